"""Prints the tables of docs/scaling.md: memory and traffic per device by GPUs, table size, strategy and sharding.

    python scripts/plan_scaling.py

Nothing is allocated; every number is a formula of `pkm_lightning.capacity`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.capacity import Plan, make_plan

GPUS = (8, 64, 256, 1024)
ROWS = (10**7, 10**8, 10**9)
NODE = 8
#: Sequences of 4096 tokens per GPU and step.
SEQUENCES = 4
BASE = ("model=1.3b", "ffn=memory_plus", "ffn.value_dim=1024", "model.activation_checkpointing=true",
        "trainer.precision=bf16-true", "trainer.accelerator=gpu", "data=text", "data.path=x", "data.seq_len=4096",
        "model.vocab_size=32000")  # fmt: skip
#: Name and override of the dense strategies.
DENSE = (("ddp", "strategy=ddp"), ("fsdp", "strategy=fsdp"), ("zero-1", "strategy=deepspeed_1"),
         ("zero-2", "strategy=deepspeed_2"), ("zero-3", "strategy=deepspeed_3"))  # fmt: skip


def composed(overrides: list[str], gpus: int) -> dict[str, Any]:
    """Composes the configuration of a run on `gpus` devices in nodes of eight."""
    sizes = [f"devices={NODE}", f"trainer.num_nodes={gpus // NODE}", f"data.global_batch_size={SEQUENCES * gpus}"]
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        config = compose("config", overrides=[*BASE, *sizes, *overrides])
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def plans(gpus: int, rows: int, variants: list[list[str]]) -> Iterator[Plan]:
    """Yields the plan of each variant at one number of GPUs and rows."""
    keys = f"ffn.n_keys={math.isqrt(rows - 1) + 1}"
    # One model serves all variants: sharding and strategy change the plan, not the shapes.
    model = build_meta_model(composed([keys], NODE))
    for overrides in variants:
        yield make_plan(model, composed([keys, *overrides], gpus))


def gigabytes(size: int | None) -> str:
    """Formats bytes as GB, with enough digits for small values."""
    return "unknown" if size is None else f"{size / 1e9:,.1f}" if size >= 5e7 or size == 0 else f"{size / 1e9:.3f}"


def dense_table() -> None:
    """Prints the table of the dense model alone, by strategy."""
    print("| strategy | " + " | ".join(f"{n} GPUs, GB held / received" for n in GPUS) + " |")
    print("|---|" + "---|" * len(GPUS))
    columns = [list(plans(n, ROWS[0], [[option] for _, option in DENSE])) for n in GPUS]
    for i, (name, _) in enumerate(DENSE):
        cells = []
        for column in columns:
            held = vars(column[i].memory)
            dense = sum(held[key] for key in ("dense_weights", "dense_gradients", "dense_states", "gathered_weights"))
            cells.append(f"{gigabytes(dense)} / {gigabytes(column[i].traffic.dense)}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def ways(gpus: int) -> dict[str, list[str]]:
    """Returns the shardings of a table by name: none, or by columns or rows over a node, eight nodes, or all GPUs."""
    groups = sorted({size for size in (NODE, 64, gpus) if size <= gpus})
    split = {f"{shard}, {n}": [f"table.shard={shard}", f"table.group={n}"] for shard in ("dim", "row") for n in groups}
    return {"none": ["table.shard=none"], **split}


def sparse_table(gpus: int) -> None:
    """Prints the table of value tables and their reads, by size and sharding."""
    print("| shard, group | " + " | ".join(f"10^{round(math.log10(rows))} rows" for rows in ROWS) + " |")
    print("|---|" + "---|" * len(ROWS))
    variants = [["table/optimizer=row_adagrad", "strategy=fsdp", *options] for options in ways(gpus).values()]
    columns = [list(plans(gpus, rows, variants)) for rows in ROWS]
    for i, name in enumerate(ways(gpus)):
        cells = []
        for column in columns:
            held, sent = column[i].memory, column[i].traffic
            reads = (sent.table_forward or 0) + (sent.table_backward or 0)
            update = (sent.replicas or 0) + (sent.row_statistics or 0)
            gradient = (held.staged_reads or 0) + (held.merged_replicas or 0)
            parts = f"{gigabytes(held.table_part + held.table_states)} + {gigabytes(gradient)}"
            cells.append(f"{parts} / {gigabytes(reads)} + {gigabytes(update)}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Prints all tables."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("### Dense weights, gradients, states and gathered weights\n")
    dense_table()
    for gpus in GPUS:
        print(f"\n### Tables on {gpus} GPUs\n")
        sparse_table(gpus)


if __name__ == "__main__":
    main()
