"""The text that `edit` compares the model on: that of the command, or what the run was trained on and has kept."""

from __future__ import annotations

import logging
from pathlib import Path

from pkm_lightning.adaptation.settings import WritingSettings
from pkm_lightning.adaptation.text_batches import TextParts, held_out_parts, text_file_parts, training_batches
from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.companions import TOKENIZER, companion_place
from pkm_lightning.cli.places import cache_of
from pkm_lightning.cli.resume import saved_config
from pkm_lightning.cli.run_contents import HELD_OUT
from pkm_lightning.data.base import Batch
from pkm_lightning.data.datamodule import TokenDataModule
from pkm_lightning.data.held_out import holds_held_out
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import ConfigError, PkmError

_log = logging.getLogger(__name__)


def other_text(
    drift_path: str | None,
    folder: Path | None,
    loaded: LoadedModel,
    settings: WritingSettings,
    *,
    cache: str | None,
    trust: bool,
) -> TextParts:
    """Returns the text that the learning sees, and the text that bounds what it may change.

    Args:
        drift_path: text files; None: the held-out data of the run and, where they are prepared in the cache still, its
            training data, which the learning then sees as well.
        folder: the run's directory; None for a bare checkpoint.
        loaded: the model.
        settings: how much is read.
        cache: where the data of the run are prepared; None: in the default cache, or that of a run that is trusted.
        trust: whether the run's configuration may name classes of other packages.

    Raises:
        ConfigError: none is named, and the run has kept none.
        DataError: it cannot be read, or is too short.
    """
    most = settings.drift_tokens
    if drift_path is not None:
        codec = loaded.codec()
        if not isinstance(codec, Tokenizer):
            raise ConfigError(f"drift_path={drift_path} needs a tokenizer.json beside the weights; leave it out.")
        return text_file_parts(drift_path, codec, context=loaded.context, most_tokens=most)
    held_out = companion_place(loaded.path, HELD_OUT)
    if not holds_held_out(held_out):
        raise ConfigError(
            f"{held_out} has no held-out data, by which `edit` bounds what else it changes; give drift_path=FILE of "
            "other text."
        )
    parts = held_out_parts(held_out, companion_place(loaded.path, TOKENIZER), most_tokens=most, seed=settings.seed)
    training = [] if folder is None else _training(folder, loaded, most, cache, trust=trust)
    return parts._replace(penalised=[*training, *parts.penalised])


def _training(folder: Path, loaded: LoadedModel, most_tokens: int, cache: str | None, *, trust: bool) -> list[Batch]:
    """Returns training sequences of a run, none where its data are not prepared here: nothing is built for them."""
    try:
        command = cache_of({"data": {"cache_dir": cache}})
        config = saved_config(folder, trust=trust, cache=command)
        if cache is not None and "cache_dir" in config["data"]:  # of a run that is trusted, too
            config["data"]["cache_dir"] = command
        data = instantiate(config["data"], "data")
        if not isinstance(data, TokenDataModule):
            return []
        data.prepared_sources()
        data.prepare_data()
        if data.fingerprint != open_checkpoint(loaded.path).skeleton.get("data"):
            return []
        batches = training_batches(data, most_tokens)
    except (PkmError, OSError, ValueError, KeyError, ImportError) as reason:
        _log.info("the training data are not at hand (%s): held-out validation data are the other text", reason)
        return []
    return batches
