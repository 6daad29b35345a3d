"""The plan of a run on several devices as `info` shows it: keys for programs, rows for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from pkm_lightning.capacity import check_memory

if TYPE_CHECKING:
    from pkm_lightning.build.run import ResolvedRun
    from pkm_lightning.capacity import Plan

_HELD = {
    "dense_weights": "  dense weights, embedding included",
    "dense_gradients": "  dense gradients",
    "dense_states": "  dense optimizer states",
    "gathered_weights": "  weights gathered temporarily",
    "activations": "  activations of a micro-batch",
    "logits": "  logits of a micro-batch and their gradients",
    "table_part": "  part of the tables",
    "table_gradients": "  gradient of that part",
    "table_states": "  optimizer states of that part",
    "staged_reads": "  staged reads of a step",
    "merged_replicas": "  merged gradients of the replicas",
    "usage_counters": "  counters of slot usage",
}
_RECEIVED = {
    "dense": "  dense weights and gradients",
    "table_forward": "  table, forward",
    "table_backward": "  table, backward",
    "replicas": "  table gradients between replicas, uniform reads",
    "row_statistics": "  sums over whole rows, uniform reads",
}


def describe_plan(resolved: ResolvedRun) -> dict[str, Any]:
    """Returns the key `plan` of `info`'s figures; empty for one process, unless `device_memory` is set.

    Raises:
        ConfigError: it needs more memory than `device_memory`, or than the CUDA device has.
    """
    plan, config = resolved.plan, resolved.config
    alone = plan.setting.strategy == "single" and plan.setting.world == 1
    limit = _device_memory(config)
    if alone and config.get("device_memory") is None:
        return {}
    if limit is not None:
        check_memory(plan, limit, resolved.model, config)
    return {"plan": _as_keys(plan, limit)}


def _device_memory(config: dict[str, Any]) -> float | None:
    if config.get("device_memory") is not None:
        return float(config["device_memory"]) * 1e9
    if config["trainer"]["accelerator"] == "cpu" or not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory)


def _as_keys(plan: Plan, limit: float | None) -> dict[str, Any]:
    setting = plan.setting
    return {
        "devices": setting.world,
        "strategy": setting.strategy,
        "table": {"shard": setting.shard, "group": setting.members, "copies": setting.replicas},
        "tokens_per_device_and_step": None if setting.tokens is None else setting.tokens * setting.accumulate,
        "memory_per_device": {**asdict(plan.memory), "total": plan.memory_total},
        "host_memory_per_device": {**asdict(plan.host), "total": plan.host_total},
        "device_memory": limit,
        "device_memory_left": None if limit is None else limit - plan.memory_total,
        "received_per_step": {**asdict(plan.traffic), "total": plan.traffic_total},
        "unknown_reads": list(plan.unknown),
    }


def plan_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns label and value of each figure under the key `plan`."""
    table, held, host = plan["table"], plan["memory_per_device"], plan["host_memory_per_device"]
    split = "whole on each" if table["group"] == 1 else f"by {table['shard']} over {table['group']}"
    at_least, at_most = (", at least", ", at most") if None in held.values() else ("", "")
    tokens, tables = plan["tokens_per_device_and_step"], held["table_part"] + host["table_part"]
    rows = [
        ("devices, strategy", f"{plan['devices']}, {plan['strategy'].replace('zero', 'deepspeed_')}"),
        *([("tables", f"{split}, {table['copies']} cop{'y' if table['copies'] == 1 else 'ies'}")] if tables else []),
        ("tokens per device and step", "unknown" if tokens is None else f"{tokens:,}"),
        (f"memory per device{at_least}", _amount(held["total"])),
        *((label, _amount(held[key])) for key, label in _HELD.items() if held[key] != 0),
    ]
    if plan["device_memory"] is not None:
        left = f"  left of {_amount(round(plan['device_memory'])).partition(' (')[0]}{at_most}"
        rows.append((left, _amount(round(plan["device_memory_left"]))))
    if host["total"]:
        rows.append(("host memory per device, for tables", _amount(host["total"])))
    received = plan["received_per_step"]
    if plan["devices"] > 1:
        rows.append(("received per device and step", _amount(received["total"])))
        rows += [(label, _amount(received[key])) for key, label in _RECEIVED.items() if received[key] != 0]
    if plan["unknown_reads"]:
        rows.append(("without the table reads of", ", ".join(plan["unknown_reads"])))
    return rows


def _amount(size: int | None) -> str:
    if size is None:
        return "unknown"
    rounded = f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
    return f"{rounded} ({size:,} bytes)"
