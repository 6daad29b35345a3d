"""`data=tokens`: prepared folders read where they lie, and refused where they are not what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_folders import text, write_folder, write_shards
from small import Run

from pkm_lightning.data import HeldOutDataModule, JsonlDataModule, MixDataModule, TokensDataModule
from pkm_lightning.data.held_out import keep_held_out
from pkm_lightning.data.prepared import prepare_data
from pkm_lightning.data.shards.mapped import TokenShards
from pkm_lightning.data.tokenizer import bytes_tokenizer, train_bpe
from pkm_lightning.errors import ConfigError, DataError
from pkm_lightning.huggingface.model_card import data_sources

OPTIONS = {
    "val_path": None, "test_path": None, "packing": "windows", "seq_len": 8, "global_batch_size": 4, "num_workers": 0,
    "order_seed": 3, "prompts": [], "prompts_file": None,
}  # fmt: skip
PARTS = {
    "train": [text("the first document"), text("and the second, which is longer")],
    "validation": [text("held out to validate")],
    "test": [text("held out to test")],
}


def tokens(root: Path, path: Path, **options: Any) -> TokensDataModule:
    made = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return TokensDataModule(**{**OPTIONS, "path": str(path), "cache_dir": str(root / "cache"), **made})


def words(batch: dict[str, Any]) -> str:
    decoded: str = bytes_tokenizer().decode(batch["input_ids"][batch["valid"]].tolist())
    return decoded


def test_the_sources_with_their_licences_are_those_of_the_folder(tmp_path: Path) -> None:
    """Model cards of exports name them."""
    folder = write_folder(tmp_path, PARTS)
    config = {"_target_": "pkm_lightning.data.TokensDataModule", **OPTIONS, "path": str(folder)}
    (source,) = data_sources({"data": {**config, "cache_dir": str(tmp_path)}})
    assert (source["name"], source["files"]) == ("test", {"file": "0"})
    assert data_sources({"data": {**config, "path": str(tmp_path / "gone"), "cache_dir": str(tmp_path)}}) == []


def test_the_parts_are_those_of_the_folder(tmp_path: Path) -> None:
    data = tokens(tmp_path, write_folder(tmp_path, PARTS, questions=[("who", "me")]), packing="documents", seq_len=40)
    assert data.vocab_size == 258
    data.prepare_data()
    assert data.tokenizer.digest == bytes_tokenizer().digest
    assert [words(batch) for batch in data.val_dataloader()] == ["held out to validate"]
    assert [words(batch) for batch in data.test_dataloader()] == ["held out to test"]
    assert [(item.prompt, item.answer) for item in data.recall_items()] == [("who", "me")]


TEXTS = [{"text": f"text {i} and more of it"} for i in range(12)]
ANSWERS = [{"prompt": f"number {i}", "answer": f"{i * 7}"} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(12)
]


@pytest.mark.parametrize("records", [TEXTS, ANSWERS, CHATS], ids=["texts", "answers", "chats"])
def test_a_folder_is_packed_as_the_data_that_it_was_made_from(
    jsonl: Callable[..., JsonlDataModule], tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = jsonl(str(tmp_path / "r.jsonl"), seq_len=64)
    folder, _ = prepare_data(source, "jsonl", tmp_path / "out", overwrite=False)
    alone = tokens(tmp_path, folder, packing=None, seq_len=64)
    alone.prepare_data()
    assert alone.packing == "documents"
    # Those of two builds differ in the sources alone, and these are the same.
    assert alone.fingerprint == source.fingerprint
    sources = {"one": {"path": str(folder)}, "two": {"path": str(folder), "weight": 3}}
    cut = {**OPTIONS, "packing": "windows", "cache_dir": str(tmp_path)}
    del cut["val_path"], cut["test_path"]
    for module in (
        tokens(tmp_path, folder, packing="windows", seq_len=8),
        tokens(tmp_path, write_folder(tmp_path, PARTS), val_path=folder),
        MixDataModule(sources=sources, **cut),
    ):
        if records is CHATS:
            with pytest.raises(
                ConfigError, match=r"data\.packing=windows would cut the conversations of data\..*path="
            ):
                module.prepare_data()
        else:
            module.prepare_data()


def test_text_is_cut_into_windows_and_answers_of_earlier_folders_are_not(tmp_path: Path) -> None:
    for parts, packing in ((PARTS, "windows"), ({**PARTS, "train": [text("asked answered", 6)] * 3}, "documents")):
        data = tokens(tmp_path, write_folder(tmp_path, parts), packing=None)
        data.cache_folder()
        assert data.packing == packing


def test_folders_of_their_own_are_held_out_as_a_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = write_folder(tmp_path, {**PARTS, "test": []})
    other = write_folder(tmp_path, {"train": [text("one")], "validation": [text("two")]}, questions=[("a", "b")])
    data = tokens(tmp_path, training, val_path=other, packing="documents", seq_len=40)
    data.prepare_data()
    assert [words(batch) for batch in data.val_dataloader()] == ["onetwo"]
    assert data.recall_items()[0].prompt == "a"
    with caplog.at_level("INFO"):
        assert len(list(data.test_dataloader())) == 1
    assert "the data have no test part: the validation part is tested" in caplog.text
    assert data.fingerprint != tokens(tmp_path, training, packing="documents", seq_len=40).fingerprint


def test_a_folder_without_validation_needs_another_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"train": PARTS["train"]})
    with pytest.raises(DataError, match=r"has no validation part; set data\.val_path to a prepared folder"):
        tokens(tmp_path, folder).prepare_data()
    tokens(tmp_path, folder, val_path=write_folder(tmp_path, {"train": PARTS["validation"]})).prepare_data()


@pytest.mark.parametrize(("part", "message"), [("train", "training"), ("validation", "validation"), ("test", "test")])
def test_parts_shorter_than_a_sequence_are_refused(tmp_path: Path, part: str, message: str) -> None:
    folder = write_folder(tmp_path, {**PARTS, part: [text("abc")]})
    with pytest.raises(
        DataError, match=rf"the {message} part has 4 tokens, a sequence of data\.seq_len=8 needs 9; lower"
    ):
        tokens(tmp_path, folder).prepare_data()


def _rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        (content := json.loads((folder / name).read_text())) and change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _in_place(name: str, place: int) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"holds no prepared tokens \(manifest\.json missing\)"),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        r"holds no prepared tokens \(tokenizer\.json missing\)",
    ),
    "no shard": (lambda f: (f / "train-00000.tokens").unlink(), r"train-00000\.tokens does not hold what shards\.json"),
    "truncated": (lambda f: (f / "train-00000.begins").write_bytes(b"1234"), r"train-00000\.begins does not hold what"),
    "edited": (_in_place("train-00000.tokens", 7), r"train-00000\.tokens has changed since it was written"),
    "edited documents": (_in_place("train-00000.begins", 9), r"train-00000\.begins has changed since it was written"),
    "index": (
        _rewrite("shards.json", lambda index: index.update(vocab_size=300)),
        r"shards\.json has (changed|another)",
    ),
    "index of others": (lambda f: (f / "shards.json").write_text("[]"), r"shards\.json is not one of this package"),
    "negative": (_rewrite("shards.json", lambda index: index.update(vocab_size=-1)), r"shards\.json is not one of"),
    "no JSON": (lambda f: (f / "shards.json").write_text("{"), r"shards\.json is not one of this package"),
    "outside": (
        _rewrite("shards.json", lambda index: index["parts"]["train"][0].update(name="../../x")),
        r"names \.\./\.\./x, which is no name of a file",
    ),
    "manifest": (lambda f: (f / "manifest.json").write_text("{}"), r"manifest\.json has changed since it was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_written_is_refused(tmp_path: Path, damage: str) -> None:
    folder = write_folder(tmp_path, PARTS)
    tokens(tmp_path, folder).prepare_data()
    edit, message = DAMAGES[damage]
    edit(folder)
    with pytest.raises(DataError, match=rf"data\.path={folder} .*{message}"):
        tokens(tmp_path, folder).prepare_data()


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_changed_bit_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    folder = write_folder(tmp_path, PARTS)
    files = [f for f in folder.iterdir() if f.name != "manifest.json" and f.stat().st_size]
    name = data.draw(st.sampled_from(sorted(f.name for f in files)))
    content = (folder / name).read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    (folder / name).write_bytes(changed)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        tokens(tmp_path, folder).prepare_data()
    (folder / name).write_bytes(content)


def test_documents_out_of_order_are_refused_even_under_a_right_hash(tmp_path: Path) -> None:
    write_shards(tmp_path, PARTS)
    shards = TokenShards(tmp_path, "train")
    assert shards.begins(0).tolist() == [0, len(PARTS["train"][0][0])]
    for begins in ([5, 3], [-1, 3], [0, 10**9], [0, 0]):
        np.asarray(begins, dtype=np.int64).tofile(tmp_path / "train-00000.begins")
        with pytest.raises(DataError, match=r"train-00000\.begins is damaged: its documents are not in order"):
            shards.begins(0)


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=/no/such does not exist; set the folder that `prepare data"):
        _ = tokens(tmp_path, Path("/no/such")).vocab_size
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(DataError, match=r"corpus\.txt is not a directory; set the folder"):
        tokens(tmp_path, tmp_path / "corpus.txt").prepare_data()
    with pytest.raises(DataError, match=r"manifest\.json, shards\.json, tokenizer\.json missing"):
        tokens(tmp_path, tmp_path).prepare_data()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder, other = write_folder(tmp_path, PARTS), write_folder(tmp_path, PARTS, tokenizer=train_bpe(["ab ab"], 259))
    with pytest.raises(
        DataError, match=r"data\.val_path=.* another tokenizer than data\.path=.*data\.tokenizer=.*json"
    ):
        tokens(tmp_path, folder, val_path=other).prepare_data()


@pytest.mark.parametrize("packing", ["windows", "documents", "none"])
def test_a_run_keeps_both_held_out_parts(tmp_path: Path, packing: str) -> None:
    data = tokens(tmp_path, write_folder(tmp_path, PARTS), packing=packing)
    data.prepare_data()
    keep_held_out(data, tmp_path / "kept")
    loader = {key: OPTIONS[key] for key in ("seq_len", "global_batch_size", "num_workers", "order_seed", "prompts")}
    kept = HeldOutDataModule(
        folder=str(tmp_path / "kept"), tokenizer=str(data.path / "tokenizer.json"), vocab_size=0, prompts_file=None,
        cache_dir=str(tmp_path), **loader,
    )  # fmt: skip
    kept.prepare_data()
    for one, two in zip(
        [*data.val_dataloader(), *data.test_dataloader()],
        [*kept.val_dataloader(), *kept.test_dataloader()],
        strict=True,
    ):
        assert all(one[name].equal(two[name]) for name in one)
    assert kept.splits.test is not None
    (tmp_path / "kept" / "test.npz").unlink()
    with pytest.raises(DataError, match=r"test\.npz is damaged or missing"):
        kept.prepare_data()


def test_a_run_is_trained_and_tested_without_the_data(cli: Run, tmp_path: Path) -> None:
    documents = [text(f"document {i} says {i * 7}") for i in range(30)]
    folder = write_folder(tmp_path, {**PARTS, "train": documents, "test": documents[:3]})
    trained = cli(
        "fit", "data=tokens", f"data.path={folder}", "data.seq_len=16", "data.global_batch_size=4", "ffn=dense",
        "model.dim=16", "model.n_layers=1", "model.n_heads=4", "trainer.max_steps=4", "trainer.val_check_interval=2",
        "run_dir=run", "logger=none",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    folder.rename(tmp_path / "gone")
    tested = cli("test", "run_dir=run")
    assert tested.code == 0, tested.err
    validated = cli("validate", "run_dir=run")
    assert validated.code == 0, validated.err
    figure = f"{record['metrics']['test/loss']:.4f}"
    assert figure[:5] in tested.out
    assert figure[:5] not in validated.out
