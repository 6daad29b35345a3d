"""SlotRevival through the real Trainer: what changes, what does not, what is refused, and that all ranks agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import revival_jobs as revivals
import torch
import usage_jobs as jobs
from rank_group import Groups

from pkm_lightning.callbacks import SlotRevival
from pkm_lightning.errors import ConfigError
from pkm_lightning.usage.revival import addressing_of

ALONE = "strategy=single"
#: Of the ranks that must agree, those of the long tests.
MORE_RANKS = [("ddp", "row"), ("ddp", "dim"), ("fsdp", "dim")]
STILL = ["optim.warmup_share=0", "optim.final_factor=1.0"]


class Before(L.Callback):
    """Copies tables, sub-keys and last reads after the update, before the revival."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        usage = next(callback for callback in trainer.callbacks if hasattr(callback, "counters"))  # type: ignore[attr-defined]
        self.tables = [table.weight.detach().clone() for table in pl_module.model.tables]
        self.keys = [p.detach().clone() for n, p in pl_module.named_parameters() if n.endswith("keys.keys")]
        self.last_N = usage.counters.last_read("table0").clone()
        heads = usage.counters.heads
        self.heads = {name: counts.last_N.clone() for name, counts in heads.items()}


def run(tmp_path: Path, *overrides: str, steps: int = 6, **changes: Any) -> tuple[Any, Before, SlotRevival, Any]:
    before, reviving = Before(), revivals.revival(every_n_steps=steps, **changes)
    usage = jobs.usage(tmp_path, per_head="halves")
    module, trainer, _ = jobs.fit([ALONE, *overrides], steps, [usage, before, reviving])
    optimizer = trainer.optimizers[0] if module.table_optimizer is None else module.table_optimizer
    return module, before, reviving, (usage.counters, optimizer)


def changed_rows(before: Before, module: Any, rows: int) -> set[int]:
    after, earlier = module.model.tables[0].weight.detach().view(rows, -1), before.tables[0].view(rows, -1)
    return set((after != earlier).any(1).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "overrides",
    [
        ["ffn=memory_plus", "placement=all", "table.learning=rows"],
        ["ffn=ultramem", "placement=middle", "table.learning=dense"],
    ],
)
def test_dead_rows_become_busy_ones_and_nothing_else_moves(overrides: list[str], tmp_path: Path) -> None:
    overrides = [*overrides, "model.memory.n_keys=32", "table.shared=true"]
    module, before, reviving, (counters, optimizer) = run(tmp_path, *overrides, noise=0.0)
    rows = len(before.last_N)
    dead = set((6 - before.last_N >= 2).nonzero().flatten().tolist())
    changed = changed_rows(before, module, rows)
    assert len(changed) == min(-(-rows // 10), len(dead)) == reviving.revived["table0"]
    assert changed <= dead
    after_keys = [p.detach() for n, p in module.named_parameters() if n.endswith("keys.keys")]
    assert all(torch.equal(a, b) for a, b in zip(after_keys, before.keys, strict=True))
    busy = set((counters.total("table0", "window").counts_N > 0).nonzero().flatten().tolist()) - dead
    values = before.tables[0].view(rows, -1)
    after = module.model.tables[0].weight.detach().view(rows, -1)
    busiest = counters.total("table0", "window").counts_N.masked_fill(6 - before.last_N >= 2, 0).argmax()
    assert any(torch.equal(after[row], values[busiest]) for row in changed)
    assert all(any(torch.equal(after[row], values[other]) for other in busy) for row in changed)
    state = optimizer.state[module.model.tables[0].weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not state[name].view(rows, -1)[sorted(changed)].any()
        assert state[name].any()
    assert torch.equal(counters.last_read("table0"), before.last_N)  # it is no read
    since_N = reviving.history.last_change("table0", before.last_N)
    assert set((since_N != before.last_N).nonzero().flatten().tolist()) == changed
    assert (since_N[sorted(changed)] == 6).all()


@pytest.mark.parametrize("ffn", ["memory_plus", "peer"])
def test_dead_sub_keys_move_and_live_ones_stay(ffn: str, tmp_path: Path) -> None:
    overrides = [
        f"ffn={ffn}",
        "placement=middle",
        "model.memory.n_keys=32",
        "model.memory.knn=2",
        "model.memory.heads=1",
    ]
    module, before, reviving, (counters, optimizer) = run(tmp_path, *overrides, source="queries", dead_after=1)
    name = "layer1.slot"
    keys = addressing_of(module.model.blocks[1].ffn).keys.keys  # type: ignore[union-attr]
    moved = (keys.detach() != before.keys[0]).any(-1)
    dead = (6 - before.heads[name] >= 1).view(1, 2, 32)
    assert 0 < int(moved.sum()) == reviving.revived[name]
    assert not (moved & ~dead).any()
    assert (moved.sum(-1) == dead.sum(-1).clamp(max=4)).all()
    assert not optimizer.state[keys]["exp_avg"][moved].any()
    assert torch.equal(counters.heads[name].last_N, before.heads[name])
    last_H2S = before.heads[name].view(1, 2, 32)
    assert torch.equal(reviving.history.last_change(name, last_H2S), last_H2S.masked_fill(moved, 6))
    reached = moved[0, 0][:, None] | moved[0, 1]
    rows = changed_rows(before, module, 1024)
    assert rows <= set(reached.flatten().nonzero().flatten().tolist())
    assert rows <= set((6 - before.last_N >= 1).nonzero().flatten().tolist())
    assert len(rows) == reviving.revived["table0"] > 0


def test_sub_keys_move_above_rows_that_do_not_learn(tmp_path: Path) -> None:
    overrides = ["ffn=pkm", "ffn.cures.simvq=true", "model.memory.n_keys=32", "model.memory.knn=2"]
    module, before, reviving, _ = run(tmp_path, *overrides, source="queries", dead_after=1)
    assert reviving.revived["layer1.slot"] > 0
    assert not changed_rows(before, module, 1024)


def test_moved_sub_keys_are_read_again(tmp_path: Path) -> None:
    """Compares runs with and without revivals, by counts of sub-keys that follow from those of slots."""
    overrides = [ALONE, "ffn=pkm", "model.memory.n_keys=32", "model.memory.knn=1", "optim.lr=0"]
    alive = []
    for callbacks in ([], [revivals.revival(every_n_steps=2, source="queries", dead_after=2, max_share=0.5)]):
        usage = jobs.usage(tmp_path, per_head="full", window=4)
        jobs.fit([*overrides, *STILL], 8, [usage, *callbacks])
        assert usage.counters is not None
        counts_Z = usage.counters.total_of_heads("layer1.slot", "window").counts_N
        alive.append(int((usage.counters.heads["layer1.slot"].by_sub_key(counts_Z, torch.sum) > 0).sum()))
    assert alive[1] > 1.2 * alive[0]


@pytest.mark.parametrize(
    ("strategy", "shard"),
    [("fsdp", "row"), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_RANKS)],
)
def test_ranks_agree(ranks: Groups, strategy: str, shard: str) -> None:
    overrides = ["ffn=memory_plus", "placement=middle", f"strategy={strategy}", f"table.shard={shard}", *STILL]
    one, other = ranks(2).run(revivals.train, overrides, 5, source="queries", max_share=0.2)
    assert one == other
    assert one[1]["table0"] > 0
    assert one[1]["layer1.slot"] > 0


@pytest.mark.slow
def test_rows_of_split_tables_are_those_of_one_process(ranks: Groups) -> None:
    overrides = ["ffn=memory_plus", "placement=middle", "trainer.precision=64-true", *STILL]
    alone = revivals.train([*overrides, ALONE], 5)
    for strategy in ("ddp", "deepspeed_2"):
        precision = ["trainer.precision=32-true"] if strategy != "ddp" else []
        spread = revivals.train([*overrides, *precision, ALONE], 5) if precision else alone
        for part in ranks(2).run(
            revivals.train, [*overrides, *precision, f"strategy={strategy}", "table.shard=row"], 5
        ):
            assert part[1] == spread[1]
            for step, expected in zip(part[0], spread[0], strict=True):
                assert step["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


def test_what_was_revived_is_logged_and_survives_a_resume(tmp_path: Path) -> None:
    overrides = [ALONE, "ffn=memory_plus", *STILL]
    found = []
    for kill in (False, True):
        callbacks = [jobs.usage(tmp_path), revivals.revival(dead_after=1)]
        if kill:
            _, trainer, _ = jobs.fit(overrides, 4, callbacks)
            trainer.save_checkpoint(str(tmp_path / "saved.ckpt"))
            callbacks = [jobs.usage(tmp_path), revivals.revival(dead_after=1)]
            seen = jobs.fit(overrides, 8, callbacks, 4, ckpt_path=str(tmp_path / "saved.ckpt"))[2]
        else:
            seen = jobs.fit(overrides, 8, callbacks)[2]
        found.append((seen[-4:], callbacks[1].revived))
    assert found[0] == found[1]
    assert found[0][0][-1]["train/revived/table0"] == found[0][1]["table0"] > 0


@pytest.mark.parametrize(
    ("overrides", "changes", "per_head", "message"),
    [
        (["ffn=pkm", "ffn.cures.simvq=true"], {}, True, "no table of this model learns"),
        (["ffn=moe"], {}, True, "no table of this model learns"),
        (["ffn=ple"], {}, True, "tokens alone decide which rows of this model's tables are read"),
        (["ffn=engram", "ffn.end_id=0"], {}, True, "tokens alone decide which rows of this model's tables are read"),
        (["ffn=pkm"], {"source": "queries"}, False, r"needs callbacks.slot_usage.per_head=halves"),
        (["ffn=ultramem_v2"], {"source": "queries"}, True, "moves the sub-keys of product keys"),
    ],
)
def test_what_cannot_work_is_refused(
    overrides: list[str], changes: dict[str, Any], per_head: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        jobs.fit([ALONE, *overrides], 1, [jobs.usage(tmp_path, per_head=per_head), revivals.revival(**changes)])


@pytest.mark.slow
def test_sub_keys_of_an_engine_are_refused(ranks: Groups) -> None:
    for message in ranks(2).run(revivals.refused, ["ffn=memory_plus", "strategy=deepspeed_3"], source="queries"):
        assert "cannot write sub-keys that DeepSpeed's engine owns; set source=busy" in message


def test_it_needs_slot_usage() -> None:
    with pytest.raises(ConfigError, match=r"needs callbacks.slot_usage"):
        jobs.fit([ALONE, "ffn=pkm"], 1, [revivals.revival()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every_n_steps": 0}, "callbacks.slot_revival.every_n_steps=0 is out of range"),
        ({"dead_after": 0}, "callbacks.slot_revival.dead_after=0 is out of range"),
        ({"max_share": 1.5}, "callbacks.slot_revival.max_share=1.5 is out of range"),
        ({"noise": -0.1}, "callbacks.slot_revival.noise=-0.1 is out of range"),
        ({"source": "bussy"}, "callbacks.slot_revival.source='bussy' is not known; allowed: busy, queries"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        revivals.revival(**changes)
