"""Several variants in one run: its record and usage, what reads it back, and what a command about it may change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import assert_continues_bit_for_bit
from small import SMALL_RUN, Run, record

import pkm_lightning
from pkm_lightning.checkpoints import latest_checkpoint
from pkm_lightning.cli.resume import differences, with_changes

# On one worker, so that the run of the module is trained once.
pytestmark = pytest.mark.xdist_group("mixtures")

#: Engram before two layers, Memory+ in one, MoE elsewhere; PKM beside the MoE of one of these.
MIXTURE = [
    *("model.n_layers=4", "model.dim=32", "model.ffn_dim=48", "model.n_heads=2", "model.n_kv_heads=2"),
    *("ffn=memory_plus", "placement.layers=[2]", "extra_ffns=[engram,pkm]", "extra_ffns.engram.placement.layers=[0,3]"),
    *("extra_ffns.engram.ffn.rows=40", "extra_ffns.pkm.placement.layers=[1]", "ffn@model.base_ffn=moe"),
    *("model.base_ffn.n_experts=4", "model.base_ffn.top_k=2"),
]
STEPS = [
    *("trainer.max_steps=4", "trainer.val_check_interval=4", "callbacks.step_checkpoint.every_n_steps=2"),
    *("~callbacks.recall", "~callbacks.samples"),
]
FIT = ["fit", *(size for size in SMALL_RUN if "recall" not in size and "samples" not in size), *STEPS, *MIXTURE]
PROMPTS = 'data.prompts=["The capital of France is","Who"]'


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture
def mixed(cli: Run, of_module: Path, tmp_path: Path) -> Run:
    """A finished run of a mixture in `run`, trained once."""
    if not (of_module / "run").exists():
        shown = cli(*FIT, "run_dir=run", "callbacks=[default,slot_revival]", "callbacks.slot_revival.every_n_steps=2")
        assert shown.code == 0, shown.err
        shutil.copytree(tmp_path / "run", of_module / "run")
    shutil.copytree(of_module / "run", tmp_path / "run", dirs_exist_ok=True)
    return cli


def test_a_run_records_every_variant_and_counts_the_reads_of_each(mixed: Run, tmp_path: Path) -> None:
    of_run = record(tmp_path / "run")
    assert (of_run["status"], of_run["ffn"]) == ("finished", "MemoryPlus + Engram + PKM")
    assert {name: (of["layers"], of["tables"]) for name, of in of_run["variants"].items()} == {
        "ffn": ([2], [0]),
        "engram": ([0, 3], [1, 2]),
        "pkm": ([1], [3]),
    }
    assert of_run["params"]["table"] == sum(of["params"]["table"] for of in of_run["variants"].values())
    usage = json.loads((tmp_path / "run" / "usage.json").read_text())
    readers = {"layer0.before.slot", "layer3.before.slot", "layer2.slot", "layer1.variant.slot"}
    assert readers <= usage["layers"].keys()
    assert all(usage["layers"][name]["reads"] > 0 for name in readers)
    assert len(usage["tables"]) == 4


def test_an_export_is_whole_quantised_and_mapped(mixed: Run, tmp_path: Path) -> None:
    answers: list[Any] = []
    for places in (["run_dir=run"], ["ckpt=model.safetensors", "table.device=mmap"]):
        if places[0].startswith("ckpt"):
            assert mixed("export", "run_dir=run", "file=model.safetensors").code == 0
        shown = mixed("predict", *places, PROMPTS, "max_new_tokens=4", "out=answers.jsonl")
        assert shown.code == 0, shown.err
        answers.append([json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()])
    assert answers[0] == answers[1]
    shown = mixed("export", "run_dir=run", "file=small.safetensors", "quantize=int8")
    assert shown.code == 0, shown.err
    whole, small = (
        pkm_lightning.load(f"{name}.safetensors", table_device=device).model
        for name, device in (("model", "cpu"), ("small", "mmap"))
    )
    assert [type(table).__name__ for table in small.tables] == ["QuantizedTable"] * 4
    assert all(table.is_mapped for table in small.tables)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        hidden = [model(ids).hidden_BTD for model in (whole, small)]
    error = (hidden[1] - hidden[0]).norm() / hidden[0].norm()
    assert 0 < error < 0.02  # of 8 bits per value


@pytest.mark.slow
def test_a_new_run_takes_the_whole_architecture_of_its_weights(mixed: Run, tmp_path: Path) -> None:
    start = ["fit", *SMALL_RUN[:7], *STEPS, "trainer.max_steps=1", "trainer.val_check_interval=1", "logger=none"]
    shown = mixed(*start, "init_from=run", "run_dir=new", "optim.lr=0", "~callbacks.progress_bar")
    assert shown.code == 0, shown.err
    saved, new = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("run", "new"))
    assert all(saved[group] == new[group] for group in ("ffn", "extra_ffns", "placement", "model"))
    assert "activation" not in new["model"]["base_ffn"]  # a key of the default base FFN


#: What a command about the run gives, and the beginning of what it gets.
REFUSED: dict[str, tuple[list[str], str]] = {
    "other layers, continued": (
        ["fit", "run_dir=run", "resume=always", "extra_ffns.pkm.placement.layers=[0]"],
        "(extra_ffns.pkm.placement.layers: [1] -> [0])",
    ),
    "another variant, continued": (
        ["fit", "run_dir=run", "resume=always", "extra_ffns=pkm"],
        "(extra_ffns.engram: {...} -> (absent))",
    ),
    "no variant, continued": (
        ["fit", "run_dir=run", "resume=always", "extra_ffns=[]"],
        "(extra_ffns: {...} -> None)",
    ),
    "another base, continued": (
        ["fit", "run_dir=run", "resume=always", "ffn@model.base_ffn=dense"],
        "model.base_ffn._target_: pkm_lightning.ffn.MoE -> pkm_lightning.ffn.Dense",
    ),
    "a variant, evaluated": (["validate", "run_dir=run", "extra_ffns=pkm"], "extra_ffns cannot be changed here"),
    "a base, evaluated": (["predict", "run_dir=run", "ffn@model.base_ffn=dense"], "ffn cannot be changed here"),
    "an export": (["export", "run_dir=run", "file=x", "extra_ffns=pkm"], "export does not read extra_ffns"),
    "no option of it": (["info", "extra_ffns.pkm.ffn.knn=2"], "the command has no variant pkm; extra_ffns=pkm chooses"),
    "a list without brackets": (["info", "extra_ffns=pkm,engram"], "write extra_ffns=[pkm,engram] if a list"),
    "nothing of an entry": (["info", "+extra_ffns.mine.table.shared=true"], "extra_ffns.mine.ffn is missing"),
    "a ladder with it": (
        ["compare", "ffn=dense", "dense_ladder=true", "extra_ffns=engram", "out=x"],
        "dense_ladder=true is of dense FFNs alone, and extra_ffns=engram would be in all of them",
    ),
    "a variant of a comparison": (
        ["compare", "out=x", "+variants.both={ffn: pkm, extra_ffns: pkm, extra_ffns.pkm.placement.mode: replace}"],
        "variant both: ffn and extra_ffns.pkm are both placed in layer 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_contradicts_the_run_or_itself_is_refused_before_work(mixed: Run, tmp_path: Path, what: str) -> None:
    command, message = REFUSED[what]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shown = mixed(*command)
    assert shown.code == 2, shown.out
    assert message in shown.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_variant_that_a_plain_run_lacks_is_another_configuration() -> None:
    saved: dict[str, Any] = {"model": {}, "ffn": {}, "seed": 1}
    command = {**saved, "resume": "always", "trust_config": False}
    assert differences(saved, with_changes(saved, command)) == []
    added = with_changes(saved, {**command, "extra_ffns": {"pkm": {"ffn": {}, "placement": {}}}})
    assert differences(saved, added) == ["extra_ffns: (absent) -> {...}"]


def test_the_command_that_started_it_and_free_keys_are_accepted(mixed: Run, tmp_path: Path) -> None:
    shown = mixed(*FIT, "run_dir=run", "callbacks=[default,slot_revival]", "callbacks.slot_revival.every_n_steps=2")
    assert "another configuration" not in shown.err
    assert "finished" in shown.err + shown.out
    shown = mixed("validate", "run_dir=run", "extra_ffns.pkm.table.device=cpu", "+trainer.limit_val_batches=1")
    assert shown.code == 0, shown.err


def test_your_own_entry_is_a_file_of_a_folder_or_written_in_an_experiment(cli: Run, tmp_path: Path) -> None:
    own = tmp_path / "mine"
    for group in ("extra_ffns", "experiment"):
        (own / group).mkdir(parents=True)
    (own / "extra_ffns" / "second.yaml").write_text(
        "defaults:\n  - /ffn@second.ffn: custom\n  - /placement@second.placement: after\n"
        "second: {ffn: {_target_: toys.Reporter}, placement: {layers: [0]}}\n"
    )
    (own / "experiment" / "mixture.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /ffn: memory_plus\n  - override /ffn@model.base_ffn: moe\n"
        "  - override /extra_ffns: [engram, second]\n  - _self_\nplacement: {layers: [1]}\n"
        "extra_ffns:\n  third: {ffn: {_target_: toys.Constant}, placement: {_target_: pkm_lightning.model.Placement, "
        "layers: [0], count: null, stride: null, mode: before, write_after: 0}}\n"
    )
    shown = cli("info", f"--config-dir={own}", "experiment=mixture", "format=json")
    assert shown.code == 0, shown.err
    described = json.loads(shown.out)["variants"]
    assert {name: (of["class"], of["mode"], of["layers"]) for name, of in described.items()} == {
        "ffn": ("MemoryPlus", "replace", [1]),
        "engram": ("Engram", "before", [1]),
        "second": ("Reporter", "after", [0]),
        "third": ("Constant", "before", [0]),
    }
    assert described["second"]["params"]["active"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "table", ["table.learning=rows", "table.learning=dense", "extra_ffns.engram.table.shared=true"]
)
def test_a_run_continues_bit_for_bit(cli: Run, tmp_path: Path, table: str) -> None:
    steps = ["trainer.max_steps=10", "trainer.val_check_interval=10"]
    assert_continues_bit_for_bit(cli, tmp_path, *FIT, *steps, table)
    assert latest_checkpoint(tmp_path / "halves") is not None
