"""`data=mix`: several folders of tokens, each with its share of the training sequences."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np

from pkm_lightning.data.base import RecallItem
from pkm_lightning.data.datamodule import LoaderOptions, Splits, TokenDataModule
from pkm_lightning.data.files import check_paths, expanded
from pkm_lightning.data.mixture import BLOCK, MixedKey, MixedOrder, MixedSequences, places_per_block
from pkm_lightning.data.shards.content import content_lines
from pkm_lightning.data.shards.folder import check_same_tokenizer
from pkm_lightning.data.shards.mapped import read_index
from pkm_lightning.data.tokens import TokensDataModule
from pkm_lightning.errors import ConfigError, check_range

__all__ = ["MixDataModule", "MixedSource"]

#: Sums of weights and their ratios are finite.
MOST_WEIGHT = 1e9

log = logging.getLogger(__name__)


class MixedSource(TypedDict):
    """One source of a mixture.

    Attributes:
        path: a folder that `prepare` has written.
        weight: its share, in proportion to the weights of the others; 1 where it is absent.
    """

    path: str
    weight: NotRequired[float]


class MixDataModule(TokenDataModule):
    """Folders of shards, of one tokenizer, in given shares of the training sequences.

    Every source goes through its own epochs. Validation and test hold each source's own part, of which as much is taken
    as the shares allow, so that their loss is that of the mixture.

    Args:
        sources: by name.
        packing: see `ShardedDataModule`; None: of each source that of the data which it was prepared from.
        options: see `LoaderOptions`.

    Raises:
        ConfigError: no source, a wrong key, or a weight that gives no sequence in 1,000.
        DataError: see `TokensDataModule`.
    """

    builds = False

    def __init__(
        self, *, sources: Mapping[str, MixedSource], packing: str | None, **options: Unpack[LoaderOptions]
    ) -> None:
        _check_sources(sources)
        self.weights = [float(source.get("weight", 1)) for source in sources.values()]
        paths = [source["path"] for source in sources.values()]
        super().__init__(tokenizer=str(expanded(paths[0]) / "tokenizer.json"), vocab_size=0, **options)
        self.parts = [
            TokensDataModule(path=path, val_path=None, test_path=None, packing=packing, **options) for path in paths
        ]
        for name, part in zip(sources, self.parts, strict=True):
            part.key = f"data.sources.{name}.path"
            part.without_validation = "prepare it again with data.val_fraction or data.val_path"
        self.places = places_per_block(self.weights)
        for name, weight, places in zip(sources, self.weights, self.places, strict=True):
            if not places:
                raise ConfigError(
                    f"data.sources.{name}.weight={weight} gives it no sequence in {BLOCK}; its share must be 0.001 or "
                    "more of the sum of all weights."
                )

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model must provide for."""
        return max(part.vocab_size for part in self.parts)

    def passes(self, steps: int) -> float:
        """Returns how often so many optimizer steps read the source that is read most often, after `prepare_data`."""
        sequences = steps * self.global_batch_size / BLOCK
        return max(
            sequences * places / (order.sections * order.size(0))
            for order, places in zip(self._orders, self.places, strict=True)
        )

    def prepared_sources(self) -> list[dict[str, Any]]:
        """Returns the names and licences of what the folders were made from."""
        return [source for part in self.parts for source in part.prepared_sources()]

    def cache_folder(self) -> Path:
        """Returns the folder of the first source, once all are checked.

        Raises:
            DataError: one is missing, foreign, damaged, or of another tokenizer.
        """
        folders = [part.cache_folder() for part in self.parts]
        for folder, part in zip(folders[1:], self.parts[1:], strict=True):
            check_same_tokenizer(folders[0], self.parts[0].key, folder, part.key)
        return folders[0]

    @property
    def fingerprint(self) -> str:
        """sha256 of the fingerprints of the sources and their places per block, but not of the order."""
        content = [[part.fingerprint, places] for part, places in zip(self.parts, self.places, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def load(self, folder: Path) -> Splits:
        """Opens all sources.

        Raises:
            ConfigError, DataError: see `TokensDataModule.load`.
        """
        opened = [part.load(part.cache_folder()) for part in self.parts]
        self._orders = [split.order for split in opened]
        tokenizer = opened[0].tokenizer
        tokenizer.chat_template = self._chat_template([split.tokenizer.chat_template for split in opened])
        pad_id = tokenizer.pad_id
        tests = [(split.test, split.test_keys) for split in opened if split.test is not None]
        return Splits(
            tokenizer=tokenizer,
            train=MixedSequences([split.train for split in opened], pad_id),
            order=MixedOrder(self._orders, self.places, self.order_seed),
            validation=MixedSequences([split.validation for split in opened], pad_id),
            validation_keys=ProportionalKeys([split.validation_keys for split in opened], self.weights),
            # Without one of the sources it would be the test of another mixture.
            test=MixedSequences([source for source, _ in tests], pad_id) if len(tests) == len(opened) else None,
            test_keys=ProportionalKeys([keys for _, keys in tests], self.weights) if len(tests) == len(opened) else (),
        )

    def _chat_template(self, templates: Sequence[str | None]) -> str | None:
        """Returns the template of the first source that has one, since a model can be asked in one form only."""
        named = [(part.key, template) for part, template in zip(self.parts, templates, strict=True) if template]
        for key, template in named[1:]:
            if template != named[0][1]:
                log.warning("%s has another chat template than %s, which the run keeps for chat", key, named[0][0])
        return named[0][1] if named else None

    def content(self) -> list[str]:
        """Returns the share and the tokens of each source."""
        shares = {part: 100 * places / BLOCK for part, places in zip(self.parts, self.places, strict=True)}
        tokens = {part: content_lines(read_index(part.path))[1] for part in self.parts}
        return [f"{p.place('train')}: {share:.1f}% of the sequences; {tokens[p]}" for p, share in shares.items()]

    def recall_items(self, limit: int | None = None) -> list[RecallItem]:
        """Returns at most `limit` validation questions, of the sources in turn."""
        rounds = zip_longest(*(part.recall_items(limit) for part in self.parts))
        return [item for of_round in rounds for item in of_round if item is not None][:limit]


class ProportionalKeys(Sequence[MixedKey]):
    """The first keys of each source, as many as make the shares those of the weights; at least one of each.

    Args:
        keys: of the sources, one or more each.
        weights: of the sources.
    """

    def __init__(self, keys: Sequence[Sequence[Any]], weights: Sequence[float]) -> None:
        # The source that has least for its weight gives all that it has.
        per_weight = min(len(of_source) / weight for of_source, weight in zip(keys, weights, strict=True))
        self._keys = keys
        self._starts = np.cumsum([0, *(max(1, round(per_weight * weight)) for weight in weights)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, self._keys[source][index - int(self._starts[source])]


def _check_sources(sources: Mapping[str, MixedSource]) -> None:
    if not isinstance(sources, Mapping) or not sources:
        raise ConfigError(
            f"data.sources={sources!r} names no sources; set 'data.sources={{NAME: {{path: FOLDER, weight: 1}}}}'."
        )
    for name, source in sources.items():
        key = f"data.sources.{name}"
        if not isinstance(source, Mapping) or not {"path"} <= set(source) <= set(MixedSource.__annotations__):
            raise ConfigError(
                f"{key}={source!r} must have the key path and may have weight (1 if it is left out), and no others."
            )
        check_paths(f"{key}.path", source["path"])
        if not isinstance(source["path"], str):
            raise ConfigError(f"{key}.path={source['path']!r} is no folder; give each folder a name and a weight.")
        weight = source.get("weight", 1)
        check_range(f"{key}.weight", weight, low=0, high=MOST_WEIGHT)
        if weight < 1 / MOST_WEIGHT:
            raise ConfigError(
                f"{key}.weight={weight} gives it no sequence; set {1 / MOST_WEIGHT:g} or more, or leave the source out."
            )
