"""`compare`: variants times seeds, a process a run, after an equal sweep of learning rates; then one report.

The directory `out` holds compare.json, runs/ARM/seed-N, sweep/ARM/lr-X/seed-N, logs, and the report. The same command
goes on where an earlier one stopped: finished runs stay, interrupted ones continue.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.cli.comparison_arms import arm_config, base_overrides, make_arms
from pkm_lightning.cli.job import Interrupted, Job, plain
from pkm_lightning.compare.budget import steps_of_tokens
from pkm_lightning.compare.calibration import measured_speeds, warm_up
from pkm_lightning.compare.comparison_file import Comparison, read_comparison
from pkm_lightning.compare.live_table import LiveTable
from pkm_lightning.compare.overrides import says
from pkm_lightning.compare.plan import Arm, PlannedRun, plan_runs, plan_sweep, with_steps
from pkm_lightning.compare.processes import STARTED, Ended, Processes
from pkm_lightning.compare.report import write_report
from pkm_lightning.compare.run_state import is_held
from pkm_lightning.compare.settings import ReportSettings, Settings, read_report_settings, read_settings
from pkm_lightning.compare.study import Study, make_study
from pkm_lightning.compare.sweep import check_swept, choose_rates
from pkm_lightning.errors import ConfigError, RunDirectoryError, check_choice
from pkm_lightning.storage import hold

_log = logging.getLogger(__name__)
#: Validations over a run whose length the budget decides.
_VALIDATIONS = 10


def run(job: Job) -> None:
    """Runs what is missing and writes the report after each run that ends."""
    check_choice("resume", str(job.config.resume), STARTED)
    settings, shown = read_settings(plain(job.config)), read_report_settings(plain(job.config))
    if job.config.out is None or not str(job.config.out).strip():
        raise ConfigError("out is not set; give the comparison's directory as out=DIR.")
    out = Path(str(job.config.out)).absolute()
    base = base_overrides(job)
    arms = make_arms(job, settings, base)
    _check_said_once(job, settings, arms)
    configs = {arm.name: arm_config(arm, base).config for arm in arms}
    if all("progress_bar" in (config["callbacks"] or {}) for config in configs.values()):
        base = [*base, "~callbacks.progress_bar"]
    with _held(out), _signals_stop():
        Director(job, settings, shown, out, base, arms, configs).direct()


class Director:
    """Carries a checked comparison out.

    Args:
        job: of the command.
        settings: what was asked for.
        shown: of the report.
        out: the comparison's directory, held.
        base: overrides of all arms.
        arms: the arms.
        configs: the completed configuration of each.
    """

    def __init__(
        self,
        job: Job,
        settings: Settings,
        shown: ReportSettings,
        out: Path,
        base: Sequence[str],
        arms: list[Arm],
        configs: dict[str, dict[str, Any]],
    ) -> None:
        self._job, self._settings, self._shown, self._out = job, settings, shown, out
        self._base, self._arms, self._configs = list(base), arms, configs
        self._asked = {(arm.name, seed) for arm in arms for seed in settings.seeds}
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
        )

    def direct(self) -> None:
        """Budget, sweep, runs, report.

        Raises:
            Interrupted: a signal asked for it; what ran was asked to stop and can be continued.
            RunDirectoryError: `out` is about something else; or, at the end, some runs gave no figures.
        """
        settings = self._settings
        self._prepare(settings.budget_tokens)
        if self._job.config.resume == "never":
            _clear(self._out)
        elif (earlier := read_comparison(self._out)) is not None:
            self._comparison.continue_from(earlier, self._out)
        if settings.budget_seconds is not None:
            self._measure_speeds(settings.budget_seconds)
        else:
            self._join(self._arms)
            if settings.sweep is None and settings.warm_up:
                warm_up(self._arms, self._configs, self._base, self._out, self._processes)
        rates = self._sweep()
        runs = plan_runs(self._arms, settings, self._base, self._out, rates)
        self._run(runs, "runs", after=lambda _: self._try_report())
        study = self._write_report()
        failed = [run for run in study.failed if (run.arm, run.seed) in self._asked] if study else []
        if failed:
            labels = [f"{run.arm} seed {run.seed}" for run in failed]
            again = any(run.record.get("status") != "finished" for run in failed)
            raise RunDirectoryError(
                f"{len(failed)} runs gave no figures ({', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''}); "
                f"{self._out / 'report.md'} says why{', and resume=always tries again what failed' * again}."
            )
        print(f"report: {self._out / 'report.html'}")

    def _join(self, arms: Sequence[Arm]) -> None:
        """Adds arms to compare.json, which nothing has changed before: a refused command leaves it as it was."""
        self._comparison.add_arms({arm.name: list(arm.overrides) for arm in arms}, self._out)
        self._comparison.save(self._out)

    def _prepare(self, budget_tokens: float | None) -> None:
        """Builds the data once, that no run's memory counts it; gives each arm the steps that a budget of tokens is."""
        counted: dict[str, int] = {}
        for i, arm in enumerate(self._arms):
            config = self._configs[arm.name]
            key = json.dumps([config["data"], config["trainer"]], sort_keys=True, default=str)
            if key not in counted:
                data = instantiate(config["data"], "data")
                data.prepare_data()
                counted[key] = 0 if budget_tokens is None else steps_of_tokens(budget_tokens, data, config)
            if counted[key]:
                self._arms[i] = self._with_steps(arm, counted[key])

    def _measure_speeds(self, seconds: float) -> None:
        """Gives each arm the steps that fill `seconds`, after short runs of those whose speed is not known."""
        known = self._comparison.steps_per_second
        self._join(self._filling(seconds))
        missing = [arm for arm in self._arms if arm.name not in known]
        measured, failed = measured_speeds(missing, self._configs, self._base, self._out, self._processes)
        known.update(measured)
        self._leave_out(failed)
        self._arms = self._filling(seconds)
        self._join(self._arms)

    def _filling(self, seconds: float) -> list[Arm]:
        """The arms whose speed is known, with the steps that fill `seconds`."""
        speeds = self._comparison.steps_per_second
        return [
            self._with_steps(arm, max(1, round(speeds[arm.name] * seconds))) for arm in self._arms if arm.name in speeds
        ]

    def _with_steps(self, arm: Arm, steps: int) -> Arm:
        said = self._job.names("trainer.val_check_interval") or says(arm.overrides, "trainer.val_check_interval")
        validations = None if said else _VALIDATIONS
        return with_steps(arm, steps, validations, self._configs[arm.name]["trainer"]["accumulate_grad_batches"])

    def _sweep(self) -> dict[str, float]:
        """The learning rate of each arm; none without a sweep."""
        sweep = self._settings.sweep
        if sweep is None:
            return {}
        data_seeds = {name: config["data"].get("seed") for name, config in self._configs.items()}
        known = {name: seed for name, seed in data_seeds.items() if isinstance(seed, int)}
        runs = plan_sweep(self._arms, sweep, self._base, self._out, known)
        for run in runs:
            check_swept(run, sweep)
        self._run(runs, "sweep of learning rates", after=lambda end: check_swept(end.run, sweep))
        results, chosen = choose_rates(runs, sweep)
        assert self._comparison.sweep is not None
        before = self._comparison.sweep["chosen"]
        begun = [arm.name for arm in self._arms if arm.name in before and (self._out / "runs" / arm.name).exists()]
        # What a run was begun with stays, though a rate that failed in an earlier sitting may have won since.
        chosen |= {name: before[name] for name in begun}
        self._comparison.add_sweep(results, chosen)
        self._comparison.save(self._out)
        reason = f"no learning rate of the sweep ended with a finite {sweep.metric}"
        self._leave_out({arm.name: reason for arm in self._arms if arm.name not in chosen})
        return chosen

    def _leave_out(self, failed: Mapping[str, str]) -> None:
        """Arms that cannot be run appear in the report as failed, and the others go on."""
        for name, reason in failed.items():
            for seed in self._settings.seeds:
                self._comparison.failures[f"runs/{name}/seed-{seed}"] = reason
        self._arms = [arm for arm in self._arms if arm.name not in failed]
        self._comparison.save(self._out)

    def _run(self, runs: Sequence[PlannedRun], title: str, after: Callable[[Ended], None]) -> None:
        todo = self._processes.to_start(runs)
        steps = {arm.name: _steps(arm, self._configs[arm.name]) for arm in self._arms}
        with (
            LiveTable(runs, steps, title) as table,
            contextlib.closing(self._processes.run(todo, table.running)) as ends,
        ):
            for end in ends:
                table.ended(end)
                self._note(end)
                after(end)

    def _note(self, end: Ended) -> None:
        """Keeps what a run said that did not finish: a killed one could not write it into its record."""
        path = str(end.run.folder.relative_to(self._out))
        self._comparison.failures.pop(path, None)
        if end.exit_code:
            self._comparison.failures[path] = end.words
        self._comparison.save(self._out)

    def _try_report(self) -> None:
        """A report that cannot be written now must not end the runs."""
        try:
            self._write_report()
        except Interrupted:
            raise
        except Exception as error:
            _log.warning("the report was not written: %s", error)

    def _write_report(self) -> Study | None:
        """Writes the report; None as long as there is no run."""
        if not list(self._out.glob("runs/*/*/run.json")) and not self._comparison.failures:
            return None
        study = make_study([self._out], self._shown)
        write_report(study, self._out)
        return study


def _steps(arm: Arm, config: dict[str, Any]) -> int:
    # What a variant says is in its configuration; what a budget has come to is the last of its overrides alone.
    own = [o.partition("=")[2] for o in arm.overrides if o.startswith("trainer.max_steps=")]
    return int(own[-1]) if own else int(config["trainer"]["max_steps"])


def _ranks(config: dict[str, Any]) -> int:
    devices = config["trainer"]["devices"]
    return devices if isinstance(devices, int) and devices > 0 else 1


def _clear(out: Path) -> None:
    """Removes what an earlier comparison has left but for compare.json, which says that it is one until it is replaced.

    Raises:
        RunDirectoryError: one of its runs is still under way, or it cannot be removed.
    """
    held = [lock.parent for lock in out.glob("*/**/.lock") if is_held(lock.parent)]
    if held:
        raise RunDirectoryError(f"{held[0]} is being run by another process; wait for it or stop it.")
    try:
        for name in ("runs", "sweep", "speed", "logs", "plots", "hparams"):
            if (out / name).exists():
                shutil.rmtree(out / name)
        for name in ("report.html", "report.md", "runs.csv"):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{error.filename} cannot be removed ({error.strerror}); choose another out.") from None


def _check_said_once(job: Job, settings: Settings, arms: Sequence[Arm]) -> None:
    """Refuses a learning rate beside a sweep, and a budget beside a number of steps.

    Raises:
        ConfigError: both are said.
    """
    if settings.sweep is not None and job.names("optim.lr"):
        raise ConfigError("optim.lr and lr_sweep both say the learning rate; leave one out, or set lr_sweep=null.")
    if settings.budget_tokens is None and settings.budget_seconds is None:
        return
    saying = [arm.name for arm in arms if says(arm.overrides, "trainer.max_steps")]
    if job.names("trainer.max_steps") or saying:
        where = f"variants.{saying[0]}.trainer.max_steps" if saying else "trainer.max_steps"
        raise ConfigError(f"budget and {where} both say how long a run is; leave one of them out.")


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """One command works on a directory at a time.

    Raises:
        RunDirectoryError: another one does, it cannot be written, or it is something else.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a")
    except OSError as error:
        raise RunDirectoryError(f"out={out} cannot be written ({error.strerror}); choose another.") from None
    with lock:
        if not hold(lock):
            raise RunDirectoryError(f"out={out} is held by another comparison that is running; wait for it.")
        others = sorted(entry.name for entry in out.iterdir() if entry.name not in (".lock", "compare.json.tmp"))
        if others and not (out / "compare.json").exists():
            raise RunDirectoryError(
                f"out={out} is not empty ({', '.join(others[:4])}) and no comparison; choose another."
            )
        yield


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the comparison in order; the runs are stopped by what waits for them."""

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        print("stopping: each run writes a checkpoint", file=sys.stderr)
        raise Interrupted("interrupted; the same command continues", 128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
