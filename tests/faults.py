"""Models and losses with a wrong second derivative, none of which says so; and what a person would
call to blame.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop

from blockspec import Objective, losses

WIDTH, CLASSES, DTYPE = 6, 4, torch.float64


@dataclass(frozen=True)
class Fault:
    """make: the objective. blamed: a pattern that the message has to match."""

    make: Callable[[], Objective]
    blamed: str
    curvatures: tuple[str, ...] = ("hessian",)

    def objective(self) -> Objective:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors are to leave torch
            torch.manual_seed(3)
            return self.make()


def made(build: Callable[[], nn.Module], dtype: torch.dtype = DTYPE) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().to(dtype)


def batch_of(rows: int = 8, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(rows) % CLASSES


def network(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), *middle, nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
    )  # fmt: skip


def objective(*middle: nn.Module, loss: Any = losses.classification) -> Objective:
    return Objective(made(lambda: network(*middle)), [batch_of()], loss)


class FusedEntropy(torch.autograd.Function):
    """As kernels do that save memory: the gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx, logits, labels):
        probabilities = logits.softmax(-1)
        ctx.save_for_backward(probabilities - F.one_hot(labels, logits.shape[-1]))
        return -probabilities.gather(-1, labels[:, None]).squeeze(-1).log()

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, None] * ctx.saved_tensors[0], None


def fused(function: Callable[[Tensor, Tensor], Tensor]) -> losses.Loss:
    return losses.Loss(
        lambda model, batch: model(batch[0]), lambda out, batch: function(out, batch[1])
    )


def torch_fused(model, batch):
    hidden = model[:-1](batch[0])
    total = F.linear_cross_entropy(
        hidden, model[-1].weight, batch[1], linear_bias=model[-1].bias, reduction="sum",
        options=nn.LinearCrossEntropyOptions(),
    )  # fmt: skip
    return total, len(batch[1])


def compiled(model, batch):
    """As torch.compile does, but out of the reach of its stances."""
    entropy = aot_function(
        lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum"), nop
    )
    return entropy(model(batch[0]), batch[1]), len(batch[1])


class KeptDeviation(torch.autograd.Function):
    """A norm whose backward pass takes the reciprocal deviation for a constant."""

    @staticmethod
    def forward(ctx, x):
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        mean = (gradient * x).mean(-1, keepdim=True)
        return gradient * scale - x * mean * scale**3


class KeptSlope(torch.autograd.Function):
    """An activation that keeps f' of its forward pass."""

    @staticmethod
    def forward(ctx, x):
        gate = x.sigmoid()
        ctx.save_for_backward(gate * (1 + x * (1 - gate)))
        return x * gate

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OwnWeightNorm(nn.Module):
    """Calls PyTorch's fused function, which is wrong for the first and the last dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.v = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.g = nn.Parameter(torch.norm_except_dim(self.v, 2, dim).detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.v, self.g, self.dim))


def scaled_by_parameter_hook() -> Objective:
    it = objective()
    for p in it.model.parameters():
        p.register_hook(lambda g: 2 * g)
    return it


def scaled_by_module_hook() -> Objective:
    it = objective()
    it.model[2].register_full_backward_hook(lambda m, given, _: tuple(3 * g for g in given))
    return it


class Untracked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Int8(nn.Module):
    """A quantised linear layer as a library's kernel is: numbers in 8 bits, and no backward
    pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (WIDTH, WIDTH), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.detach(), self.weight.to(x.dtype) / 127)


class QuantizedLinear(Int8):
    pass


def dynamically_quantised() -> Objective:
    model = made(
        lambda: network(Residual(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)))),
        torch.float32,
    )
    model[2].inner[1] = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(model[2].inner[1]), {nn.Linear}
    )[0]
    return Objective(model, [batch_of(dtype=torch.float32)], losses.classification)


def quantised_around() -> Objective:
    """All that lies before the last quantised layer gets no gradient, and what it rounds away does
    not move the loss.
    """
    model = made(lambda: network(nn.LayerNorm(WIDTH)), torch.float32)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    return Objective(model, [batch_of(dtype=torch.float32)], losses.classification)


def no_grad_body() -> Objective:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network(), nn.Linear(CLASSES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    return Objective(made(Frozen), [batch_of()], losses.classification)


FAULTS: dict[str, Fault] = {
    "fused loss": Fault(
        lambda: objective(loss=fused(FusedEntropy.apply)), r"the loss's terms.*fused loss",
        ("hessian", "ggn"),
    ),
    "compiled cross "
    "entropy": Fault(lambda: objective(loss=compiled), r"the loss function.*compiled"),
    "kept deviation": Fault(lambda: objective(Applied(KeptDeviation.apply)), r"2 \(Applied\).*KeptDeviation"),
    "kept slope": Fault(lambda: objective(Applied(KeptSlope.apply)), r"2 \(Applied\).*KeptSlope"),
    "kept slope, ggn": Fault(lambda: objective(Applied(KeptSlope.apply)), r"2 \(Applied\).*KeptSlope", ("residual",)),
    "weight norm, first": Fault(lambda: objective(OwnWeightNorm(0)), r"2 \(OwnWeightNorm\).*weight "
                                                                     r"norm"),
    "weight norm, last": Fault(lambda: objective(OwnWeightNorm(1)), r"2 \(OwnWeightNorm\).*weight "
                                                                    r"norm"),
    "hook of parameters": Fault(scaled_by_parameter_hook, r"a hook on gradients.*0\.weight"),
    "hook of a module": Fault(scaled_by_module_hook, r"a hook on gradients.*\(2"),
    "no_grad in a layer": Fault(lambda: objective(Residual(Untracked(WIDTH, WIDTH))), r"no gradient"),
    "no_grad around the body": Fault(no_grad_body, r"body.*gradients switched off"),
    "before a quantised layer": Fault(
        lambda: objective(Residual(nn.Sequential(nn.LayerNorm(WIDTH), QuantizedLinear()))),
        r"2\.inner\.0.*QuantizedLinear.*quantised",
    ),
    "between quantised layers": Fault(quantised_around, r"'2\.weight'.*; 3 \(Linear\).*quantised"),
    "before a dynamically quantised layer": Fault(dynamically_quantised, r"2\.inner\.0.*quantised"),
}  # fmt: skip
if hasattr(nn, "LinearCrossEntropyOptions"):
    FAULTS["torch's fused loss"] = Fault(
        lambda: objective(loss=torch_fused), r"the loss function.*fused loss"
    )
