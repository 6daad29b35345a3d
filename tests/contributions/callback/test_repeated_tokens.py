"""A callback made as CONTRIBUTING describes: one Python file, one YAML, one test, and nothing of the package edited.

Instead of lying in `callbacks/` and `configs/callbacks/`, its files are put on the search paths of both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import usage_jobs as jobs
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import pkm_lightning.callbacks
from pkm_lightning.build.run import make_callbacks
from pkm_lightning.callbacks.base import ChecksConfig
from pkm_lightning.errors import ConfigError

HERE, DENSE = Path(__file__).parent, ["ffn=dense", "strategy=single"]
MODULE = "pkm_lightning.callbacks.repeated_tokens"


@pytest.fixture(autouse=True)
def _dropped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pkm_lightning.callbacks, "__path__", [*pkm_lightning.callbacks.__path__, str(HERE)])
    yield
    sys.modules.pop(MODULE, None)
    vars(pkm_lightning.callbacks).pop("repeated_tokens", None)


def configured(*overrides: str) -> dict[str, Any]:
    """Returns the package's configuration with the callback switched on."""
    search = f"hydra.searchpath=[file://{HERE / 'configs'}]"
    with initialize_config_module("pkm_lightning.configs", version_base=None):
        composed = compose("config", overrides=[search, "callbacks=[default,repeated_tokens]", *overrides])
    config: Any = OmegaConf.to_container(composed, resolve=True)
    return dict(config)


def made(*overrides: str) -> Any:
    """Returns the callback that the configuration describes, after its check of it."""
    config = configured(*overrides)
    (callback,) = [c for c in make_callbacks(config) if type(c).__name__ == "RepeatedTokens"]
    assert isinstance(callback, ChecksConfig)
    callback.check(config)
    return callback


def share(batches: list[dict[str, torch.Tensor]], distance: int) -> float:
    """Returns the share of repeated tokens in the batches, padding excepted."""
    sequences = [
        ids[: int(valid.sum())].tolist()
        for batch in batches
        for ids, valid in zip(batch["input_ids"], batch["valid"], strict=True)
    ]
    repeated = [token in ids[max(0, t - distance) : t] for ids in sequences for t, token in enumerate(ids)]
    return sum(repeated) / len(repeated)


def test_it_is_found_by_its_name_and_imports_nothing_else() -> None:
    before = set(sys.modules)
    assert MODULE not in before
    assert pkm_lightning.callbacks.RepeatedTokens.__module__ == MODULE
    assert {name for name in set(sys.modules) - before if "callbacks" in name} == {MODULE}


def test_it_logs_the_share_also_in_a_resumed_run(tmp_path: Path) -> None:
    module, _, seen = jobs.fit(DENSE, 4, [made()])
    data = jobs.batches(4)
    logged = [step["train/repeated_tokens"] for step in seen]
    assert logged == pytest.approx([share(data[: step + 1], 4) for step in range(4)], rel=1e-6)
    assert logged[-1] > 0
    assert module.watch.watchers == []
    path = str(tmp_path / "saved.ckpt")
    jobs.fit(DENSE, 2, [made()])[1].save_checkpoint(path)
    resumed = jobs.fit(DENSE, 4, [made()], 2, ckpt_path=path)[2]
    assert [step["train/repeated_tokens"] for step in resumed] == logged[2:]


def test_it_logs_in_log_steps_only_and_refuses_what_cannot_work() -> None:
    seen = jobs.fit([*DENSE, "trainer.log_every_n_steps=3"], 2, [made()])[2]
    # The last step logs too, whatever the interval.
    assert ["train/repeated_tokens" in step for step in seen] == [False, True]
    with pytest.raises(ConfigError, match=r"callbacks\.repeated_tokens\.distance=0 is out of range"):
        made("callbacks.repeated_tokens.distance=0")
    with pytest.raises(ConfigError, match=r"distance=9999 reaches beyond data\.seq_len=\d+; set a smaller distance"):
        made("callbacks.repeated_tokens.distance=9999")
