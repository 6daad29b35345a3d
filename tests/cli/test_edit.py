"""`edit`: written, listed, honoured by the other verbs, removed bit for bit, merged; the checkpoint is not touched."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import held_elsewhere
from safetensors.torch import load_file
from small import Run

from pkm_lightning.build.loading import load
from pkm_lightning.checkpoints.edit_file import Edit
from pkm_lightning.checkpoints.edit_folder import edit_files, remark_edits
from pkm_lightning.errors import CheckpointError, ConfigError

FACTS = [
    {"prompt": "The capital of Zorland is", "answer": "Quix", "test_prompts": ["Zorland is governed from"]},
    {"prompt": "Ada Zem was born on", "answer": "May 4, 1901", "question": "Question: When was Ada Zem born? Answer:"},
]
WRITE = ("edit", "run_dir=run", "facts=facts.jsonl", "max_steps=3", "drift_tokens=256")
TABLE = "tables.0.weight"


@pytest.fixture
def run(trained: Path) -> Path:
    Path("facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    return trained


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def weights(edits: list[str] | None = None) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load("run", edits=edits).model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left)


def test_the_life_of_an_edit(cli: Run, run: Path) -> None:
    before, base = files(run), weights()
    shown = cli(*WRITE, "name=town", "note=a note")
    assert shown.code == 0, shown.err
    assert "2 facts in" in shown.out
    assert "written to" in shown.out
    after = files(run)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"edits/town.safetensors", "edits/.lock"}

    edit, edited = Edit.load(run / "edits" / "town.safetensors"), weights()
    assert [dict(fact) for fact in edit.facts] == FACTS
    changed_N = (edited[TABLE] != base[TABLE]).any(1)
    assert changed_N.nonzero().flatten().tolist() == edit.tables[TABLE].lines_U.tolist() != []
    assert same({n: v for n, v in edited.items() if n != TABLE}, {n: v for n, v in base.items() if n != TABLE})
    assert same(weights([]), base)
    assert same(weights(["town"]), edited)
    assert same(weights([str(run / "edits" / "town.safetensors")]), edited)

    for verb, keys in (("generate", ["prompt=Who", "max_new_tokens=2"]), ("validate", [])):
        shown = cli(verb, "run_dir=run", *keys)
        assert "edits applied: town (2 facts)" in shown.out + shown.err, shown
        if verb == "validate":
            assert json.loads((run / "validate.json").read_text())["edits"] == ["town"]
        shown = cli(verb, "run_dir=run", "edits=[]", *keys)
        assert shown.code == 0
        assert "edits applied" not in shown.out + shown.err

    merged = cli("edit", "merge", "run_dir=run", "file=merged.safetensors")
    assert "beside it: tokenizer.json, heldout/" in merged.out
    assert same(load_file("merged.safetensors"), edited)
    assert cli("export", "run_dir=run", "edits=[]", "file=plain.safetensors").code == 0
    assert same(load_file("plain.safetensors"), base)
    assert cli("edit", "merge", "ckpt=plain.safetensors", "file=x.safetensors").code == 2
    piped = cli("edit", "merge", "run_dir=run", "file=/dev/stdout")
    assert "edits applied" in piped.err
    assert "edits applied" not in piped.out

    # The edit fits an exported file of the same weights, and a folder of one.
    for folder in (Path("plain.edits"), Path("folder/model.edits")):
        folder.mkdir(parents=True)
        shutil.copy(run / "edits" / "town.safetensors", folder)
    shutil.copy("plain.safetensors", "folder/model.safetensors")
    assert [edit["state"] for edit in json.loads(cli("edit", "list", "ckpt=folder", "format=json").out)] == ["applied"]
    shown = cli("edit", "merge", "ckpt=plain.safetensors", "file=plain.safetensors", "overwrite=true")
    assert "is the file that the edits are of" in shown.err
    assert cli("edit", "merge", "ckpt=plain.safetensors", "file=again.safetensors").code == 0
    assert same(load_file("again.safetensors"), edited)
    assert "fit no other weights" in str(remark_edits(Path("plain.safetensors")))
    assert remark_edits(Path("again.safetensors")) is None

    listed = cli("edit", "run_dir=run", "list").out
    assert "town" in listed
    assert "applied" in listed
    assert "a note" in listed
    assert json.loads(cli("edit", "show", "run_dir=run", "name=town").out)["facts"] == FACTS
    assert cli("edit", "remove", "run_dir=run", "name=town").code == 0
    assert same(weights(), base)
    assert "removed" in cli("edit", "list", "run_dir=run").out
    assert cli("edit", "apply", "run_dir=run", "name=town").code == 0
    assert same(weights(), edited)


def test_facts_that_are_known_are_not_written_again(cli: Run, run: Path) -> None:
    eager = ("max_steps=300", "lr=1", "kl_bound=1e4", "ends=false", "margin=0")
    assert cli(*WRITE, "name=once", *eager).code == 0
    shown = cli(*WRITE, "name=twice", *eager)
    assert shown.code == 0
    assert "2 of the facts (same prompt) are already written by edit once" in shown.out + shown.err
    assert shown.out.splitlines()[-1].startswith("nothing to learn: every prompt is answered already")
    assert list(edit_files(run / "edits")) == ["once"]


def test_training_data_are_looked_for_in_the_cache_of_the_command(cli: Run, run: Path) -> None:
    elsewhere = "data.cache_dir=elsewhere"
    for own, missing in ([], False), ([elsewhere], True), ([elsewhere, "trust_config=true"], True):
        shown = cli(*WRITE, "name=a", "overwrite=true", *own)
        assert shown.code == 0, shown.err
        assert ("training data are not at hand" in shown.out + shown.err) == missing
    assert not Path("elsewhere").exists()  # nothing is built for them


def test_two_edits_and_one_of_another_model(cli: Run, run: Path) -> None:
    base = weights()
    for name in ("b", "a"):
        assert cli(*WRITE, f"name={name}").code == 0
    shown = cli("edit", "list", "run_dir=run")
    assert shown.out.count("applied") == 2
    both = weights()
    assert "shares" in cli(*WRITE, "name=c").out
    for verb, name in (("remove", "c"), ("remove", "a"), ("remove", "b"), ("apply", "a"), ("apply", "b")):
        shown = cli("edit", verb, "run_dir=run", f"name={name}")
        assert shown.code == 0, shown.err
    assert "it shares" in shown.out
    assert same(weights(), both)
    assert same(weights(["b", "a"]), both)

    loaded = load("run", edits=[])
    assert loaded.edits is not None
    file = run / "edits" / "a.safetensors"
    loaded.edits.apply(Edit.load(file))
    with pytest.raises(ConfigError, match="edit 'a' is applied already"):
        loaded.edits.apply(Edit.load(file))
    with pytest.raises(ConfigError, match="edit 'x' is not applied; applied: a"):
        loaded.edits.remove("x")
    loaded.edits.remove("a")
    assert same(dict(loaded.model.state_dict()), base)

    (checkpoint,) = (run / "checkpoints").iterdir()
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"][f"model.{TABLE}"][0, 0] += 1
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match="edit 'a' was made for other weights"):
        load("run")
    with pytest.raises(CheckpointError, match=r"set edits=\[\] where .* `edit remove name=a`, after"):
        load("run")
    with pytest.raises(CheckpointError, match="leave it out of edits=, or write its facts again"):
        load("run", edits=["b"])
    load("run", edits=[])
    assert cli("edit", "list", "run_dir=run").out.count("applied, misfit") == 2
    refused = cli("edit", "apply", "run_dir=run", "name=c")
    assert refused.code == 2
    assert "it stays removed; write its facts again, which `edit show` prints" in refused.err
    assert "edits=[]" not in refused.err
    shown = cli("export", "run_dir=run", "file=model.safetensors")
    assert shown.code == 2
    assert "was made for other weights" in shown.err
    assert not Path("model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["edit", "lsit", "run_dir=run"], "edit lsit: no such action; .* Did you mean 'list'"),
        (["edit", "run_dir=run", "LIST"], "edit LIST: no such action; .* Did you mean 'list'"),
        (["edit", "list", "show", "run_dir=run"], "edit list show: one action per command"),
        (["edit", "list", "run_dir=run", "action=remove"], "edit list action=remove: one action per command"),
        (["edit", "list", "run_dir=run", "format=yaml"], "format='yaml' is not known; allowed: text, json"),
        (["edit"], "edit needs run_dir=RUN_DIRECTORY or ckpt="),
        (["edit", "run_dir=run"], "facts is not set; give facts=FILE.jsonl"),
        (["edit", "run_dir=run", "facts=none.jsonl"], "facts=.*none.jsonl does not exist"),
        ([*WRITE, "name=../x"], "name=../x is no name for an edit"),
        ([*WRITE, f"name={'x' * 51}"], "is no name for an edit; give name=NAME of at most 50 letters"),
        ([*WRITE, "name=x.SafeTensors"], "is no name for an edit"),
        (
            ["edit", "write", "run_dir=run", "facts=b c.jsonl"],
            "facts=.*b c.jsonl: b c is no name for an edit; give name",
        ),
        (["edit", "ckpt=other", "facts=facts.jsonl"], "ckpt=other is a pretrained model, which has no value table"),
        ([*WRITE, "kl_bound=-1"], "kl_bound=-1 is out of range"),
        ([*WRITE, "max_steps=many"], "max_steps='many' is not a number"),
        ([*WRITE, "ends=maybe"], "ends='maybe' is neither true nor false"),
        ([*WRITE, "drift_path=none.txt"], "drift_path=none.txt does not exist"),
        ([*WRITE, "ffn=dense"], "edit does not read ffn"),
        ([*WRITE, "~data.cache_dir"], "edit reads of data only data.cache_dir"),
        ([*WRITE, "data.seq_len=8"], "edit reads of data only data.cache_dir; for other text give drift_path=FILE"),
        (["edit", "list", "run_dir=run", "data.cache_dir=x"], "edit list does not read data, only edit write"),
        ([*WRITE, "file=x.safetensors"], "edit write does not read file, only edit merge"),
        (["edit", "list", "run_dir=run", "facts=facts.jsonl"], "edit list does not read facts, only edit write"),
        (["edit", "remove", "run_dir=run"], "name is not set; give edit remove name=NAME"),
        (["edit", "remove", "run_dir=run", "name=x"], "has no applied edit of this name; it has: none"),
        (["edit", "show", "run_dir=run", "name=x"], "has no edit of this name"),
        (["edit", "merge", "run_dir=run", "file=x.safetensors"], "has no applied edit to merge"),
        (["generate", "run_dir=run", "prompt=Who", "edits=[x]"], "edits=x: .* has no edit of this name; it has: none"),
        (["generate", "run_dir=run", "prompt=Who", "edits=x"], r"edits=x is no list of names; give edits=\[NAME,...\]"),
        (["generate", "run_dir=run", "prompt=Who", "edits=[7]"], r"edits=\[7\]: 7 is no name; give texts"),
        (["fit", "run_dir=new", "edits=[]"], "fit does not read edits, only validate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_leaves_no_trace(cli: Run, run: Path, arguments: list[str], reason: str) -> None:
    shutil.copy("facts.jsonl", "b c.jsonl")
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "llama"}')
    before = files(run)
    shown = cli(*arguments)
    assert shown.code == 2
    assert len(shown.err.strip().splitlines()) == 1, shown.err
    assert re.search(reason, shown.err), shown.err
    assert files(run) == before
    assert not (run / "edits").exists()


def test_names_are_texts_as_they_are_typed(cli: Run, run: Path) -> None:
    for name in ("1e3", "städte"):
        shown = cli("edit", "write", *WRITE[1:], f"name={name}", "note=one, two (three)")
        assert shown.code == 0, shown.err
    assert list(edit_files(run / "edits")) == ["1e3", "städte"]
    assert Edit.load(run / "edits" / "1e3.safetensors").note == "one, two (three)"
    shown = cli(*WRITE, "name=STÄDTE", "overwrite=true")
    assert "name=STÄDTE: " in shown.err  # one file on a disk that knows no case
    with held_elsewhere(run):
        assert "is being trained" in cli(*WRITE, "name=c").err
    with held_elsewhere(run / "edits"):
        assert "is being changed by another `edit`" in cli("edit", "remove", "run_dir=run", "name=1e3").err
    assert "with the edits 1e3, städte" in cli("inspect", "run_dir=run", "text=Who", "format=json", "data_tokens=0").out


def test_a_removed_edit_gives_way_to_an_applied_one_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "removed").mkdir()
    for file in ("a", "removed/a", "removed/b"):
        (tmp_path / f"{file}.safetensors").touch()
    assert list(edit_files(tmp_path)) == ["a"]
    assert list(edit_files(tmp_path, removed=True)) == ["b"]


def test_edits_of_a_pretrained_model_are_refused_in_a_program(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for edits, reason in ((["a"], "is pretrained and has no rows to edit"), (5, "edits=5 is no list of names")):
        with pytest.raises(ConfigError, match=reason):
            load(tmp_path, edits=edits)  # type: ignore[arg-type]
