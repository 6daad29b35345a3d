"""`fit init_from=`: a new run from the weights of a run, a checkpoint or an export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import pytest
import start_jobs
import torch
import yaml
from processes import last_checkpoint
from rank_group import Groups
from small import Run, record
from toys import config

from pkm_lightning.build.model import build_meta_model, build_model
from pkm_lightning.build.run import ResolvedRun
from pkm_lightning.checkpoints import SavedCheckpoint, latest_checkpoint
from pkm_lightning.cli.initial_weights import InitialWeights
from pkm_lightning.errors import CheckpointError

SOURCE = [
    "data=text", "data.path=a.txt", "data.tokenizer=bytes", "data.seq_len=16", "data.global_batch_size=4",
    "model.n_layers=2", "model.dim=16", "model.ffn_dim=16", "model.n_heads=2", "model.n_kv_heads=2", "ffn=peer",
    "model.memory.n_keys=16", "callbacks=[metrics_csv,step_checkpoint]", "trainer.max_steps=3", "logger=none",
]  # fmt: skip
#: Nothing of the architecture: that of the weights is taken.
NEW = [
    "fit", "data=text", "data.path=b.txt", "data.seq_len=8", "data.global_batch_size=8", "seed=2", "optim.lr=0",
    "callbacks=[metrics_csv,step_checkpoint]", "trainer.max_steps=1", "logger=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture
def run(cli: Run, of_module: Path, tmp_path: Path) -> Run:
    """Texts, a run in `source`, and its export in `export/model.safetensors`, made once and copied for each test."""
    if not (of_module / "made").exists():
        for name in "ab":
            Path(f"{name}.txt").write_text((name + " cat sat on the mat and saw a dog run by . ") * 60)
        assert cli("fit", *SOURCE, "run_dir=source").code == 0
        Path("export").mkdir()
        assert cli("export", "run_dir=source", "file=export/model.safetensors").code == 0
        shutil.copytree(tmp_path, of_module / "made")
    shutil.copytree(of_module / "made", tmp_path, dirs_exist_ok=True)
    return cli


PLACES = {
    "a run": "source",
    "a checkpoint": "source/checkpoints/step-00000003.ckpt",
    "an export": "export/model.safetensors",
    "the folder of an export": "export",
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in ("a run", "an export") else pytest.mark.slow) for what in PLACES]
)
def test_a_new_run_starts_from_the_weights(run: Run, what: str) -> None:
    shown = run(*NEW, f"init_from={PLACES[what]}", "run_dir=new")
    assert shown.code == 0, shown.err
    trained, start = last_checkpoint(Path("source")), last_checkpoint(Path("new"))
    parameters = [name for name in trained["state_dict"] if name.endswith(("weight", "keys", "bias"))]
    assert parameters
    for name in parameters:  # a step with the rate 0 changes no parameter
        assert torch.equal(trained["state_dict"][name], start["state_dict"][name]), name
    assert start["global_step"] == 1
    assert start["tokens_seen"] == 8 * 8
    config = yaml.safe_load((Path("new") / "config.yaml").read_text())
    assert config["init_from"] == str(Path(PLACES[what]).absolute())
    assert config["ffn"]["_target_"] == "pkm_lightning.ffn.PEER"
    assert config["data"]["tokenizer"] == InitialWeights(PLACES[what], trust=False).tokenizer
    assert len(record(Path("new"))["init_from"]["digest"]) == 64


def without_checkpoint(folder: Path) -> None:
    """As a kill before the first checkpoint leaves it."""
    shutil.rmtree(folder / "checkpoints")
    (folder / "run.json").write_text(json.dumps({**record(folder), "status": "running"}))


def test_a_run_needs_its_source_until_it_has_a_checkpoint(run: Run) -> None:
    assert run(*NEW, "init_from=source", "run_dir=new").code == 0
    Path("source").rename("moved")
    assert run("fit", "run_dir=new", "resume=always").code == 0
    assert run(*NEW, "init_from=source", "run_dir=new", "resume=always").code == 0
    without_checkpoint(Path("new"))
    gone = run("fit", "run_dir=new")
    assert "source does not exist; give a run, a checkpoint or an exported model" in gone.err
    Path("moved").rename("source")
    path = latest_checkpoint(Path("source"))
    assert path is not None
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.norm.weight"] += 1
    torch.save(content, path)
    assert "has changed since this run started from it" in run("fit", "run_dir=new").err
    path.write_bytes(whole)
    assert run("fit", "run_dir=new").code == 0
    assert record(Path("new"))["status"] == "finished"


def _changed(change: Callable[[dict[str, Any]], object], **content_of: Any) -> str:
    path = Path("source/checkpoints/step-00000003.ckpt")
    content = {**torch.load(path, weights_only=True), **content_of}
    change(content["hyper_parameters"]["config"])
    torch.save(content, path)
    return "source"


REFUSED: dict[str, tuple[Callable[[], str], list[str], str]] = {
    "missing": (lambda: "nowhere", [], r"init_from=\S*nowhere does not exist; give a run"),
    "an empty folder": (lambda: str(Path("empty").mkdir() or "empty"), [], r"empty is no run directory and holds no"),
    "a text": (lambda: "a.txt", [], r"a\.txt is damaged or no checkpoint"),
    "another model": (lambda: "source", ["model.dim=32"], r"does not fit .*of another shape: model\.blocks\.0\.att"),
    "another plugin": (
        lambda: "source",
        ["ffn=moe"],
        r"does not fit the model of this command \(unexpected: model\.blo",
    ),
    "other words": (
        lambda: _changed(lambda config: None, tokenizer="of other words"),
        ["data.tokenizer=bytes"],
        r"not the one that init_from=\S*source was trained with, .*data\.tokenizer=\S*tokenizer\.json \(for data=",
    ),
    "its own run": (lambda: "source", ["run_dir=source", "resume=never"], r"lies in run_dir=\S*source, whose files"),
    "its own run, which has ended": (lambda: "source", ["run_dir=source"], r"lies in run_dir=\S*source, whose files"),
    "quantised": (
        lambda: _changed(lambda config: config["table"].update(bits=4)),
        [],
        "holds a table of 4 bits per value, which cannot be trained",
    ),
    "of a stranger": (
        lambda: _changed(lambda config: config["ffn"].update(_target_="evil.FFN")),
        [],
        r"names ffn\._target_=evil\.FFN, code that a saved configuration may not run unasked",
    ),
    "frozen": (lambda: "source", ["optim.freeze=['*']"], "so that nothing is trained"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_started_from_is_refused_before_anything_is_written(run: Run, what: str) -> None:
    source, overrides, reason = REFUSED[what]
    shown = run(*NEW, "run_dir=new", f"init_from={source()}", *overrides)
    assert shown.code == 2
    assert len(shown.err.strip().splitlines()) == 1, shown.err
    assert re.search(reason, shown.err), shown.err
    assert not Path("new").exists()
    assert record(Path("source"))["status"] == "finished"


@pytest.mark.parametrize(
    ("chosen", "prefix"), [("ffn=engram", "ffn"), ("extra_ffns=engram", "extra_ffns.engram.ffn")], ids=["ffn", "extra"]
)
def test_keys_that_buffers_of_the_weights_hold_may_not_change(tmp_path: Path, chosen: str, prefix: str) -> None:
    def run(*overrides: str) -> ResolvedRun:
        settings = {**config(chosen, f"{prefix}.rows=64", *overrides), "run_dir": str(tmp_path / "new")}
        data: Any = None
        return ResolvedRun(settings, data, build_meta_model(settings))

    settings = run().config
    state = {f"model.{name}": value for name, value in build_model(settings).state_dict().items()}
    torch.save(
        {"state_dict": state, "tokens_seen": 0, "hyper_parameters": {"config": settings}}, tmp_path / "source.ckpt"
    )
    initial = InitialWeights(tmp_path / "source.ckpt", trust=False)
    for key, value, shown, trained in (
        ("canonical", "true", "true", "false"), ("end_id", "5", "5", "null"), ("seed", "9", "9", "1234"),
        ("rows", "65", "65", "64"),
        ("orders", f"[3] {prefix}.heads=4", r"\[3\]", r"\[2, 3\]"),
    ):  # fmt: skip
        key = f"{prefix}.{key}"
        message = f"^{key}={shown} contradicts the {trained} of init_from=.*, whose .* leave {key} out.$"
        with pytest.raises(CheckpointError, match=message):
            initial.check(run(*f"{key}={value}".split()))
    initial.check(run(f"{prefix}.gate=no_root", f"{prefix}.dilation=1"))


def test_other_verbs_do_not_read_it(run: Run) -> None:
    assert "validate does not read init_from, only fit" in run("validate", "run_dir=source", "init_from=source").err
    assert "or start one from its weights with init_from=PATH" in run("fit", "ckpt=source").err


def test_the_tokenizer_beside_the_weights_is_taken(run: Run) -> None:
    for place in ("source", "export"):
        file = Path(place).absolute() / "tokenizer.json"
        assert InitialWeights(place, trust=False).tokenizer == str(file)
        file.unlink()
        assert InitialWeights(place, trust=False).tokenizer == "bytes"


@pytest.mark.parametrize(
    ("written", "strategy"),
    [
        ("single", "ddp"),
        *(
            pytest.param(written, strategy, marks=pytest.mark.slow)
            for written in ("ddp", "single")
            for strategy in ("fsdp", "deepspeed_1", "deepspeed_3", "ddp")
            if (written, strategy) != ("single", "ddp")
        ),
    ],
)
def test_each_rank_reads_its_part(ranks: Groups, tmp_path: Path, written: str, strategy: str) -> None:
    source, path, options = str(tmp_path / "source.ckpt"), str(tmp_path / "new.ckpt"), ["ffn=memory_plus"]
    if written == "single":
        jobs.train_and_save(["strategy=single", *options], 1, source)
    else:
        ranks(2).run(jobs.train_and_save, [f"strategy={written}", *options], 1, source)
    ranks(2).run(start_jobs.start_and_save, [f"strategy={strategy}", "table.shard=row", *options], source, path)
    trained, start = (SavedCheckpoint(p).read()["state_dict"] for p in (source, path))
    parameters = [name for name in trained if name.endswith(("weight", "keys", "bias"))]
    assert "model.tables.0.weight" in parameters
    for name in parameters:
        assert torch.equal(trained[name], start[name]), name
