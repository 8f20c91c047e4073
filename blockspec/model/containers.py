"""The layers of a model as modules: what is called one after the other and makes up its depth."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from blockspec.model.architectures import layer_prefix

CONTAINERS = (nn.ModuleList, nn.Sequential)


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every layer, none within another.

    Layers that stand where known architectures have theirs are found by their names. Of a model
    with other names, they are the members of those containers (``nn.ModuleList``,
    ``nn.Sequential``) that have two or more members of one class, each with parameters.
    """
    named = [layer_prefix(name) for name, _ in model.named_parameters()]
    paths = list(dict.fromkeys(path for path in named if path is not None))
    above = {".".join(p.split(".")[:n]) for p in paths for n in range(1, p.count(".") + 1)}
    found = {path: model.get_submodule(path) for path in paths if path not in above}
    return found or _alike(model)


def _alike(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost containers of layers."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(path.startswith(outer + ".") for outer in found) or not isinstance(
            module, CONTAINERS
        ):
            continue
        members: Mapping[str, nn.Module] = dict(module.named_children())
        holding = [m for m in members.values() if next(m.parameters(), None) is not None]
        if len(holding) > 1 and len({type(m) for m in holding}) == 1 == len(
            {type(m) for m in members.values()}
        ):
            found |= {f"{path}.{name}".lstrip("."): member for name, member in members.items()}
    return found
