"""What a run says, in sentences: of what, how large, how different, how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from blockspec.figures.style import matrix_name
from blockspec.model.pieces import FULL, Block
from blockspec.runs.loading import Run
from blockspec.runs.page.numbers import Maps, names_of
from blockspec.spectra.spectrum import Spectrum

MOST_LAYERS = 12  # of query against key
LIKENESS = ((0.03, "look alike"), (0.15, "differ a little"), (math.log(2) + 1, "differ clearly"))
"""Upper ends of Jensen-Shannon divergences in nats, and how they are called."""


def sentences(run: Run, maps: Maps | None) -> list[str]:
    """HTML of one sentence or two each, everything from the run escaped; buttons lead on.

    Args:
        run: As it was read.
        maps: Its Jensen-Shannon divergences, where it has them.
    """
    names = names_of(run)
    parts = dict(run.last.parts or run.last)
    found = [_what(run), _largest(run, parts, names)]
    if maps is not None:
        places = {block.name: place for place, block in enumerate(run.parts)}
        inside = [places[name] for name in parts]
        last = {name: array[-1][np.ix_(inside, inside)] for name, array in maps.items()}
        found += [_heterogeneity(run, last["values"]), _furthest(parts, names, last["values"])]
        found += _query_and_key(run, parts, last)
    return [*found, *_trust(run, parts, names)]


def _what(run: Run) -> str:
    """Model, data, matrix, steps, loss."""
    entry, settings = run.entry(run.steps[-1]), run.record.get("settings", {})
    model = entry.get("model", {})
    called = f"<b>{escape(str(model.get('class', 'A model')))}</b>"
    if "parameters" in model:
        dtype = escape(str(model["dtype"]).removeprefix("torch."))
        called += f", {model['parameters']:,} parameters in {dtype}"
    source = f" from <code>{escape(str(settings['model']))}</code>" if "model" in settings else ""
    data = f", on {len(entry['data'])} batches of data" if entry.get("data") else ""
    steps, losses = run.steps, [run.entry(step).get("loss") for step in run.steps]
    ends = [escape(run.called(step)) for step in (steps[0], steps[-1])]
    several = f"{len(steps)} {'stages' if run.labels else 'steps'}"
    at = ends[0] if len(steps) == 1 else several
    span = "" if len(steps) == 1 else f", from {ends[0]} to {ends[1]}"
    loss = "" if losses[-1] is None else f" The loss is {losses[-1]:.4g}"
    if loss and losses[0] is not None and len(steps) > 1:
        loss += f" at the end; it was {losses[0]:.4g} at the start"
    things = [f"{len(run.parts)} blocks of its {matrix_name(run.last)}"] if run.parts else []
    things += ["the full matrix"] if len(run.parts) < len(run.blocks) else []
    measured = f"{' and '.join(things)} were measured at {at}{span}{data}."
    measured = measured[0].upper() + measured[1:]
    return f"{called}{source}. {measured}{loss + '.' if loss else ''}"


def _largest(run: Run, parts: Mapping[str, Spectrum], names: Mapping[str, str]) -> str:
    """Which block has the largest eigenvalue, and how it moved."""
    name, top = max(parts.items(), key=lambda item: item[1].largest.value)
    first = run.stages[run.steps[0]]
    now = _plus_minus(top.largest.value, top.largest.residual)
    text = (
        f"The largest eigenvalue of all blocks is <b>{now}</b>, in {_button(run, name, names)}, "
        f"at {escape(run.called(run.steps[-1]))}."
    )
    if len(run.steps) > 1 and name in first:
        before = first[name].largest
        was = _plus_minus(before.value, before.residual)
        text += f" It was {was} in that block at {escape(run.called(run.steps[0]))}."
    for whole in (s.largest for s in run.last.values() if FULL == s.block.kind != top.block.kind):
        text += f" That of the full matrix is {_plus_minus(whole.value, whole.residual)}."
    return text


def _heterogeneity(run: Run, distances: np.ndarray) -> str:
    """Mean distance, as the run's table has it."""
    rows = run.heterogeneity
    if rows is None:
        return ""
    rows = rows[rows["definition"] == "jensen-shannon"].drop_duplicates("step").set_index("step")
    told = [
        f"<b>{_plus_minus(*rows.loc[step, ['js0', 'js0_stderr']])} nats</b> at "
        f"{escape(run.called(step))}"
        for step in dict.fromkeys([run.steps[-1], run.steps[0]])
        if step in rows.index
    ]
    largest = float(distances.max())
    return (
        f"Heterogeneity, the mean distance between two blocks' spectra, is {', and '.join(told)} "
        "(0: all blocks have the same spectrum; 0.693, which is ln 2: no two overlap). The two "
        f"most different blocks are {largest:.2f} nats apart."
    )


def _furthest(parts: Mapping[str, Spectrum], names: Mapping[str, str], distances: Any) -> str:
    """Blocks that stand out: furthest from the others on average."""
    mean = distances.sum(1) / (len(parts) - 1)
    order = np.argsort(mean)[::-1][:3]
    keys = list(parts)
    told = [f"{_named(keys[i], names)} ({mean[i]:.2f} nats)" for i in order]
    return f"The blocks that stand out, by mean distance to the others: {', '.join(told)}."


def _query_and_key(run: Run, parts: Mapping[str, Spectrum], last: Maps) -> Iterator[str]:
    """Whether query and key of a layer look alike, for every layer that has one of each."""
    keys = {(s.block.layer, s.block.role): n for n, s in parts.items() if s.block.kind == "key"}
    told = []
    for block in (s.block for s in parts.values() if s.block.kind == "query"):
        key = keys.get((block.layer, block.role.replace("query", "key")))
        if key and "/head_" not in block.name:
            told.append(_pair(run, block, key, last))
    if told:
        more = f"; {len(told) - MOST_LAYERS} more layers" if len(told) > MOST_LAYERS else ""
        limits = ", ".join(f"{word} below {end}" for end, word in LIKENESS[:-1])
        yield (
            f"Query against key: {'; '.join(told[:MOST_LAYERS])}{more}. (In nats, the noise of "
            f"probes taken off; {limits}.)"
        )


def _pair(run: Run, query: Block, key: str, last: Maps) -> str:
    order = list(run.last.parts)
    at = order.index(query.name), order.index(key)
    distance, error = float(last["corrected"][at]), float(last["errors"][at])
    word = next(word for end, word in LIKENESS if distance < end)
    places = [_place(run, name) for name in (query.name, key)]
    shown = _plus_minus(distance, error)
    called = "alone" if query.layer is None else f"layer {query.layer}"
    called += f" ({escape(query.role)})" if query.role != "query" else ""
    pair = f"{places[0]},{places[1]}"
    return f'<button class="link" data-pair="{pair}">{called}</button> {word} ({shown})'


def _trust(run: Run, parts: Mapping[str, Spectrum], names: Mapping[str, str]) -> Iterator[str]:
    """Errors of the estimates, of the data, and the check of the products."""
    shares = {n: s.error / s.norm for n, s in parts.items() if s.norm}
    if shares:
        worst = max(shares, key=lambda name: shares[name])
        probes = [s.num_probes for s in parts.values()]
        steps = max(int(s.steps.max()) for s in parts.values())
        yield (
            "How far to trust it: with 95 % confidence a block's spectrum is known to "
            f"<b>{_percent(shares)} of its largest magnitude</b> (median over blocks; at worst "
            f"{_percent({worst: shares[worst]})}, {_named(worst, names)}), for the batches that "
            f"were given. {_range(probes)} probes of at most {steps} Lanczos steps."
        )
    totals = {n: s.total_error for n, s in parts.items()}
    known = {n: t / parts[n].norm for n, t in totals.items() if t is not None and parts[n].norm}
    if known:
        yield (
            "The batches are a sample. With them counted in, the error is "
            f"<b>{_percent(known)} of the largest magnitude</b> (median over {len(known)} of "
            f"{len(parts)} blocks)."
        )
    else:
        yield (
            "The batches are a sample. How far the numbers for all data may lie from those of "
            f"these batches is <b>not known</b>: {escape(run.last.data)}."
        )
    check = (run.entry(run.steps[-1]).get("cost") or {}).get("check")
    if check:
        yield f"Products against differences of gradients: {escape(str(check))}."


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _percent(shares: Mapping[str, float]) -> str:
    return f"{100 * float(np.median(list(shares.values()))):.2g} %"


def _named(name: str, names: Mapping[str, str]) -> str:
    return f"<b>{escape(names[name])}</b>"


def _place(run: Run, name: str) -> int:
    return [block.name for block in run.blocks].index(name)


def _button(run: Run, name: str, names: Mapping[str, str]) -> str:
    place = _place(run, name)
    return f'<button class="link" data-block="{place}">{escape(names[name])}</button>'


def _plus_minus(value: float, error: float | None) -> str:
    """The value with the digits that its error allows, at most five."""
    if error is None or not math.isfinite(error):
        return f"{value:.3g} (error not known)"
    digits = math.floor(math.log10(abs(value) / error)) + 2 if value and error > 0 else 5
    return f"{value:.{min(max(digits, 2), 5)}g} ± {error:.2g}"
