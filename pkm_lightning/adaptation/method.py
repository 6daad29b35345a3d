"""What the methods of `finetune` share: keys of replay, and nothing that acts while the run is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pkm_lightning.build.kinds import Range

if TYPE_CHECKING:
    import lightning as L

    from pkm_lightning.model import Transformer

#: Of the sequences of each step.
Share = Annotated[float, Range(0, 0.999)]


class Finetuning:
    """The base of finetuning methods.

    Args:
        replay_share: share of the training sequences that comes from old data.
        replay_path: where these lie; see `pkm_lightning.build.replay`, which reads both keys.
    """

    def __init__(self, *, replay_share: Share, replay_path: str | None) -> None:
        self.replay_share, self.replay_path = replay_share, replay_path

    def check(self, model: Transformer, config: Mapping[str, Any]) -> None:
        """Refuses none."""

    def callbacks(self) -> list[L.Callback]:
        """Returns none."""
        return []
