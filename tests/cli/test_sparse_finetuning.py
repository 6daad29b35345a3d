"""`fit finetune=sparse init_from=RUN` as a user runs it: from a training to few changed rows, resumed, and refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from processes import assert_equal_runs, last_checkpoint
from small import Run, record, rows

# On one worker, so that the run of the module is trained once.
pytestmark = pytest.mark.xdist_group("sparse_finetuning")

DATA = ["data=text", "data.tokenizer=bytes", "data.seq_len=16", "data.global_batch_size=4", "logger=none"]
BASE = [
    *DATA, "data.path=a.txt", "model.n_layers=2", "model.dim=16", "model.ffn_dim=16", "model.n_heads=2",
    "model.n_kv_heads=2", "model.memory.n_keys=16", "callbacks=[read_background,step_checkpoint]",
    "trainer.max_steps=12", "run_dir=base",
]  # fmt: skip
SPARSE = [
    *DATA, "data.path=b.txt", "finetune=sparse", "finetune.rows=6", "init_from=base", "table/optimizer=row_adagrad",
    "callbacks=[metrics_csv,step_checkpoint]", "trainer.max_steps=9", "trainer.log_every_n_steps=3",
    "trust_config=true", "callbacks.step_checkpoint.every_n_steps=3",
    "+callbacks.interrupt._target_=toys.InterruptOnce",
]  # fmt: skip
TABLE = "model.tables.0.weight"


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    (folder / "a.txt").write_text("a cat sat on the mat and saw a dog run by . " * 60)
    (folder / "empty.txt").write_text("\n \n")
    (folder / "b.txt").write_text("QUICK ZEBRAS JUMP OVER 77 LAZY FOXES ! " * 60)
    return folder


@pytest.fixture
def run(of_module: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run in `base`, trained once."""
    monkeypatch.chdir(of_module)
    if not Path("base").exists():
        shown = cli("fit", *BASE)
        assert shown.code == 0, shown.err
    return cli


def test_few_rows_learn_from_the_background_of_the_run(run: Run) -> None:
    shown = run("fit", *SPARSE, "run_dir=learned")
    assert shown.code == 0, shown.err
    assert "read background: 8 sequences, counted in the training of init_from" in shown.out + shown.err
    before, after = last_checkpoint(Path("base")), last_checkpoint(Path("learned"))
    changed_N = (before["state_dict"][TABLE] != after["state_dict"][TABLE]).any(-1)
    for name, value in before["state_dict"].items():
        assert name == TABLE or torch.equal(value, after["state_dict"][name]), name
    state = after["callbacks"]["SparseRows"]
    number = int(changed_N.sum())
    assert torch.equal(state["chooser"]["changed"]["table0"], changed_N)
    assert 6 <= number <= 54
    assert f"table0: changed {number} of 256 rows ({number * 64:,} bytes)" in shown.out + shown.err
    row = next(line for line in shown.out.splitlines() if "of which changed in table0" in line)
    assert f" {number} of 256 rows ({number * 64:,} bytes) " in row
    logged = rows(Path("learned"))
    assert float(logged[0]["train/sparse/table0/chosen_share"]) == 6 / 256
    assert float(logged[0]["train/sparse/table0/rows_changed"]) < number
    assert float(logged[0]["train/sparse/table0/threshold"]) > 0
    assert float(logged[-1]["train/loss"]) < float(logged[0]["train/loss"])
    shown = run("generate", "run_dir=learned", "prompt=QUICK", "max_new_tokens=2", "table.device=mmap")
    assert shown.code == 0, shown.err
    # A second finetuning compares with the same background.
    again = run("fit", *SPARSE, "init_from=learned", "run_dir=again", "trainer.max_steps=1", "finetune.score=kl")
    assert again.code == 0, again.err
    assert "read background: 8 sequences" in again.out + again.err
    for name, counts in last_checkpoint(Path("again"))["callbacks"]["SparseRows"]["background"]["reads"].items():
        assert torch.equal(counts, before["callbacks"]["ReadBackgroundCounter"]["background"]["reads"][name])


def test_an_interrupted_run_ends_like_another_without_its_sources(run: Run) -> None:
    if not Path("learned").exists():
        assert run("fit", *SPARSE, "run_dir=learned").code == 0
    Path("interrupt").touch()
    assert run("fit", *SPARSE, "run_dir=cut").code == 130
    assert record(Path("cut"))["status"] == "interrupted"
    shutil.move("base", "elsewhere")
    try:
        resumed = run("fit", "run_dir=cut", "trust_config=true")
    finally:
        shutil.move("elsewhere", "base")
    assert resumed.code == 0, resumed.err
    assert_equal_runs(Path("learned"), Path("cut"))


REFUSED = {
    "no init_from": (
        ["init_from=null"],
        "init_from=RUN",
    ),
    "a run without counts": (["init_from=bare"], "/bare holds none: set finetune.background_path=TEXT"),
    "an export": (["init_from=bare.safetensors"], "/bare.safetensors holds none"),
    "no text": (["finetune.background_path=no.txt"], "no.txt does not exist; give a file"),
    "no file": (["finetune.background=no.safetensors"], "no.safetensors cannot be read"),
    "no text in it": (["finetune.background_path=empty.txt"], "empty.txt holds no text"),
    "another run": (["finetune.background=bare"], "/bare holds no read background"),
    "other tables": (
        ["extra_ffns=engram"],
        "/base counts the reads of table0 (256 rows), but the tables of this model",
    ),
    "both": (["finetune.background=x", "finetune.background_path=a.txt"], "are both set; keep the file of counts"),
    "rows": (["finetune.rows=0"], "error: finetune.rows=0 is out of range; allowed: 1 or more"),
    "score": (["finetune.score=idf"], "error: finetune.score='idf' is not known"),
    "per": (["finetune.per=epoch"], "error: finetune.per='epoch' is not known"),
    "DeepSpeed": (["strategy=deepspeed_1"], "finetune=sparse leaves none of them; set strategy=ddp"),
    "revival": (
        ["callbacks=[slot_usage,slot_revival]", "~callbacks.step_checkpoint"],
        "callbacks.slot_revival changes rows of tables",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_written(run: Run, what: str) -> None:
    if not Path("bare").exists():
        assert run("fit", *BASE[:-3], "trainer.max_steps=1", "callbacks=[step_checkpoint]", "run_dir=bare").code == 0
        assert run("export", "run_dir=bare", "file=bare.safetensors").code == 0
    overrides, message = REFUSED[what]
    given = [one for one in SPARSE if not (what == "revival" and "callbacks" in one)]
    if what == "revival":
        overrides = overrides[:1]
    shown = run("fit", *given, *overrides, "run_dir=refused")
    assert (shown.code, message in shown.err) == (2, True), shown.err
    assert not Path("refused").exists()
