"""`validate`: held-out loss and a sample of the recall questions."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from pkm_lightning.cli.evaluation import locate
from pkm_lightning.cli.job import Job
from pkm_lightning.cli.pretrained_run import evaluated_run
from pkm_lightning.storage import check_target, write_beside
from pkm_lightning.supervision.rank_failures import supervise_evaluation


def run(job: Job) -> float | None:
    """Prints the metrics; writes `VERB.json` into the run directory, if one was given. Returns the loss."""
    folder, _ = locate(job)
    if folder is not None:
        check_target("run_dir", folder / f"{job.verb}.json")
    saved = evaluated_run(job)
    trainer, module = saved.trainer(), saved.module()
    evaluate = trainer.validate if job.verb == "validate" else trainer.test
    with supervise_evaluation(trainer):
        results = evaluate(module, datamodule=saved.run.data, ckpt_path=saved.ckpt_path, verbose=False)
    metrics = {k: float(v) for result in results for k, v in result.items()}
    if trainer.is_global_zero:
        table = Table(title=f"{job.verb} {saved.path}", show_header=False)
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4f}")
        Console(markup=False, emoji=False).print(table)
        if saved.folder is not None:
            content = {**metrics, "edits": saved.applied} if saved.applied else metrics
            write_beside(saved.folder / f"{job.verb}.json", json.dumps(content, indent=2) + "\n")
    return next((v for k, v in metrics.items() if k.endswith("/loss")), None)
