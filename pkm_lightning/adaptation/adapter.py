"""`finetune=adapter`: only FFN variants beside the FFNs that were trained learn, or other chosen parts of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from pkm_lightning.adaptation.method import Finetuning, Share
from pkm_lightning.build.freezing import freeze_others, matching_names
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import HasReads

__all__ = ["Adapter"]

#: The names within a layer of plugins that stand in the place of its FFN; the others are beside it.
_IN_PLACE = ("ffn", "ffn.base")


class Adapter(Finetuning):
    """Finetuning of some parameters, by default those of plugins beside FFNs (Houlsby et al. 2019, arXiv 1902.00751).

    Args:
        learn: patterns of the parameters that learn, as `fnmatch` reads them, like those of `optim.freeze`; None for
            those of plugins with `placement.mode=parallel`, `before` or `after`, and of tables that only these read.
        replay_share, replay_path: see `Finetuning`.

    Raises:
        ConfigError: in `adapt`, a pattern that matches nothing, or no plugin beside an FFN.
    """

    def __init__(self, *, learn: Sequence[str] | None, replay_share: Share, replay_path: str | None) -> None:
        super().__init__(replay_share=replay_share, replay_path=replay_path)
        self.learn = learn

    def adapt(self, model: nn.Module) -> None:
        """Excludes all other parameters from training."""
        names = [name for name, _ in model.named_parameters()]
        if self.learn is not None:
            chosen = matching_names(names, self.learn, "finetune.learn")
        else:
            beside = {id(parameter) for parameter in _beside(model)}
            chosen = {name for name, parameter in model.named_parameters() if id(parameter) in beside}
        if not chosen:
            raise ConfigError(
                "finetune=adapter: the model has no plugin beside an FFN, as extra_ffns=dense adds one to each layer; "
                "add one, or name what learns in finetune.learn=[PATTERN,...]."
            )
        freeze_others(model, chosen)


def _beside(model: Any) -> Iterator[nn.Parameter]:
    """Yields the parameters of plugins beside FFNs, of their norms, and of tables that no other plugin reads."""
    by_place: dict[bool, list[nn.Module]] = {True: [], False: []}
    for layer, part, plugin in model.plugins():
        by_place[part in _IN_PLACE].append(plugin)
        norm = getattr(model.blocks[layer], f"{part}_norm", None)
        if isinstance(norm, nn.Module):
            by_place[part in _IN_PLACE].append(norm)
    others = {id(weight) for plugin in by_place[True] for weight in _weights(plugin)}
    yield from (weight for plugin in by_place[False] for weight in _weights(plugin) if id(weight) not in others)


def _weights(plugin: nn.Module) -> Iterator[nn.Parameter]:
    yield from plugin.parameters()
    if isinstance(plugin, HasReads):
        yield from (read.table.weight for read in plugin.reads())
