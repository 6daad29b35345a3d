"""What a comparison consists of: its runs by name, their commands, and what their records hold.

The setting of a method is chosen on other facts; the size of LoRA's decides those of the methods that add parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curves import LEARNED, SHARE_LEARNED, Point, first_at, start_point
from measure import Benchmarks
from methods import METHODS, Method, Setting, overrides, replay, settings, sizes
from plans import Plan
from records import curve_of, read
from tasks import further_questions, task_folder

from pkm_lightning.data.facts.invented_files import FACTS, TRAIN
from pkm_lightning.storage import write_beside

LORA = next(method for method in METHODS if method.name == "lora")
#: Draw of the facts on which settings are chosen.
_OTHER_FACTS = 0
_BYTES_PER_PARAMETER = 4
#: Of text, before a pretrained model with an Engram is edited.
_RETROFIT_STEPS = 2


@dataclass(frozen=True)
class Study:
    """A comparison of one model.

    Args:
        plan: the model and the lengths.
        folder: of runs, checkpoints and caches, which may be lost.
        records: folder of what the report is written from.
        seeds: each also the draw of its facts.
        text: file of other text; None where nothing needs one.
        methods: names of some; None for all of the plan.
        benchmarks: on which the starting model is scored, and each run at its end; None for none.
    """

    plan: Plan
    folder: Path
    records: Path
    seeds: Sequence[int]
    text: Path | None
    methods: Sequence[str] | None = None
    benchmarks: Benchmarks | None = None

    def chosen_methods(self) -> list[Method]:
        """Returns the methods that `fit` runs, LoRA first."""
        return [method for method in METHODS if self.includes(method.name)]

    def includes(self, name: str) -> bool:
        """Returns whether a method is part of the comparison."""
        return name in self.plan.methods and (self.methods is None or name in self.methods)

    def variants(self) -> list[tuple[Method, bool]]:
        """Returns each method without old data, and with it where the plan has that."""
        pairs = ((method, replayed) for method in self.chosen_methods() for replayed in (False, True))
        return [(method, replayed) for method, replayed in pairs if not replayed or method.name in self.plan.replayed]

    def run_name(self, method: Method, seed: int, replayed: bool) -> str:
        """Returns the name of a run, of its directory and its record."""
        return f"{method.name}{'-replay' if replayed else ''}-{seed}"

    def tries(self, method: Method) -> dict[str, Setting]:
        """Returns the settings that are tried, by the names of their runs; none where there is no choice."""
        chosen = settings(method, self.plan)
        # LoRA's size is read from the record of its run.
        needed = chosen if len(chosen) > 1 or method == LORA else []
        return {f"{method.name}-try{number}": setting for number, setting in enumerate(needed)}

    def start(self, seed: int) -> str:
        """Returns the place of the starting model."""
        return str(self.folder / f"start-{seed}") if self.plan.pretrained is None else self.plan.pretrained

    def start_overrides(self, seed: int) -> list[str] | None:
        """Returns the overrides that train the starting model; None for one that is trained already."""
        if self.plan.pretrained is not None:
            return None
        return [*self.plan.start, f"seed={seed}", "logger=none", "~callbacks.progress_bar", *self._cache()]

    def record(self, name: str) -> dict[str, Any] | None:
        """Returns the record of a run, try, edit or starting model; None where there is none."""
        content: dict[str, Any] | None = read(self.record_file(name))
        return content

    def run_record(self, method: Method, seed: int, replayed: bool) -> dict[str, Any] | None:
        """Returns the record of a run; None also where that is of another setting than the one that is chosen now."""
        record = self.record(self.run_name(method, seed, replayed))
        return record if record and record["command"] == self.shown(self.command(method, seed, replayed)) else None

    def record_file(self, name: str) -> Path:
        """Returns the file of a record."""
        return self.records / f"{name}.json"

    def log(self, name: str) -> Path:
        """Returns the file for the output of a run's command."""
        return self.folder / "logs" / f"{name}.txt"

    def failures(self) -> dict[str, str]:
        """Returns the messages of commands that failed, by run."""
        return self.record("failures") or {}

    def curve(self, method: Method, seed: int, replayed: bool) -> list[Point]:
        """Returns the evaluations of a run from its start on; none of one that is missing."""
        record, start = self.run_record(method, seed, replayed), self.record(f"start-{seed}")
        if record is None or start is None:
            return []
        points = curve_of(record)
        return [start_point(start["alone"], points[0]), *points]

    def setting(self, method: Method) -> Setting:
        """Returns the best of the settings that were tried; the only one where there is no choice."""
        tried = self.tries(method)
        if not tried:
            return settings(method, self.plan)[0]
        return tried[max(tried, key=self.score)]

    def score(self, name: str) -> tuple[float, float]:
        """Returns the order of a try: by what is lost of A where `SHARE_LEARNED` is reached, else by what is learned.

        The least harmful setting of all would be one that teaches nothing. At a share that few methods reach, most
        would be represented by a setting that learns at any price.
        """
        record = self.record(name)
        if record is None:
            return -1.0, 0.0
        points = curve_of(record)
        # Of other facts too the starting model knows none.
        reached = first_at([start_point({"paraphrase": 0.0}, points[0]), *points], LEARNED, SHARE_LEARNED)
        if reached is None:
            return 0.0, max(point.value(LEARNED) for point in points)
        loss = reached.value("lost")
        return 1.0, -loss if math.isfinite(loss) else -math.inf

    def command(self, method: Method, seed: int, replayed: bool) -> list[str]:
        """Returns the overrides of a run."""
        return [*self.common(seed, seed), *self.specific(method, seed, replayed)]

    def command_of_try(self, method: Method, setting: Setting) -> list[str]:
        """Returns the overrides of a try, which is evaluated half as often as a run, and on no benchmarks."""
        specific = overrides(method, self.plan, setting, self.sizes(method))
        return [*self.common(self.seeds[0], _OTHER_FACTS, max(1, self.plan.evaluations // 2)), *specific]

    def specific(self, method: Method, seed: int, replayed: bool) -> list[str]:
        """Returns the overrides of a method, in the setting that was chosen for it."""
        chosen = overrides(method, self.plan, self.setting(method), self.sizes(method))
        if not replayed:
            return chosen
        return [*chosen, *replay(self.plan, self.start(seed), str(self.text_part("background")))]

    def common(self, seed: int, draw: int, evaluations: int | None = None) -> list[str]:
        """Returns what all runs have in common: the starting model, the facts, the length, and what is measured."""
        interval = self.plan.steps // (evaluations or self.plan.evaluations)
        scored = self.benchmarks if evaluations is None else None
        callbacks = ["metrics_csv", "retention", "processor_time", *(["evaluate"] if scored else [])]
        plan, task = self.plan, self.task(draw)
        start = self.start(seed)
        further = ",".join(map(str, further_questions(task)))
        begin = [f"init_from={start}"] if plan.pretrained is None else ["model=hf", f"model.path={start}"]
        other = [] if plan.pretrained is None else [f"callbacks.retention.text={self.text_part('measured')}"]
        return [
            *begin,
            *("data=jsonl", f"data.path={task / TRAIN}", f"data.val_path={task / TRAIN}", *plan.data, *self._cache()),
            *(f"seed={seed}", f"trainer.max_steps={plan.steps}", f"trainer.val_check_interval={interval}"),
            # The loss on what is learned is no figure of the comparison.
            *("+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"),
            *(f"trainer.log_every_n_steps={interval}", f"callbacks=[{','.join(callbacks)}]", "logger=none"),
            f"callbacks.retention.facts={task / FACTS}",
            *(f"callbacks.retention.questions=[{further}]", f"callbacks.retention.items={plan.questions}"),
            *(f"callbacks.retention.positions={plan.positions}", *other),
            *(scored.overrides(plan.steps) if scored else ()),
        ]

    def editable(self, seed: int) -> tuple[Path, list[str] | None]:
        """Returns the run that is edited, and the overrides that train it; None for the starting model.

        A pretrained model has an Engram beside it, which has learned from few batches of text, as in a retrofit.
        """
        if self.plan.pretrained is None:
            return Path(self.start(seed)), None
        engram = next(method for method in METHODS if method.name == "engram")
        values = self.sizes(engram)
        added = [text for text in engram.overrides[self.plan.name] if text.startswith("extra_ffns")]
        return self.folder / f"retrofit-{seed}", [
            *("model=hf", f"model.path={self.plan.pretrained}", *(text.format(**values) for text in added)),
            *("data=text", f"data.path={self.text_part('background')}", *self.plan.data, *self._cache()),
            *("optim.freeze=[trunk]", "optim.lr=1e-3", f"seed={seed}", f"trainer.max_steps={_RETROFIT_STEPS}"),
            *("callbacks=step_checkpoint", "logger=none"),
            *("+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"),
        ]

    def task(self, draw: int) -> Path:
        """Returns the folder of the facts of a draw, written if it is missing."""
        return task_folder(self.plan, self.folder, draw)

    def text_part(self, name: str) -> Path:
        """Returns a part of the text: the last tenth is `measured`, what precedes it is `background`."""
        part = self.folder / f"{name}.txt"
        if not part.exists() and self.text is not None:
            part.parent.mkdir(parents=True, exist_ok=True)
            content = self.text.read_text(encoding="utf-8")
            cut = content.rfind("\n", 0, len(content) * 9 // 10) + 1
            write_beside(part, content[cut:] if name == "measured" else content[:cut])
        return part

    def sizes(self, method: Method) -> dict[str, str]:
        """Returns the sizes of what methods add; those of LoRA itself need none."""
        if method == LORA:
            return sizes(self.plan, 1, "")
        record = self.record(max(self.tries(LORA), key=self.score))
        if record is None:
            raise SystemExit("All tries of LoRA have failed, whose size decides those of the other methods.")
        return sizes(self.plan, record["trained_bytes"] // _BYTES_PER_PARAMETER, str(self.text_part("background")))

    def shown(self, command: Sequence[str]) -> list[str]:
        """Returns a command without the places of this machine."""
        places = {str(self.folder): "RUNS", str(self.plan.pretrained): Path(self.plan.pretrained or "-").name}
        if self.benchmarks is not None:
            places[str(self.benchmarks.folder)] = "SETS"
        return [_replaced(text, places) for text in command]

    def _cache(self) -> list[str]:
        return [f"data.cache_dir={self.folder / 'cache'}"]


def _replaced(text: str, places: dict[str, str]) -> str:
    for place, name in places.items():
        text = text.replace(place, name)
    return text
