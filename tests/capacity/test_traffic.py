"""The plan's formulas against what ranks receive and hold in training, counted at torch's collectives."""

from __future__ import annotations

from dataclasses import asdict

import plan_jobs
import pytest
from rank_group import Groups

TOLERANCE = 0.1
#: Kinds that depend on how skewed the reads are: the plan assumes uniform reads, which touch the most rows.
ESTIMATED = {"row_statistics"}

QUICK = ["strategy=ddp", "ffn=memory_plus", "table.shard=dim"]
TWO = [
    ["strategy=deepspeed_3", "ffn=dense", "model.vocab_size=8000"],
    ["strategy=ddp", "ffn=peer", "table.shard=row"],
    ["strategy=ddp", "ffn=ultramem", "table.shard=dim", "table/optimizer=row_adagrad"],
    ["strategy=fsdp", "ffn=memory_plus", "table.shard=row", "trainer.accumulate_grad_batches=2"],
    ["strategy=deepspeed_2", "ffn=memory_plus", "trainer.accumulate_grad_batches=2"],
    ["strategy=ddp", "ffn=memory_plus", "model.activation_checkpointing=true"],
    ["strategy=ddp", "ffn=memory_plus", "table.shard=row"],
    ["strategy=ddp", "ffn=peer", "table.shard=dim"],
    ["strategy=ddp", "ffn=ultramem", "table.shard=row"],
    ["strategy=ddp", "ffn=ple", "table.shard=dim"],
    ["strategy=ddp", "ffn=stem", "table.shard=row"],
    ["strategy=ddp", "ffn=engram", "ffn.end_id=0", "table.shard=dim"],
    ["strategy=ddp", "ffn=engram", "ffn.end_id=0", "table.shard=row"],
    ["strategy=ddp", "ffn=memory", "ffn.cures.straight_through=true"],
    ["strategy=ddp", "ffn=pkm", "trainer.accumulate_grad_batches=2"],
    ["strategy=fsdp", "ffn=dense"],
    ["strategy=fsdp", "ffn=moe"],
    ["strategy=deepspeed_1", "ffn=dense"],
    ["strategy=deepspeed_1", "ffn=memory_plus", "trainer.accumulate_grad_batches=2"],
    ["strategy=deepspeed_2", "ffn=dense"],
    ["strategy=deepspeed_3", "ffn=memory_plus", "model.vocab_size=8000", "trainer.accumulate_grad_batches=2"],
]
FOUR = [
    ["strategy=ddp", "ffn=memory_plus", "table.group=2"],
    ["strategy=ddp", "ffn=peer", "table.shard=row", "table.group=2"],
    ["strategy=ddp", "ffn=ultramem", "table.group=2"],
    ["strategy=ddp", "ffn=ultramem_v2"],
    ["strategy=ddp", "ffn=memory_plus", "table.group=2", "table.learning=dense"],
    ["strategy=ddp", "ffn=memory_plus", "table.shard=none", "model.memory.n_keys=64"],
    ["strategy=fsdp", "ffn=memory_plus", "table.group=2"],
    ["strategy=deepspeed_3", "ffn=ultramem", "table.shard=row"],
    # FSDP2 pads the first dimension of a weight, here 1, to the number of ranks.
    ["strategy=fsdp", "ffn=peer", "model.memory.n_keys=64", "model.memory.key_dim=32"],
]


def check(ranks: Groups, world: int, overrides: list[str]) -> dict[tuple[str, str], float]:
    """Compares the plan to a run; returns the bytes that rank 0 received, by kind and operation."""
    plan = plan_jobs.planned(world, overrides)
    assert plan.memory.staged_reads is not None
    (first, *_) = ranks(world).run(plan_jobs.counted, overrides)
    received = plan_jobs.by_kind(first["received"])
    for kind, expected in asdict(plan.traffic).items():
        counted = received.get(kind, 0)
        if kind in ESTIMATED:
            assert 0.5 * expected <= counted <= (1 + TOLERANCE) * expected, (kind, overrides)
        elif expected or counted > 64:  # else only the numbers by which replicas choose a way
            assert counted == pytest.approx(expected, rel=TOLERANCE), (kind, overrides)
    assert set(received) <= {*asdict(plan.traffic), "small", "statistics"}
    # DeepSpeed flattens parameters and states into buffers of its own.
    names = ("table_part", "staged_reads") if "deepspeed" in overrides[0] else first["held"]
    for name in names:
        if name == "staged_reads" and plan.setting.shard == "row":
            # Buffers double until they fit the step with the most reads of this rank's rows.
            assert 0.5 < first["held"][name] / plan.memory.staged_reads < 2, overrides
            continue
        assert first["held"][name] == pytest.approx(getattr(plan.memory, name), rel=TOLERANCE), (name, overrides)
    received_by: dict[tuple[str, str], float] = first["received"]
    return received_by


def test_two_ranks_receive_and_hold_what_the_plan_computes(ranks: Groups) -> None:
    few = check(ranks, 2, QUICK)
    # `row_adagrad` sums squares of whole rows over the ranks, which changes nothing in forward and backward.
    many = check(ranks, 2, [*QUICK, "model.memory.knn=8", "table/optimizer=row_adagrad"])
    assert many["row_statistics", "allreduce_"] > 0
    # Under `dim` the outputs do not grow with the number of reads (4 to 8), ids and weights do.
    for kind in ("table_forward", "table_backward"):
        assert many[kind, "alltoall_base_"] == few[kind, "alltoall_base_"] > 0
    assert many["table_forward", "_allgather_base_"] == 2 * few["table_forward", "_allgather_base_"] > 0
    assert many["table_backward", "_reduce_scatter_base_"] == 2 * few["table_backward", "_reduce_scatter_base_"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("overrides", TWO, ids=" ".join)
def test_two_ranks_with_other_plugins_and_strategies(ranks: Groups, overrides: list[str]) -> None:
    check(ranks, 2, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", FOUR, ids=" ".join)
def test_four_ranks_with_replicas(ranks: Groups, overrides: list[str]) -> None:
    check(ranks, 4, overrides)
