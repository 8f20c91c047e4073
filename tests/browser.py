"""A headless Chromium, driven over a pipe by the DevTools protocol: real clicks, keys, pictures."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

import pytest

BINARY = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
FLAGS += ("--remote-debugging-pipe", "--no-first-run", "--disable-extensions", "--mute-audio")
FLAGS += ("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND")
PATIENCE = 60  # seconds, on a machine that does much else

needs_chromium = pytest.mark.skipif(
    BINARY is None, reason="no Chromium here; run_tests.sh installs it as root on Debian"
)


class Page:
    """One page of a browser; ``errors`` holds what its console complained of, and its requests."""

    def __init__(self, write, read):
        self._write, self._read, self._buffer = write, read, b""
        self._numbers, self.errors, self.requests = itertools.count(1), [], []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self._call(f"{domain}.enable")

    _session = None

    def _call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _message(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            assert ready, "Chromium does not answer"
            self._buffer += os.read(self._read, 1 << 20)
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, given):
        if method == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.errors.append(str([part.get("value") for part in given["args"]]))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.errors.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])

    def size(self, width, height, *, phone=False):
        """Of the window in points of CSS."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)

    def scheme(self, name):
        """``dark`` or ``light``, as the system prefers it."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self._call("Emulation.setEmulatedMedia", features=features)

    def open(self, path):
        """Opens a file and waits until the page says that it is ready; seconds that it took."""
        started = time.perf_counter()
        self._call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.documentElement?.dataset.ready === 'true'")
        return time.perf_counter() - started

    def run(self, expression):
        """Value of a JavaScript expression."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression):
        """Waits for an expression to be true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never: {expression}; {self.errors}"
            time.sleep(0.02)

    def click(self, selector, *, at=(0.5, 0.5)):
        """A click of the mouse on an element, at a share of its width and height."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = f"{element}.getBoundingClientRect()"
        left, top, width, height = self.run(f"(b => [b.left, b.top, b.width, b.height])({box})")
        place = {"x": left + at[0] * width, "y": top + at[1] * height}
        self._call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
            time.sleep(0.03)

    def press(self, key):
        """A key, where the focus is."""
        codes = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
        given = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 40)}
        given |= {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **given)

    def picture(self, path, *, whole=True):
        """A screenshot as png."""
        taken = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextlib.contextmanager
def chromium():
    """A browser with one page; it ends with the block."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # the browser reads from its descriptor 3 and writes to 4
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        arguments = [BINARY, *FLAGS, f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            ["bash", "-c", shell, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(ours_out, ours_in)
        finally:
            browser.terminate()
            browser.wait(timeout=PATIENCE)
            os.close(ours_out)
            os.close(ours_in)
