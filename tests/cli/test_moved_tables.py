"""Files of frozen tables that have moved are named by the same keys in all verbs, those of further variants too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import Run, resolved
from stored_files import write_tensors

import pkm_lightning
from pkm_lightning.build.stored_tables import with_table_path
from pkm_lightning.errors import ConfigError

MODEL = [
    "ffn=dense", "extra_ffns=engram", "extra_ffns.engram.ffn.rows=40", "extra_ffns.engram.ffn.heads=1",
    "extra_ffns.engram.ffn.row_dim=8", "extra_ffns.engram.placement.layers=[0]", "model.n_layers=2", "model.dim=16",
    "model.ffn_dim=16", "model.n_heads=2", "model.n_kv_heads=2", "extra_ffns.engram.table.trainable=false",
]  # fmt: skip
RUN = [
    *MODEL, "data=text", "data.path=a.txt", "data.tokenizer=bytes", "data.seq_len=16", "data.global_batch_size=4",
    "callbacks=[step_checkpoint]", "trainer.max_steps=1", "trainer.val_check_interval=1", "logger=none",
]  # fmt: skip
MOVED = "extra_ffns.engram.table.path=moved.safetensors"


@pytest.mark.slow
def test_every_verb_takes_the_key_of_a_further_variant(cli: Run, tmp_path: Path) -> None:
    Path("a.txt").write_text("a cat sat on the mat and saw a dog run by . " * 60)
    (table,) = resolved(*MODEL).model.tables
    rows = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(table.rows, table.dim)})  # type: ignore[call-overload]
    assert cli("fit", *RUN, "extra_ffns.engram.table.path=rows.safetensors", "run_dir=run").code == 0
    rows.rename("moved.safetensors")
    asked = ["generate", "run_dir=run", "prompt=a", "max_new_tokens=2"]
    export = ["export", "run_dir=run", "overwrite=true"]
    verbs = {
        "generate": (asked, [MOVED]),
        "the short key": (asked, ["table.path=moved.safetensors"]),
        "export": ([*export, "file=long.safetensors"], [MOVED]),
        "export, short": ([*export, "file=short.safetensors"], ["table.path=moved.safetensors"]),
        "validate": (["validate", "run_dir=run"], [MOVED]),
        "fit": (["fit", "run_dir=run", "resume=always"], [MOVED]),
    }
    for name, (command, keys) in verbs.items():
        refused = cli(*command)
        assert (refused.code, "rows.safetensors cannot be read" in refused.err) == (2, True), (name, refused.err)
        shown = cli(*command, *keys)
        assert shown.code == 0, (name, shown.err)
    assert Path("long.safetensors").read_bytes() == Path("short.safetensors").read_bytes()
    assert pkm_lightning.load("run", table_path={"engram": "moved.safetensors"}).model.tables[0].stored is not None  # type: ignore[union-attr]
    for command, message in (
        (
            [*asked, "extra_ffns.ple.table.path=x"],
            "extra_ffns.ple.table.path=x: the model has no variant ple, only ffn",
        ),
        ([*export, "file=x.safetensors", MOVED, "table.path=y"], "table.path=y: the rows of ffn lie in the checkpoint"),
        ([*asked, "extra_ffns.engram.table.device=cpu"], "generate does not read extra_ffns.engram.table.device"),
        ([*asked, "extra_ffns.engram.table.path=null"], "rows.safetensors cannot be read"),
    ):
        refused = cli(*command)
        assert (refused.code, message in refused.err) == (2, True), refused.err
        assert len(refused.err.splitlines()) == 1


def config(main: str | None, **extras: str | None) -> dict[str, object]:
    """Returns the tables of a configuration by the paths of their files."""
    return {
        "table": {"path": main, "trainable": False},
        "extra_ffns": {name: {"table": {"path": path, "trainable": False}} for name, path in extras.items()},
    }


def test_one_place_is_that_of_the_only_file_or_of_the_main_variant() -> None:
    def paths(saved: dict[str, object], place: object) -> tuple[object, ...]:
        moved = with_table_path(saved, place)  # type: ignore[arg-type]
        return moved["table"]["path"], *(extra["table"]["path"] for extra in moved["extra_ffns"].values())

    assert paths(config(None, one="/a", two=None), "/x") == (None, "/x", None)
    assert paths(config("/a", one="/b"), "/x") == ("/x", "/b")
    assert paths(config("/a", one="/b"), {"ffn": "/x", "one": "/y"}) == ("/x", "/y")
    assert paths(config("/a", one="/b"), None) == ("/a", "/b")
    assert paths(config("/a", one="/b"), {"ffn": None, "one": "/y"}) == ("/a", "/y")
    with pytest.raises(
        ConfigError, match=r"^table.path=/x is one file, .* set extra_ffns.one.table.path, extra_ffns.two"
    ):
        paths(config(None, one="/a", two="/b"), "/x")
