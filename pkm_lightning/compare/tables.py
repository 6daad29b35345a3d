"""The tables of a report: columns and cells as text, which HTML and Markdown only lay out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkm_lightning.compare.bootstrap import plain_mean
from pkm_lightning.compare.curves import read_off
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.study import Study


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: a few words.
        note: what a reader must know; may be empty.
        columns, rows: texts; the first column names the variant.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def all_tables(study: Study) -> list[Table]:
    """Those that the runs have figures for."""
    if study.resampled is None:
        return []
    made = [quality_table(study), multiplier_table(study), cost_table(study), storage_table(study)]
    made += [decile_table(study), relation_table(study), sweep_table(study)]
    return [table for table in made if table is not None and table.rows]


def quality_table(study: Study) -> Table:
    """Quality of every seed, mean, interval, difference to the reference, and at another equal moment."""
    quality, resampled, reference = study.quality, study.resampled, study.reference
    assert resampled is not None
    assert reference is not None
    seeds = sorted({run.seed for runs in study.arms.values() for run in runs})
    axis = "tokens" if study.is_equal_time else "seconds"
    moment = study.mean_cost(reference, "tokens" if study.is_equal_time else "seconds_train")
    forms = _other_forms(study)
    rows = []
    for arm, runs in study.arms.items():
        by_seed = {run.seed: quality.value(run) for run in runs}
        difference, low, high = resampled.difference(arm, reference)
        read = [read_off(run, quality, axis, moment) for run in runs]
        rows.append([
            arm,
            *(quality.written(by_seed.get(seed, math.nan)) for seed in seeds),
            quality.written(resampled.mean[arm]),
            _range(quality, *resampled.interval(arm)),
            "" if arm == reference else f"{_signed(quality, difference)} ({_range(quality, low, high, signed=True)})",
            # A mean over some seeds only would leave out just the slow ones.
            quality.written(sum(read) / len(read)),
            *(other.written(plain_mean([other.value(run) for run in runs])) for other in forms),
            ", ".join(sorted({f"{run.config['optim']['lr']:g}" for run in runs})),
        ])  # fmt: skip
    finals, others = ("seconds", "tokens") if study.is_equal_time else ("tokens", "seconds")
    equal = f"{moment:,.0f} {others}"
    partly = " Not all variants have the same seeds and facts: what they have in common is resampled together."
    return Table(
        f"{quality.label.capitalize()} at {'unequal' if study.is_unequal_length else 'equal'} {finals}",
        f"Final test of each run. {_interval_note(study)}{'' if resampled.is_paired else partly} "
        f"'At {equal}' is read off each run's validations where {reference} ends: the learning rates of longer runs "
        "have not come down there, a run that ended earlier keeps its last value, and validations ask fewer questions.",
        ["variant", *(f"seed {seed}" for seed in seeds), "mean", "95% interval", f"less {reference}", f"at {equal}",
         *(other.label for other in forms), "learning rate"],
        rows,
    )  # fmt: skip


def _interval_note(study: Study) -> str:
    assert study.resampled is not None
    over, n_seeds = study.resampled.over, min(len(runs) for runs in study.arms.values())
    if not over:
        return "Of one seed and no questions there is no interval."
    few = f"; {n_seeds} seeds understate how seeds differ" if n_seeds > 1 and "seeds" in over else ""
    few = few or "; of one seed it does not say how seeds differ"
    pairs = "paired " if study.resampled.is_paired else ""
    return (
        f"The interval is a 95% percentile interval of {study.settings.resamples:,} {pairs}resamples over {over}{few}."
    )


def multiplier_table(study: Study) -> Table | None:
    """How much more compute, and time, a dense model needs for the same quality."""
    if not study.multipliers:
        return None
    assert study.resampled is not None
    assert study.reference is not None
    rows = []
    for arm in study.multipliers["trunk"]:
        cells = []
        for basis, found in study.multipliers.items():
            share = study.spent(arm, basis) / study.spent(study.reference, basis)
            between = "-" if math.isnan(found[arm].low.value) else f"{found[arm].low} to {found[arm].high}"
            cells += [f"{share:.2f}x", str(found[arm].value), between]
        rows.append([arm, study.quality.written(study.resampled.mean[arm]), *cells])
    rungs = ", ".join(f"{arm} {study.quality.written(study.resampled.mean[arm])}" for arm in study.ladder)
    return Table(
        "Compute and time multipliers",
        "How many times a variant's training compute a dense model needs for the same quality, interpolated in the "
        f"logarithm of compute over {rungs}. 'Own' is the variant's compute over that of {study.reference}. 'Trunk': "
        "all layers without embedding and unembedding. 'Model': with the unembedding at every position, though "
        "training computes it only where there is a target. 'Time': the same of training seconds, as this machine took "
        "them. '>=': better than the largest dense model; '<=': no better than the smallest. The interval resamples "
        "quality; compute and seconds are taken as they are.",
        ["variant", study.quality.label, *(f"{basis}, {what}" for basis in study.multipliers
                                           for what in ("own", "multiplier", "95% interval"))],
        rows,
    )  # fmt: skip


def cost_table(study: Study) -> Table:
    """Parameters, FLOPs, bytes, speed, memory."""
    shown = (
        ("parameters", "params_total", _count),
        ("active", "params_active", _count),
        ("in tables", "params_table", _count),
        ("FLOPs a token, trunk forward", "trunk_flops_forward", _count),
        ("model, training", "model_flops_train", _count),
        ("model, decoding", "model_flops_decode", _count),
        ("bytes a token, training", "bytes_train", _count),
        ("decoding", "bytes_decode", _count),
        ("tokens", "tokens", _count),
        ("training seconds", "seconds_train", _count),
        ("tokens/s", "tokens_per_second", _count),
        ("peak memory, MB", "peak_memory_bytes", lambda value: _count(value / 1e6)),
    )
    rows = [[arm, *(write(study.mean_cost(arm, name)) for _, name, write in shown)] for arm in study.arms]
    return Table(
        "Cost",
        "Means over seeds. Active: parameters of one token's arithmetic. Bytes in training are rows of embedding and "
        "tables that a token moves for itself; in decoding, parameters read at batch 1. Seconds are those of training "
        "alone, as the machine was.",
        ["variant", *(label for label, _, _ in shown)],
        rows,
    )


def storage_table(study: Study) -> Table | None:
    """Bits of knowledge about the facts of training, and per parameter."""
    rows = []
    for arm in study.arms:
        a_fact, stored = study.bits_stored(arm)
        if math.isfinite(stored):
            per = [stored / study.mean_cost(arm, name) for name in ("params_total", "params_active")]
            rows.append([arm, f"{a_fact:.2f}", f"{stored / 1e3:,.1f}", *(f"{value:.3f}" for value in per)])
    return Table(
        "Storage",
        "Bits of knowledge about a fact: -log2 of its answer's share in the relation, less the model's -log2 "
        "probability of the answer after a held-out paraphrase; not clipped at 0. Stored: that mean times all facts of "
        "training.",
        ["variant", "bits a fact", "kbit stored", "bits a parameter", "bits an active parameter"],
        rows,
    )


def decile_table(study: Study) -> Table | None:
    """Recall of held-out paraphrases by decile of exposure."""
    by_arm = {arm: by_decile(study, arm) for arm in study.arms}
    deciles = sorted({decile for found in by_arm.values() for decile in found})
    if len(deciles) < 2:
        return None
    rows = [
        [arm, *(f"{found[d]:.1%}" if d in found else "-" for d in deciles)] for arm, found in by_arm.items() if found
    ]
    return Table(
        "Recall of paraphrases by decile of exposure",
        "Decile 0 holds the subjects that are shown most. With uniform exposures deciles are of prominence alone.",
        ["variant", *(str(decile) for decile in deciles)],
        rows,
    )


def by_decile(study: Study, arm: str) -> dict[int, float]:
    """Mean recall of paraphrases in each decile, over the arm's runs."""
    hits: dict[int, list[float]] = {}
    for run in study.arms[arm]:
        answers = run.answers.get("paraphrase")
        for decile, exact in zip(answers.deciles, answers.exact, strict=True) if answers else ():
            hits.setdefault(int(decile), []).append(float(exact))
    return {decile: sum(values) / len(values) for decile, values in sorted(hits.items())}


def relation_table(study: Study) -> Table | None:
    """Recall of held-out paraphrases by relation."""
    by_arm: dict[str, dict[str, list[float]]] = {}
    for arm, runs in study.arms.items():
        for run in runs:
            of_run = ((run.record["metrics"].get("recall") or {}).get("paraphrase") or {}).get("by_relation") or {}
            for relation, means in of_run.items():
                by_arm.setdefault(arm, {}).setdefault(relation, []).append(means["recall"])
    relations = sorted({relation for found in by_arm.values() for relation in found})
    if len(relations) < 2:
        return None
    recall = Quality("recall_paraphrase")
    rows = [[arm, *(recall.written(plain_mean(found.get(r, []))) for r in relations)] for arm, found in by_arm.items()]
    return Table("Recall of paraphrases by relation", "", ["variant", *relations], rows)


def sweep_table(study: Study) -> Table | None:
    """What every learning rate of a sweep gave."""
    sweeps = [comparison.sweep for comparison in study.comparisons if comparison.sweep and comparison.sweep["results"]]
    rates = [f"{rate:g}" for rate in sorted({rate for sweep in sweeps for rate in sweep["learning_rates"]})]
    rows, notes = [], []
    for sweep in sweeps:
        tried = sorted(sweep["learning_rates"])
        for arm, results in sweep["results"].items():
            chosen = sweep["chosen"].get(arm)
            cells = {rate: "failed" if value is None else f"{value:.4f}" for rate, value in results.items()}
            if chosen is not None:
                cells[f"{chosen:g}"] += " *" + (" (edge)" if chosen in (tried[0], tried[-1]) else "")
            rows.append([arm, *(cells.get(rate, "") for rate in rates)])
        notes.append(
            f"{sweep['metric']} of runs with seed {', '.join(map(str, sweep['seeds']))} on {_data_of(sweep, study)}; "
            "* the chosen rate. At an edge of the sweep a better rate may lie outside."
        )
    once = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    return Table("Sweep of learning rates", " ".join(dict.fromkeys(notes)), ["variant", *rates], once)


def _data_of(sweep: Mapping[str, Any], study: Study) -> str:
    """On which data a sweep chose, in words: rates chosen on the reported data flatter whom they were chosen for."""
    swept = [arm for arm in sweep["results"] if arm in study.arms]
    same = [arm for arm in swept if "seed" not in (study.arms[arm][0].config.get("data") or {})]
    if not sweep["data_seed"] or (same and len(same) == len(swept)):
        return "the data of the reported runs"
    raised = f"data.seed raised by {sweep['data_seed']}: another draw, where the data are facts"
    return raised + (f" ({', '.join(same)}: no data.seed, so the data of the reported runs)" if same else "")


def _other_forms(study: Study) -> list[Quality]:
    """Figures beside the one that the report is about, as far as any run has them."""
    candidates = [Quality(name) for name in ("recall_paraphrase", "recall_question", "recall_control", "test/loss")]
    runs = [run for own in study.arms.values() for run in own]
    others = [q for q in candidates if q.metric != study.quality.metric]
    return [q for q in others if any(math.isfinite(q.value(run)) for run in runs)]


def _range(quality: Quality, low: float, high: float, *, signed: bool = False) -> str:
    write = _signed if signed else (lambda q, value: q.written(value))
    return f"{write(quality, low)} to {write(quality, high)}"


def _signed(quality: Quality, value: float) -> str:
    return ("+" if value > 0 else "") + quality.written(value).replace("%", " pp")


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def failures(study: Study) -> Sequence[tuple[str, str]]:
    """Run and reason of what gave no figures."""
    return [(f"{run.arm} seed {run.seed}", run.failure) for run in study.failed]
