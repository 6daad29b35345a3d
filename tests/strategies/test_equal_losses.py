"""Every distribution of a model over ranks reaches the losses of one process with the same global batch.

In fp32 with Adam, lazy Adam and clipping by norm; the remaining difference is the order of additions.
"""

from __future__ import annotations

import functools

import distributed_jobs as jobs
import pytest
from rank_group import Groups
from tolerances import RANKS

#: The root in its gate has an unbounded slope, by which fp32 gradients differ more than the tolerance.
ENGRAM = "ffn=engram ffn.end_id=0 ffn.gate=no_root"
#: Strategy, ranks and overrides of the cases that every run of the tests has, with 8 steps.
QUICK = [
    ("ddp", 2, "ffn=memory_plus table.shard=dim table.learning=dense"),
    ("ddp", 2, "ffn=peer table.shard=none table.learning=rows"),
]
#: Engram before two layers, with a table each.
EXTRA_ENGRAM = (
    "extra_ffns.engram.placement.layers=[0,2] extra_ffns.engram.ffn.end_id=0 extra_ffns.engram.ffn.rows=47 "
    "extra_ffns.engram.ffn.row_dim=8 extra_ffns.engram.ffn.row_multiple=2"
)
#: With Memory+ in a layer and PKM parallel to another. In fp32 the three would soon select other slots: a step of Adam
#: turns the rounding of a small gradient into a change of full size.
MIXTURE = f"ffn=memory_plus placement.layers=[2] extra_ffns=[engram,pkm] {EXTRA_ENGRAM} trainer.precision=64-true"
#: A pairwise subset, with 30 steps. The full matrix is in test_full_matrix.py.
CASES = [
    *QUICK,
    pytest.param("ddp", 4, "ffn=peer table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param("ddp", 2, "ffn=ultramem table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param("ddp", 4, "ffn=memory_plus table.shard=dim table.learning=rows table.group=2", marks=pytest.mark.slow),
    pytest.param("fsdp", 2, "ffn=peer table.shard=dim table.learning=rows", marks=pytest.mark.slow),
    pytest.param(
        "fsdp", 4, "ffn=memory_plus table.shard=row table.learning=dense table.group=2", marks=pytest.mark.slow
    ),
    pytest.param("fsdp", 4, "ffn=ultramem table.shard=dim table.learning=rows table.group=2", marks=pytest.mark.slow),
    pytest.param("ddp", 4, f"{ENGRAM} table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param("fsdp", 2, f"{ENGRAM} table.shard=dim table.learning=dense", marks=pytest.mark.slow),
    pytest.param("deepspeed_3", 2, f"{ENGRAM} table.shard=dim table.learning=rows", marks=pytest.mark.slow),
    pytest.param("ddp", 2, "ffn=engram ffn.end_id=0 table.shard=dim trainer.precision=64-true", marks=pytest.mark.slow),
    pytest.param("fsdp", 2, "ffn=moe", marks=pytest.mark.slow),
    pytest.param(
        "fsdp",
        2,
        "ffn=memory_plus table.shard=dim table/optimizer=row_adagrad trainer.accumulate_grad_batches=2",
        marks=pytest.mark.slow,
    ),
    pytest.param("fsdp", 2, "ffn=peer table.shard=dim table/optimizer=factored_adam", marks=pytest.mark.slow),
    pytest.param("ddp", 4, "ffn=memory_plus table.shard=row table/optimizer=factored_adam", marks=pytest.mark.slow),
    pytest.param(
        "ddp", 4, "ffn=peer table.shard=row table.group=2 table.optimizer.bias_correction=row", marks=pytest.mark.slow
    ),
    pytest.param("deepspeed_1", 2, "ffn=memory_plus table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param("deepspeed_1", 4, "ffn=peer table.shard=dim table.learning=dense", marks=pytest.mark.slow),
    pytest.param("deepspeed_2", 2, "ffn=ultramem table.shard=dim table.learning=dense", marks=pytest.mark.slow),
    pytest.param(
        "deepspeed_2",
        2,
        "ffn=memory_plus table.shard=dim table.learning=rows trainer.accumulate_grad_batches=2",
        marks=pytest.mark.slow,
    ),
    pytest.param("deepspeed_2", 4, "ffn=moe", marks=pytest.mark.slow),
    pytest.param("deepspeed_3", 2, "ffn=peer table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param(
        "deepspeed_3", 4, "ffn=memory_plus table.shard=dim table.learning=dense table.group=2", marks=pytest.mark.slow
    ),
    pytest.param(
        "deepspeed_3",
        2,
        "ffn=ultramem_v2 table.shard=dim table.learning=rows",
        marks=pytest.mark.slow,
    ),
    pytest.param("ddp", 4, "ffn=ple table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param("fsdp", 2, "ffn=ple table.shard=dim table.learning=dense", marks=pytest.mark.slow),
    pytest.param("deepspeed_3", 2, "ffn=ple table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param("ddp", 2, "ffn=stem table.shard=dim table.learning=rows", marks=pytest.mark.slow),
    pytest.param("fsdp", 4, "ffn=stem table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param("deepspeed_3", 2, "ffn=moe trainer.accumulate_grad_batches=2", marks=pytest.mark.slow),
    pytest.param("ddp", 2, f"{MIXTURE} table.shard=row table.learning=rows", marks=pytest.mark.slow),
    pytest.param("ddp", 2, f"{MIXTURE} table.shard=dim table.learning=dense", marks=pytest.mark.slow),
    pytest.param("fsdp", 2, f"ffn=dense extra_ffns=engram {EXTRA_ENGRAM} table.shard=dim", marks=pytest.mark.slow),
    pytest.param(
        "ddp",
        2,
        "ffn=memory_plus placement.mode=parallel table.shared=false model.activation_checkpointing=true",
        marks=pytest.mark.slow,
    ),
]


@functools.cache
def alone(overrides: str, steps: int) -> list[dict[str, float]]:
    """Returns the logged figures of the steps of one process."""
    kept = [o for o in overrides.split() if o.split("=")[0] not in ("table.shard", "table.group")]
    return jobs.train(["strategy=single", *kept], steps)


@pytest.mark.parametrize(("strategy", "size", "overrides"), CASES, ids=lambda value: str(value).replace(" ", ","))
def test_losses_and_norms_are_those_of_one_process(ranks: Groups, strategy: str, size: int, overrides: str) -> None:
    steps = 8 if (strategy, size, overrides) in QUICK else 30
    expected = alone(overrides, steps)
    for found in ranks(size).run(jobs.train, [f"strategy={strategy}", *overrides.split()], steps):
        assert len(found) == len(expected) == steps
        assert found[0].keys() == expected[0].keys()
        for step, (one_process, ranks_of) in enumerate(zip(expected, found, strict=True)):
            assert ranks_of["train/loss"] == pytest.approx(one_process["train/loss"], rel=RANKS["loss"]), step
            for name in ("train/grad_norm_table", "train/grad_norm_dense", "train/aux_balance"):
                if name in ranks_of:
                    assert ranks_of[name] == pytest.approx(one_process[name], rel=RANKS["norm"], abs=1e-7), (step, name)
    if steps == 30:  # 8 steps of random tokens show no trend yet
        assert expected[-1]["train/loss"] < expected[0]["train/loss"]
