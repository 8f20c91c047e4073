"""Residual networks (He et al. 2015, arXiv 1512.03385) whose batch norm and shortcuts can be
switched off.

PyHessian's study (arXiv 1912.07145) compares those. Names of modules and parameters are
torchvision's, so that its state dicts of ResNet18 fit.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

# One switch for the whole network, or one for each stage.
Switch = bool | Sequence[bool]
STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}  # size and stride of the first convolution


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and, where ``residual``, a shortcut around them."""

    def __init__(
        self, inputs: int, width: int, *, stride: int, batch_norm: bool, residual: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = _norm(width, batch_norm)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = _norm(width, batch_norm)
        self.downsample = _shortcut(inputs, width, stride, batch_norm) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))  # (B, D, H / stride, W / stride)
        y = self.bn2(self.conv2(y))
        return F.relu(y if self.downsample is None else y + self.downsample(x))


class ResNet(nn.Module):
    """A stem, stages of ``BasicBlock``s that halve the image and double the width, and a linear
    head.

    Args:
        blocks: Number of blocks in each stage.
        classes: Number of classes.
        channels: Channels of the images.
        width: Channels of the first stage.
        batch_norm: Whether layers are followed by batch norm. The stem keeps its own unless no
            stage has any, so that switching off one stage changes that stage alone.
        residual: Whether blocks have shortcuts.
        stem: "cifar" (3x3) or "imagenet" (7x7 with stride 2 and max-pooling: an eighth of the
            pixels go on).
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 3, 3),
        *,
        classes: int = 10,
        channels: int = 3,
        width: int = 16,
        batch_norm: Switch = True,
        residual: Switch = True,
        stem: str = "cifar",
    ) -> None:
        super().__init__()
        norms, shortcuts = _switches(batch_norm, len(blocks)), _switches(residual, len(blocks))
        if stem not in STEMS:
            raise ValueError(f"no stem {stem!r}: there are {', '.join(STEMS)}")
        kernel, stride = STEMS[stem]
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = _norm(width, any(norms))
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        widths = [width, *(width * 2**i for i in range(len(blocks)))]
        for i, name in enumerate(self.stages):
            switches = {"batch_norm": norms[i], "residual": shortcuts[i]}
            first = BasicBlock(widths[i], widths[i + 1], stride=2 if i else 1, **switches)
            rest = [
                BasicBlock(widths[i + 1], widths[i + 1], stride=1, **switches)
                for _ in range(blocks[i] - 1)
            ]
            self.add_module(name, nn.Sequential(first, *rest))
        self.fc = nn.Linear(widths[-1], classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # (B, D, H, W)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))  # (B, C)


def cifar_resnet(
    *,
    depth: int = 20,
    classes: int = 10,
    channels: int = 3,
    width: int = 16,
    batch_norm: Switch = True,
    residual: Switch = True,
) -> ResNet:
    """ResNet20, 32, 38, 56, … for small images: three stages of (depth - 2) / 6 blocks each.

    Args:
        depth: Number of layers with weights: 6 n + 2.
        classes: Number of classes.
        channels: Channels of the images.
        width: Channels of the first stage; 16 in the paper.
        batch_norm: One switch, or one for each of the three stages.
        residual: One switch, or one for each of the three stages.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"depth {depth} does not fit: it must be 6 n + 2 with n >= 1, such as 8, 20, 32, 38, 56"
        )
    blocks = [(depth - 2) // 6] * 3
    return ResNet(
        blocks,
        classes=classes,
        channels=channels,
        width=width,
        batch_norm=batch_norm,
        residual=residual,
    )


def resnet18(*, classes: int = 1000, batch_norm: Switch = True, residual: Switch = True) -> ResNet:
    """ResNet18 for ImageNet: 11,689,512 parameters, four stages."""
    return ResNet(
        [2] * 4,
        classes=classes,
        width=64,
        batch_norm=batch_norm,
        residual=residual,
        stem="imagenet",
    )


def _norm(width: int, on: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if on else nn.Identity()


def _shortcut(inputs: int, width: int, stride: int, batch_norm: bool) -> nn.Module:
    if inputs == width and stride == 1:
        return nn.Identity()
    convolution = nn.Conv2d(inputs, width, 1, stride, bias=False)
    return (
        nn.Sequential(convolution, nn.BatchNorm2d(width))
        if batch_norm
        else nn.Sequential(convolution)
    )


def _switches(value: Switch, stages: int) -> list[bool]:
    if isinstance(value, bool):
        return [value] * stages
    if len(value) != stages:
        raise ValueError(
            f"{len(value)} switches {list(value)} for {stages} stages: give one switch, or one for "
            "each stage"
        )
    return list(value)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
