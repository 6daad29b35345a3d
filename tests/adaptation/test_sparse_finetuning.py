"""`finetune=sparse` in the real Trainer: which rows learn, that nothing else moves, resumes and ranks.

Letters: N rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_jobs
import pytest
import sparse_jobs as jobs
import torch
import usage_jobs
from adaptation.plain_scores import plain_choice, plain_scores
from rank_group import Groups
from sparse_jobs import Finetuned
from tolerances import RANKS

from pkm_lightning.adaptation import ReadBackground
from pkm_lightning.build.finetuning import check_adapted
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.errors import ConfigError
from pkm_lightning.usage.slot_readers import find_readers, find_tables

STEPS = 4
MEMORY = ["ffn=memory_plus", "placement=all"]
MODELS = {
    "shared table, row_adagrad": [*MEMORY, "table/optimizer=row_adagrad"],
    "two tables per expert, lazy_adam": ["ffn=peer", "placement=middle", "table/optimizer=lazy_adam"],
    "token-addressed, sgd": ["ffn=engram", "ffn.end_id=0", "ffn.rows=40", "table/optimizer=sgd"],
    "two sets, micro-batches": [
        *(*MEMORY, "extra_ffns=engram", "extra_ffns.engram.ffn.end_id=0", "extra_ffns.engram.ffn.rows=40"),
        *("table/optimizer=sgd", "trainer.accumulate_grad_batches=2"),
    ],
    "batch norm, factored_adam": ["ffn=pkm", "placement=middle", "table/optimizer=factored_adam"],
}


def plain_rows(done: Finetuned, background: ReadBackground, score: str, rows: int) -> dict[str, list[set[int]]]:
    """Returns the rows of each step and set by the formula, from the reads that a watcher has copied."""
    readers = find_readers(done.model)
    chosen: dict[str, list[set[int]]] = {}
    for name, tables in find_tables(readers).items():
        for step in range(1, STEPS + 1):
            counts = [0] * tables.tables[0].rows
            for reader in (readers[one] for one in tables.readers):
                for at, traces, valid_BT in done.raw.seen:
                    trace = traces[reader.layer]
                    part = next(value for key, value in trace.items() if key.endswith(f"{reader.slots.name}_ids"))
                    if len(trace) > 2:  # two plugins in one layer: their entries have the names of their parts
                        part = next(v for k, v in trace.items() if k.endswith("slot_ids") and _is_of(k, reader.part))
                    for slot in part[valid_BT].flatten().tolist() if at == step else ():
                        counts[slot] += 1
            known = background.of(name)
            scores = plain_scores(counts, score, known.n_batches, known.batches_N.tolist(), known.reads_N.tolist())
            chosen.setdefault(name, []).append(set(plain_choice(scores, rows)))
    return chosen


def _is_of(entry: str, part: str) -> bool:
    prefix = entry.rpartition("slot_ids")[0].rstrip("./")
    return prefix == part or (not prefix and part == "ffn")


@pytest.mark.parametrize("what", MODELS)
def test_rows_of_the_formula_learn_and_every_other_bit_stays(what: str, tmp_path: Path) -> None:
    path = tmp_path / "background.safetensors"
    background = jobs.background(MODELS[what], path)
    score = "kl" if "micro" in what else "tfidf"
    done = Finetuned([*MODELS[what], f"finetune.score={score}"], STEPS, path)
    state, start = done.state, done.start()
    chosen = plain_rows(done, background, score, 5)
    sets = find_tables(find_readers(done.model))
    assert sets.keys() == chosen.keys() == done.chooser.changed.keys()
    learned = {}
    for name, tables in sets.items():
        rows = sorted(set().union(*chosen[name]))
        assert done.chooser.changed[name].nonzero().flatten().tolist() == rows
        for table in tables.tables:
            (key,) = (k for k, module in done.model.named_modules() if module is table)
            learned[f"{key}.weight"] = rows
            changed_N = (state[f"{key}.weight"] != start[f"{key}.weight"]).any(-1)
            # A row that is read by tokens without any effect on the loss has the gradient zero.
            moved = changed_N.nonzero().flatten().tolist()
            assert set(moved) <= set(rows)
            assert len(moved) > len(rows) * (0.5 if "token" in what else 0.99)
    assert {name for name in start if not torch.equal(start[name], state[name])} == learned.keys()
    rows_of = [rows for _, rows in sorted(learned.items())]
    for name, value in state.items():
        if name.startswith("optimizer.") and value.ndim and not name.split(".")[-1].startswith("column_"):
            others = [row for row in range(len(value)) if row not in rows_of[int(name.split(".")[1])]]
            assert value.any()
            assert not value[others].any()
    shares = [row[f"train/sparse/{name}/chosen_share"] for name in sets for row in done.losses]
    assert shares == pytest.approx([5 / tables.tables[0].rows for tables in sets.values()] * STEPS)


def test_a_task_chooses_once_from_a_pass_over_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = usage_jobs.batches(2)
    monkeypatch.setattr("pkm_lightning.adaptation.sparse_callback._task_batches", lambda *_: iter(batches))
    path = tmp_path / "background.safetensors"
    background = jobs.background(MEMORY, path)
    overrides = [*MEMORY, "finetune.per=task", "table/optimizer=sgd"]
    done = Finetuned(overrides, STEPS, path)
    chosen = done.chooser.state_dict()["fixed"]["table0"].tolist()
    # The first two steps train on these batches, with the rows as they were for the first of them.
    known, counts = background.of("table0"), [0] * 256
    model = Finetuned(["finetune.rows=null", *MEMORY, "optim.lr=0"], 2).raw
    for _, traces, valid_BT in model.seen:
        for trace in traces.values():
            for slot in trace["slot_ids"][valid_BT].flatten().tolist():
                counts[slot] += 1
    scores = plain_scores(counts, "tfidf", 9, known.batches_N.tolist(), known.reads_N.tolist())
    assert chosen == plain_choice(scores, 5)
    changed = done.chooser.changed["table0"].nonzero().flatten().tolist()
    assert changed
    assert set(changed) <= set(chosen)


@pytest.mark.parametrize("per", ["step", "task"])
def test_an_interrupted_finetuning_ends_like_another(per: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = usage_jobs.batches(2)
    monkeypatch.setattr("pkm_lightning.adaptation.sparse_callback._task_batches", lambda *_: iter(batches))
    path = tmp_path / "background.safetensors"
    jobs.background(MEMORY, path)
    overrides = [*MEMORY, f"finetune.per={per}", "table/optimizer=lazy_adam", "optim.final_factor=1"]
    whole = Finetuned(overrides, STEPS, path)
    half = Finetuned(overrides, 2, path)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    path.unlink()  # the checkpoint has the background
    rest = Finetuned(overrides, STEPS, path, done=2, ckpt_path=tmp_path / "half.ckpt")
    expected, state = whole.state, rest.state
    assert expected.keys() == state.keys()
    assert not [name for name in expected if not torch.equal(expected[name], state[name])]
    assert torch.equal(whole.chooser.changed["table0"], rest.chooser.changed["table0"])
    assert [row["train/loss"] for row in whole.losses[2:]] == [row["train/loss"] for row in rest.losses]


MORE_RANKS = (("ddp", "dim"), ("ddp", "none"), ("fsdp", "dim"))


@pytest.mark.parametrize(
    ("strategy", "shard"),
    [("ddp", "row"), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_RANKS)],
)
def test_two_ranks_choose_and_learn_what_one_process_does(
    ranks: Groups, strategy: str, shard: str, tmp_path: Path
) -> None:
    path = tmp_path / "background.safetensors"
    overrides = [*MEMORY, "table/optimizer=sgd", f"table.shard={shard}"]
    jobs.background(overrides, path)
    losses, changed, norms = jobs.on_ranks(["strategy=single", *overrides], STEPS, str(path))
    for of_rank in ranks(2).run(jobs.on_ranks, [f"strategy={strategy}", *overrides], STEPS, str(path)):
        assert of_rank[1] == changed
        assert of_rank[0] == pytest.approx(losses, rel=RANKS["loss"])
        assert of_rank[2] == pytest.approx(norms, rel=RANKS["norm"])


REFUSED: dict[str, tuple[list[str], str]] = {
    "dense learning": (["table.learning=dense"], "finetune=sparse updates tables by rows"),
    "no table": (["ffn=dense"], "this model has no value table; set ffn=memory_plus"),
    "frozen table": (["table.trainable=false"], "has no table that learns"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_without_rows_that_learn_are_refused_in_training_alone(what: str) -> None:
    overrides, message = REFUSED[what]
    settings = distributed_jobs.settings(*jobs.BASE, *overrides)
    model = build_meta_model(settings)
    with pytest.raises(ConfigError, match=message):
        check_adapted(model, settings)


def test_all_rows_that_are_read_learn_without_a_number() -> None:
    done: Any = Finetuned([*MEMORY, "finetune.rows=null", "table/optimizer=sgd"], 2)
    read = {
        int(i) for _, traces, valid in done.raw.seen for t in traces.values() for i in t["slot_ids"][valid].flatten()
    }
    assert done.chooser.changed["table0"].nonzero().flatten().tolist() == sorted(read)
