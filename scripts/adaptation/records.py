"""What a comparison keeps of its runs: small JSON files in one folder, to be committed.

The report is written from them alone, and a run whose record is there is not repeated: a comparison that was stopped
continues in another clone on another day. Checkpoints and caches lie elsewhere and may be lost.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commands import fit
from curves import Point, read_curve
from plans import Plan

from pkm_lightning.storage import write_beside

#: Of the files of a run that a record has no use for: distributions of the starting model.
_START = "retention.safetensors"
#: Significant digits of figures.
_DIGITS = 6


def write(file: Path, content: object) -> None:
    """Writes JSON, with its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_beside(file, json.dumps(content, indent=1) + "\n")


def read(file: Path) -> Any:
    """Returns the content of a record; None where there is none."""
    return json.loads(file.read_text()) if file.exists() else None


def check_plan(file: Path, plan: Plan) -> None:
    """Stores the plan beside the records, or refuses another one: its runs would not be comparable with theirs.

    Raises:
        SystemExit: the records are of another plan.
    """
    # Where the model lies is nobody's concern.
    now = json.loads(json.dumps(asdict(plan) | {"pretrained": plan.pretrained is not None}))
    before = read(file)
    if before is None:
        write(file, now)
    elif different := sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key)):
        raise SystemExit(f"{file} is of a comparison with another {', '.join(different)}; give another folder: --out.")


@dataclass(frozen=True)
class FitJob:
    """A run and its record.

    Args:
        run: directory of the run.
        log: for the output of the command.
        record: the file that is written when the run has ended.
        overrides: of `fit`.
        shown: the same as a reader sees them.
    """

    run: Path
    log: Path
    record: Path
    overrides: Sequence[str]
    shown: Sequence[str]

    def __call__(self) -> None:
        """Trains, and writes the record.

        Raises:
            CommandFailed: `fit` ended with an error.
        """
        shutil.rmtree(self.run, ignore_errors=True)
        wall, processor = time.monotonic(), time.process_time()
        fit(self.run, self.log, self.overrides)
        cost = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - processor}
        content = json.loads((self.run / "run.json").read_text())
        (self.run / _START).unlink(missing_ok=True)
        write(
            self.record,
            {
                "command": list(self.shown),
                "trained_bytes": content["trained_bytes"],
                "start": (content.get("init_from") or {}).get("digest"),
                "commit": content["commit"],
                "device": content["device"],
                **{name: round(value, 1) for name, value in cost.items()},
                "peak_memory_bytes": content.get("peak_memory_bytes"),
                "curve": [plain(point) for point in read_curve(self.run / "metrics.csv")],
            },
        )


def plain(point: Point) -> dict[str, float]:
    """Returns a point as it is in a record, without what is unknown."""
    values: Mapping[str, float] = {"step": point.step, "seconds": point.seconds, "wall": point.wall, **point.figures}
    return {name: float(f"{value:.{_DIGITS}g}") for name, value in values.items() if math.isfinite(value)}


def curve_of(record: Mapping[str, Any]) -> list[Point]:
    """Returns the evaluations of a run from its record."""
    axes = ("step", "seconds", "wall")
    return [
        Point(*(row[axis] for axis in axes), {name: value for name, value in row.items() if name not in axes})
        for row in record["curve"]
    ]
