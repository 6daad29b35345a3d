"""Learning and forgetting: what was taught is asked at each validation, and so is what was known before.

Metrics of each validation, all by greedy answers, exact up to case, punctuation and articles:

| metric | content |
|---|---|
| `val/learned_FORM` | share of the facts answered; FORM: seen, paraphrase, question, or a file of `questions` |
| `val/known_FORM`, `val/known_FORM_change` | the same of what was known before, and the difference to the start |
| `val/known_loss`, `val/known_loss_change` | on other text, in nats per target |
| `val/known_kl` | KL divergence from the starting model on that text, in nats per target |
| `val/bytes_changed` | of all rows of parameters that differ from the start; in one process alone |

The starting model's distributions and the hashes of its rows are computed once and stored in the run directory, so that
a continued run measures against the same start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from safetensors.torch import save
from torch import Tensor

from pkm_lightning.adaptation.facts_file import read_facts
from pkm_lightning.adaptation.questions import first_of_each_form, known_questions, questions_about, recall_by_form
from pkm_lightning.adaptation.retention import (
    bytes_changed,
    drift,
    parameter_digests,
    parameters_in_memory,
    read_start,
    report_unmeasured,
    sample_of_run,
    sample_of_text,
    start_log_probabilities,
)
from pkm_lightning.build.loading import context_of
from pkm_lightning.callbacks.base import evaluation_mode, in_training
from pkm_lightning.data.base import Batch, RecallItem, tokenizer_of
from pkm_lightning.data.files import read_text, require_file
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import ConfigError, DataError, check_integer
from pkm_lightning.inference.synchronized_forwards import synchronized_forwards
from pkm_lightning.storage import write_beside
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.engine import engine_of

__all__ = ["Retention"]

_KEY = "callbacks.retention"
_LOG_PROBS = "log_probs"  # no parameter has a name without a dot
#: Tokens per sequence of text, so that the cost of attention does not depend on what the model can read.
_LONGEST = 256


class Retention(L.Callback):
    """Scorer of what is learned and forgotten; see configs/callbacks/retention.yaml for the arguments.

    Attributes:
        before, after: figures of the start and of the last validation by their names in the metrics; at first empty.

    Raises:
        ConfigError: a value out of range.
        DataError: a file is missing or malformed.
    """

    #: Before those that measure time: the starting model is measured first.
    hook_order = -1

    def __init__(
        self,
        *,
        facts: str | None,
        questions: Sequence[str],
        known: str | None,
        text: str | None,
        items: int,
        positions: int,
        path: str,
    ) -> None:
        check_integer(f"{_KEY}.items", items, 1)
        check_integer(f"{_KEY}.positions", positions, 1)
        self.path, self._positions = Path(path), positions
        learned = [] if facts is None else questions_about(read_facts(Path(facts), f"{_KEY}.facts"))
        for file in map(Path, questions):
            learned += questions_about(read_facts(file, f"{_KEY}.questions"), file.stem)
        self._learned = first_of_each_form(learned, items)
        self._known_path, self._known, self._items = known, list[RecallItem](), items
        self._held_out: Path | None = None
        if text is not None:
            require_file(f"{_KEY}.text={text}", Path(text), "give a file of plain text")
        self._text = None if text is None else read_text(Path(text))
        self.before, self.after, self._is_measured = dict[str, float](), dict[str, float](), False
        self._sample, self._start = list[Batch](), dict[str, Tensor]()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reads what was known: not before, since the run may not be there when a configuration is checked.

        Raises:
            CheckpointError: there is no such run.
            DataError: the file is missing or malformed.
        """
        if stage == "fit" and self._known_path is not None:
            known, self._held_out = known_questions(self._known_path, f"{_KEY}.known")
            self._known = first_of_each_form(known, self._items)

    def state_dict(self) -> dict[str, Any]:
        """Returns the figures of the starting model."""
        return {"before": self.before, "measured": self._is_measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.before, self._is_measured = dict(state["before"]), state["measured"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the starting model; a run that is continued reads what it has measured.

        Raises:
            ConfigError: the data have no tokenizer.
            DataError: the text has no two tokens.
            RunDirectoryError: the file of the starting model is missing or damaged.
        """
        assert isinstance(pl_module, LanguageModule)
        model, self._sample = pl_module.model, self._sample_of(trainer, pl_module)
        if self._is_measured:
            self._start = read_start(self.path)
            return
        report_unmeasured(_KEY, self._learned, self._known, self._sample)
        if self._sample:
            with _forwards(trainer, pl_module):
                self._start[_LOG_PROBS] = start_log_probabilities(model, self._sample, device=pl_module.device)
        self._start |= parameter_digests(_counted(trainer, pl_module))
        learned = self._recall(trainer, pl_module, "learned", self._learned)
        self.before, self._is_measured = learned | self._known_figures(trainer, pl_module), True
        if trainer.is_global_zero:
            write_beside(self.path, save(self._start))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores and logs."""
        if not in_training(trainer):
            return
        assert isinstance(pl_module, LanguageModule)
        known = self._known_figures(trainer, pl_module)
        self.after = figures = known | self._recall(trainer, pl_module, "learned", self._learned)
        # The KL is from the start as it is.
        figures |= {f"{name}_change": known[name] - self.before[name] for name in known if name != "known_kl"}
        if counted := _counted(trainer, pl_module):
            figures["bytes_changed"] = bytes_changed(counted, self._start)
        for name, value in figures.items():
            # All ranks have the same figures; without `sync_dist` Lightning would warn that they may not.
            pl_module.log(f"val/{name}", float(value), sync_dist=True)

    def _known_figures(self, trainer: L.Trainer, pl_module: LanguageModule) -> dict[str, float]:
        figures = self._recall(trainer, pl_module, "known", self._known)
        if self._sample:
            with _forwards(trainer, pl_module):
                loss, kl = drift(pl_module.model, self._sample, self._start[_LOG_PROBS], device=pl_module.device)
            figures |= {"known_loss": loss, "known_kl": kl}
        return figures

    def _recall(self, trainer: L.Trainer, module: LanguageModule, of: str, items: list[RecallItem]) -> dict[str, float]:
        tokenizer = tokenizer_of(trainer.datamodule)  # type: ignore[attr-defined]
        assert tokenizer is not None
        with _forwards(trainer, module):
            by_form = recall_by_form(module.model, tokenizer, items, device=module.device)
        return {f"{of}_{form}": value for form, value in by_form.items()}

    def _sample_of(self, trainer: L.Trainer, pl_module: LanguageModule) -> list[Batch]:
        """Returns the text, or the held-out sequences; none where there is neither."""
        tokenizer = tokenizer_of(trainer.datamodule)  # type: ignore[attr-defined]
        if not isinstance(tokenizer, Tokenizer):
            raise ConfigError(f"{_KEY} needs data with a tokenizer of this package; remove it with ~{_KEY}.")
        if self._text is None:
            return [] if self._held_out is None else sample_of_run(tokenizer, self._held_out, self._positions)
        seq_len = min(context_of(pl_module.config) or _LONGEST, _LONGEST)
        sample = sample_of_text(tokenizer, self._text, positions=self._positions, seq_len=seq_len)
        if not sample:
            raise DataError(f"{_KEY}.text has fewer than two tokens; give a longer text.")
        return sample


@contextlib.contextmanager
def _forwards(trainer: L.Trainer, pl_module: LanguageModule) -> Iterator[None]:
    """Prepares for an evaluation. Collective: enter and leave on all ranks, which all ask everything."""
    with (
        evaluation_mode(pl_module),
        synchronized_forwards(pl_module.model, pl_module.device),
        trainer.precision_plugin.forward_context(),
    ):
        yield


def _counted(trainer: L.Trainer, pl_module: LanguageModule) -> dict[str, Tensor]:
    """Returns the parameters whose changes are counted, by name: those in memory, in one process."""
    is_whole = trainer.world_size == 1 and engine_of(trainer) is None
    return parameters_in_memory(pl_module.model) if is_whole else {}
