"""The runs of a comparison: starting models, settings chosen on other facts, then every method with every seed.

Each run is a `fit` with its own directory: one that is finished is used again, so that a comparison that was stopped
continues with the run in which it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import CommandFailed, fit, status
from curves import LEARNED, Point, read_curve, start_point
from edits import measure_edit
from measure import Benchmarks, measure_start
from methods import METHODS, Method, Setting, overrides, replay, settings, sizes
from plans import Plan
from tasks import further_questions, task_folder

from pkm_lightning.data.facts.invented_files import FACTS, TRAIN
from pkm_lightning.storage import write_beside

#: Draw of the facts on which settings are chosen, and seed of the runs that do.
_OTHER_FACTS = 0
_BYTES_PER_PARAMETER = 4
#: Of text, before a pretrained model with an Engram is edited.
_RETROFIT_STEPS = 2


@dataclass
class Study:
    """A comparison of one model.

    Args:
        plan: the model and the lengths.
        folder: of all runs of this model.
        seeds: each also the draw of its facts.
        text: file of other text; None where nothing needs one.
        methods: names; None for all.
        replays: for each method, without old data and with it.
        benchmarks: on which the starting model is scored, and each run at its end; None for none.
        failures: messages of commands that failed, by run.
    """

    plan: Plan
    folder: Path
    seeds: Sequence[int]
    text: Path | None
    methods: Sequence[str] | None = None
    replays: Sequence[bool] = (False, True)
    benchmarks: Benchmarks | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The output of all commands."""
        return self.folder / "log.txt"

    def chosen_methods(self) -> list[Method]:
        """Returns the methods of this model, LoRA first: its size decides the others'."""
        return [m for m in METHODS if self.plan.name in m.overrides and (not self.methods or m.name in self.methods)]

    def start(self, seed: int) -> str:
        """Returns the starting model, trained if it is missing."""
        if self.plan.pretrained is not None:
            return self.plan.pretrained
        run = self.folder / f"start-{seed}"
        fit(run, self.log, [*self.plan.start, f"seed={seed}", "logger=none", "~callbacks.progress_bar", *self._cache()])
        return str(run)

    def run_all(self) -> None:
        """Trains what is missing; a method that fails is noted, and the others go on."""
        for seed in self.seeds:
            task = task_folder(self.plan, self.folder, seed)
            measure_start(self.plan, self.start(seed), task, seed, self.folder / f"start-{seed}.json")
        if self.benchmarks is not None:
            self.benchmarks.scores(self.start(self.seeds[0]), self.folder / "benchmarks.json")
        chosen = {method.name: self._setting(method) for method in self.chosen_methods()}
        write_beside(self.folder / "settings.json", json.dumps(chosen, indent=1) + "\n")
        for seed in self.seeds:
            for method in self.chosen_methods():
                for replayed in self.replays:
                    self._try(self.run_dir(method, seed, replayed), self.command(method, seed, replayed))

        if not self.methods or "edit" in self.methods:
            for seed in self.seeds:
                self._edit(seed)

    def edit_file(self, seed: int) -> Path:
        """Returns where the figures of the edit of a seed lie."""
        return self.folder / f"edit-{seed}.json"

    def editable_dir(self, seed: int) -> Path:
        """Returns the directory of the run that is edited."""
        return self.folder / (f"start-{seed}" if self.plan.pretrained is None else f"retrofit-{seed}")

    def _edit(self, seed: int) -> None:
        task = task_folder(self.plan, self.folder, seed)
        text = None if self.plan.pretrained is None else self._text_part("measured")
        try:
            measure_edit(self.plan, self._editable(seed), task, text, self.log, self.edit_file(seed))
        except CommandFailed as error:
            self.failures[f"edit-{seed}"] = str(error)
        print(f"{self.plan.name} edit-{seed}: {'finished' if self.edit_file(seed).exists() else 'failed'}", flush=True)

    def _editable(self, seed: int) -> Path:
        """Returns a run with a value table: the starting model, or a pretrained one with an Engram beside it.

        The Engram learns from a few batches of text, as it would in a retrofit; edits are measured against this model.
        """
        run = self.editable_dir(seed)
        if self.plan.pretrained is None:
            return run
        engram = next(m for m in METHODS if m.name == "engram")
        added = [text for text in engram.overrides[self.plan.name] if text.startswith("extra_ffns")]
        values = self._sizes(engram)
        fit(
            run,
            self.log,
            [
                *("model=hf", f"model.path={self.plan.pretrained}", *(text.format(**values) for text in added)),
                *("data=text", f"data.path={self._text_part('background')}", *self.plan.data, *self._cache()),
                *("optim.freeze=[trunk]", "optim.lr=1e-3", f"seed={seed}", f"trainer.max_steps={_RETROFIT_STEPS}"),
                *("callbacks=step_checkpoint", "logger=none"),
                *("+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"),
            ],
        )
        return run

    def run_dir(self, method: Method, seed: int, replayed: bool) -> Path:
        """Returns the directory of a run."""
        return self.folder / f"{method.name}{'-replay' if replayed else ''}-{seed}"

    def command(self, method: Method, seed: int, replayed: bool) -> list[str]:
        """Returns the overrides of a run."""
        return [*self.common(seed, seed), *self.specific(method, seed, replayed)]

    def specific(self, method: Method, seed: int, replayed: bool) -> list[str]:
        """Returns the overrides of a method, in the setting that was chosen for it."""
        chosen = overrides(method, self.plan, self._setting(method), self._sizes(method))
        if not replayed:
            return chosen
        return [*chosen, *replay(self.plan, self.start(seed), str(self._text_part("background")))]

    def curve(self, method: Method, seed: int, replayed: bool) -> list[Point]:
        """Returns the evaluations of a run from its start on; none of one that is missing."""
        run = self.run_dir(method, seed, replayed)
        if status(run) != "finished":
            return []
        points = read_curve(run / "metrics.csv")
        alone = json.loads((self.folder / f"start-{seed}.json").read_text())["alone"]
        return [start_point(alone, points[0]), *points]

    def record(self, method: Method, seed: int, replayed: bool) -> dict[str, Any]:
        """Returns run.json of a run."""
        content: dict[str, Any] = json.loads((self.run_dir(method, seed, replayed) / "run.json").read_text())
        return content

    def _try(self, run: Path, command: Sequence[str]) -> None:
        try:
            fit(run, self.log, command)
        except CommandFailed as error:
            self.failures[run.name] = str(error)
        print(f"{self.plan.name} {run.name}: {status(run) or 'failed'}", flush=True)

    def _cache(self) -> list[str]:
        return [f"data.cache_dir={self.folder / 'cache'}"]

    def common(self, seed: int, draw: int, evaluations: int | None = None) -> list[str]:
        """Returns what all runs have in common: the starting model, the facts, the length, and what is measured."""
        interval = self.plan.steps // (evaluations or self.plan.evaluations)
        # Settings are chosen without benchmarks.
        scored = self.benchmarks if evaluations is None else None
        callbacks = ["metrics_csv", "retention", *(["evaluate"] if scored else [])]
        plan, task = self.plan, task_folder(self.plan, self.folder, draw)
        start = self.start(seed)
        further = ",".join(map(str, further_questions(task)))
        begin = [f"init_from={start}"] if plan.pretrained is None else ["model=hf", f"model.path={start}"]
        other = [] if plan.pretrained is None else [f"callbacks.retention.text={self._text_part('measured')}"]
        return [
            *begin,
            *("data=jsonl", f"data.path={task / TRAIN}", f"data.val_path={task / TRAIN}", *plan.data, *self._cache()),
            *(f"seed={seed}", f"trainer.max_steps={plan.steps}", f"trainer.val_check_interval={interval}"),
            # The loss on what is learned is no figure of the comparison.
            *(
                "+trainer.limit_val_batches=1",
                "+trainer.limit_test_batches=1",
                f"trainer.log_every_n_steps={interval}",
            ),
            *(f"callbacks=[{','.join(callbacks)}]", f"callbacks.retention.facts={task / FACTS}", "logger=none"),
            *(f"callbacks.retention.questions=[{further}]", f"callbacks.retention.items={plan.questions}"),
            *(f"callbacks.retention.positions={plan.positions}", *other),
            *(scored.overrides(plan.steps) if scored else ()),
        ]

    def _text_part(self, name: str) -> Path:
        """Returns a part of the text: the last tenth is `measured`, what precedes it is `background`."""
        part = self.folder / f"{name}.txt"
        if not part.exists() and self.text is not None:
            content = self.text.read_text(encoding="utf-8")
            cut = content.rfind("\n", 0, len(content) * 9 // 10) + 1
            write_beside(part, content[cut:] if name == "measured" else content[:cut])
        return part

    def _setting(self, method: Method) -> Setting:
        """Returns the setting of a method that learns most and loses least on other facts, tried if it is unknown."""
        file = self.folder / "tuning" / f"{method.name}.json"
        if file.exists():
            return tuple(json.loads(file.read_text())["chosen"])
        scores = {setting: self._score(method, number) for number, setting in self._settings(method)}
        best = max(scores, key=lambda setting: scores[setting])
        tried = [{"setting": setting, "score": score} for setting, score in scores.items()]
        write_beside(file, json.dumps({"chosen": best, "tried": tried}, indent=1) + "\n")
        return best

    def _settings(self, method: Method) -> Iterator[tuple[int, Setting]]:
        yield from enumerate(settings(method, self.plan))

    def _score(self, method: Method, number: int) -> float:
        """Returns what a setting learns of other facts, less what it loses; 0 for one that is the only one."""
        if self.plan.tries == 1 and method.name != "lora":
            return 0.0
        run = self.folder / "tuning" / f"{method.name}-{number}"
        chosen = overrides(method, self.plan, dict(self._settings(method))[number], self._sizes(method))
        self._try(run, [*self.common(self.seeds[0], _OTHER_FACTS, evaluations=1), *chosen])
        if status(run) != "finished":
            return -math.inf
        last = read_curve(run / "metrics.csv")[-1]
        loss = last.value("lost")
        return last.value(LEARNED) - (min(max(loss, 0.0), 1.0) if math.isfinite(loss) else 1.0)

    def _sizes(self, method: Method) -> dict[str, str]:
        """Returns the sizes of what methods add; those of LoRA itself need none."""
        if method.name == "lora":
            return sizes(self.plan, 1, "")
        lora = next(m for m in METHODS if m.name == "lora")
        number = next(n for n, setting in self._settings(lora) if setting == self._setting(lora))
        record = json.loads((self.folder / "tuning" / f"lora-{number}" / "run.json").read_text())
        parameters = record["trained_bytes"] // _BYTES_PER_PARAMETER
        return sizes(self.plan, parameters, str(self._text_part("background")))
