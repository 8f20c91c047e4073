"""The layers of a model as modules: what is called one after the other and makes up its depth."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from blockspec.model.architectures import layer_prefix

CONTAINERS = (nn.ModuleList, nn.Sequential)


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every layer, none within another.

    Layers that stand where known architectures have theirs are found by their names. Of a model
    with other names, they are the members of those containers (``nn.ModuleList``,
    ``nn.Sequential``) that have two or more members of one class, each with parameters. Of
    containers within each other the outermost one counts, unless its members are stages: containers
    of layers themselves.
    """
    named = [layer_prefix(name) for name, _ in model.named_parameters()]
    paths = list(dict.fromkeys(path for path in named if path is not None))
    above = {".".join(p.split(".")[:n]) for p in paths for n in range(1, p.count(".") + 1)}
    found = {path: model.get_submodule(path) for path in paths if path not in above}
    members = found or _alike(model)
    return {p: m for path, member in members.items() for p, m in _called(path, member)}


def _alike(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost containers of layers."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        within = any(f"{path}.".startswith(f"{outer}.") for outer in found)
        if not within and _holds_layers(module):
            found |= {
                f"{path}.{name}".lstrip("."): member for name, member in module.named_children()
            }
    return found


def _holds_layers(module: nn.Module) -> bool:
    if not isinstance(module, CONTAINERS):
        return False
    members = list(module.children())
    holding = [m for m in members if next(m.parameters(), None) is not None]
    return len(holding) > 1 and len({type(m) for m in members}) == 1


def _called(path: str, member: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A member of a container, if the model calls it as one layer; else what is called within it:
    the layers of a stage, and the members of a list, which nobody can call.
    """
    if _is_list(member) or _is_stage(member):
        for name, child in member.named_children():
            yield from _called(f"{path}.{name}", child)
    else:
        yield path, member


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and (
        type(module).forward in (nn.ModuleList.forward, nn.ModuleDict.forward)
    )


def _is_stage(module: nn.Module) -> bool:
    """Whether a container's members are layers, and not the single operations of one."""
    return _holds_layers(module) and all(
        next(member.children(), None) is not None for member in module.children()
    )
