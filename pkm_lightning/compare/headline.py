"""The head of a report: what was asked, of which model, data and budget, the answer, and what limits it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pkm_lightning.compare.amounts import compact, seconds
from pkm_lightning.compare.answer import answer, ordered_candidates
from pkm_lightning.compare.conditions import in_a_row, meeting
from pkm_lightning.compare.leaves import leaves
from pkm_lightning.compare.limits import CEILING
from pkm_lightning.compare.pairs import Pair, pair
from pkm_lightning.compare.study import Study
from pkm_lightning.compare.table import Table, columns

_MATCHES = {
    "flops": "Each is sized to the same forward FLOPs per token of the trunk (match=flops).",
    "params": "Each is sized to the same number of parameters (match=params).",
    "none": "Each has the size that its configuration gives it (match=none).",
}
# Keys of `data` that a reader asks for first, in the order of a sentence.
_DATA_KEYS = ("path", "exposures", "exposure_distribution", "loss")
# Runs that a sentence names before it counts the remaining ones.
_NAMED = 3
# With fewer seeds the resampled spread of seeds is far too narrow; see `bootstrap`.
_FEW_SEEDS = 5


@dataclass(frozen=True)
class Headline:
    """The head of a report.

    Args:
        answer: one sentence.
        multiplier: the compute that a dense model needs for the same, in a sentence; empty without a ladder.
        circumstances: what was asked, model, data and budget: label and text.
        side_by_side: the best variant and the reference at equal tokens, seconds and parameters; None without two.
        remarks: sentences about what limits the answer.
    """

    answer: str
    multiplier: str
    circumstances: list[tuple[str, str]]
    side_by_side: Table | None
    remarks: list[str]


def headline(study: Study) -> Headline:
    """Returns the head of the report on `study`."""
    has_results = study.resampled is not None
    return Headline(
        answer=answer(study),
        multiplier=_multiplier(study) if has_results else "",
        circumstances=[(label, text) for label, text in _circumstances(study) if text],
        side_by_side=_side_by_side(study) if has_results else None,
        remarks=[*_of_limits(study), *_of_seeds(study), *_of_runs(study)] if has_results else [],
    )


def _circumstances(study: Study) -> Iterable[tuple[str, str]]:
    configs = [dict(leaves(run.config)) for run in study.runs if run.config]
    yield "question", _question(study, configs)
    yield "model", _model(study, configs)
    yield "data", _data(study, configs)
    yield "budget", _budget(study, configs)
    yield "learning rate", _learning_rate(study, configs)


def _question(study: Study, configs: Sequence[Mapping[str, Any]]) -> str:
    arguments = [argument for comparison in study.comparisons for argument in comparison.command]
    names = [name for argument in arguments if (name := argument.removeprefix("experiment=")) != argument]
    matches, variants = _values(configs, "match"), list(dict.fromkeys(run.variant for run in study.runs))
    sized = f" {_MATCHES[matches[0]]}" if len(matches) == 1 and matches[0] in _MATCHES else ""
    experiment = f" experiment={','.join(dict.fromkeys(names))}." if names else ""
    if len(variants) < 2:
        return f"What is the {study.quality.label} of {variants[0]}?{sized}{experiment}"
    better = "highest" if study.quality.higher_is_better else "lowest"
    return f"Which of {len(variants)} variants has the {better} {study.quality.label}?{sized}{experiment}"


def _model(study: Study, configs: Sequence[Mapping[str, Any]]) -> str:
    layers, dims = _values(configs, "model.n_layers"), _values(configs, "model.dim")
    size = f"{in_a_row(layers)} layers of dimension {in_a_row(dims)}" if layers and dims else ""
    known = {variant: study.mean_cost(variant, "params_total") for variant in study.variants}
    known = {variant: value for variant, value in known.items() if math.isfinite(value)}
    parameters = ""
    if known:
        least, most = min(known, key=lambda v: known[v]), max(known, key=lambda v: known[v])
        parameters = f"{compact(known[least])} parameters"
        if compact(known[least]) != compact(known[most]):
            parameters = f"{compact(known[least])} ({least}) to {compact(known[most])} parameters ({most})"
    paths = [PurePath(path).name for path in _values(configs, "model.path")]
    return "; ".join(filter(None, [in_a_row(paths), size, parameters]))


def _data(study: Study, configs: Sequence[Mapping[str, Any]]) -> str:
    names = [name.rsplit(".", 1)[-1] for name in _values(configs, "data._target_")]
    values = {key: _values(configs, f"data.{key}") for key in _DATA_KEYS}
    # A path's folders are those of somebody's machine.
    values["path"] = [PurePath(path).name for path in values["path"]]
    settings = [f"{key}={','.join(of_key)}" for key, of_key in values.items() if of_key]
    facts = [study.mean_cost(variant, "facts") for variant in study.variants]
    asked = [len(study.quality.prompts(run)) for runs in study.variants.values() for run in runs]
    parts = [in_a_row(names) + (f" with {' '.join(settings)}" if settings else "")] if names else []
    parts += [f"{_span(facts, '{:,.0f}')} facts"] if any(map(math.isfinite, facts)) else []
    parts += [f"{_span(asked, '{:,}')} questions in the test"] if any(asked) else []
    return "; ".join(parts)


def _budget(study: Study, configs: Sequence[Mapping[str, Any]]) -> str:
    budgets = [comparison.seconds for comparison in study.comparisons if comparison.seconds]
    tokens = [study.mean_cost(variant, "tokens") for variant in study.variants]
    steps = [int(step) for step in _values(configs, "trainer.max_steps") if step.isdigit()]
    parts = [f"{_span(budgets, '{:g}')} training seconds per run"] if budgets else []
    if tokens:
        least, most = compact(min(tokens)), compact(max(tokens))
        parts.append(f"{least if least == most else f'{least} to {most}'} tokens per run")
    parts += [f"{_span(steps, '{:,}')} steps"] if steps else []
    seeds = [str(seed) for seed in sorted({run.seed for run in study.runs})]
    return ", ".join([*parts, f"seed{'s' * (len(seeds) > 1)} {in_a_row(seeds)}"])


def _learning_rate(study: Study, configs: Sequence[Mapping[str, Any]]) -> str:
    sweeps = [comparison.sweep for comparison in study.comparisons if comparison.sweep]
    if sweeps:
        tried = sorted({rate for sweep in sweeps for rate in sweep["learning_rates"]})
        metrics = list(dict.fromkeys(str(sweep["metric"]) for sweep in sweeps))
        among = in_a_row([f"{rate:g}" for rate in tried])
        return f"chosen for each variant among {among} by {in_a_row(metrics)} of other runs"
    rates = _values(configs, "optim.lr")
    one = f"{rates[0]} for every variant" if len(rates) == 1 else f"{in_a_row(rates)}, set by hand"
    return f"{one}; no sweep" if rates else ""


def _values(configs: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    """Returns the different values of a key as texts, as far as configurations have it."""
    return list(dict.fromkeys(str(config[key]) for config in configs if config.get(key) is not None))


def _span(values: Iterable[float], form: str) -> str:
    """Returns the least and the greatest of the finite values, or the one value that there is."""
    finite = [value for value in values if math.isfinite(value)]
    return " to ".join(dict.fromkeys((form.format(min(finite)), form.format(max(finite)))))


#: What a dense model needs, by `costs.BASES`.
_IN_WORDS = {
    "trunk": "{} the FLOPs in the trunk",
    "model": "{} in the whole model",
    "time": "{} the training seconds",
    "processor": "{} the processor seconds",
}


def _multiplier(study: Study) -> str:
    """Returns what a dense model needs for the quality of the best variant."""
    variants = [variant for variant in ordered_candidates(study) if variant in study.multipliers.get("trunk", {})]
    if not variants:
        return ""
    parts = []
    for basis, text in _IN_WORDS.items():
        one = study.multipliers.get(basis, {}).get(variants[0])
        if one is not None and not math.isnan(one.value.value):
            parts.append(text.format(f"{one.value}{f' ({one.low} to {one.high})' if one.has_interval else ''}"))
    return f"For the quality of {variants[0]} a dense model needs {in_a_row(parts)}." if parts else ""


def _side_by_side(study: Study) -> Table | None:
    """Returns the best variant and the reference, or the reference and who comes next, at equal this and that."""
    assert study.resampled is not None
    others = [variant for variant in ordered_candidates(study) if variant != study.reference]
    if not others:
        return None
    one, other, quality, met = others[0], str(study.reference), study.quality, meeting(study)
    difference = pair(study.resampled, one, other)
    at = met.quality[one], met.quality[other]
    is_known = all(map(math.isfinite, at))
    finals = f"{'unequal' if study.is_unequal_length else 'equal'} {'seconds' if study.is_equal_time else 'tokens'}"
    moment = f"{compact(met.moment)} tokens" if study.is_equal_time else f"{seconds(met.moment)} s"
    rows = [
        [f"{finals}: the final test", *(quality.format(study.resampled.mean[v]) for v in (one, other)),
         _with_unit(study, difference)],
        [f"equal {met.axis} ({moment}): by validations", *(quality.format(value) for value in at),
         _with_unit(study, Pair(at[0] - at[1], math.nan, math.nan)) if is_known else "not known"],
    ]  # fmt: skip
    for label, name in (
        ("parameters", "params_total"),
        ("forward FLOPs per token, trunk", "trunk_flops_forward"),
        ("tokens", "tokens"),
        ("training seconds", "seconds_train"),
    ):
        costs = study.mean_cost(one, name), study.mean_cost(other, name)
        write = seconds if name == "seconds_train" else compact
        is_ratio = all(map(math.isfinite, costs)) and costs[1] > 0
        rows.append([label, *map(write, costs), f"{costs[0] / costs[1]:.2f}x" if is_ratio else "-"])
    return Table(
        "Side by side",
        f"By validations: interpolated where {other} ends, without an interval. There the learning rates of longer "
        "runs have not decayed yet, and validations ask fewer questions.",
        columns(quality.label, one, other, f"{one} against {other}"),
        rows,
    )


def _with_unit(study: Study, difference: Pair) -> str:
    """Returns `+34.6 points (+32.5 to +36.5)`."""
    size, *ends = study.quality.format_difference(difference.difference, difference.low, difference.high).split(" (")
    return " (".join([f"{size} {study.quality.unit}".rstrip(), *ends])


def _of_limits(study: Study) -> Iterable[str]:
    ceiling, floor = study.limits.ceiling, study.limits.floor
    if ceiling:
        yield (
            f"At the ceiling, {CEILING:.0%} or more: {in_a_row(ceiling)}. Differences among them mean little; more "
            "facts or fewer exposures would separate them."
        )
    if floor:
        chance = study.quality.format(max(floor.values()))
        yield (
            f"At the floor, not separated from what is recalled of subjects never trained ({chance}): "
            f"{in_a_row(list(floor))}. Differences among them mean nothing."
        )


def _of_seeds(study: Study) -> Iterable[str]:
    assert study.resampled is not None
    n_seeds = min(len(runs) for runs in study.variants.values())
    if n_seeds == 1:
        yield "One seed: no interval includes how much seeds differ, and another seed may order the variants otherwise."
    elif n_seeds < _FEW_SEEDS:
        yield f"{n_seeds} seeds: the intervals understate how much seeds differ."
    if not study.resampled.is_paired:
        yield "Not all variants have the same seeds and questions: only what two of them share is paired."


def _of_runs(study: Study) -> Iterable[str]:
    if study.unfair:
        yield "These runs differ in more than the FFN and its size, which the answer may be due to: see the warning."
    if study.failed:
        labels = [f"{run.variant} seed {run.seed}" for run in study.failed]
        missing = list(dict.fromkeys(run.variant for run in study.failed if run.variant not in study.variants))
        shown = [*labels[:_NAMED], *([f"{len(labels) - _NAMED} more"] if len(labels) > _NAMED else [])]
        without = f" Missing from the answer: {in_a_row(missing)}." if missing else ""
        plural = "s have" if len(labels) > 1 else " has"
        yield f"{len(labels)} run{plural} no results ({in_a_row(shown)}).{without}"
