"""How figures look: colours and markers of kinds, short block names, scales that show bulk and
outliers, saving.
"""

from __future__ import annotations

import functools
import inspect
import io
import math
import os
import re
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from torch import nn

from blockspec.figures.page import page, points
from blockspec.model.architectures import ADAPTERS, layer_prefix, role
from blockspec.model.pieces import Block
from blockspec.model.places import ATTENDING, CROSS, SIDE, Places

RC: Any = {
    # of figures 7 to 9 inches wide, so that they are legible across a paper's two columns
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "figure.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 4.0,
    "errorbar.capsize": 1.5,
    "axes.unicode_minus": True,
}
DPI = 200
LETTER = 0.52  # mean width of a character over the size of its font
LN10 = math.log(10)


@dataclass(frozen=True)
class Look:
    """How a kind of block is drawn everywhere."""

    label: str
    short: str
    colour: str
    marker: str


# Paul Tol's muted scheme, safe for colour blindness, its pale ones darkened. Kinds of like
# lightness differ in markers.
KINDS: dict[str, Look] = {
    "full": Look("full", "full", "#000000", "+"),
    "layer": Look("layer", "layer", "#4477AA", "H"),
    "query": Look("query", "query", "#332288", "o"),
    "key": Look("key", "key", "#3A9BD0", "s"),
    "value": Look("value", "value", "#117777", "^"),
    "qkv": Look("query, key, value", "qkv", "#332288", "D"),
    "attention_output": Look("attention out", "attn_out", "#44AA99", "v"),
    "attention_gate": Look("attention gate", "attn_gate", "#6699CC", "H"),
    "mlp_in": Look("MLP in", "mlp_in", "#CC6677", "P"),
    "mlp_gate": Look("MLP gate", "mlp_gate", "#E08E45", "p"),
    "mlp_out": Look("MLP out", "mlp_out", "#882255", "X"),
    "mixer": Look("state-space mixer", "mixer", "#994455", "8"),
    "router": Look("router", "router", "#997700", "1"),
    "adapter": Look("adapter", "adapter", "#EE6677", "2"),
    "conv": Look("convolution", "conv", "#332288", "h"),
    "norm": Look("norm", "norm", "#AA4499", "d"),
    "bias": Look("bias", "bias", "#777777", "x"),
    "embedding": Look("embedding", "embedding", "#117733", "*"),
    "position": Look("position", "position", "#999933", "<"),
    "head": Look("head", "head", "#661100", ">"),
    "other": Look("other", "other", "#444444", "."),
}
"""In the order in which kinds stand in figures; kinds of a user's own come after them, see
``looks_of``.
"""

OWN = ("#0077BB", "#EE7733", "#009988", "#CC3311", "#BBBBBB")
OWN_MARKERS = "34|_,"
"""Colours and markers of kinds that are not in KINDS."""

MATRIX_KINDS = (
    "query",
    "key",
    "value",
    "qkv",
    "attention_output",
    "attention_gate",
    "mlp_in",
    "mlp_gate",
    "mlp_out",
    "router",
)
"""What short names call a layer's matrices by."""

RUNS = (
    "#004488",
    "#BB5566",
    "#DDAA33",
    "#228833",
    "#66CCEE",
    "#AA3377",
)  # Tol's high contrast, then bright
RUN_MARKERS = "osD^vP"
MATRICES = {
    "hessian": "Hessian",
    "ggn": "generalised Gauss-Newton matrix",
    "fisher": "empirical Fisher matrix",
    "residual": "Hessian less Gauss-Newton",
}


def look(kind: str) -> Look:
    """The look of a block of that kind."""
    return looks_of([kind])[kind]


def looks_of(kinds: Iterable[str]) -> dict[str, Look]:
    """Kind or role -> look for those given, each once, in the order in which they stand in figures:
    roles after their kind.

    What is not in KINDS has a look that depends on its name alone, so that it is the same in every
    figure.
    """
    places = list(KINDS)

    def order(kind: str) -> tuple[int, bool, str]:
        base = _kind_of(kind)
        return (places.index(base) if base else len(places), kind != base, kind)

    return {kind: KINDS.get(kind) or _own_look(kind) for kind in sorted(set(kinds), key=order)}


def _kind_of(role: str) -> str | None:
    """The longest kind of KINDS that a role ends in: ``query`` of ``decoder_cross_query``."""
    ends = [kind for kind in KINDS if role == kind or role.endswith(f"_{kind}")]
    return max(ends, key=len, default=None)


def column_of(block: Block) -> str:
    """What a block is among those of its layer: its role, less the side that the layer is on."""
    return block.role.removeprefix("encoder_").removeprefix("decoder_")


def _own_look(kind: str) -> Look:
    number = zlib.crc32(kind.encode())
    base = _kind_of(kind)
    label = kind if base is None else kind.removesuffix(base) + KINDS[base].label
    label = label.replace("_", " ")
    return Look(label, kind, OWN[number % len(OWN)], OWN_MARKERS[number // 7 % len(OWN_MARKERS)])


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws under ``RC``, and leaves matplotlib's settings as they were; a notebook shows what is
    drawn, whether or not pyplot was ever imported.

    The function also takes ``ax=``: the figure, all its panels, then takes the place of that axes
    in a figure of one's own, which is returned.
    """

    @functools.wraps(draw)
    def drawn(*args: object, ax: Axes | None = None, **kwargs: object) -> Figure:
        token = _place.set(None if ax is None else _instead_of(ax))
        try:
            with matplotlib.rc_context(_rc()):
                figure = _wrapped_title(draw(*args, **kwargs))
        finally:
            _place.reset(token)
        whole: Figure = figure if ax is None else figure.get_figure(root=True)  # type: ignore[assignment]
        whole._repr_png_ = functools.partial(_png, whole)  # type: ignore[attr-defined]
        return whole

    given = inspect.signature(draw)
    place = inspect.Parameter("ax", inspect.Parameter.KEYWORD_ONLY, default=None)
    drawn.__signature__ = given.replace(parameters=[*given.parameters.values(), place])  # type: ignore[attr-defined]
    return drawn


_place: ContextVar[SubFigure | None] = ContextVar("place", default=None)


def _instead_of(ax: Axes) -> SubFigure:
    """A part of the figure in place of the axes, which is removed."""
    spec, figure = ax.get_subplotspec(), ax.get_figure(root=True)
    if spec is None:
        raise ValueError("ax= takes an axes of plt.subplots(), which has a place in a grid")
    assert figure is not None
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")  # legends and colour bars find room
    part = ax.figure.add_subfigure(spec)
    ax.remove()
    return part


def canvas(*, figsize: tuple[float, float], layout: Any) -> Figure:
    """What a figure function draws on: a figure of its own, or the place of the ``ax`` it got."""
    part: Any = _place.get()
    return Figure(figsize=figsize, layout=layout) if part is None else part


def _png(figure: Figure) -> bytes:
    written = io.BytesIO()
    with matplotlib.rc_context(_rc()):
        figure.savefig(written, format="png", dpi=DPI)
    return written.getvalue()


def _rc() -> Any:
    sizes = {name: points(size) for name, size in RC.items() if name.endswith("size") and size >= 7}
    return RC | sizes


def _wrapped_title(figure: Figure) -> Figure:
    """No line of the title is wider than the figure."""
    title = figure.get_suptitle()
    if title and "$" not in title:
        width = 72 * figure.bbox.width / figure.dpi
        room = int(width / (LETTER * points(RC["figure.titlesize"])))
        figure.suptitle("\n".join(textwrap.fill(line, room) for line in title.split("\n")))
    return figure


def with_note(figure: Figure, note: str) -> Figure:
    """The figure, whose title begins with what the figure is of."""
    if not note:
        return figure
    with matplotlib.rc_context(_rc()):
        figure.suptitle("\n".join(filter(None, [note, figure.get_suptitle()])))
        return _wrapped_title(figure)


def save(figure: Figure, folder: str | os.PathLike[str], name: str) -> Path:
    """Writes ``name.png`` and ``name.pdf`` into ``folder``, each whole or not at all; returns the
    path of the png.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for form in ("pdf", "png"):
        partial = folder / f".{name}.{form}.{os.getpid()}.partial"
        try:
            with matplotlib.rc_context(
                _rc() | {"pdf.fonttype": 42}
            ):  # TrueType: journals refuse Type 3
                figure.savefig(partial, format=form, dpi=DPI)
            partial.replace(folder / f"{name}.{form}")
        finally:
            partial.unlink(missing_ok=True)
    return folder / f"{name}.png"


def short_name(name: str) -> str:
    """A block's name for an axis: ``transformer.h.0.attn.c_attn.weight/query`` is ``h0.query``.

    A matrix within a layer is called by its kind where its architecture is known, with ``cross_``
    before it in cross-attention; anything else by its module.
    """
    path, *parts = name.split("/")
    found = role(path, nn.Identity())
    kind, adapter = found.matrix, ADAPTERS.search(path)
    if parts and kind == "qkv":
        middle = [_crossed(path, parts.pop(0))]
    elif layer_prefix(path) and kind in MATRIX_KINDS:
        middle = [_crossed(path, kind), *([adapter[1]] if adapter else [])]
    else:
        below = _below_layer(path)
        middle = below[-2:] if below and below[-1].isdigit() else below[-1:]
    return _joined(path, middle, parts)


def _crossed(path: str, kind: str) -> str:
    short = KINDS[kind].short
    return f"cross_{short}" if kind in ATTENDING and CROSS.search(path) else short


def _longer_name(name: str) -> str:
    """With the whole path below the layer: ``blocks0.mlp_tokens.fc1``."""
    path, *parts = name.split("/")
    return _joined(path, _below_layer(path), parts)


def _joined(path: str, middle: Sequence[str], parts: Sequence[str]) -> str:
    suffix = ["bias"] if path.endswith((".bias", "in_proj_bias")) else []
    name = (
        ".".join([*_layer(path), *middle, *suffix, *(part.replace("_", "") for part in parts)])
        or path
    )
    return re.sub(r"(?<=[A-Za-z_])\.(?=\d+(\.|$))", "", name)  # h.0 is h0, but layer1.0 stays


def _below_layer(path: str) -> list[str]:
    """Modules from the layer, or from the whole model, to the parameter."""
    module = re.sub(r"(^|\.)(weight|bias)$", "", path).removeprefix(layer_prefix(path) or "")
    return [part for part in module.split(".") if part]


def _layer(path: str) -> list[str]:
    """The components of the layer's path from the first that is numbered: ``["h", "0"]``,
    ``["stages", "1", "layers", "0"]``.
    """
    components = (layer_prefix(path) or "").split(".")
    numbered = [i for i, component in enumerate(components) if component[-1:].isdigit()]
    return components[max(numbered[0] - components[numbered[0]].isdigit(), 0) :] if numbered else []


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> short name for matplotlib, which takes what is between dollars for a formula."""
    return {name: label.replace("$", r"\$") for name, label in plain_names(names).items()}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> short name; names whose short names coincide are spelled longer, so that all stay
    different. Where there are layers of an encoder and of a decoder, the side comes first.
    """
    names = list(names)
    sides = Places.of(map(layer_prefix, names)).sides

    def with_side(name: str, label: str) -> str:
        side = SIDE.search(layer_prefix(name) or "") if sides else None
        return f"{side[1]}.{label}" if side else label

    short = {name: with_side(name, short_name(name)) for name in names}
    for longer in (
        lambda name: with_side(name, _longer_name(name)),
        lambda name: name.replace(".weight", ""),
        lambda name: name,
    ):
        counts = Counter(short.values())
        short = {
            name: label if counts[label] == 1 else longer(name) for name, label in short.items()
        }
    return short


def spread(items: Sequence, count: int) -> list:
    """At most ``count`` items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))]


def eigenvalue_axis(
    axes: Axes, which: str, low: float, high: float, linear: float, *, room: float
) -> None:
    """A scale that is linear around zero and logarithmic beyond ``linear``; ticks at powers of ten
    and 0.

    Args:
        room: What a tick label takes, as a share of the axis.
    """
    axis: Axis = getattr(axes, f"{which}axis")
    if which == "x" and page().axis != "symlog":
        _other_scale(axes, low, high, linear)
        return
    getattr(axes, f"set_{which}scale")("asinh", linear_width=linear)
    getattr(axes, f"set_{which}lim")(low, high)
    gap = room * (np.arcsinh(high / linear) - np.arcsinh(low / linear))
    powers = _powers(high / linear, -low / linear, linear, gap)
    values = [*(-value for value in reversed(powers[1])), 0.0, *powers[0]]
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FixedFormatter([power_of_ten(value) for value in values]))
    axis.set_minor_formatter(NullFormatter())
    decades = 10.0 ** np.arange(math.ceil(math.log10(linear)), math.log10(max(-low, high)))
    axis.set_minor_locator(
        FixedLocator([value for value in (*-decades, *decades) if low <= value <= high])
    )


def _other_scale(axes: Axes, low: float, high: float, linear: float) -> None:
    if page().axis == "log":
        axes.set_xscale("log")
        axes.set_xlim(linear, max(high, 10 * linear))
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(MaxNLocator(3))


def _powers(high: float, low: float, linear: float, gap: float) -> list[list[float]]:
    """Powers of ten up to each of two ends (in units of ``linear``), ``gap`` apart on the scale
    from each other and from 0.

    Both sides have the same ones, counted from the largest that the shorter side has room for.
    """
    exponents = range(
        math.floor(math.log10(linear)), math.ceil(math.log10(max(high, low) * linear)) + 1
    )
    position = {e: np.arcsinh(10.0**e / linear) for e in exponents}
    furthest = [
        np.arcsinh(end) - 0.2 * gap for end in (high, low)
    ]  # a label centred beyond would stand out of the axis
    fitting = [[e for e in exponents if gap <= position[e] <= far] for far in furthest]
    anchor = min((side[-1] for side in fitting if side), default=0)
    stride = max(1, math.ceil(gap / LN10))
    return [[10.0**e for e in side if (e - anchor) % stride == 0] for side in fitting]


def power_of_ten(value: float) -> str:
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    return rf"${sign}10^{{{round(math.log10(abs(value)))}}}$"


def matrix_name(spectra: Mapping) -> str:
    """What the spectra are of, for a title."""
    return matrix_called(next(iter(spectra.values())).curvature)


def matrix_called(curvature: str) -> str:
    """What a matrix is called in a title; ``preconditioned hessian (AdamW)`` is one too."""
    inner = re.fullmatch(r"preconditioned (\w+) \((.+)\)", curvature)
    if inner:
        return f"{MATRICES.get(inner[1], 'matrix')} as {inner[2]} sees it"
    return MATRICES.get(curvature, "matrix")


def in_units_of(label: str, spectra: Mapping) -> str:
    """A label for these spectra: P^-1 H has the unit of 1 / learning rate, and not that of H."""
    if not next(iter(spectra.values())).curvature.startswith("preconditioned "):
        return label
    for plain, seen in UNITS.items():
        label = label.replace(plain, seen)
    return label


UNITS = {"parameter² / loss": "learning rate", "loss / parameter²": "1 / learning rate"}
"""Unit of the curvature -> unit of the preconditioned one."""
