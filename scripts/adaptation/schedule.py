"""Which jobs of a comparison are missing, and in which order they are done: what others depend on comes first."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

from edits import edit_start
from measure import prepare_start
from methods import Method
from records import FitJob, check_plan, write
from study import LORA, Study
from workers import Job, Workers


def run_all(study: Study, workers: Workers) -> None:
    """Does what has no record; a run that fails is noted, and the others go on.

    Raises:
        SystemExit: the records are of another plan, or a starting model or LoRA cannot be trained.
    """
    check_plan(study.record_file("plan"), study.plan)
    starts = _starts(study)
    first = dict(itertools.islice(starts.items(), workers.processes))
    _finish(study, workers, first)
    if failed := study.failures().keys() & starts.keys():
        raise SystemExit(f"{', '.join(sorted(failed))} failed; {study.record_file('failures')} has the message.")
    # LoRA's tries need the first starting model alone.
    _finish(study, workers, {**_tries(study, LORA), **{n: job for n, job in starts.items() if n not in first}})
    others = (_tries(study, method).items() for method in study.chosen_methods() if method != LORA)
    _finish(study, workers, dict(itertools.chain.from_iterable(others)))
    _finish(study, workers, dict(itertools.chain.from_iterable(_runs(study, seed).items() for seed in study.seeds)))


def _finish(study: Study, workers: Workers, jobs: Mapping[str, Job]) -> None:
    for name, message in workers.run(jobs):
        failures = {other: text for other, text in study.failures().items() if other != name}
        write(study.record_file("failures"), failures if message is None else {**failures, name: message})
        print(f"{study.plan.name} {name}: {message or 'finished'}", flush=True)
        digests = (study.record(name) or {}).get("digests", ())
        if len(digests) > 1:
            print(f"warning: {name} has other weights than the model of earlier runs: {', '.join(digests)}", flush=True)


def _starts(study: Study) -> dict[str, Job]:
    """Returns the jobs that provide the starting models that are missing, or that a missing run starts from."""
    jobs: dict[str, Job] = {}
    for number, seed in enumerate(study.seeds):
        name = f"start-{seed}"
        names = [name, *(study.run_name(method, seed, replayed) for method, replayed in study.variants())]
        names += [f"edit-{seed}"] if study.includes("edit") else []
        if number == 0:
            names += [run for method in (LORA, *study.chosen_methods()) for run in study.tries(method)]
            names += ["benchmarks"] if study.benchmarks is not None else []
        if any(study.record(one) is None for one in names):
            study.task(seed)
            jobs[name] = functools.partial(
                prepare_start,
                study.plan,
                study.start(seed),
                study.start_overrides(seed),
                study.task(seed),
                seed,
                study.log(name),
                study.record_file(name),
            )
    return jobs


def _tries(study: Study, method: Method) -> dict[str, Job]:
    missing = {name: setting for name, setting in study.tries(method).items() if study.record(name) is None}
    return {name: _fit(study, name, study.command_of_try(method, setting)) for name, setting in missing.items()}


def _runs(study: Study, seed: int) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    for method, replayed in study.variants():
        name = study.run_name(method, seed, replayed)
        if study.run_record(method, seed, replayed) is None:
            jobs[name] = _fit(study, name, study.command(method, seed, replayed))
    name = f"edit-{seed}"
    if study.includes("edit") and study.record(name) is None:
        text = None if study.plan.pretrained is None else study.text_part("measured")
        place = (*study.editable(seed), study.task(seed))
        jobs[name] = functools.partial(edit_start, study.plan, *place, text, study.log(name), study.record_file(name))
    if study.benchmarks is not None and seed == study.seeds[0] and study.record("benchmarks") is None:
        jobs["benchmarks"] = functools.partial(
            study.benchmarks.write_scores, study.start(seed), study.record_file("benchmarks")
        )
    return jobs


def _fit(study: Study, name: str, command: list[str]) -> FitJob:
    return FitJob(study.folder / name, study.log(name), study.record_file(name), command, study.shown(command))
