"""Sample answers: what the model answers to a few prompts at each validation, in the log and in the
loggers that show tables.

No metric is logged. Decoding is greedy and the model in evaluation mode, so that no random number is drawn and training
is the same as without this callback. Each token of an answer is one forward of all prompts of equal length.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L

from pkm_lightning.data.base import data_of, tokenizer_of, validation_items_of
from pkm_lightning.data.files import check_characters
from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.inference.generation import greedy
from pkm_lightning.inference.synchronized_forwards import synchronized_forwards
from pkm_lightning.loggers import show_table
from pkm_lightning.training import LanguageModule

_log = logging.getLogger(__name__)


__all__ = ["Samples"]


class Samples(L.Callback):
    """Display of sample answers, generated on the first rank; the others take part in its forwards.

    Args:
        prompts: the prompts; None for the validation questions of the data module, if it has any, with their answers.
        items: questions per form, 0 or more.
        max_new_tokens: tokens after which an answer is cut off, 1 or more.

    Raises:
        ConfigError: `prompts` is not a list of texts, or the data module has no tokenizer for them; a number out of
            range.
        DataError: a prompt that holds half of a character.
    """

    def __init__(self, *, prompts: Sequence[str] | None, items: int, max_new_tokens: int) -> None:
        if prompts is not None:
            # A text is a sequence of texts too.
            listed = isinstance(prompts, Sequence) and not isinstance(prompts, str)
            if not listed or not all(isinstance(prompt, str) for prompt in prompts):
                raise ConfigError(
                    f'callbacks.samples.prompts={prompts!r} is not a list of texts; set ["first","second"] or null.'
                )
            for prompt in prompts:
                check_characters(f"callbacks.samples.prompts: {prompt!r}", prompt)
        check_integer("callbacks.samples.items", items, 0)
        check_integer("callbacks.samples.max_new_tokens", max_new_tokens, 1)
        self.prompts, self.items, self.max_new_tokens = prompts, items, max_new_tokens
        self._questions: list[tuple[str, str | None]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Collects the questions, and their answers where they are known."""
        data: Any = data_of(trainer)
        if tokenizer_of(data) is None:
            if self.prompts:
                raise ConfigError(
                    f"callbacks.samples.prompts needs a tokenizer, and {type(data).__name__} has none; "
                    "set callbacks.samples.prompts=null."
                )
        elif self.prompts is not None:
            self._questions = [(prompt, None) for prompt in self.prompts]
        elif self.items and stage in ("fit", "validate"):
            self._questions = [(item.prompt, item.answer) for item in validation_items_of(data, self.items)]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generates and shows the answers, except in the validation that precedes training."""
        if trainer.sanity_checking or not self._questions:
            return
        assert isinstance(pl_module, LanguageModule)
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        # All ranks enter: under FSDP every forward is a collective.
        prompts = [prompt for prompt, _ in self._questions] if trainer.is_global_zero else []
        with synchronized_forwards(pl_module.model, pl_module.device), trainer.precision_plugin.forward_context():
            answers = greedy(
                pl_module.model, tokenizer, prompts, device=pl_module.device, max_new_tokens=self.max_new_tokens
            )
        if trainer.is_global_zero:
            self._show(trainer, answers)

    def _show(self, trainer: L.Trainer, answers: list[str]) -> None:
        rows = [(prompt, answer, truth) for (prompt, truth), answer in zip(self._questions, answers, strict=True)]
        lines = [f"  {p} -> {a}" + ("" if truth is None else f" (right: {truth})") for p, a, truth in rows]
        _log.info("samples at step %d\n%s", trainer.global_step, "\n".join(lines))
        shown = [(prompt, answer, truth or "") for prompt, answer, truth in rows]
        for logger in trainer.loggers:
            show_table(logger, "samples", ("prompt", "answer", "right"), shown, trainer.global_step)
