"""`finetune=sparse`: all but the tables is frozen, and of these only rows learn that the new data read unusually often.

Sparse Memory Finetuning (Lin et al. 2025, arXiv 2510.15103, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pkm_lightning.adaptation.method import Finetuning, Share
from pkm_lightning.adaptation.row_reads import RowReads
from pkm_lightning.adaptation.sparse_callback import SparseRows
from pkm_lightning.build.kinds import Range
from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import ValueTable

if TYPE_CHECKING:
    import lightning as L
    from torch import nn

    from pkm_lightning.model import Transformer

__all__ = ["SparseFinetuning"]


class SparseFinetuning(Finetuning):
    """Training of few rows of the value tables.

    Args:
        rows: rows that learn per choice and set of tables, t; None: all that are read.
        score: by which they are chosen: `tfidf`, `kl`, `tf`, `random`; see `row_scores`.
        per: `step`: chosen anew from the reads of each step. `task`: once, from a pass over the training data.
        task_steps: optimizer steps of that pass; None: one epoch, at most `trainer.max_steps`.
        background: a run, or a file that `ReadBackground.save` wrote; None: the checkpoint of `init_from`.
        background_path: text whose reads are the background instead, measured before training.
        background_batches: sequences of that text, at most.
        replay_share, replay_path: as in `Finetuning`.
    """

    def __init__(
        self,
        *,
        rows: Annotated[int, Range(1)] | None,
        score: Literal["tfidf", "kl", "tf", "random"],
        per: Literal["step", "task"],
        task_steps: Annotated[int, Range(1)] | None,
        background: str | None,
        background_path: str | None,
        background_batches: Annotated[int, Range(1)],
        replay_share: Share,
        replay_path: str | None,
    ) -> None:
        super().__init__(replay_share=replay_share, replay_path=replay_path)
        if background is not None and background_path is not None:
            raise ConfigError(
                f"finetune.background={background} and finetune.background_path={background_path} are both set; "
                "keep the file of counts, or the text to count in."
            )
        self._callback = SparseRows(
            rows=rows,
            score=score,
            per=per,
            task_steps=task_steps,
            background=background,
            background_path=background_path,
            background_batches=background_batches,
        )

    def adapt(self, model: nn.Module) -> None:
        """Excludes all parameters from training but value tables."""
        tables = {id(table.weight) for table in _tables(model)}
        for parameter in model.parameters():
            if id(parameter) not in tables:
                parameter.requires_grad_(False)

    def check(self, model: Transformer, config: Mapping[str, Any]) -> None:
        """Refuses a model without tables that learn by rows, with tables that learn otherwise, or without a background.

        Raises:
            PkmError: saying which keys help.
        """
        tables = _tables(model)
        if any(table.weight.requires_grad for table in tables):
            raise ConfigError(
                "finetune=sparse updates tables by rows, and table.learning=dense moves all of them at every step; "
                "set table.learning=rows."
            )
        if not any(table.stage is not None for table in tables):
            problem = "has no value table" if not tables else "has no table that learns"
            raise ConfigError(
                f"finetune=sparse trains rows of value tables, and this model {problem}; set ffn=memory_plus for a "
                "new memory (with model=hf beside the pretrained weights), table.trainable=true, or finetune=full."
            )
        reads = RowReads(model, learning=True)
        self._callback.check_background(config, reads.rows)

    def callbacks(self) -> list[L.Callback]:
        """Returns the callback that chooses the rows."""
        return [self._callback]


def _tables(model: nn.Module) -> list[ValueTable]:
    return [module for module in model.modules() if isinstance(module, ValueTable)]
