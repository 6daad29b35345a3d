"""Frozen parameters keep their values, and all others learn as if the frozen ones were constants."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import pytest
import torch
from rank_group import Groups
from tolerances import RANKS

from pkm_lightning.training import LanguageModule

PATTERNS = {
    "a part": "embedding*",
    "a table": "tables.*",
    "all but the table": "embedding*,unembedding*,blocks.*,norm*",
}
STEPS = 3


def frozen(name: str, what: str) -> bool:
    roots = {pattern.partition(".")[0].rstrip("*") for pattern in PATTERNS[what].split(",")}
    return name.removeprefix("model.").partition(".")[0] in roots


@functools.cache
def trained(what: str, learning: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Weights before and after, and the state of the optimizer."""
    given = jobs.settings(f"table.learning={learning}", f"optim.freeze=[{PATTERNS[what]}]", steps=STEPS)
    fresh = LanguageModule(copy.deepcopy(given))
    fresh.configure_model()
    module, trainer, _ = jobs.fit(given, STEPS)
    names = {name for name, _ in module.named_parameters()}
    before, after = ({n: v for n, v in m.state_dict().items() if n in names} for m in (fresh, module))
    return before, after, trainer.optimizers[0].state_dict()


@pytest.mark.parametrize("what", PATTERNS)
@pytest.mark.parametrize("learning", ["rows", "dense"])
def test_frozen_parameters_keep_their_values_and_have_no_state(what: str, learning: str) -> None:
    before, after, states = trained(what, learning)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if not frozen(name, what)}
    n_states = sum(len(group["params"]) for group in states["param_groups"])
    assert n_states == len(states["state"]) == len(changed)


@pytest.mark.parametrize(
    ("strategy", "what"),
    [
        ("ddp", "all but the table"),
        pytest.param("ddp", "a part", marks=pytest.mark.slow),
        *(
            pytest.param(strategy, what, marks=pytest.mark.slow)
            for strategy in ("fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
            for what in PATTERNS
            if not (strategy.startswith("deepspeed") and what == "all but the table")
        ),
    ],
)
def test_ranks_train_what_one_process_trains(ranks: Groups, tmp_path: Path, strategy: str, what: str) -> None:
    freeze = [f"optim.freeze=[{PATTERNS[what]}]", "ffn=memory_plus"]
    expected = jobs.train(["strategy=single", *freeze], STEPS)
    for losses in ranks(2).run(jobs.train, [f"strategy={strategy}", *freeze], STEPS):
        for one, several in zip(expected, losses, strict=True):
            assert several["train/loss"] == pytest.approx(one["train/loss"], rel=RANKS["loss"])
    path, again = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    ranks(2).run(jobs.train_and_save, [f"strategy={strategy}", *freeze], STEPS, str(path))
    ranks(2).run(jobs.resume_and_save, [f"strategy={strategy}", *freeze], STEPS, str(path), str(again))
    assert path.exists()
    assert again.exists()
