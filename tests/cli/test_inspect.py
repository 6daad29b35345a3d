"""`inspect` on a run: screen, JSON, page, masks; readers of slots out of data; refusals before anything is read."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from small import Run

from pkm_lightning import load, mask, trace
from pkm_lightning.inspection import Record

TEXT = "text=Who was born in Paris, France?"


def record_of(path: Path) -> Record:
    return Record.from_json(path.read_text())


def test_a_run_is_inspected(cli: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One function: each command loads the run again."""
    screen = cli("inspect", "run_dir=run", TEXT, "show=5", "data_tokens=500", "questions=20")
    assert screen.code == 0, screen.err
    assert "Who was born in Paris, France?" in screen.out
    assert "effects: exact; readers of slots out of validation data" in screen.out
    assert "slots of table0, those of the largest effects first" in screen.out
    assert "more tokens: set show=" in screen.out

    few = ("data_tokens=500", "questions=4", "out=record.json")
    masked = cli("inspect", "run_dir=run", TEXT, "mask=[3,7]", "mask_table=table0", *few)
    assert masked.code == 0, masked.err
    assert masked.out == "written to record.json\n"
    record = record_of(tmp_path / "record.json")
    assert [ablation.masked for ablation in record.ablations] == [{"table0": [3, 7]}, {"table0": None}]
    assert all(ablation.recall is not None for ablation in record.ablations)
    assert record.ablations[1].p_without == [record.texts[0].p_without]
    assert any(one.facts for one in record.slots["table0"].values())
    assert any(
        str(r.text).startswith("validation data ") for one in record.slots["table0"].values() for r in one.readers
    )

    loaded = load(trained)
    same = trace(
        loaded.model, loaded.codec(), TEXT.removeprefix("text="), context=loaded.context, name=str(loaded.path)
    )
    assert same.texts == record.texts
    with mask(loaded.model, [3, 7]):
        assert (
            trace(loaded.model, loaded.codec(), TEXT.removeprefix("text=")).texts[0].p
            == record.ablations[0].p_without[0]
        )

    (tmp_path / "facts.jsonl").write_text('{"prompt": "Paris is in", "answer": "France"}\n{"text": "Rome is old."}\n')
    options = ("effects=none", "data_path=facts.jsonl", "format=json")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Rome\n\nParis is in\n")))
    piped = cli("inspect", "run_dir=run", "texts_file=-", *options)
    assert piped.code == 0, piped.err
    read = Record.from_json(piped.out)
    assert [text.title for text in read.texts] == ["Rome", "Paris is in"]
    assert (read.effects, read.data) == ("none", "facts.jsonl")
    facts = {(f.prompt, f.answer) for one in read.slots["table0"].values() for f in one.facts}
    assert facts == {("Paris is in", "France")}
    assert json.loads(piped.out)["version"] == 1

    for choice, message in (
        ("mask=[99999]", "error: mask=99999: table0 has the slots 0 to "),
        ("mask_table=tabel0", "error: mask_table=tabel0 is no set of slots of this model; allowed: table0"),
    ):
        refused = cli("inspect", "run_dir=run", TEXT, choice)
        assert (refused.code, message in refused.err) == (2, True), refused.err
        assert "reading" not in refused.err, "refused before the texts are read"

    page = cli("inspect", "run_dir=run", TEXT, "data_tokens=0", "out=page.html")
    assert page.code == 0, page.err
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_a_quantised_export_is_inspected_out_of_its_file(cli: Run, trained: Path, tmp_path: Path) -> None:
    assert cli("export", "run_dir=run", "file=small.safetensors", "quantize=int8").code == 0
    quantized = cli("inspect", "ckpt=small.safetensors", TEXT, "table.device=mmap", "out=small.json")
    assert quantized.code == 0, quantized.err
    assert cli("inspect", "run_dir=run", TEXT, "out=whole.json").code == 0
    small, whole = (record_of(tmp_path / f"{name}.json").texts[0] for name in ("small", "whole"))
    assert small.p == pytest.approx(whole.p, rel=0.05)
    assert small.p_without == pytest.approx(whole.p_without, rel=1e-4)
    refused = cli("inspect", "ckpt=small.safetensors", TEXT, "effects=gradient")
    assert (refused.code, "reads of a quantised table have no gradient" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to inspect; give text=TEXT, or texts_file=FILE"),
        ([TEXT, "texts_file=x"], "both give texts"),
        (["texts_file=none.txt"], "texts_file=.*none.txt"),
        (["texts_file=7"], "texts_file=7 is not text; quote it"),
        ([TEXT, "effects=all"], "effects=.?all"),
        ([TEXT, "format=yaml"], "format=.?yaml"),
        ([TEXT, "format=html"], "format=html writes a page; give out=FILE.html"),
        ([TEXT, "out=record.txt"], "out=.*record.txt is neither .json nor .html"),
        ([TEXT, "format=text", "out=record.json"], "format=text is for the screen"),
        ([TEXT, "show=0"], "show=0"),
        ([TEXT, "readers=0"], "readers=0"),
        ([TEXT, "data_tokens=-1"], "data_tokens=-1"),
        ([TEXT, "questions=x"], "questions='?x"),
        ([TEXT, "mask=table0"], "mask=table0 names no slots"),
        ([TEXT, "mask=[]"], r"mask=\[\] names no slots"),
        ([TEXT, "mask={table0:3}"], "mask={'table0': 3} names no slots"),
        ([TEXT, "mask={table0:null}"], "names no slots; .* mask_table=table0 for a whole set"),
        ([TEXT, "mask=true"], "mask=True names no slots"),
        ([TEXT, "mask_table=7"], "mask_table=7 names no sets of slots"),
        ([TEXT, "mask_table=[null]"], "names no sets of slots"),
        ([TEXT, "data_path=none.txt"], "data_path=.*none.txt"),
    ],
)
def test_bad_keys_are_refused_before_a_model_is_read(cli: Run, arguments: list[str], message: str) -> None:
    refused = cli("inspect", "run_dir=run", *arguments)
    assert refused.code == 2
    assert re.search(message, refused.err), refused.err
    assert refused.err.count("\n") == 1
