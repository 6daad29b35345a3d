"""Which old data a run replays: what `finetune.replay_path` may name, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from shard_folders import text, write_folder
from toys import config

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.build.replay import add_replay
from pkm_lightning.data.datamodule import TokenDataModule
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError, DataError

TEXTS = ("data=text", "data.path=new.txt", "data.tokenizer=bytes", "data.seq_len=16", "data.global_batch_size=4")


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("new.txt").write_text("new words of a new time. " * 30)
    Path("old.txt").write_text("OLD WORDS OF AN OLD TIME. " * 30)


def settings(path: str | None, share: float = 0.5, *overrides: str) -> dict[str, Any]:
    settings = config(*TEXTS, "data.cache_dir=cache", *overrides)
    return {**settings, "finetune": {"replay_share": share, "replay_path": path}}


def replaying(path: str | None, share: float = 0.5, *overrides: str) -> TokenDataModule:
    described = settings(path, share, "run_dir=.", *overrides)
    data: TokenDataModule = instantiate(described["data"], "data")
    add_replay(data, described)
    return data


def upper_case(data: TokenDataModule) -> list[bool]:
    """Returns of each sequence of a training batch whether it is of the old text."""
    batch = next(iter(data.train_dataloader()))
    texts = [bytes_tokenizer().decode(ids.tolist()) for ids in batch["input_ids"]]
    assert all(text.isupper() or text.islower() for text in texts)
    return [text.isupper() for text in texts]


def a_run(**data: Any) -> str:
    """Writes a run that was trained on the old text."""
    described = {**config("data=text", "data.path=old.txt")["data"], **data}
    Path("run").mkdir()
    Path("run/config.yaml").write_text(yaml.safe_dump({"model": {}, "ffn": {}, "data": described}))
    return "run"


def a_folder() -> str:
    documents = [text("OLD WORDS OF AN OLD TIME") for _ in range(20)]
    return str(write_folder(Path(), {"train": documents, "validation": documents}))


def test_text_is_replayed_in_the_tokens_of_the_run() -> None:
    data = replaying("old.txt")
    data.prepare_data()
    assert sum(upper_case(data)) == 2


def test_a_run_is_replayed_by_its_training_data_in_the_tokens_of_this_run() -> None:
    data = replaying(a_run(tokenizer="bpe", seq_len=99))
    data.prepare_data()
    assert sum(upper_case(data)) == 2


def test_a_folder_of_tokens_is_replayed() -> None:
    data = replaying(a_folder(), 0.25)
    data.prepare_data()
    assert data.replay is not None
    assert data.replay.places == [3, 1]


def test_tokens_replay_text() -> None:
    overrides = ("data=tokens", f"data.path={a_folder()}", "data.seq_len=16", "data.global_batch_size=4")
    described = config(*overrides, "data.cache_dir=cache")
    described["finetune"] = {"replay_share": 0.5, "replay_path": "old.txt"}
    data: TokenDataModule = instantiate(described["data"], "data")
    add_replay(data, described)
    data.prepare_data()
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (4, 16)


def test_none_by_default() -> None:
    assert replaying(None, 0.0).replay is None


@pytest.mark.parametrize(
    ("path", "share", "message"),
    [
        (None, 0.5, "finetune.replay_share=0.5 needs old data; set finetune.replay_path"),
        ("old.txt", 0.0, "finetune.replay_path=old.txt has no effect with finetune.replay_share=0"),
        ("old.txt", 0.0001, "finetune.replay_share=0.0001 must be 0.001 to 0.999"),
        ("nowhere", 0.5, "finetune.replay_path=nowhere does not exist"),
        ("old.jsonl", 0.5, "prepare data=jsonl data.path=old.jsonl data.tokenizer=bytes out=FOLDER"),
        ("old.jsonl.gz", 0.5, "prepare data=jsonl"),
        (".", 0.5, "finetune.replay_path=. is run_dir"),
        ("broken", 0.5, "finetune.replay_path=broken: its config.yaml holds no data"),
        ("foreign", 0.5, "config.yaml names data._target_=subprocess.Popen.*trust_config=true"),
    ],
)
def test_refusals(path: str | None, share: float, message: str) -> None:
    for name in ("old.jsonl", "old.jsonl.gz"):
        Path(name).touch()
    for name, content in (("broken", "model: {}"), ("foreign", "data: {_target_: subprocess.Popen, args: ls}")):
        Path(name).mkdir()
        (Path(name) / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        replaying(path, share)


def test_errors_of_the_old_data_name_the_key() -> None:
    Path("empty").mkdir()
    data = replaying("empty")
    with pytest.raises(DataError, match=r"^finetune.replay_path=empty: .*no"):
        data.prepare_data()


def test_other_data_modules_take_no_replay() -> None:
    with pytest.raises(ConfigError, match="LightningDataModule is no TokenDataModule"):
        add_replay(L.LightningDataModule(), settings("old.txt"))
