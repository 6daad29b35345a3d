"""Tables of a report that divide its figures: recall by exposure and by relation, and sweeps of learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkm_lightning.compare.bootstrap import finite_mean
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.study import Study
from pkm_lightning.compare.table import Column, Table, columns


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
    if has_uniform_exposures(study):
        title = "Recall of paraphrases by decile of prominence"
        note = "Decile 0 holds the most prominent subjects. All are shown equally often."
    else:
        title = "Recall of paraphrases by decile of exposure"
        note = "Decile 0 holds the subjects that are shown most."
    return Table(
        title,
        note,
        [Column("variant"), *columns(*map(str, deciles), group="decile")],
        rows,
    )


def has_uniform_exposures(study: Study) -> bool:
    """Returns whether the data of all runs show every fact equally often, as far as their configurations say."""
    runs = [run for of_variant in study.variants.values() for run in of_variant]
    return all((run.config.get("data") or {}).get("exposure_distribution") == "uniform" for run in runs)


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
    return Table("Recall of paraphrases by relation", "", [Column("variant"), *map(Column, relations)], rows)


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
    return Table(
        "Sweep of learning rates",
        " ".join(dict.fromkeys(notes)),
        [Column("variant"), *columns(*rates, group="learning rate")],
        unique_rows,
    )


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
