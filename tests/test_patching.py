"""Attributes of other people's objects, changed for a while."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from blockspec.model import checkpointing
from blockspec.model.patching import patched
from blockspec.products.precision import reduced_multiplication


class Config:
    """A setter that writes to a part, as Hugging Face's configs have."""

    def __init__(self, kind, part=None):
        self._kind, self.part = kind, part

    @property
    def kind(self):
        return self._kind

    @kind.setter
    def kind(self, value):
        self._kind = value
        if self.part is not None:
            self.part.kind = value


def test_a_method_hides_and_comes_back():
    module = nn.ReLU()
    with patched([(module, "forward", lambda x: x - 1)]):
        assert module(torch.zeros(1)) == -1
    assert "forward" not in vars(module)
    module.forward = own = lambda x: x + 5
    with patched([(module, "forward", lambda x: x - 1)]):
        assert module(torch.zeros(1)) == -1
    assert module.forward is own


def test_buffers_and_flags_of_a_module():
    norm = nn.BatchNorm1d(2)
    mean = norm.running_mean
    with patched([(norm, "running_mean", None), (norm, "training", False)]):
        assert norm.running_mean is None
        assert not norm.training
    assert norm.running_mean is mean
    assert norm.training
    assert list(norm.state_dict()) == list(nn.BatchNorm1d(2).state_dict())


def test_a_part_keeps_its_own_setting():
    part = Config("inner")
    whole = Config("outer", part)
    with patched([(whole, "kind", "other"), (part, "kind", "other")]):
        assert (whole.kind, part.kind) == ("other", "other")
    assert (whole.kind, part.kind) == ("outer", "inner")


def test_everything_comes_back_when_something_raises():
    module, config = nn.ReLU(), Config("own")
    with (
        pytest.raises(ZeroDivisionError),
        patched([(module, "forward", abs), (config, "kind", "other")]),
    ):
        _ = 1 / 0
    assert "forward" not in vars(module)
    assert config.kind == "own"
    with (
        pytest.raises(AttributeError),
        patched([(module, "training", False), (config, "absent", 1)]),
    ):
        pass
    assert module.training


def flags_of_the_process():
    names = checkpointing.DIRECT
    functions = [getattr(torch.utils.checkpoint, name, None) for name in names]
    return [*functions, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


@pytest.mark.parametrize(
    "change",
    [
        checkpointing.without_checkpoints,
        lambda: reduced_multiplication("tf32", torch.device("cpu")),
    ],
    ids=["checkpoints", "tf32"],
)
@pytest.mark.parametrize("fails", [False, True])
def test_what_threads_share_is_restored_by_the_last_that_leaves(change, fails):
    """As two threads do it: the first to come is the first to leave."""
    before = flags_of_the_process()
    first, second = ExitStack(), ExitStack()
    first.enter_context(change())
    changed = flags_of_the_process()
    second.enter_context(change())
    assert changed != before
    first.__exit__(*((KeyError, KeyError(), None) if fails else (None, None, None)))
    assert flags_of_the_process() == changed
    second.close()
    assert flags_of_the_process() == before
