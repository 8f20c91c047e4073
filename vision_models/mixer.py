"""The MLP-mixer (Tolstikhin et al. 2021, arXiv 2105.01601): a transformer without attention, under
timm's names.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Cuts images into patches and maps each to a vector."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT  # (B, T, D)


class MLP(nn.Module):
    """Two layers with a GELU between them, on the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MixerBlock(nn.Module):
    """Mixes tokens, then channels, each with a shortcut."""

    def __init__(self, tokens: int, width: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp_tokens = MLP(tokens, token_hidden)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp_channels = MLP(width, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).mT).mT  # (B, T, D)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches, blocks, and a linear head on the mean token.

    The defaults are mixer-B/16's: 59,880,472 parameters.

    Args:
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels; divides image_size.
        channels: Channels of the images.
        classes: Number of classes.
        width: Channels of a token.
        depth: Number of blocks.
        token_hidden: Hidden width of the MLP across tokens.
        channel_hidden: Hidden width of the MLP across channels.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        classes: int = 1000,
        width: int = 768,
        depth: int = 12,
        token_hidden: int = 384,
        channel_hidden: int = 3072,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        tokens = (image_size // patch_size) ** 2
        self.stem = PatchEmbedding(patch_size, channels, width)
        self.blocks = nn.Sequential(
            *(MixerBlock(tokens, width, token_hidden, channel_hidden) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.stem(x)))  # (B, T, D)
        return self.head(x.mean(1))  # (B, C)


def _initialise(module: nn.Module) -> None:
    # The head is drawn like every layer: with timm's head of zeros the Hessian of all other blocks
    # would start as zero.
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
