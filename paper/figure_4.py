"""Heat maps of the distances between blocks at initialisation (figure 4), and their patterns as
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from blockspec.engine.settings import EstimateSettings
from blockspec.figures.plots import distance_heatmaps
from blockspec.figures.style import short_name
from blockspec.runs.run import BlockSettings, RunSettings
from paper.distances import (
    DEFAULT,
    DEFINITIONS,
    KL,
    PUBLISHED,
    RESOLVED,
    coarsest,
    distances,
    heterogeneity,
    nearness,
    square,
    tidy,
)
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.runs import spectra

Pairs = list[tuple[str, str]]

GPT2_LAYERS = (0, 3, 7, 11)
GPT2 = BlockSettings(
    include=[
        "transformer.wte.weight",
        *(
            f"transformer.h.{layer}.{block}"
            for layer in GPT2_LAYERS
            for block in ("attn.c_attn.weight/*", "*.c_*.weight")
        ),
    ],
    full=False,
)
NANO = BlockSettings(
    by="tensor",
    include=["transformer.wpe.weight", "*.c_attn.weight", "*.ln_2.weight", "*.mlp.c_proj.weight"],
    full=False,
)
BERT = BlockSettings(
    by="matrix", exclude=["*.bias*", "*LayerNorm*", "*position_embeddings*"], full=False
)


def vit_blocks(layers: Sequence[int], depth: int) -> BlockSettings:
    """timm's blocks of the paper, of Hugging Face's ViT: query, key and value in one."""
    parts = {
        "qkv": "attention.[qkv]_proj",
        "proj": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    by = {
        f"blocks.{l}.{name}": [f"vit.layers.{l}.{path}.weight"]
        for l in layers
        for name, path in parts.items()
    }
    left = [
        f"vit.layers.{l}.{path}.weight"
        for l in range(depth)
        if l not in layers
        for path in parts.values()
    ]
    rest = ["*.bias", "*layernorm*", "*cls_token", "*position_embeddings", *left]
    by = {
        "patch_embed": ["*.patch_embeddings.projection.weight"],
        **by,
        "head": ["classifier.weight"],
        "rest": rest,
    }
    return BlockSettings(by=by, exclude=["rest"], full=False)


def weights(*exclude: str) -> BlockSettings:
    return BlockSettings(exclude=["*.bias", *exclude], full=False)


def vision(
    model: str, blocks: BlockSettings, estimate: EstimateSettings, **arguments: Any
) -> RunSettings:
    """A fresh vision model; batch norm with the statistics of the batch, as in training."""
    factory, arguments = (
        ("image_folder", arguments) if "root" in arguments else ("digits", arguments)
    )
    arguments = {"model": model, **arguments}
    return RunSettings(
        f"vision_models.factories:{factory}", arguments, [], blocks, estimate, batch_norm="train"
    )


def language(
    settings: dict[str, Any], blocks: BlockSettings, estimate: EstimateSettings, **arguments: Any
) -> RunSettings:
    return RunSettings(
        "language_models.fresh:fresh", {"settings": settings, **arguments}, [], blocks, estimate
    )


@dataclass(frozen=True)
class Model:
    """What is measured, and with how many seeds of its weights, which give the spread.

    Args:
        run: All but the seeds.
        seeds: Number of seeds.
        memory: Of one estimate; None: no bound.
    """

    run: RunSettings
    seeds: int = 2
    memory: str | None = None


SMALL_VISION = {"count": 64, "batch_size": 64}
TWO_PROBES = EstimateSettings(num_probes=2, num_steps=30)
ONE_PROBE = EstimateSettings(num_probes=1, num_steps=12)
NANO_SHAPE = {"num_layers": 6, "num_heads": 6, "width": 384, "bias": False}
GPT2_SHAPE = {"num_layers": 12, "num_heads": 12, "width": 768, "bias": False, "vocabulary": 50304}

SMALL = {
    "ResNet": Model(
        vision("digits_resnet", weights("*bn*", "*downsample.1.*"), TWO_PROBES, **SMALL_VISION)
    ),
    "VGG": Model(vision("digits_vgg", weights(), TWO_PROBES, **SMALL_VISION)),
    "ViT": Model(vision("digits_vit", vit_blocks((0, 2, 3), 4), TWO_PROBES, **SMALL_VISION)),
    "mixer": Model(vision("digits_mixer", weights("*norm*"), TWO_PROBES, **SMALL_VISION)),
    "BERT": Model(
        language({"architecture": "bert"}, BERT, TWO_PROBES, num_batches=1, batch_size=16)
    ),
    "GPT2-nano": Model(language(NANO_SHAPE, NANO, ONE_PROBE, num_batches=1, batch_size=2), seeds=3),
    "GPT2": Model(
        language(GPT2_SHAPE, GPT2, ONE_PROBE, num_batches=1, batch_size=1, num_tokens=64)
    ),
}

TOLERANCE = EstimateSettings(num_probes="auto", num_steps="auto")
IMAGENET = {"root": "imagenet/train", "count": 256, "batch_size": 256, "workers": 8}
OPENWEBTEXT = {"data": "data/openwebtext", "num_batches": 60, "batch_size": 8, "num_tokens": 1024}
PAPER_MODELS = {
    "ResNet": Model(
        vision("resnet18", weights("*bn*", "*downsample.1.*"), TOLERANCE, **IMAGENET), memory="90%"
    ),
    "VGG": Model(vision("vgg16", weights(), TOLERANCE, **IMAGENET), memory="90%"),
    "ViT": Model(vision("vit", vit_blocks((0, 6, 11), 12), TOLERANCE, **IMAGENET), memory="90%"),
    "mixer": Model(vision("mixer", weights("*norm*"), TOLERANCE, **IMAGENET), memory="90%"),
    "BERT": Model(
        language(
            {"architecture": "bert", "num_layers": 12, "num_heads": 12, "width": 768},
            replace(BERT, exclude=[*(BERT.exclude or []), "*.layer.[2-9].*", "*.layer.1?.*"]),
            TOLERANCE,
            **OPENWEBTEXT | {"data": "data/openwebtext_bert", "num_tokens": 512},
        ),
        memory="90%",
    ),
    "GPT2-nano": Model(
        language(NANO_SHAPE, NANO, TOLERANCE, **OPENWEBTEXT | {"num_tokens": 256}), memory="90%"
    ),
    "GPT2": Model(language(GPT2_SHAPE, GPT2, TOLERANCE, **OPENWEBTEXT), memory="90%"),
}


@dataclass(frozen=True)
class Settings:
    models: Mapping[str, Model] = field(default_factory=lambda: SMALL)


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    pairs, means = [], []
    for name, model in settings.models.items():
        for seed in range(context.seed, context.seed + model.seeds):
            run = replace(model.run, model_args={**model.run.model_args, "seed": seed})
            folder = context.runs / "initial" / name / f"seed_{seed}"
            found = spectra(run, folder, device=context.device, memory=model.memory)
            means.append(
                heterogeneity(found).assign(
                    model=name, seed=seed, blocks=len(found), width=coarsest(found)
                )
            )
            pairs += [
                tidy(distances(found, d)).assign(model=name, seed=seed, definition=d)
                for d in DEFINITIONS
            ]
    tables = {
        "distances": pd.concat(pairs, ignore_index=True),
        "js0": pd.concat(means, ignore_index=True),
    }
    return {**tables, "patterns": patterns(tables)}


def heatmap(tables: Tables, model: str, definition: str, seed: int | None = None) -> pd.DataFrame:
    """Distances (blocks x blocks); of the first seed by default."""
    rows = tables["distances"]
    rows = rows[(rows["model"] == model) & (rows["definition"] == definition)]
    return square(rows[rows["seed"] == (rows["seed"].min() if seed is None else seed)])


GROUPS = {"vision": ("ResNet", "VGG", "ViT", "mixer"), "language": ("BERT", "GPT2-nano", "GPT2")}


def draw(tables: Tables) -> dict[str, Figure]:
    """Maps of the resolved divergence, and of the published distance in the published colours, from
    0 to 3.
    """
    there = tables["js0"]["model"].unique()
    return {
        f"figure_4_{group}_{name}": distance_heatmaps(
            {m: heatmap(tables, m, definition) for m in models if m in there}, shown, top=top
        )
        for name, definition, shown, top in (
            ("resolved", RESOLVED, DEFAULT, None),
            ("as_published", PUBLISHED, KL, 3.0),
        )
        for group, models in GROUPS.items()
        if set(models) & set(there)
    }


# The patterns of the published maps: which pairs, of the short names of blocks, and whether they
# are near or far.

FIRST = ("wte", *(f"h0.{kind}" for kind in ("value", "attn_out", "mlp_in", "mlp_out")))


def first_and_rest(names: Sequence[str]) -> Pairs:
    return list(product(FIRST, [name for name in names if name not in FIRST]))


def query_and_key(names: Sequence[str]) -> Pairs:
    return [(f"h{layer}.query", f"h{layer}.key") for layer in GPT2_LAYERS]


def within_late_layers(names: Sequence[str]) -> Pairs:
    return [
        pair
        for layer in GPT2_LAYERS[2:]
        for pair in combinations([n for n in names if n.startswith(f"h{layer}.")], 2)
    ]


def second_norms(names: Sequence[str]) -> Pairs:
    return list(combinations([name for name in names if name.endswith("ln_2")], 2))


def last_projections(names: Sequence[str]) -> Pairs:
    last = [name for name in names if name.startswith("blocks")][-1].rpartition(".")[0]
    return [(f"{last}.proj", f"{last}.fc2")]


@dataclass(frozen=True)
class Pattern:
    model: str
    claim: str
    pairs: Callable[[Sequence[str]], Pairs]
    near: bool
    comparable: bool = True


PATTERNS = (
    Pattern(
        "GPT2",
        "wte and layer 0 except query and key are far from everything else",
        first_and_rest,
        near=False,
    ),
    Pattern("GPT2", "query and key of one layer are nearly alike", query_and_key, near=True),
    Pattern("GPT2", "within layers 7 and 11 all blocks are near", within_late_layers, near=True),
    Pattern("GPT2-nano", "all ln_2 are nearly alike", second_norms, near=True),
    Pattern(
        "ViT",
        "all pairs are far but proj and fc2 of the last layer",
        last_projections,
        near=True,
        comparable=False,
    ),
)
CLEAR = 0.8  # of the other pairs must be farther (or nearer) than one of the group


def patterns(tables: Tables) -> pd.DataFrame:
    """A row a pattern, definition and seed: median distance of its pairs over that of all pairs,
    and the share of the other pairs that are farther (or nearer, for patterns of far pairs) than
    one of them.
    """
    rows = []
    for pattern in (
        pattern for pattern in PATTERNS if pattern.model in set(tables["js0"]["model"])
    ):
        for seed in tables["js0"].loc[tables["js0"]["model"] == pattern.model, "seed"].unique():
            for definition in DEFINITIONS:
                table = heatmap(tables, pattern.model, definition, seed).rename(
                    index=_short, columns=_short
                )
                ratio, nearer = nearness(table, pattern.pairs(list(table.index)))
                named = {
                    "model": pattern.model,
                    "claim": pattern.claim,
                    "definition": definition,
                    "seed": seed,
                }
                rows.append(
                    named | {"ratio": ratio, "share": nearer if pattern.near else 1 - nearer}
                )
    return pd.DataFrame(rows)


JUDGED = {
    PUBLISHED: "as the paper measures it, on a mean loss",
    RESOLVED: "what Lanczos does not resolve counts as no difference",
}


def judge(tables: Tables) -> list[Finding]:
    by_claim = tables["patterns"].set_index(["model", "claim", "definition"]).sort_index()
    there = [pattern for pattern in PATTERNS if (pattern.model, pattern.claim) in by_claim.index]
    return [
        *(_judge(p, d, by_claim.loc[p.model, p.claim, d]) for p in there for d in JUDGED),
        _means(tables),
    ]


def _judge(pattern: Pattern, definition: str, seeds: pd.DataFrame) -> Finding:
    mean, spread = seeds.mean(), seeds.std(ddof=1)
    side = "nearer" if pattern.near else "farther"
    verdict = "agrees" if mean["share"] > CLEAR else "disagrees"
    small = "" if pattern.comparable else "; of a model of this size only the analogue"
    return Finding(
        f"{pattern.model}: {pattern.claim}",
        f"{definition}: median distance {with_error(mean['ratio'], spread['ratio'])} times that of "
        f"all pairs, {side} than "
        f"{with_error(100 * mean['share'], 100 * spread['share'])} % of the other pairs",
        verdict if pattern.comparable else "not comparable",
        f"{JUDGED[definition]}; must be {side} than {100 * CLEAR:.0f} % of the other pairs; error: "
        "standard deviation over "
        f"{len(seeds)} seeds of the weights{small}",
    )


def _short(name: str) -> str:
    return name if name.startswith("blocks") else short_name(name)


def _means(tables: Tables) -> Finding:
    js0 = tables["js0"].groupby(["definition", "model"], sort=False)[["js0", "width"]].mean()
    texts = [
        f"{name} {js0.loc[(PUBLISHED, name), 'js0']:.3g} ({row.js0:.3g} at width {row.width:.2g})"
        for name, row in js0.loc[KL].iterrows()
    ]
    return Finding(
        "the maps run from 0 to 3, and means over all pairs to hundreds",
        f"symmetrised KL divergence, mean over pairs: {'; '.join(texts)}",
        "not comparable",
        "the published width is sqrt(1e-5) in units of an eigenvalue, the widths in brackets are "
        "those that Lanczos resolves in "
        "every block; floor 1e-258, 50,000 points; the paper's loss is a sum over batches, ours a "
        "mean",
    )


EXHIBIT = Exhibit(
    name="figure_4",
    title="Distances between blocks at initialisation",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 4",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(
            Settings(),
            "Digits (8x8) for ResNet14, a VGG of 6 layers, a ViT and a mixer of 4; the embedded "
            "text for a BERT of 2 layers, "
            "GPT2-nano (6 layers, D=384, 128 tokens) and GPT2 (12 layers, D=768, vocabulary 50304, "
            "64 tokens), all with random "
            "weights; 30 Lanczos steps of 2 probes, for the last two 12 of 1. Batch norm has the "
            "statistics of the batch.",
            "Some ten minutes on one core, 8 GiB.",
        ),
        "paper": Scale(
            Settings(PAPER_MODELS),
            "The paper's models and data; the steps and probes of a tolerance.",
            "Not run. Estimated: a day of one GPU.",
        ),
    },
    shown=("patterns", "js0"),
)

if __name__ == "__main__":
    command(EXHIBIT)
