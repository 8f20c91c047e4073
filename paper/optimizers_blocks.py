"""Does the optimizer make the blocks alike? Heterogeneity of the Hessian, and of the Hessian as
each optimizer sees it, in that optimizer's own run.

Three small models (GPT-2 on the embedded text, ViT and ResNet on the digits) are trained by SGD,
Adam, AdaHessian, Muon (with AdamW for what is no hidden matrix) and Shampoo, each with the best of
a few learning rates, from several seeds. Along training, the spectra of every weight matrix are
measured twice: of H, and of P^(-1/2) H P^(-1/2) with the optimizer's own P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures.style import RUNS, styled
from blockspec.optim import AdaHessian
from language_models.embedded import VOCABULARY, token_ids, tokenizer
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.shampoo import Shampoo, shampoo_seen
from vision_models.digits import digits
from vision_models.hf import vit
from vision_models.resnet import cifar_resnet

TOKENS, SEQUENCES, IMAGES = 32, 16, 64  # of a batch
MATRICES = ("hessian", "preconditioned")
TRANSFORMERS = ("gpt2", "vit")
Batch = Any
Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True)
class Settings:
    """What is trained and measured.

    Args:
        models: gpt2, vit and resnet.
        optimizers: sgd, adam, adahessian, muon and shampoo.
        steps: Of each training.
        stages: Shares of the training after which spectra are measured.
        rates: How many of each optimizer's learning rates are tried, with the first seed.
        seeds: Trainings of each optimizer, which differ in initialisation and order of the data.
        probes: Of each spectrum.
        lanczos: Steps of each probe.
    """

    models: tuple[str, ...] = ("gpt2", "vit", "resnet")
    optimizers: tuple[str, ...] = ("sgd", "adam", "adahessian", "muon", "shampoo")
    steps: int = 150
    stages: tuple[float, ...] = (0.2, 1.0)
    rates: int = 3
    seeds: int = 3
    probes: int = 2
    lanczos: int = 12


@dataclass(frozen=True)
class Subject:
    """A model to train.

    Args:
        make: The model.
        batches: An endless row of training batches, given a seed.
        held_out: Batches that are not trained on; spectra are of the first.
        loss: As :class:`blockspec.Objective` takes it.
    """

    make: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    held_out: Sequence[Batch]
    loss: Any


def _gpt2() -> Subject:
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=TOKENS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    train, held = (torch.tensor(token_ids(split, tokenizer())) for split in ("train", "val"))

    def drawn(tokens: torch.Tensor, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(tokens) - TOKENS, (SEQUENCES,), generator=generator)
        return {"input_ids": torch.stack([tokens[s : s + TOKENS] for s in starts])}

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield drawn(train, generator)

    generator = torch.Generator().manual_seed(1)
    held_out = [drawn(held, generator) for _ in range(4)]
    return Subject(lambda: GPT2LMHeadModel(config), batches, held_out, blockspec.losses.next_token)


def _images(make: Callable[[], nn.Module]) -> Subject:
    parts = {}
    for split in ("train", "test"):
        data = digits(split)
        images = torch.tensor(data.arrays).permute(0, 3, 1, 2) / 8.0 - 1.0
        parts[split] = images, torch.tensor(data.labels)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        images, labels = parts["train"]
        while True:
            chosen = torch.randint(len(images), (IMAGES,), generator=generator)
            yield images[chosen], labels[chosen]

    images, labels = parts["test"]
    held_out = list(zip(images[:256].split(IMAGES), labels[:256].split(IMAGES), strict=True))
    return Subject(make, batches, held_out, blockspec.losses.classification)


def _vit() -> nn.Module:
    return vit(
        classes=10, image_size=8, patch_size=2, num_channels=1, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.15,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def _resnet() -> nn.Module:
    """Without batch norms, whose statistics would be another loss at each step."""
    return cifar_resnet(depth=8, channels=1, width=8, batch_norm=False)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "gpt2": _gpt2,
    "vit": lambda: _images(_vit),
    "resnet": lambda: _images(_resnet),
}


def _muon(model: nn.Module, lr: float) -> Optimizers:
    """Hidden matrices by Muon, as its authors advise; the rest by AdamW."""
    hidden = {b.parameters[0] for b in blockspec.partition(model, "tensor") if _is_hidden(b)}
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if name in hidden and p.ndim == 2]
    rest = [p for name, p in named.items() if not (name in hidden and p.ndim == 2)]
    return [torch.optim.Muon(matrices, lr), torch.optim.AdamW(rest, lr / 5)]


def _is_hidden(block: blockspec.Block) -> bool:
    return block.kind not in ("embedding", "position", "head", "norm", "bias")


MAKERS: Mapping[str, Callable[[nn.Module, float], Optimizers]] = {
    "sgd": lambda m, lr: [torch.optim.SGD(m.parameters(), lr, momentum=0.9)],
    "adam": lambda m, lr: [torch.optim.Adam(m.parameters(), lr, betas=(0.9, 0.95))],
    "adahessian": lambda m, lr: [AdaHessian(m.parameters(), lr, betas=(0.9, 0.95))],
    "muon": _muon,
    "shampoo": lambda m, lr: [Shampoo(m.parameters(), lr)],
}
RATES: Mapping[str, tuple[float, ...]] = {
    "sgd": (0.1, 0.03, 0.3),
    "adam": (3e-3, 1e-3, 1e-2),
    "adahessian": (0.1, 0.03, 0.3),
    "muon": (0.02, 0.05, 0.01),
    "shampoo": (0.1, 0.03, 0.3),
}
"""The first is tried first; the best by the mean of the last training losses is kept."""


def preconditioner(optimizers: Optimizers, model: nn.Module) -> blockspec.Preconditioner:
    """P of the optimizer as it is now."""
    if isinstance(optimizers[0], Shampoo):
        return shampoo_seen(optimizers[0], model)
    return blockspec.Preconditioner.from_optimizer(optimizers, model)


@dataclass
class Training:
    """One model on its way, with its optimizers and losses."""

    subject: Subject
    model: nn.Module
    optimizers: Optimizers
    losses: list[float]

    def run(self, batches: Iterator[Batch], steps: int) -> None:
        for _ in range(steps):
            total, count = self.subject.loss(self.model, next(batches))
            self.losses.append(float(total.detach()) / count)
            for one in self.optimizers:
                one.zero_grad()
            if isinstance(self.optimizers[0], AdaHessian):
                self.optimizers[0].backward(total / count)
            else:
                (total / count).backward()
            for one in self.optimizers:
                one.step()

    @property
    def score(self) -> float:
        """Mean of the last training losses; infinite for a training that diverged."""
        last = float(np.mean(self.losses[-20:]))
        return last if np.isfinite(last) else float("inf")


def training_of(subject: Subject, optimizer: str, lr: float, seed: int) -> Training:
    torch.manual_seed(seed)
    model = subject.make()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # AdaHessian differentiates it twice
    return Training(subject, model, MAKERS[optimizer](model, lr), [])


def best_rate(subject: Subject, optimizer: str, settings: Settings, seed: int) -> float:
    scores = {}
    for lr in RATES[optimizer][: settings.rates]:
        training = training_of(subject, optimizer, lr, seed)
        training.run(subject.batches(seed), settings.steps)
        scores[lr] = training.score
    return min(scores, key=lambda lr: scores[lr])


def held_out_loss(training: Training) -> float:
    objective = blockspec.Objective(
        training.model, training.subject.held_out, training.subject.loss
    )
    return objective.value()


def spectra_of(training: Training, settings: Settings, *, seen: bool) -> blockspec.Spectra:
    """Of every weight matrix and kernel, on the first batch that is held out."""
    subject, model = training.subject, training.model
    objective = blockspec.Objective(model, subject.held_out[:1], subject.loss)
    named = dict(model.named_parameters())
    blocks = [b for b in blockspec.partition(model, "tensor") if named[b.name].squeeze().ndim > 1]
    p = preconditioner(training.optimizers, model) if seen else None
    return blockspec.estimate_spectra(
        objective, blocks, settings.probes, settings.lanczos, precondition=p, check=False
    )


def size(spectrum: blockspec.Spectrum) -> float:
    """Root mean square eigenvalue."""
    return float(np.sqrt((spectrum.weights * spectrum.nodes**2).sum(1).mean()))


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    made: dict[str, list[dict[str, Any]]] = {"heterogeneity": [], "sizes": [], "losses": []}
    for name in settings.models:
        subject = SUBJECTS[name]()
        for optimizer in settings.optimizers:
            if (name, optimizer) == ("resnet", "muon"):  # its kernels are no matrices
                continue
            lr = best_rate(subject, optimizer, settings, context.seed)
            for seed in range(context.seed, context.seed + settings.seeds):
                key = {"model": name, "optimizer": optimizer, "seed": seed}
                for table, rows in _followed(subject, optimizer, lr, seed, settings).items():
                    made[table] += [key | row for row in rows]
    tables = {table: pd.DataFrame(values) for table, values in made.items()}
    return {"summary": summary(tables), **tables}


def _followed(
    subject: Subject, optimizer: str, lr: float, seed: int, settings: Settings
) -> dict[str, list[dict[str, Any]]]:
    """One training: rows of each table."""
    rows: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []
    training = training_of(subject, optimizer, lr, seed)
    batches, done = subject.batches(seed), 0
    for stage in settings.stages:
        step = max(2, round(stage * settings.steps))
        training.run(batches, step - done)
        done = step
        for matrix in MATRICES:
            spectra = spectra_of(training, settings, seen=matrix != "hessian")
            found = blockspec.js0(spectra)
            key = {"step": step, "matrix": matrix}
            own = {block: size(s) for block, s in spectra.items()}
            spread = float(np.std(np.log10([v for v in own.values() if v > 0])))
            rows.append(key | {"js0": found.value, "stderr": found.stderr, "decades": spread})
            sizes += [key | {"block": b, "size": v} for b, v in own.items()]
    loss = {"lr": lr, "train": training.score, "held_out": held_out_loss(training)}
    return {"heterogeneity": rows, "sizes": sizes, "losses": [loss]}


def ends(tables: Tables) -> pd.DataFrame:
    """A row for each training: both heterogeneities at its end, and its losses."""
    table = tables["heterogeneity"]
    end = table[table["step"] == table["step"].max()]
    keys = ["model", "optimizer", "seed"]
    wide = end.pivot(index=keys, columns="matrix", values=["js0", "stderr", "decades"])
    wide.columns = [f"{value} {matrix}" for value, matrix in wide.columns]
    wide["fall"] = wide["js0 hessian"] - wide["js0 preconditioned"]
    wide["left"] = wide["js0 preconditioned"] / wide["js0 hessian"]
    probes = [wide[f"stderr {matrix}"] for matrix in MATRICES]
    wide["stderr fall"] = np.hypot(*probes)
    wide["stderr left"] = wide["left"] * np.hypot(
        *(error / wide[f"js0 {matrix}"] for error, matrix in zip(probes, MATRICES, strict=True))
    )
    return wide.reset_index().merge(tables["losses"], on=keys)


AVERAGED = ("js0 hessian", "js0 preconditioned", "fall", "left")


def summary(tables: Tables) -> pd.DataFrame:
    """A row for each model and optimizer: means over the seeds.

    Each error is of the mean. It is the larger one of what the spread over the seeds gives, which
    holds the probes' errors too, and of what the probes' errors alone give: three seeds may lie
    close together by chance.
    """
    rows = []
    for (model, optimizer), runs in ends(tables).groupby(["model", "optimizer"], sort=False):
        row: dict[str, Any] = {"model": model, "optimizer": optimizer, "seeds": len(runs)}
        for name in AVERAGED:
            values, errors = runs[name], runs[f"stderr {name.removeprefix('js0 ')}"]
            spread = values.std() if len(runs) > 1 else 0.0
            own = float(np.sqrt((errors**2).mean()))
            row |= {name: values.mean(), f"error {name}": max(spread, own) / len(runs) ** 0.5}
        row["falls"] = int((runs["fall"] > 0).sum())
        means = ("decades hessian", "decades preconditioned", "lr", "train", "held_out")
        rows.append(row | {name: runs[name].mean() for name in means})
    return pd.DataFrame(rows)


@styled
def plot(tables: Tables) -> Figure:
    """Above JS^0 of both matrices at the end of training, means over the seeds and single
    trainings; below the sizes of all blocks.
    """
    means, runs = tables["summary"], ends(tables)
    models = list(dict.fromkeys(tables["heterogeneity"]["model"]))
    figure = Figure(figsize=(2.5 * len(models) + 1.2, 5.2), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False)
    for column, model in zip(axes.T, models, strict=True):
        rows = means[means["model"] == model].reset_index(drop=True)
        places = pd.Series(np.arange(len(rows)), index=rows["optimizer"])
        own = runs[runs["model"] == model]
        for matrix, colour, shift in zip(MATRICES, RUNS, (-0.12, 0.12), strict=False):
            label = {"hessian": "H", "preconditioned": r"$P^{-1/2} H P^{-1/2}$"}[matrix]
            column[0].errorbar(
                places + shift, rows[f"js0 {matrix}"], rows[f"error js0 {matrix}"],
                fmt="o", color=colour, label=label,
            )  # fmt: skip
            column[0].plot(
                own["optimizer"].map(places) + 1.8 * shift, own[f"js0 {matrix}"],
                ".", color=colour, alpha=0.4,
            )  # fmt: skip
            _strips(column[1], tables["sizes"], model, matrix, places + shift, colour)
        column[0].set_title(model)
        column[0].set_ylim(bottom=0)
        column[1].set_yscale("log")
        for place in column:
            place.set_xticks(places, rows["optimizer"], rotation=35)
    axes[0, 0].set_ylabel("JS$^0$ (nats)")
    axes[1, 0].set_ylabel("size of each block\n(rms eigenvalue / median block)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Blocks as they are, and as the optimizer of the run sees them")
    return figure


def _strips(
    axes: Any, sizes: pd.DataFrame, model: str, matrix: str, places: pd.Series, colour: str
) -> None:
    """Of the first seed."""
    chosen = (sizes["model"] == model) & (sizes["matrix"] == matrix)
    first = sizes["seed"] == sizes["seed"].min()
    end = sizes[chosen & first & (sizes["step"] == sizes["step"].max())]
    for optimizer, place in places.items():
        values = end[end["optimizer"] == optimizer]["size"]
        values = values[values > 0]
        axes.plot([place] * len(values), values / values.median(), "_", color=colour, alpha=0.8)


def draw(tables: Tables) -> dict[str, Figure]:
    return {"optimizers_blocks": plot(tables)}


def judge(tables: Tables) -> list[Finding]:
    table = tables["summary"]
    findings = [_removed(row) for row in table.to_dict("records") if row["optimizer"] != "sgd"]
    return [*findings, *_better(table), _ranks(table)]


def _removed(row: Mapping[Any, Any]) -> Finding:
    before, after = (
        with_error(row[f"js0 {matrix}"], row[f"error js0 {matrix}"]) for matrix in MATRICES
    )
    agrees = row["fall"] > 2 * row["error fall"] and row["falls"] == row["seeds"]
    return Finding(
        "the optimizer's preconditioner makes the blocks alike "
        f"({row['model']}, {row['optimizer']})",
        f"JS^0 {before} of H, {after} of what it sees: a fall in {row['falls']} of {row['seeds']} "
        f"seeds, {with_error(row['left'], row['error left'])} of it left; sizes of blocks spread "
        f"over {row['decades hessian']:.2f} and {row['decades preconditioned']:.2f} decades",
        "agrees" if agrees else "disagrees",
        "agrees where JS^0 falls by more than two standard errors, and in every seed",
    )


def _better(table: pd.DataFrame) -> Iterator[Finding]:
    """Muon and Shampoo against Adam, by the share of JS^0 that is left."""
    for model, rows in table.groupby("model", sort=False):
        left = {r["optimizer"]: (r["left"], r["error left"]) for r in rows.to_dict("records")}
        for name in ("muon", "shampoo"):
            if not {name, "adam"} <= left.keys():
                continue
            (own, own_error), (adams, error) = left[name], left["adam"]
            yield Finding(
                f"a matrix as preconditioner makes blocks more alike than Adam's ({model}, {name})",
                f"{with_error(own, own_error)} of JS^0 left, with Adam {with_error(adams, error)}",
                "agrees" if adams - own > 2 * float(np.hypot(own_error, error)) else "disagrees",
                "agrees where less is left by more than two standard errors",
            )


def _ranks(table: pd.DataFrame) -> Finding:
    """Ranks within each model, put together; of means over the seeds."""
    ranks = table.groupby("model")[["js0 preconditioned", "held_out"]].rank()
    found = spearmanr(ranks["js0 preconditioned"], ranks["held_out"])
    return Finding(
        "the heterogeneity that is left ranks the optimizers' losses",
        f"rank correlation {found.statistic:.2f} within models (p = {found.pvalue:.2g}, "
        f"{len(table)} pairs of model and optimizer)",
        "agrees" if found.statistic > 0 and found.pvalue < 0.05 else "disagrees",
        "agrees where it is positive with p < 0.05",
    )


EXHIBIT = Exhibit(
    name="optimizers_blocks",
    title="Does the optimizer make the blocks alike?",
    source="Our question, after Why Transformers Need Adam (arXiv 2402.16788)",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(
            Settings(),
            "GPT-2 (2 layers, D=32) on the embedded text, ViT (2 layers, D=32) and ResNet8 without "
            "batch norm on the digits; 150 steps, the best of three learning rates each, three "
            "seeds; spectra of every weight matrix by 2 probes of 12 steps.",
            "About 10 minutes on one core.",
        ),
        "paper": Scale(
            Settings(steps=2000, probes=4, lanczos=30),
            "The same models and seeds, trained for 2,000 steps; 4 probes of 30 steps.",
            "About two hours on one core, estimated.",
        ),
    },
    shown=("summary", "losses"),
)

if __name__ == "__main__":
    command(EXHIBIT)
