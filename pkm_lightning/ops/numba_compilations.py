"""Clock of numba's compilations: see `pkm_lightning.ops.compile_clock`.

Only modules of the numba kernels import this one, so that the package can be imported without numba.
"""

from __future__ import annotations

from functools import cache

from numba.core import event

from pkm_lightning.ops.compile_clock import begin, end


class _Compilations(event.Listener):
    def on_start(self, event: object) -> None:
        begin()

    def on_end(self, event: object) -> None:
        end()


@cache
def time_compilations() -> None:
    """Times all compilations of this process from the first call on."""
    event.register("numba:compile", _Compilations())
