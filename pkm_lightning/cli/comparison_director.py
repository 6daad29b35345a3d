"""The course of a comparison: data and budget, sweep, runs, report."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.cli.comparison_variants import PRELOADED, compiled_shape, is_one_process
from pkm_lightning.cli.job import Job
from pkm_lightning.cli.objective import check_objective_of, check_questions
from pkm_lightning.compare.budget import measure_speeds, steps_of_tokens, warm_up
from pkm_lightning.compare.comparison_file import Comparison, read_comparison
from pkm_lightning.compare.directory import clear_directory
from pkm_lightning.compare.live_table import shown_runs
from pkm_lightning.compare.overrides import sets_key
from pkm_lightning.compare.processes import Processes, RunEnd
from pkm_lightning.compare.report import write_report
from pkm_lightning.compare.schedule import ScheduledRun, Variant, schedule_runs, with_steps
from pkm_lightning.compare.settings import ReportSettings, Settings
from pkm_lightning.compare.study import Study, make_study
from pkm_lightning.compare.sweep import choose_rates, schedule_sweep
from pkm_lightning.compare.time_left import TimeLeft
from pkm_lightning.data.base import yields_whole_steps
from pkm_lightning.errors import Interrupted, RunDirectoryError

_log = logging.getLogger(__name__)
# Validations over a run whose length follows from a budget.
_VALIDATIONS = 10
# Seconds before the first report, and those between two in units of the seconds that one takes to write.
_FIRST_REPORT, _REPORT_EVERY = 60.0, 20


class Director:
    """Runner of a checked comparison.

    Args:
        job: the command's job.
        settings: settings of the comparison.
        report_settings: settings of its report.
        out: the comparison's directory, held by the caller.
        base: overrides of all variants.
        variants: what is compared.
        configs: the completed configuration of each variant.
        weights: expected seconds per step by variant, in any unit.
    """

    def __init__(
        self,
        job: Job,
        settings: Settings,
        report_settings: ReportSettings,
        out: Path,
        base: Sequence[str],
        variants: list[Variant],
        configs: dict[str, dict[str, Any]],
        weights: Mapping[str, float],
    ) -> None:
        self._job, self._settings, self._report_settings, self._out = job, settings, report_settings, out
        self._base, self._variants, self._configs = list(base), variants, configs
        self._requested = {(variant.name, seed) for variant in variants for seed in settings.seeds}
        sweep = settings.sweep
        self._comparison = Comparison(
            command=["python", "-m", "pkm_lightning", "compare", *job.given],
            base=self._base,
            seeds=list(settings.seeds),
            seconds=settings.budget_seconds,
            sweep=None if sweep is None else {**asdict(sweep), "results": {}, "chosen": {}},
        )
        self._processes = Processes(
            flags=job.flags,
            logs=out / "logs",
            jobs=settings.jobs,
            ranks=max(_ranks(config) for config in configs.values()),
            resume=str(job.config.resume),
            preload=PRELOADED if all(map(is_one_process, configs.values())) else (),
        )
        self._time_left = TimeLeft(jobs=settings.jobs, weights=weights)
        self._next_report = time.monotonic() + _FIRST_REPORT

    def direct(self) -> None:
        """Runs the comparison.

        Raises:
            Interrupted: a signal arrived; the running runs were asked to stop and can be resumed.
            RunDirectoryError: `out` holds another comparison; or, at the end, some runs have no results.
        """
        settings = self._settings
        self._prepare(settings.budget_tokens)
        if self._job.config.resume == "never":
            clear_directory(self._out)
        elif (earlier := read_comparison(self._out)) is not None:
            self._comparison.continue_from(earlier, self._out)
        with self._processes:
            self._run_all()
        study = self._write_report()
        if study is not None:
            self._refuse_failures(study)
        print(f"report: {self._out / 'report.html'}")

    def _run_all(self) -> None:
        """Runs what is missing: short runs, the sweep, the reported runs."""
        settings = self._settings
        if settings.budget_seconds is not None:
            self._measure_speeds(settings.budget_seconds)
        else:
            self._add(self._variants)
        self._plan()
        if settings.budget_seconds is None and settings.sweep is None and settings.warm_up:
            self._warm_up()
        rates = self._sweep()
        runs = schedule_runs(self._variants, settings, self._base, self._out, rates)
        self._run(runs, "runs", after=self._report_in_between)

    def _warm_up(self) -> None:
        """Runs two steps per set of compiled kernels that depend on shapes, so that no timed run compiles them."""
        alike: dict[str, list[Variant]] = {}
        for variant in self._variants:
            shape = compiled_shape(self._configs[variant.name])
            if shape is not None:
                alike.setdefault(shape, []).append(variant)
        cold = [group[0] for group in alike.values() if not any(map(self._has_run, group))]
        warm_up(cold, self._configs, self._base, self._out, self._processes, self._time_left)

    def _has_run(self, variant: Variant) -> bool:
        return (self._out / "runs" / variant.name).exists()

    def _refuse_failures(self, study: Study) -> None:
        """Ends the command with an error if a run that it asked for failed; earlier commands' runs do not count."""
        failed = [run for run in study.failed if (run.variant, run.seed) in self._requested]
        if failed:
            labels = [f"{run.variant} seed {run.seed}" for run in failed]
            # A diverged run has finished: starting it again would give the same.
            can_retry = any(run.record.get("status") != "finished" for run in failed)
            raise RunDirectoryError(
                f"{len(failed)} runs have no results ({', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''}); "
                f"see {self._out / 'report.md'} for the reasons{', and set resume=always to retry them' * can_retry}."
            )

    def _add(self, variants: Sequence[Variant]) -> None:
        """Adds variants to compare.json; nothing has written it before, so a refused command leaves it unchanged."""
        self._comparison.add_variants({variant.name: list(variant.overrides) for variant in variants}, self._out)
        self._comparison.save(self._out)

    def _prepare(self, budget_tokens: float | None) -> None:
        """Builds the data of each variant, of its sweep too, and gives it the steps that a budget of tokens amounts to.

        The data are built here because a run that built them would count that in its peak memory.
        """
        steps: dict[str, int] = {}
        for i, variant in enumerate(self._variants):
            config = self._configs[variant.name]
            key = json.dumps([config["data"], config["trainer"]], sort_keys=True, default=str)
            if key not in steps:
                data = instantiate(config["data"], "data")
                data.prepare_data()
                self._prepare_sweep(config)
                steps[key] = 0
                if budget_tokens is not None:
                    whole = yields_whole_steps(data)
                    steps[key] = steps_of_tokens(budget_tokens, data, config, whole_steps=whole)
            if steps[key]:
                self._variants[i] = self._with_steps(variant, steps[key])

    def _prepare_sweep(self, config: dict[str, Any]) -> None:
        sweep, data_config = self._settings.sweep, config["data"]
        if sweep is None:
            return
        draw = {"draw": data_config["draw"] + sweep.draw} if "draw" in data_config else {}
        data = instantiate({**data_config, **draw}, "data")
        data.prepare_data()
        objective = {**config, "objective": sweep.metric}
        check_objective_of(objective, key="sweep.metric")
        check_questions(data, sweep.metric, key="sweep.metric")

    def _measure_speeds(self, seconds: float) -> None:
        """Gives each variant the steps that fill `seconds`, after short runs of those whose speed is not known."""
        speeds = self._comparison.steps_per_second
        self._add(self._filling(seconds))
        unknown = [variant for variant in self._variants if variant.name not in speeds]
        self._time_left.later = seconds * len(self._variants) * (len(self._settings.seeds) + self._n_swept())
        measured, failed = measure_speeds(
            unknown, self._configs, self._base, self._out, self._processes, self._time_left
        )
        self._time_left.later = 0.0
        speeds.update(measured)
        self._leave_out(failed)
        self._variants = self._filling(seconds)
        self._add(self._variants)

    def _filling(self, seconds: float) -> list[Variant]:
        """Returns the variants whose speed is known, with the steps that fill `seconds`."""
        speeds = self._comparison.steps_per_second
        known = [variant for variant in self._variants if variant.name in speeds]
        return [self._with_steps(variant, max(1, round(speeds[variant.name] * seconds))) for variant in known]

    def _with_steps(self, variant: Variant, steps: int) -> Variant:
        key = "trainer.val_check_interval"
        validations = None if self._job.sets(key) or sets_key(variant.overrides, key) else _VALIDATIONS
        accumulate = self._configs[variant.name]["trainer"]["accumulate_grad_batches"]
        return with_steps(variant, steps, validations, accumulate)

    def _n_swept(self) -> int:
        """Returns the number of runs of the sweep per variant."""
        sweep = self._settings.sweep
        return 0 if sweep is None else len(sweep.learning_rates) * len(sweep.seeds)

    def _plan(self) -> None:
        """Plans the time left for all runs that will be started: those of the sweep and the reported ones."""
        # A run's folder does not depend on the learning rate that the sweep will choose.
        reported = schedule_runs(self._variants, self._settings, self._base, self._out, {})
        for runs in (self._swept_runs(), reported):
            to_start = self._processes.to_start(runs)
            self._time_left.plan(to_start, self._steps())
            self._time_left.learn([run for run in runs if run not in to_start], self._steps())

    def _steps(self) -> dict[str, int]:
        return {variant.name: _steps(variant, self._configs[variant.name]) for variant in self._variants}

    def _swept_runs(self) -> list[ScheduledRun]:
        sweep = self._settings.sweep
        if sweep is None:
            return []
        draws = {name: config["data"]["draw"] for name, config in self._configs.items() if "draw" in config["data"]}
        return schedule_sweep(self._variants, sweep, self._base, self._out, draws)

    def _sweep(self) -> dict[str, float]:
        """Returns the learning rate of each variant after the sweep's runs; empty without a sweep."""
        sweep, runs = self._settings.sweep, self._swept_runs()
        if sweep is None:
            return {}
        self._run(runs, "sweep of learning rates")
        results, chosen = choose_rates(runs, sweep)
        assert self._comparison.sweep is not None
        before = self._comparison.sweep["chosen"]
        # A variant whose runs have started keeps its rate, even if a rate that failed earlier would win now.
        started = [v.name for v in self._variants if v.name in before and (self._out / "runs" / v.name).exists()]
        chosen |= {name: before[name] for name in started}
        self._comparison.add_sweep(results, chosen)
        self._comparison.save(self._out)
        reason = f"no learning rate of the sweep ended with a finite {sweep.metric}"
        self._leave_out({variant.name: reason for variant in self._variants if variant.name not in chosen})
        return chosen

    def _leave_out(self, failed: Mapping[str, str]) -> None:
        """Records variants that cannot be run as failed; the report lists them, and the others go on."""
        for name, reason in failed.items():
            for seed in self._settings.seeds:
                self._comparison.failures[f"runs/{name}/seed-{seed}"] = reason
        self._variants = [variant for variant in self._variants if variant.name not in failed]
        self._time_left.drop(list(failed))
        self._comparison.save(self._out)

    def _run(self, runs: Sequence[ScheduledRun], title: str, after: Callable[[], None] = lambda: None) -> None:
        """Runs what `resume` starts of `runs`, and calls `after` at each end."""
        to_start, steps = self._processes.to_start(runs), self._steps()
        self._time_left.plan(to_start, steps)
        shown = shown_runs(runs, to_start, steps, title, self._processes, self._time_left)
        # An interruption in `after` must stop the running runs before it goes on.
        with contextlib.closing(shown) as ends:
            for end in ends:
                self._record_end(end)
                after()

    def _record_end(self, end: RunEnd) -> None:
        """Keeps the reason of a run that did not finish: a killed process cannot write it into its own record."""
        path = str(end.run.folder.relative_to(self._out))
        self._comparison.failures.pop(path, None)
        if end.exit_code:
            self._comparison.failures[path] = end.reason
        self._comparison.save(self._out)

    def _report_in_between(self) -> None:
        """Writes the report if that takes little beside the runs; an error in it must not end them."""
        started = time.monotonic()
        is_last = self._time_left.seconds() == 0.0  # `direct` writes that one
        if is_last or started < self._next_report:
            return
        try:
            self._write_report()
        except Interrupted:
            raise
        except Exception as error:
            _log.warning("the report was not written: %s", error)
        ended = time.monotonic()
        self._next_report = ended + _REPORT_EVERY * (ended - started)

    def _write_report(self) -> Study | None:
        """Writes the report and returns its study; None as long as there is no run."""
        if not list(self._out.glob("runs/*/*/run.json")) and not self._comparison.failures:
            return None
        study = make_study([self._out], self._report_settings)
        write_report(study, self._out)
        return study


def _steps(variant: Variant, config: dict[str, Any]) -> int:
    # A budget adds its steps to the variant's overrides, after the configuration was composed.
    steps = [o.partition("=")[2] for o in variant.overrides if o.startswith("trainer.max_steps=")]
    return int(steps[-1]) if steps else int(config["trainer"]["max_steps"])


def _ranks(config: dict[str, Any]) -> int:
    devices = config["trainer"]["devices"]
    return devices if isinstance(devices, int) and devices > 0 else 1
