"""Answers to a batch of prompts as records, on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pkm_lightning.inference.generation import Generation
from pkm_lightning.inference.sampling import Sampling
from pkm_lightning.inference.synchronized_forwards import synchronized_forwards

if TYPE_CHECKING:
    from pkm_lightning.data.base import TextCodec
    from pkm_lightning.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How prompts are answered.

    Attributes:
        sampling: how each token is chosen and where an answer ends.
        batch_size: largest number of answers written together.
        context: most tokens that the model reads per sequence, or None for any number.
    """

    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 512
    context: int | None = None


def answer_batch(
    model: Transformer, tokenizer: TextCodec, batch: Mapping[str, Any], answering: Answering, *, device: torch.device
) -> list[dict[str, Any]]:
    """Returns records with `index`, `prompt`, `answer`, and `sample` where there are several. Collective.

    The number of a prompt, `batch["index"]`, decides its draws, so that answers depend on no ranks and batches.
    """
    numbers = [int(number) for number in batch["index"]]
    generation = Generation(
        model,
        tokenizer,
        batch["prompt"],
        answering.sampling,
        device=device,
        batch_size=answering.batch_size,
        context=answering.context,
        numbers=numbers,
    )
    with synchronized_forwards(model, device):
        generation.run()
    records: list[dict[str, Any]] = []
    for number, prompt, answers in zip(numbers, batch["prompt"], generation.answers, strict=True):
        for answer in answers:
            sample = {"sample": answer.sample} if len(answers) > 1 else {}
            records.append({"index": number, "prompt": prompt, **sample, "answer": answer.text.strip()})
    return records
