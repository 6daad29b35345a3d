"""The tables of a report: columns and cells as text, which the HTML and Markdown templates lay out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pkm_lightning.compare.amounts import compact, seconds
from pkm_lightning.compare.bootstrap import finite_mean
from pkm_lightning.compare.breakdowns import decile_table, relation_table, sweep_table
from pkm_lightning.compare.conditions import meeting
from pkm_lightning.compare.metric import WITHOUT_TABLE
from pkm_lightning.compare.pairs import pair_table
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.records import Run
from pkm_lightning.compare.storage import known_entropy
from pkm_lightning.compare.study import Study
from pkm_lightning.compare.table import Column, Table, columns

_ZERO_READS = (
    " Without table: the same test with every read of a value table set to zero, so that the difference is what the "
    "table holds; a model without a table has no such figure."
)


def all_tables(study: Study) -> list[Table]:
    """Returns the tables that the runs have results for."""
    if study.resampled is None:
        return []
    tables = [quality_table(study), pair_table(study), multiplier_table(study), cost_table(study), storage_table(study)]
    note, names, rows = known_entropy(study)
    tables += [Table("Storage of facts of known entropy", note, columns(*names), rows)]
    tables += [seed_table(study), decile_table(study), relation_table(study), sweep_table(study)]
    return [table for table in tables if table is not None and table.rows]


def quality_table(study: Study) -> Table:
    """Returns mean, interval, difference from the reference, quality at another moment, and further figures.

    That moment is the reference's end: in seconds for runs of equal tokens, in tokens for runs of equal seconds.
    """
    quality, resampled, reference = study.quality, study.resampled, study.reference
    assert resampled is not None
    assert reference is not None
    met, other_metrics = meeting(study), _other_metrics(study)
    rows = []
    for variant, runs in study.variants.items():
        difference = (
            "" if variant == reference else quality.format_difference(*resampled.difference(variant, reference))
        )
        rows.append([
            variant,
            quality.format(resampled.mean[variant]),
            quality.format_interval(*resampled.interval(variant)) or "-",
            difference,
            quality.format(met.quality[variant]),
            *(_mean_over_seeds(other, runs) for other in other_metrics),
            ", ".join(sorted({f"{run.config['optim']['lr']:g}" for run in runs})),
        ])  # fmt: skip
    final = "seconds" if study.is_equal_time else "tokens"
    moment = f"{seconds(met.moment)} seconds" if met.axis == "seconds" else f"{compact(met.moment)} tokens"
    partly = " Not all variants have the same seeds and facts: those that they share are resampled together."
    unit = f", {quality.unit}" if quality.unit else ""
    points = " Points are percentage points." if quality.unit == "points" else ""
    return Table(
        f"{quality.label.capitalize()} at {'unequal' if study.is_unequal_length else 'equal'} {final}",
        f"Final test, means over seeds; {'higher' if quality.higher_is_better else 'lower'} is better.{points} "
        f"{_interval_note(study)}{'' if resampled.is_paired else partly} At {moment}: interpolated between each run's "
        f"validations where {reference} ends. There the learning rates of longer runs have not decayed yet, a run that "
        "ended earlier keeps its last value, and validations ask fewer questions."
        + (_ZERO_READS if any(other.metric.endswith(WITHOUT_TABLE) for other in other_metrics) else ""),
        [Column("variant"), Column("mean"), Column("95% interval"), Column(f"difference from {reference}{unit}"),
         Column(f"at {moment}"), *columns(*(other.label for other in other_metrics), group="other means"),
         Column("learning rate")],
        rows,
    )  # fmt: skip


def seed_table(study: Study) -> Table | None:
    """Returns the quality of every run; None if no variant has two seeds."""
    seeds = sorted({run.seed for runs in study.variants.values() for run in runs})
    if all(len(runs) < 2 for runs in study.variants.values()):
        return None
    rows = []
    for variant, runs in study.variants.items():
        by_seed = {run.seed: study.quality.value(run) for run in runs}
        rows.append([variant, *(study.quality.format(by_seed.get(seed, math.nan)) for seed in seeds)])
    names = columns(*(str(seed) for seed in seeds), group="seed")
    return Table(f"{study.quality.label.capitalize()} of each run", "", [Column("variant"), *names], rows)


def _interval_note(study: Study) -> str:
    assert study.resampled is not None
    over, n_seeds = study.resampled.over, min(len(runs) for runs in study.variants.values())
    if not over:
        return "With one seed and no questions there is no interval."
    few = f"; {n_seeds} seeds understate how much seeds differ" if n_seeds > 1 and "seeds" in over else ""
    few = few or "; with one seed it does not include how much seeds differ"
    pairs = "paired " if study.resampled.is_paired else ""
    return (
        f"The interval is a 95% percentile interval of {study.settings.resamples:,} {pairs}resamples over {over}{few}."
    )


#: Headings of multipliers by `costs.BASES`.
_GROUPS = {
    "trunk": "FLOPs of the trunk",
    "model": "FLOPs of the model",
    "time": "training seconds",
    "processor": "processor seconds",
}


def multiplier_table(study: Study) -> Table | None:
    """Returns how much more compute, and time, a dense model needs for the same quality; None without a ladder."""
    if not study.multipliers:
        return None
    assert study.resampled is not None
    assert study.reference is not None
    rows = []
    for variant in study.multipliers["trunk"]:
        cells = []
        for basis, of_basis in study.multipliers.items():
            if variant not in of_basis:
                cells += ["-", "-"]
                continue
            share = study.training_cost(variant, basis) / study.training_cost(study.reference, basis)
            one = of_basis[variant]
            cells += [f"{share:.2f}x", f"{one.value} ({one.low} to {one.high})" if one.has_interval else str(one.value)]
        rows.append([variant, study.quality.format(study.resampled.mean[variant]), *cells])
    rungs = ", ".join(f"{variant} {study.quality.format(study.resampled.mean[variant])}" for variant in study.ladder)
    cost = f"cost over {study.reference}"
    return Table(
        "Compute and time multipliers",
        "Multiplier: how many times a variant's cost of training a dense model needs for the same quality, with its "
        f"95% interval. It is interpolated in the logarithm of cost between the dense models: {rungs}. '>=': better "
        "than the largest of them; '<=': no better than the smallest. Trunk: all layers without embedding and "
        "unembedding. "
        "Model: with the unembedding at every position, though training computes it only where there is a target. "
        "Seconds are those of this machine; processor seconds depend less on what else it does. The interval resamples "
        "quality: costs count as exact, though those of runs.csv differ between seeds.",
        [Column("variant"), Column(study.quality.label),
         *(column for basis in study.multipliers for column in columns(cost, "multiplier", group=_GROUPS[basis]))],
        rows,
    )  # fmt: skip


def cost_table(study: Study) -> Table:
    """Returns parameters, FLOPs, bytes, speed and memory."""
    has_processor = any(math.isfinite(study.mean_cost(variant, "processor_seconds")) for variant in study.variants)
    shown = (
        (Column("total", "parameters"), "params_total", compact),
        (Column("active", "parameters"), "params_active", compact),
        (Column("in tables", "parameters"), "params_table", compact),
        (Column("trunk, forward", "FLOPs per token"), "trunk_flops_forward", compact),
        (Column("model, training", "FLOPs per token"), "model_flops_train", compact),
        (Column("model, decoding", "FLOPs per token"), "model_flops_decode", compact),
        (Column("training", "bytes per token"), "bytes_train", compact),
        (Column("decoding", "bytes per token"), "bytes_decode", compact),
        (Column("tokens", "training"), "tokens", compact),
        (Column("seconds", "training"), "seconds_train", seconds),
        *([(Column("processor seconds", "training"), "processor_seconds", seconds)] if has_processor else []),
        (Column("tokens per second", "training"), "tokens_per_second", compact),
        (Column("peak memory, MB", "training"), "peak_memory_bytes", lambda value: compact(value / 1e6)),
    )
    rows = [
        [variant, *(write(study.mean_cost(variant, name)) for _, name, write in shown)] for variant in study.variants
    ]
    return Table(
        "Cost",
        "Means over seeds; runs.csv has all digits. Active: parameters that take part in the arithmetic of one token. "
        "In tables: rows of value tables and n-gram tables, of which each token reads a few. Trunk: all layers without "
        "embedding and unembedding. Training: forward and backward. Bytes in training are rows of embedding and tables "
        "that each token moves; in decoding, parameters read at batch 1. Seconds are those of training without tests, "
        "as this machine took them.",
        [Column("variant"), *(column for column, *_ in shown)],
        rows,
    )


def storage_table(study: Study) -> Table | None:
    """Returns bits of knowledge about the facts of training, in total and per parameter."""
    rows = []
    for variant in study.variants:
        bits_per_fact, stored = study.bits_stored(variant)
        if math.isfinite(stored):
            ratios = [stored / study.mean_cost(variant, name) for name in ("params_total", "params_active")]
            cells = [f"{bits_per_fact:.2f}", f"{stored / 1e3:,.1f}", *(f"{ratio:.3f}" for ratio in ratios)]
            rows.append([variant, *cells])
    return Table(
        "Storage",
        "Bits of knowledge about a fact: -log2 of its answer's share in the relation, less the model's -log2 "
        "probability of the answer after a held-out paraphrase; not clipped at 0. Stored: that mean times all facts of "
        "training.",
        [
            Column("variant"),
            Column("bits per fact"),
            Column("stored, kbit"),
            *columns("total", "active", group="bits per parameter"),
        ],
        rows,
    )


def _other_metrics(study: Study) -> list[Quality]:
    """Returns further metrics that any run has."""
    names = ("recall_paraphrase", "recall_question", "recall_control", "test/loss")
    candidates = [Quality(name) for name in (f"{study.quality.metric}{WITHOUT_TABLE}", *names)]
    runs = [run for of_variant in study.variants.values() for run in of_variant]
    others = [quality for quality in candidates if quality.metric != study.quality.metric]
    return [quality for quality in others if any(math.isfinite(quality.value(run)) for run in runs)]


def _mean_over_seeds(quality: Quality, runs: Sequence[Run]) -> str:
    """Returns the mean, and how many runs it is of where some, such as those of an earlier version, lack the figure."""
    values = [quality.value(run) for run in runs]
    n = sum(map(math.isfinite, values))
    return quality.format(finite_mean(values)) + (f" ({n} of {len(runs)} seeds)" if 0 < n < len(runs) else "")


def failures(study: Study) -> Sequence[tuple[str, str]]:
    """Returns run and reason of the runs without results."""
    return [(f"{run.variant} seed {run.seed}", run.failure) for run in study.failed]
