"""`predict`: answers to prompts through the Trainer's strategy, as JSON lines in the order of the prompts.

A line is `{"index", "prompt", "answer"}`, with `samples` above 1 `{"index", "prompt", "sample", "answer"}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch.distributed as dist

from pkm_lightning.build.loading import context_of
from pkm_lightning.cli.evaluation import SavedRun, check_dataloader, locate, names_pretrained
from pkm_lightning.cli.generation import STANDARD_INPUT, GenerationSettings, generation_settings, prompts_of
from pkm_lightning.cli.job import Job, log_to_stderr
from pkm_lightning.cli.pretrained_run import evaluated_run
from pkm_lightning.data.base import TextCodec, tokenizer_of
from pkm_lightning.data.datamodule import TokenDataModule
from pkm_lightning.data.prompts import PromptBatches, collect_prompts
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import ConfigError, counted
from pkm_lightning.inference.generation import encode_prompts
from pkm_lightning.inference.prediction import Answering
from pkm_lightning.storage import check_target, is_stream, write_beside
from pkm_lightning.supervision.rank_failures import supervise_evaluation


def run(job: Job) -> None:
    """Answers the prompts and writes the file that `out` names."""
    settings = generation_settings(job)
    folder, _ = locate(job)
    path = Path(job.config.out or (folder or Path.cwd()) / "predictions.jsonl")
    check_target("out", path)  # before minutes of answering
    if is_stream(path):
        log_to_stderr()
    saved = evaluated_run(job)
    context = settings.context(context_of(saved.run.config))
    data = _data_with_prompts(job, saved, settings, context)
    # Who reads a stream reads the answers and nothing else.
    trainer, module = saved.trainer(progress=not is_stream(path)), saved.module()
    module.answering = Answering(sampling=settings.sampling, batch_size=settings.batch_size, context=context)
    with supervise_evaluation(trainer):
        batches = trainer.predict(module, datamodule=data, ckpt_path=saved.ckpt_path) or []
        records = [record for batch in batches for record in batch]
        if trainer.world_size > 1:
            gathered: list[list[dict[str, object]]] = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(gathered, records)
            records = [record for of_rank in gathered for record in of_rank]
    if trainer.is_global_zero:
        # Ranks that ran out of prompts answered fillers, numbered -1.
        by_number = {(r["index"], r.get("sample", 0)): r for r in records if r["index"] >= 0}
        lines = [json.dumps(by_number[number], ensure_ascii=False) for number in sorted(by_number)]
        write_beside(path, "".join(line + "\n" for line in lines))
        if is_stream(path):
            return
        for line in lines[:20]:
            print(line)
        print(f"{counted(len(lines), 'answer')} in {path}")


class PromptData(L.LightningDataModule):
    """Prompts of a command, shared out over the ranks.

    Args:
        prompts: one or more texts.
        tokenizer: the meaning of the model's ids.
        batch_size: prompts per batch.
    """

    def __init__(self, prompts: Sequence[str], tokenizer: TextCodec, batch_size: int) -> None:
        super().__init__()
        self.prompts, self.tokenizer, self._batch_size = prompts, tokenizer, batch_size

    def predict_dataloader(self) -> PromptBatches:
        """Returns the prompts of this rank; index -1 marks a filler."""
        # Ranks of one tensor-parallel group answer the same prompts; the strategy knows how many groups there are.
        ranks = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}  # type: ignore[union-attr]
        return PromptBatches(
            self.prompts, rank=ranks["rank"], world_size=ranks["num_replicas"], batch_size=self._batch_size
        )


def _data_with_prompts(
    job: Job, saved: SavedRun, settings: GenerationSettings, context: int | None
) -> L.LightningDataModule:
    """Returns the prompts of the command, or the data module itself where it brings its own.

    Raises:
        ConfigError: no prompts, prompts by two keys, one that is too long, or no tokenizer to read them with.
    """
    if job.config.prompts_file == STANDARD_INPUT and saved.is_spread:
        raise ConfigError("prompts_file=- is read by one process; write the prompts into a file, or set devices=1.")
    own = next((key for key in ("data.prompts", "data.prompts_file") if job.sets(key)), None)
    given = next((key for key in ("prompt", "prompts_file") if job.config[key] is not None), None)
    if own and given:
        raise ConfigError(f"{given} and {own} both give prompts; leave one of them out.")
    prompts, data = prompts_of(job), saved.run.data
    if prompts is None:
        if type(data).predict_dataloader is not TokenDataModule.predict_dataloader:
            check_dataloader(job.verb, data)
            return data
        prompts = collect_prompts(saved.run.config["data"]["prompts"], saved.run.config["data"]["prompts_file"])
    tokenizer = tokenizer_of(data)
    if tokenizer is None:
        raise ConfigError(f"predict needs a tokenizer, which the data module {type(data).__name__} does not have.")
    if names_pretrained(job) and isinstance(tokenizer, Tokenizer):
        tokenizer.begins_prompts = True
    encode_prompts(tokenizer, prompts, context)
    return PromptData(prompts, tokenizer, settings.batch_size)
