"""`predict`: greedy answers to prompts, as JSON lines `{"index", "prompt", "answer"}` in the order of the prompts."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from pkm_lightning.cli.evaluation import SavedRun, locate
from pkm_lightning.cli.job import Job, log_to_stderr
from pkm_lightning.storage import check_target, is_stream, write_beside
from pkm_lightning.supervision.rank_failures import supervise_evaluation


def run(job: Job) -> None:
    """Answers `data.prompts` or `data.prompts_file` and writes the file that `out` names."""
    folder, _ = locate(job)
    path = Path(job.config.out or (folder or Path.cwd()) / "predictions.jsonl")
    check_target("out", path)  # before minutes of answering
    if is_stream(path):
        log_to_stderr()
    saved = SavedRun(job)
    trainer, module = saved.trainer(), saved.module()
    with supervise_evaluation(trainer):
        batches = trainer.predict(module, datamodule=saved.run.data, ckpt_path=saved.ckpt_path) or []
        records = [record for batch in batches for record in batch]
        if trainer.world_size > 1:
            gathered: list[list[dict[str, object]]] = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(gathered, records)
            records = [record for of_rank in gathered for record in of_rank]
    if trainer.is_global_zero:
        # Ranks that ran out of prompts answered fillers, numbered -1.
        by_index = {record["index"]: record for record in records if record["index"] >= 0}
        lines = [json.dumps(by_index[i], ensure_ascii=False) for i in sorted(by_index)]
        write_beside(path, "".join(line + "\n" for line in lines))
        if is_stream(path):  # who reads it reads the answers and nothing else
            return
        for line in lines[:20]:
            print(line)
        print(f"{len(lines)} answer{'' if len(lines) == 1 else 's'} in {path}")
