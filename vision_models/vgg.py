"""VGG networks (Simonyan and Zisserman 2014, arXiv 1409.1556), with or without batch norm;
torchvision's names.
"""

from collections.abc import Sequence

from torch import Tensor, nn

# Channels of the convolutions of each stage; a stage ends in 2x2 max-pooling. Configurations A and
# D of the paper.
VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of 3x3 convolutions, then a perceptron on the pooled image.

    Args:
        stages: Channels of the convolutions, stage by stage.
        classes: Number of classes.
        channels: Channels of the images.
        batch_norm: Whether each convolution is followed by batch norm.
        hidden: Widths of the hidden layers of the classifier; 4096, 4096 in the paper, none in the
            usual CIFAR variant.
        pool: Side in pixels of the image that the classifier sees.
        dropout: Probability of dropout after each hidden layer of the classifier, in train mode.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]] = VGG16,
        *,
        classes: int = 1000,
        channels: int = 3,
        batch_norm: bool = False,
        hidden: Sequence[int] = (4096, 4096),
        pool: int = 7,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(*_features(stages, channels, batch_norm))
        self.avgpool = nn.AdaptiveAvgPool2d(pool)
        self.classifier = nn.Sequential(
            *_classifier(stages[-1][-1] * pool**2, hidden, classes, dropout)
        )
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))  # (B, D, pool, pool)
        return self.classifier(x.flatten(1))  # (B, C)


def vgg11(*, classes: int = 1000, batch_norm: bool = False, dropout: float = 0.5) -> VGG:
    """VGG11 for ImageNet: 132,863,336 parameters without batch norm."""
    return VGG(VGG11, classes=classes, batch_norm=batch_norm, dropout=dropout)


def vgg16(*, classes: int = 1000, batch_norm: bool = False, dropout: float = 0.5) -> VGG:
    """VGG16 for ImageNet: 138,357,544 parameters without batch norm."""
    return VGG(VGG16, classes=classes, batch_norm=batch_norm, dropout=dropout)


def _features(stages: Sequence[Sequence[int]], channels: int, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for stage in stages:
        for width in stage:
            norm = [nn.BatchNorm2d(width)] if batch_norm else []
            layers += [nn.Conv2d(channels, width, 3, padding=1), *norm, nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers


def _classifier(
    inputs: int, hidden: Sequence[int], classes: int, dropout: float
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return [*layers, nn.Linear(inputs, classes)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)  # torchvision's
        nn.init.zeros_(module.bias)
