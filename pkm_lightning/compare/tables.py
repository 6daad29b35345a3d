"""The tables of a report: columns and cells as text, which the HTML and Markdown templates lay out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkm_lightning.compare.bootstrap import finite_mean
from pkm_lightning.compare.curves import quality_at
from pkm_lightning.compare.metric import WITHOUT_TABLE
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.records import Run
from pkm_lightning.compare.storage import known_entropy
from pkm_lightning.compare.study import Study

_ZERO_READS = (
    " 'Without table': the same test with every read of a value table set to zero, so that the difference is what the "
    "table holds; a model without a table has no such figure."
)


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        title: a few words.
        note: explains the table to a reader; may be empty.
        columns, rows: texts; the first column names the variant.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def all_tables(study: Study) -> list[Table]:
    """Returns the tables that the runs have results for."""
    if study.resampled is None:
        return []
    tables = [quality_table(study), multiplier_table(study), cost_table(study), storage_table(study)]
    tables += [Table("Storage of facts of known entropy", *known_entropy(study))]
    tables += [decile_table(study), relation_table(study), sweep_table(study)]
    return [table for table in tables if table is not None and table.rows]


def quality_table(study: Study) -> Table:
    """Returns quality of every seed, mean, interval, difference to the reference, and quality at another moment.

    That moment is the reference's end: in seconds for runs of equal tokens, in tokens for runs of equal seconds.
    """
    quality, resampled, reference = study.quality, study.resampled, study.reference
    assert resampled is not None
    assert reference is not None
    seeds = sorted({run.seed for runs in study.variants.values() for run in runs})
    axis = "tokens" if study.is_equal_time else "seconds"
    moment = study.mean_cost(reference, "tokens" if study.is_equal_time else "seconds_train")
    other_metrics = _other_metrics(study)
    rows = []
    for variant, runs in study.variants.items():
        by_seed = {run.seed: quality.value(run) for run in runs}
        difference, low, high = resampled.difference(variant, reference)
        at_moment = [quality_at(run, quality, axis, moment) for run in runs]
        rows.append([
            variant,
            *(quality.format(by_seed.get(seed, math.nan)) for seed in seeds),
            quality.format(resampled.mean[variant]),
            _range(quality, *resampled.interval(variant)),
            "" if variant == reference
            else f"{_signed(quality, difference)} ({_range(quality, low, high, signed=True)})",
            # A plain mean, nan if one is: a mean over some of the seeds would leave out exactly the slow ones.
            quality.format(sum(at_moment) / len(at_moment)),
            *(_mean_over_seeds(other, runs) for other in other_metrics),
            ", ".join(sorted({f"{run.config['optim']['lr']:g}" for run in runs})),
        ])  # fmt: skip
    finals, others = ("seconds", "tokens") if study.is_equal_time else ("tokens", "seconds")
    equal = f"{moment:,.0f} {others}"
    partly = " Not all variants have the same seeds and facts: those that they share are resampled together."
    return Table(
        f"{quality.label.capitalize()} at {'unequal' if study.is_unequal_length else 'equal'} {finals}",
        f"Final test of each run. {_interval_note(study)}{'' if resampled.is_paired else partly} "
        f"'At {equal}' is interpolated between each run's validations where {reference} ends: there the learning rates "
        "of longer runs have not decayed yet, a run that ended earlier keeps its last value, and validations ask fewer "
        "questions."
        + (_ZERO_READS if any(other.metric.endswith(WITHOUT_TABLE) for other in other_metrics) else ""),
        ["variant", *(f"seed {seed}" for seed in seeds), "mean", "95% interval", f"less {reference}", f"at {equal}",
         *(other.label for other in other_metrics), "learning rate"],
        rows,
    )  # fmt: skip


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
            share = study.training_cost(variant, basis) / study.training_cost(study.reference, basis)
            value, low, high = of_basis[variant].value, of_basis[variant].low, of_basis[variant].high
            cells += [f"{share:.2f}x", str(value), "-" if math.isnan(low.value) else f"{low} to {high}"]
        rows.append([variant, study.quality.format(study.resampled.mean[variant]), *cells])
    rungs = ", ".join(f"{variant} {study.quality.format(study.resampled.mean[variant])}" for variant in study.ladder)
    return Table(
        "Compute and time multipliers",
        "How many times a variant's training compute a dense model needs for the same quality, interpolated in the "
        f"logarithm of compute over {rungs}. 'Own' is the variant's compute over that of {study.reference}. 'Trunk': "
        "all layers without embedding and unembedding. 'Model': with the unembedding at every position, though "
        "training computes it only where there is a target. 'Time': the same for training seconds, as this machine "
        "took them. '>=': better than the largest dense model; '<=': no better than the smallest. The interval "
        "resamples quality; compute and seconds count as exact.",
        ["variant", study.quality.label, *(f"{basis}, {what}" for basis in study.multipliers
                                           for what in ("own", "multiplier", "95% interval"))],
        rows,
    )  # fmt: skip


def cost_table(study: Study) -> Table:
    """Returns parameters, FLOPs, bytes, speed and memory."""
    shown = (
        ("parameters", "params_total", _count),
        ("active", "params_active", _count),
        ("in tables", "params_table", _count),
        ("FLOPs per token, trunk forward", "trunk_flops_forward", _count),
        ("model, training", "model_flops_train", _count),
        ("model, decoding", "model_flops_decode", _count),
        ("bytes per token, training", "bytes_train", _count),
        ("decoding", "bytes_decode", _count),
        ("tokens", "tokens", _count),
        ("training seconds", "seconds_train", _count),
        ("tokens/s", "tokens_per_second", _count),
        ("peak memory, MB", "peak_memory_bytes", lambda value: _count(value / 1e6)),
    )
    rows = [
        [variant, *(write(study.mean_cost(variant, name)) for _, name, write in shown)] for variant in study.variants
    ]
    return Table(
        "Cost",
        "Means over seeds. Active: parameters that take part in the arithmetic of one token. Bytes in training are "
        "rows of embedding and tables that each token moves; in decoding, parameters read at batch 1. Seconds are "
        "those of training without tests, as this machine took them.",
        ["variant", *(label for label, _, _ in shown)],
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
        ["variant", "bits per fact", "kbit stored", "bits per parameter", "bits per active parameter"],
        rows,
    )


def decile_table(study: Study) -> Table | None:
    """Returns recall of held-out paraphrases by decile of exposure; None with fewer than two deciles."""
    by_variant = {variant: recall_by_decile(study, variant) for variant in study.variants}
    deciles = sorted({decile for recall in by_variant.values() for decile in recall})
    if len(deciles) < 2:
        return None
    rows = [
        [variant, *(f"{recall[d]:.1%}" if d in recall else "-" for d in deciles)]
        for variant, recall in by_variant.items()
        if recall
    ]
    return Table(
        "Recall of paraphrases by decile of exposure",
        "Decile 0 holds the subjects that are shown most. With uniform exposures deciles order prominence only.",
        ["variant", *(str(decile) for decile in deciles)],
        rows,
    )


def recall_by_decile(study: Study, variant: str) -> dict[int, float]:
    """Returns the mean recall of paraphrases in each decile, over the variant's runs."""
    hits: dict[int, list[float]] = {}
    for run in study.variants[variant]:
        answers = run.answers.get("paraphrase")
        for decile, exact in zip(answers.deciles, answers.exact, strict=True) if answers else ():
            hits.setdefault(int(decile), []).append(float(exact))
    return {decile: sum(values) / len(values) for decile, values in sorted(hits.items())}


def relation_table(study: Study) -> Table | None:
    """Returns recall of held-out paraphrases by relation; None with fewer than two relations."""
    by_variant: dict[str, dict[str, list[float]]] = {}
    for variant, runs in study.variants.items():
        for run in runs:
            of_run = ((run.record["metrics"].get("recall") or {}).get("paraphrase") or {}).get("by_relation") or {}
            for relation, means in of_run.items():
                by_variant.setdefault(variant, {}).setdefault(relation, []).append(means["recall"])
    relations = sorted({relation for recalls in by_variant.values() for relation in recalls})
    if len(relations) < 2:
        return None
    recall = Quality("recall_paraphrase")
    rows = [
        [variant, *(recall.format(finite_mean(recalls.get(relation, []))) for relation in relations)]
        for variant, recalls in by_variant.items()
    ]
    return Table("Recall of paraphrases by relation", "", ["variant", *relations], rows)


def sweep_table(study: Study) -> Table | None:
    """Returns the metric of every learning rate of the sweeps."""
    sweeps = [comparison.sweep for comparison in study.comparisons if comparison.sweep and comparison.sweep["results"]]
    rates = [f"{rate:g}" for rate in sorted({rate for sweep in sweeps for rate in sweep["learning_rates"]})]
    rows, notes = [], []
    for sweep in sweeps:
        swept_rates = sorted(sweep["learning_rates"])
        for variant, results in sweep["results"].items():
            chosen = sweep["chosen"].get(variant)
            cells = {rate: "failed" if value is None else f"{value:.4f}" for rate, value in results.items()}
            if chosen is not None:
                cells[f"{chosen:g}"] += " *" + (" (edge)" if chosen in (swept_rates[0], swept_rates[-1]) else "")
            rows.append([variant, *(cells.get(rate, "") for rate in rates)])
        notes.append(
            f"{sweep['metric']} of runs with seed {', '.join(map(str, sweep['seeds']))} on {_data_of(sweep, study)}; "
            "* marks the chosen rate. At an edge of the sweep a better rate may lie outside it."
        )
    # Directories that were merged may contain one sweep twice.
    unique_rows = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    return Table("Sweep of learning rates", " ".join(dict.fromkeys(notes)), ["variant", *rates], unique_rows)


def _data_of(sweep: Mapping[str, Any], study: Study) -> str:
    """Describes the data of a sweep.

    A reader must know: rates that were chosen on the reported data favour the variants that they were chosen for.
    """
    # Earlier versions raised `data.seed`, which shares a third of the default facts.
    key = "seed" if "data_seed" in sweep else "draw"
    step = sweep["data_seed" if key == "seed" else "draw"]
    runs = {variant: study.variants[variant][0] for variant in sweep["results"] if variant in study.variants}
    same = [variant for variant, run in runs.items() if key not in (run.config.get("data") or {})]
    is_test = any(run.record.get("own_test") is False for run in runs.values())
    reported = "the data of the reported runs" + (", whose validations read what their test reads" if is_test else "")
    if not step or (same and len(same) == len(runs)):
        return reported
    raised = f"data.{key} raised by {step}: " + (
        "another draw, where the data are facts" if key == "seed" else "none of the reported subjects"
    )
    return raised + (f" ({', '.join(same)}: no data.{key}, so {reported})" if same else "")


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


def _range(quality: Quality, low: float, high: float, *, signed: bool = False) -> str:
    write = _signed if signed else Quality.format
    return f"{write(quality, low)} to {write(quality, high)}"


def _signed(quality: Quality, value: float) -> str:
    return ("+" if value > 0 else "") + quality.format(value).replace("%", " pp")


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def failures(study: Study) -> Sequence[tuple[str, str]]:
    """Returns run and reason of the runs without results."""
    return [(f"{run.variant} seed {run.seed}", run.failure) for run in study.failed]
