"""Steps between logs read nothing back from the device for the sake of the callbacks that watch.

On a CPU reading costs nothing, so it is counted: operators that need a value on the host, methods that hand one out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training.fits import loader

from pkm_lightning.build.run import make_callbacks
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.training import LanguageModule

_READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2"}
_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.where = 0, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _READING:
            self.note(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        self.count += 1
        self.where.append(what)

    @contextmanager
    def methods_too(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in _METHODS:
                patch.setattr(Tensor, name, self._counting(name, getattr(Tensor, name)))
            # On a CPU only the argument distinguishes a copy to the host from one to the device.
            patch.setattr(Tensor, "to", self._counting("to", Tensor.to, lambda given: "cpu" in given))
            yield

    def _counting(self, name: str, method: Any, counts: Any = lambda _: True) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if counts([given for given in (*args[1:], *kwargs.values()) if isinstance(given, str)]):
                self.note(name)
            return method(*args, **kwargs)

        return counted


class CountSteps(L.Callback):
    """Reads up to the end of every step."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.totals = reads, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, *_: Any) -> None:
        self.totals.append(self.reads.count)


def reads_per_step(overrides: list[str], watching: bool, path: Path, *policies: str) -> list[int]:
    """Returns the reads in each step but the first and the last; none of them logs."""
    given = jobs.settings(*overrides, "strategy=single", "trainer.log_every_n_steps=100", steps=7)
    reads = Reads()
    count = CountSteps(reads)
    callbacks: list[L.Callback] = [count]
    if watching:
        composed = jobs.config(*overrides, *policies, f"run_dir={path}")["callbacks"]
        composed = {n: c for n, c in composed.items() if n not in ("progress_bar", "recall", "samples")}
        callbacks = [*make_callbacks({**given, "callbacks": composed}), count]
    trainer = make_trainer(given, callbacks=callbacks, loggers=[])
    module = LanguageModule(given)
    with reads, reads.methods_too():
        trainer.fit(module, loader(jobs.batches(7)))
    return [later - earlier for earlier, later in zip(count.totals[:-1], count.totals[1:-1], strict=False)]


@pytest.mark.parametrize("ffn", ["ultramem", "moe_expert_choice"])
def test_watching_reads_nothing_in_a_step(tmp_path: Path, ffn: str) -> None:
    """Covers all forms of a trace: ids of slots, of virtual slots, and experts that choose tokens."""
    overrides = [f"ffn={ffn}"]
    unwatched = reads_per_step(overrides, False, tmp_path)
    assert reads_per_step(overrides, True, tmp_path) == unwatched
    if ffn == "ultramem":
        policy = "callbacks.instability.policies.loss_not_finite=skip"
        waiting = reads_per_step(overrides, True, tmp_path, policy)
        assert [more - few for more, few in zip(waiting, unwatched, strict=True)] == [1] * 5


def test_the_count_sees_every_way_to_read() -> None:
    reads, value = Reads(), torch.ones(1)
    with reads, reads.methods_too():
        ways = (value.item, value.tolist, lambda: bool(value), lambda: float(value), value.nonzero, value.cpu)
        for read in (*ways, lambda: value.to("cpu", copy=True)):
            before = reads.count
            read()
            assert reads.count > before, read
