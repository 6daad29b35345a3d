"""Records how the value tables are called, and compares it with what plugins state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from pkm_lightning.ffn import HasReads, TableRead
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer


@contextmanager
def recorded_reads(tokens: int) -> Iterator[list[TableRead]]:
    """Yields a list that collects the calls of value tables, as `TableRead`s of one of `tokens` tokens."""
    calls: list[TableRead] = []
    start, dot, gather = ValueTable.start, ValueTable.dot, ValueTable.gather

    def recorded_start(table: ValueTable, ids_TK: Tensor, weights_TK: Tensor, *groups: Any, **named: Any) -> Any:
        n_groups = named.get("n_groups", groups[1] if groups else None)
        per_token = ids_TK.shape[0] // tokens
        calls.append(TableRead(table=table, ids=ids_TK.shape[1], reads=per_token, groups=n_groups or 0))
        return start(table, ids_TK, weights_TK, *groups, **named)

    def recorded_dot(table: ValueTable, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        calls.append(TableRead(table=table, ids=ids_TK.shape[1], reads=ids_TK.shape[0] // tokens, dot=True))
        return dot(table, x_TD, ids_TK)

    def recorded_gather(table: ValueTable, ids_TK: Tensor) -> Tensor:
        per_read = ids_TK.shape[1]
        calls.append(
            TableRead(table=table, ids=per_read, reads=ids_TK.shape[0] // tokens, groups=per_read, gather=True)
        )
        return gather(table, ids_TK)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValueTable, "start", recorded_start)
        patch.setattr(ValueTable, "dot", recorded_dot)
        patch.setattr(ValueTable, "gather", recorded_gather)
        yield calls


def check_reads(model: Transformer, calls: list[TableRead]) -> None:
    """Checks that `reads()` of the plugins list the calls of one training forward, each as often as it is made."""
    listed = [read for _, _, plugin in model.plugins() if isinstance(plugin, HasReads) for read in plugin.reads()]
    assert Counter(listed) == Counter(calls), "reads() differs from the table calls of a training forward"
