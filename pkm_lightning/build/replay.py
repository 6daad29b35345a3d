"""`finetune.replay_share` and `finetune.replay_path`: which old data are among the training sequences of a run."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from pkm_lightning.build.instantiate import check_kind, check_trusted, instantiate
from pkm_lightning.data.datamodule import LoaderOptions, TokenDataModule, TokenizerOptions
from pkm_lightning.data.files import COMPRESSED
from pkm_lightning.data.replay import Replay
from pkm_lightning.errors import ConfigError
from pkm_lightning.storage import open_regular

Config = Mapping[str, Any]

_KEY = "finetune.replay_path"
#: Files of other kinds than text, and the data source that reads them.
_RECORDS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "hf", ".arrow": "hf", ".csv": "hf"}
_TEXT = ("text.yaml", "loader/default.yaml", "loader/batches.yaml")


def add_replay(data: L.LightningDataModule, config: Config) -> None:
    """Adds what is replayed to the training sequences of `data`, which is not prepared yet.

    Raises:
        ConfigError: one of the two keys without the other, data that cannot be mixed, or a path of neither kind.
    """
    keys = config.get("finetune") or {}
    share, path = keys.get("replay_share") or 0, keys.get("replay_path")
    if not share and path is None:
        return
    if not share:
        raise ConfigError(f"{_KEY}={path} has no effect with finetune.replay_share=0; set a share, such as 0.05.")
    if path is None:
        raise ConfigError(
            f"finetune.replay_share={share} needs old data; set {_KEY} to the directory of a run, a folder that "
            "prepare has written, or text files."
        )
    if not isinstance(data, TokenDataModule):
        raise ConfigError(
            f"finetune.replay_share={share}: {type(data).__name__} is no TokenDataModule, and takes no further "
            "sequences; set it to 0 and mix them in yourself."
        )
    if Path(path).resolve() == Path(config["run_dir"]).resolve():
        raise ConfigError(
            f"{_KEY}={path} is run_dir, whose files this run replaces; give the directory of another run."
        )
    described = _described(str(path), data, config)
    old = instantiate(described, "data")
    check_kind(old, TokenDataModule, described, "data")
    data.replay = Replay(old, share, f"{_KEY}={path}")


def _described(path: str, data: TokenDataModule, config: Config) -> dict[str, Any]:
    """Returns the configuration of the data module of what is replayed, in batches and tokens like those of `data`."""
    place = Path(path)
    own = {key: value for key, value in config["data"].items() if key in LoaderOptions.__required_keys__}
    own |= {"prompts": [], "prompts_file": None}
    choice = {key: value for key, value in config["data"].items() if key in TokenizerOptions.__annotations__}
    choice["tokenizer"] = data.tokenizer_choice.kind
    if (place / "config.yaml").is_file():
        trained = _data_of(place, trust=bool(config.get("trust_config")))
        return {**trained, **own, **(choice if "tokenizer" in trained else {})}
    if (place / "manifest.json").is_file():
        target = "pkm_lightning.data.TokensDataModule"
        return {"_target_": target, "path": path, "val_path": None, "test_path": None, "packing": None, **own}
    if not place.exists() and not glob.glob(path, recursive=True):
        raise ConfigError(
            f"{_KEY}={path} does not exist; give the directory of a run, a folder that prepare has written, or text."
        )
    suffixes = [suffix for suffix in place.suffixes if suffix not in COMPRESSED]
    if suffixes and suffixes[-1] in _RECORDS:
        raise ConfigError(
            f"{_KEY}={path} is no text; tokenise it with: prepare data={_RECORDS[suffixes[-1]]} data.path={path} "
            f"data.tokenizer={choice['tokenizer']} out=FOLDER, and give that folder."
        )
    return {**_text_defaults(), **own, **choice, "path": path}


def _data_of(run_dir: Path, *, trust: bool) -> dict[str, Any]:
    """Returns the group `data` of the run in `run_dir`.

    Raises:
        ConfigError: it cannot be read, or names a class of another package.
    """
    file = run_dir / "config.yaml"
    try:
        with open_regular(file, encoding="utf-8") as stream:
            described = dict(yaml.safe_load(stream)["data"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        raise ConfigError(f"{_KEY}={run_dir}: its config.yaml holds no data; give a run of this package.") from None
    if not trust:
        check_trusted({"data": described}, str(file))
    return described


def _text_defaults() -> dict[str, Any]:
    """Returns the keys of `data=text` with their defaults."""
    folder = resources.files("pkm_lightning.configs") / "data"
    keys: dict[str, Any] = {}
    for name in _TEXT:
        keys = {**yaml.safe_load((folder / name).read_text(encoding="utf-8")), **keys}
    keys.pop("defaults")
    return keys
