"""A row a run in TensorBoard's HParams: what the run was, beside what it reached and cost."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pkm_lightning.compare.costs import cost
from pkm_lightning.compare.study import Study

_COSTS = ("params_total", "params_active", "trunk_flops_forward", "bytes_decode", "tokens_per_second", "seconds_train")


def write_board(study: Study, folder: Path) -> None:
    """Replaces `folder` by the event files of the runs with figures."""
    shutil.rmtree(folder, ignore_errors=True)
    for arm, runs in study.arms.items():
        for run in runs:
            metrics = {study.quality.metric: study.quality.value(run)}
            metrics |= {name: cost(run, name) for name in _COSTS}
            metrics |= {k: v for k, v in run.record["metrics"].items() if isinstance(v, int | float)}
            finite = {f"hparam/{name}": value for name, value in metrics.items() if math.isfinite(value)}
            what = {"variant": arm, "seed": run.seed, "lr": float(run.config["optim"]["lr"])}
            what |= {"ffn": str(run.record.get("ffn")), "match": str(run.config.get("match"))}
            with SummaryWriter(str(folder / _folder_name(f"{arm}-seed-{run.seed}"))) as writer:
                for summary in hparams(what, finite):
                    writer.file_writer.add_summary(summary)
                for name, value in finite.items():
                    writer.add_scalar(name, value)


def _folder_name(label: str) -> str:
    """`label` with nothing that a file system could refuse."""
    plain = re.sub(r"[^A-Za-z0-9_.=-]", "_", label)
    return (
        plain
        if plain == label and len(plain) < 100
        else f"{plain[:80]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    )
