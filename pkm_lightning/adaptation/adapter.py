"""`finetune=adapter`: only new parts of a model learn, such as FFN variants beside the FFNs that were trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from pkm_lightning.adaptation.method import Finetuning, Share
from pkm_lightning.build.freezing import freeze_others, matching_names
from pkm_lightning.errors import ConfigError

__all__ = ["Adapter"]

#: Plugins in parallel to an FFN, in our own transformer and in one of transformers.
_BESIDE = ("*.ffn.variant.*", "*.mlp.plugin.*")


class Adapter(Finetuning):
    """Finetuning of some parameters, by default those of plugins with `placement.mode=parallel`.

    Args:
        learn: patterns of the parameters that learn, as `fnmatch` reads them, like those of `optim.freeze`; None for
            those of all plugins in parallel to an FFN, without their tables.
        replay_share, replay_path: see `Finetuning`.

    Raises:
        ConfigError: in `adapt`, a pattern that matches nothing, or no plugin in parallel to an FFN.
    """

    def __init__(self, *, learn: Sequence[str] | None, replay_share: Share, replay_path: str | None) -> None:
        super().__init__(replay_share=replay_share, replay_path=replay_path)
        self.learn = learn

    def adapt(self, model: nn.Module) -> None:
        """Freezes all other parameters."""
        names = [name for name, _ in model.named_parameters()]
        if self.learn is not None:
            chosen = matching_names(names, self.learn, "finetune.learn")
        else:
            chosen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in _BESIDE)}
        if not chosen:
            raise ConfigError(
                "finetune=adapter: the model has no plugin in parallel to an FFN, as extra_ffns=dense adds one to each "
                "layer; add one, or name what learns in finetune.learn=[PATTERN,...]."
            )
        freeze_others(model, chosen)
