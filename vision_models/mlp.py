"""A perceptron whose layers can be scaled: heterogeneity by construction."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScaledMLP(nn.Module):
    """Linear layers with ReLUs between: layer l is scale_l (W_l x + b_l), its parameters drawn 1 /
    scale_l as large.

    The function at initialisation is thus the same for all scales, and the Hessian's block (l, m)
    is scale_l scale_m times that of the unscaled network. (Scales alone would not do: a ReLU
    network sees only their product, and all blocks would be scaled alike.) Zhang et al. (arXiv
    2402.16788, figure 5) vary heterogeneity with such a network.

    Args:
        sizes: Widths from the flattened image to the classes. (64, 8, 2) without bias: the 528
            parameters of figure 2.
        scales: One factor for each layer; all 1 by default.
        bias: Whether layers have biases.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 64, 64, 64, 10),
        *,
        scales: Sequence[float] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        layers = len(sizes) - 1
        self.scales = [1.0] * layers if scales is None else list(scales)
        if len(self.scales) != layers:
            raise ValueError(
                f"{len(self.scales)} scales {self.scales} for {layers} layers: give one for each "
                "layer"
            )
        if 0 in self.scales:
            raise ValueError(f"scales {self.scales} contain 0: every factor must differ from 0")
        self.layers = nn.ModuleList(nn.Linear(m, n, bias=bias) for m, n in pairwise(sizes))
        with torch.no_grad():
            for layer, scale in zip(self.layers, self.scales, strict=True):
                for parameter in layer.parameters():
                    parameter.div_(scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)  # (B, D)
        for l, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            x = scale * layer(F.relu(x) if l else x)
        return x  # (B, C)
