"""LoopRevival in a plain loop over a module that is no transformer: what is counted, what moves, what is refused.

Letters: B images, T positions, D model dimension, S sub-keys per half, N rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn

from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import NO_CONTEXT, PKM, FFNContext, MemoryPlus
from pkm_lightning.memory import TableOptimizer, ValueTable, row_learning_tables
from pkm_lightning.usage.loop_revival import LoopRevival

DIM, S = 8, 16


class TwoMaps(nn.Module):
    """Two memories on feature maps of other sizes, the second of which need not run."""

    def __init__(self, cls: Any = MemoryPlus, n_keys: int = S) -> None:
        super().__init__()
        arguments: dict[str, Any] = (
            {"qk_norm": True, "value_dim": None} if cls is MemoryPlus else {"query_norm": "none"}
        )
        tables = [ValueTable(rows=n_keys**2, dim=DIM, learning="rows") for _ in range(2)]
        self.first, self.second = (
            cls(dim=DIM, table=table, n_keys=n_keys, heads=2, knn=2, key_dim=8, **arguments) for table in tables
        )

    def forward(self, x_BTD: Tensor, both: bool = True, context: FFNContext = NO_CONTEXT) -> Tensor:
        x_BTD = x_BTD + self.first(x_BTD, context).y_BTD
        return x_BTD[:, ::2] + self.second(x_BTD[:, ::2]).y_BTD if both else x_BTD


def parts(model: nn.Module, **changes: Any) -> tuple[TableOptimizer, LoopRevival]:
    dense = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimizer = TableOptimizer(dense, row_learning_tables(model), rows="lazy_adam", lr=1e-3)
    return optimizer, LoopRevival(
        model, optimizer, **{"every_n_steps": 4, "dead_after": 2, "max_share": 0.5, **changes}
    )


def train(model: nn.Module, optimizer: TableOptimizer, revival: LoopRevival, steps: int, **options: Any) -> None:
    for _ in range(steps):
        model(torch.randn(1, 4, DIM), **options).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        revival.step()


def test_reads_in_training_are_counted_once_whatever_the_maps(caplog: pytest.LogCaptureFixture) -> None:
    model = TwoMaps()
    optimizer, revival = parts(model)
    train(model, optimizer, revival, 3)
    train(model, optimizer, revival, 2, both=False)
    model.eval()(torch.randn(1, 4, DIM))
    assert not caplog.messages
    layers = revival.report()["layers"]
    # 4 positions and 2 of them, 2 heads that read 2 slots each.
    assert [layers[f"layer{n}.slot"]["reads"] for n in (0, 1)] == [5 * 4 * 4, 3 * 2 * 4]
    assert revival.report()["step"] == 5
    revival.close()
    model.train()(torch.randn(1, 4, DIM))
    assert revival.report()["layers"]["layer0.slot"]["reads"] == 5 * 4 * 4


def test_padding_is_not_counted() -> None:
    model = TwoMaps()
    optimizer, revival = parts(model)
    valid_BT = torch.tensor([[True, True, False, True]])
    train(model, optimizer, revival, 1, both=False, context=FFNContext(NO_CONTEXT.input_ids_BT, valid_BT))
    assert revival.report()["layers"]["layer0.slot"]["reads"] == 3 * 4


def test_tokens_without_a_batch_count_by_head_too() -> None:
    model = TwoMaps()
    optimizer, revival = parts(model, source="queries")
    for _ in range(4):
        model(torch.randn(6, DIM), both=False).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        revival.step()
    assert revival.report()["layers"]["layer0.slot"]["reads"] == 4 * 6 * 4
    assert revival._counters.heads["layer0.slot"].heads == 2
    assert revival.revived["layer0.slot"] > 0


@pytest.mark.parametrize("cls", [MemoryPlus, PKM])
def test_dead_sub_keys_and_their_rows_change_and_live_ones_stay(cls: Any) -> None:
    model = TwoMaps(cls)
    optimizer, revival = parts(model, source="queries", every_n_steps=4)
    train(model, optimizer, revival, 3)
    keys, table = model.first.addressing.keys.keys, model.first.values.table
    model(torch.randn(1, 4, DIM)).square().mean().backward()
    optimizer.step()
    before_H2SP, before_NV = keys.detach().clone(), table.weight.detach().clone()
    revival.step()
    last_H2S = revival._counters.last_read_of_heads("layer0.slot").view(2, 2, S)
    dead_H2S, moved_H2S = 4 - last_H2S >= 2, (keys.detach() != before_H2SP).any(-1)
    assert 0 < int(moved_H2S.sum()) == revival.revived["layer0.slot"]
    assert not (moved_H2S & ~dead_H2S).any()
    assert not optimizer.state[keys]["exp_avg"][moved_H2S].any()
    changed_N = (table.weight.detach() != before_NV).any(1)
    assert 0 < int(changed_N.sum()) == revival.revived["table0"]
    assert not (changed_N & (4 - revival._counters.last_read("table0") < 2)).any()


def test_busy_changes_rows_only_and_nothing_changes_where_it_should_not() -> None:
    for revive in (True, False):
        model = TwoMaps()
        _, revival = parts(model, every_n_steps=1, dead_after=1)
        model(torch.randn(1, 4, DIM)).square().mean().backward()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        revival.step(revive=revive)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == (
            {f"{name}.values.reference.table.weight" for name in ("first", "second")} if revive else set()
        )


def test_a_resumed_loop_revives_what_the_other_one_does() -> None:
    states, rows = [], []
    for resumed in (False, True):
        torch.manual_seed(5)
        model = TwoMaps()
        optimizer, revival = parts(model, source="queries")
        train(model, optimizer, revival, 6)
        if resumed:
            saved, before = revival.state_dict(), revival
            before.close()
            revival = LoopRevival(model, optimizer, every_n_steps=4, dead_after=2, max_share=0.5, source="queries")
            revival.load_state_dict(saved)
        train(model, optimizer, revival, 6)
        states.append(revival.report())
        rows.append(model.first.values.table.weight.detach().clone())
    assert states[0] == states[1]
    assert torch.equal(rows[0], rows[1])
    with pytest.raises(CheckpointError, match="counts the reads of"):
        parts(TwoMaps(n_keys=4))[1].load_state_dict(revival.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every_n_steps": 0}, r"^every_n_steps=0 is out of range"),
        ({"source": "bussy"}, "^source='bussy' is not known; allowed: busy, queries"),
        ({"window": 1}, "^window=1 is out of range"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parts(TwoMaps(), **changes)


def test_models_without_what_could_be_revived_are_refused() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ConfigError, match="Linear has no memory layer whose slots could be revived"):
        LoopRevival(nn.Linear(2, 2), optimizer)
    frozen = PKM(
        dim=DIM, table=ValueTable(rows=4, dim=DIM, trainable=False), n_keys=2, heads=1, knn=1, key_dim=4,
        query_norm="none",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no table of this model learns"):
        LoopRevival(frozen, optimizer)


def test_the_defaults_are_those_of_the_callbacks() -> None:
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        callbacks = compose("config", overrides=["callbacks=[default,slot_revival]"]).callbacks
    defaults = LoopRevival.__init__.__kwdefaults__
    names = ("every_n_steps", "dead_after", "max_share", "source", "noise")
    assert {name: defaults[name] for name in names} == {name: callbacks.slot_revival[name] for name in names}
    assert defaults["window"] == callbacks.slot_usage.window
