"""The content of run.json: what a run was, what it cost and what it reached. Reports read it without building a model.

| key | meaning |
|---|---|
| schema | version of this table |
| status | running, finished, failed (with `reason`), interrupted, pruned (with `reason`: a sweep ended it early) |
| ffn, seed, precision, world_size, threads, device | what ran where |
| variants | of `ffn` and each entry of `extra_ffns`, by name, what `pkm_lightning.build.variant_figures` returns |
| params | total, active (parameters of one token's arithmetic), table |
| flops_per_token | train and decode, of the model and of its trunk, at `context` tokens in attention [1] |
| bytes_per_token | train (the rows that each token moves) and decode (parameters read at batch 1) |
| unknown_cost | plugins that state no cost; the figures above exclude them |
| tokens, seconds, tokens_per_second | real input tokens, {train, processor [2], total} over all sittings |
| throughput | the last figures of `pkm_lightning.callbacks.Throughput`, without checkpoints' time; None without it |
| peak_memory_bytes | of the process, or of the device where it is a GPU |
| versions, commit | of the libraries; of the working directory, if it is this package's checkout |
| data, facts | fingerprint of the data set; number of facts that training shows, where the data module has `n_facts` |
| trained_bytes | of the parameters that may learn, in the dtype in which they are trained |
| init_from | path and digest of the weights that the run started from; absent if they were random |
| loggers | ids of the runs in Weights & Biases and MLflow, by the loggers' names; absent without such loggers |
| started, ended | UTC, ISO 8601 |
| best_validation | lowest loss of the validations in training and its step; None without one |
| objective | name, mode, value and step of the figure that a sweep optimises, of the last validation; absent without |
| own_test | whether the test read other data than validations; None where that is unknown |
| metrics | of the final test; recall by form, relation and decile under `recall`; with an objective `val/...` too |
| evaluation | by task of lm-evaluation-harness: step, n, num_fewshot, figures; only after `evaluate` |

[1] The unembedding counts at every position; training computes it only where there is a target.
[2] Those that the processors worked for training, in all threads, but not in processes that load data; None where a
part of the run had several processes or a GPU.

`start_record` has what is known before training, `pkm_lightning.callbacks.RunRecord` collects the rest, and `fit` adds
how the run ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pkm_lightning.model import ModelCost
from pkm_lightning.training.machine import commit, now, versions

SCHEMA = 1


def start_record(
    config: dict[str, Any], cost: ModelCost, of_variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the record at the start of a run, with `"status": "running"`.

    Args:
        config: the resolved configuration.
        cost: of its model.
        of_variants: of each variant, as `variant_figures` returns it.
    """
    return {
        "schema": SCHEMA,
        "status": "running",
        "ffn": " + ".join(figures["class"] for figures in of_variants.values()),
        "seed": config["seed"],
        "variants": of_variants,
        "params": {"total": cost.params_total, "active": cost.params_active, "table": cost.table_params},
        "flops_per_token": {
            "train": cost.train_flops,
            "decode": cost.model_flops,
            "context": cost.context,
            "trunk": {"train": 3 * cost.trunk_train_flops, "decode": cost.trunk_flops},
        },
        "bytes_per_token": {"train": cost.train_bytes, "decode": cost.decode_bytes},
        "unknown_cost": list(cost.unknown),
        "tokens": 0,
        "seconds": {"train": 0.0, "total": 0.0},
        "tokens_per_second": None,
        "throughput": None,
        "peak_memory_bytes": None,
        "device": None,
        "versions": versions(),
        "commit": commit(),
        "precision": str(config["trainer"]["precision"]),
        "world_size": None,
        "threads": torch.get_num_threads(),
        "data": None,
        "facts": None,
        "own_test": None,
        "started": now(),
        "ended": None,
        "best_validation": None,
        "metrics": {},
    }
