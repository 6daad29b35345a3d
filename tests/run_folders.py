"""Run directories as `fit` leaves them, with chosen numbers: the files that reports read, without training."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

RELATIONS = ("birth_city", "debut_year")
TARGETS = {"Dense": "dense", "MoE": "moe", "MemoryPlus": "memory_plus"}


@dataclass
class FakeRun:
    """A finished run.

    Args:
        known: probability that a fact is known, which decides `exact`.
        flops: forward FLOPs per token of the trunk.
        seconds: length of the whole training.
        config, record: values that are merged over the defaults.
    """

    variant: str
    seed: int
    known: float = 0.5
    ffn: str = "MemoryPlus"
    flops: int = 1000
    seconds: float = 100.0
    n_facts: int = 40
    forms: tuple[str, ...] = ("paraphrase", "question", "control")
    data_seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def write(self, root: Path, folder: str | None = None) -> Path:
        """Writes it to ROOT/VARIANT/seed-N, or ROOT/FOLDER, and returns that."""
        place = root / (folder or f"{self.variant}/seed-{self.seed}")
        place.mkdir(parents=True)
        answers = self._answers()
        (place / "config.yaml").write_text(yaml.safe_dump(_merged(self._config(place), self.config), sort_keys=False))
        record = _merged(self._record(answers), self.record)
        (place / "run.json").write_text(json.dumps(record))
        self._write_csv(place / "metrics.csv", self._metrics(answers))
        if answers:
            self._write_csv(place / "recall.csv", answers)
        return place

    def _answers(self) -> list[dict[str, Any]]:
        facts = np.random.default_rng(self.data_seed)
        luck = np.random.default_rng([self.seed, round(self.known * 1e6), self.flops])
        rows = []
        for form in self.forms:
            for i in range(self.n_facts):
                chance = 0.0 if form == "control" else self.known
                exact = bool(luck.random() < chance)
                rows.append(
                    {
                        "form": form,
                        "relation": RELATIONS[i % len(RELATIONS)],
                        "decile": i % 10,
                        "prompt": f"subject {facts.integers(10**9)} {form}",
                        "truth": str(i),
                        "answer": str(i) if exact else "?",
                        "exact": int(exact),
                        "chosen": int(exact),
                        "bits": 0.5 if exact else 9.0,
                        "prior_bits": 8.0,
                    }
                )
        return rows

    def _config(self, place: Path) -> dict[str, Any]:
        return {
            "run_dir": str(place),
            "seed": self.seed,
            "match": "flops",
            "match_budget": None,
            "ffn": {
                "_target_": f"pkm_lightning.ffn.{self.ffn}",
                "_size_by_": {"flops": "hidden_dim"},
                "hidden_dim": self.flops,
            },
            "placement": {"layers": "all", "mode": "replace"},
            "table": {"learning": "rows"},
            "model": {"dim": 64, "n_layers": 3, "base_ffn": {"_target_": "pkm_lightning.ffn.Dense"}},
            "data": {"seed": self.data_seed, "order_seed": self.seed, "global_batch_size": 48},
            "optim": {"lr": 0.006},
            "trainer": {"max_steps": 100, "precision": "32-true", "val_check_interval": 10},
            "callbacks": {"metrics_csv": {"path": f"{place}/metrics.csv"}},
        }

    def _record(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        recall: dict[str, Any] = {}
        for form in self.forms:
            hits = [row["exact"] for row in answers if row["form"] == form]
            relations = {
                name: {
                    "recall": float(
                        np.mean([r["exact"] for r in answers if (r["form"], r["relation"]) == (form, name)])
                    )
                }
                for name in RELATIONS
            }
            deciles = {
                str(d): {
                    "recall": float(np.mean([r["exact"] for r in answers if (r["form"], r["decile"]) == (form, d)]))
                }
                for d in sorted({r["decile"] for r in answers})
            }
            recall[form] = {
                "n": len(hits),
                "recall": float(np.mean(hits)),
                "by_relation": relations,
                "by_decile": deciles,
            }
        flat = {f"test/recall_{form}": means["recall"] for form, means in recall.items()}
        return {
            "schema": 1,
            "status": "finished",
            "ffn": self.ffn,
            "seed": self.seed,
            "params": {"total": 40 * self.flops, "active": 4 * self.flops, "table": 20 * self.flops},
            "flops_per_token": {
                "train": 3 * (self.flops + 500),
                "decode": self.flops + 500,
                "trunk": {"train": 3 * self.flops, "decode": self.flops},
            },
            "bytes_per_token": {"train": 512, "decode": 16 * self.flops},
            "unknown_cost": [],
            "tokens": 1_000_000,
            "seconds": {"train": self.seconds, "processor": 2 * self.seconds, "total": self.seconds + 5},
            "tokens_per_second": 1_000_000 / self.seconds,
            "peak_memory_bytes": 900_000_000,
            "precision": "32-true",
            "device": "cpu",
            "world_size": 1,
            "threads": 1,
            "versions": {"torch": "2.13.0"},
            "commit": "c0ffee",
            "data": f"facts-{self.data_seed}",
            "facts": 1000,
            "best_validation": {"loss": 1 - self.known, "step": 100},
            "started": "2030-01-31T12:00:00+00:00",
            "metrics": {"test/loss": 1 - self.known, **flat, "recall": recall},
        }

    def _metrics(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        hits = [row["exact"] for row in answers if row["form"] == "paraphrase"]
        final = float(np.mean(hits)) if hits else self.known
        for step in range(10, 101, 10):
            done = step / 100
            row = {"step": step, "tokens": 10_000 * step, "seconds": self.seconds * done, "flops": 1}
            rows.append({**row, "train/loss": 2 - done, "train/usage/layer0.slot/used_percent": 50 + 40 * done,
                         "train/usage/layer0.slot/kl_count": 2 - done})  # fmt: skip
            rows.append({**row, "val/loss": 2 - done - 0.5 * self.known, "val/recall_paraphrase": final * done**2})
        return rows

    @staticmethod
    def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def ladder(seeds: tuple[int, ...] = (1, 2, 3), n_facts: int = 40) -> list[FakeRun]:
    """Returns dense models of four sizes, an MoE and Memory+, with recall that grows with compute and variant."""
    runs = []
    for seed in seeds:
        for factor, known in ((0.5, 0.2), (1, 0.4), (2, 0.6), (4, 0.8)):
            variant, flops = f"dense_{factor:g}x", round(1000 * factor)
            runs.append(FakeRun(variant, seed, known, "Dense", flops, 100 * factor**0.5, n_facts))
        runs.append(FakeRun("moe", seed, 0.55, "MoE", 1010, 150, n_facts))
        runs.append(FakeRun("memory_plus", seed, 0.9, "MemoryPlus", 990, 160, n_facts))
    return runs


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        own = merged.get(key)
        merged[key] = _merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged
