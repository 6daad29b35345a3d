"""TensorBoard with the figures that one looks at first in a group of their own, and the others by what they measure.

TensorBoard groups figures by the text before the first slash, so that everything named `train/...` would be one group
of many dozens. Only the names in TensorBoard change; metrics.csv and other loggers keep those of the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger as _TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

#: TensorBoard sorts by character: a capital comes before the small letters of all other groups.
OVERVIEW = "Overview"
_OF_OVERVIEW = {
    "train/loss": "loss_train",
    "val/loss": "loss_validation",
    "train/lr": "rate",
    "val/recall_paraphrase": "recall_paraphrase",
    "train/throughput/tokens_per_sec": "tokens_per_sec",
}
#: Columns beside the hyperparameters.
_FINAL = ("test/loss", "test/recall_paraphrase")


def tag_of(metric: str) -> str:
    """Returns the name of a metric in TensorBoard, `GROUP/NAME`."""
    if metric in _OF_OVERVIEW:
        return f"{OVERVIEW}/{_OF_OVERVIEW[metric]}"
    split, _, name = metric.partition("/")
    return name if split == "train" and "/" in name else metric


class TensorBoardLogger(_TensorBoardLogger):
    """Lightning's TensorBoardLogger with the groups above, and hyperparameters beside the figures of the final test.

    Args:
        save_dir: folder of the run.
        name: folder in it, or an empty text.
        version: folder of the events in these.
        options: of `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, *, save_dir: str, name: str, version: str, **options: Any) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False, **options)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes the figures under their names in TensorBoard."""
        super().log_metrics({tag_of(name): value for name, value in metrics.items()}, step)
        if final := [name for name in _FINAL if name in metrics]:
            self._compare(final)

    def _compare(self, final: Sequence[str]) -> None:
        """Makes columns of the hyperparameters, of the final metrics and of the last figures of the overview."""
        from torch.utils.tensorboard.summary import hparams

        shown = [*final, *(f"{OVERVIEW}/{name}" for name in _OF_OVERVIEW.values())]
        # The values of these metrics are those of their scalars; here only the names matter.
        for summary in hparams(self._sanitize_params(dict(self.hparams)), dict.fromkeys(shown, 0.0)):
            self.experiment._get_file_writer().add_summary(summary)
