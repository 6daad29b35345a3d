"""Memory that glibc keeps for the next step, counted by page faults, and large blocks that it returns."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from pkm_lightning.allocator import keep_freed_memory

PAGE = resource.getpagesize()


def is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False


def faults(size: int, *, times: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        bytearray(b"x") * size  # written, then freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not is_glibc(), reason="another C library")
def test_freed_blocks_are_used_again_and_large_ones_are_returned() -> None:
    assert keep_freed_memory({})
    size, large = 16 * 2**20, 128 * 2**20
    faults(size, times=1)
    assert faults(size, times=10) < size // PAGE
    resident = Path("/proc/self/statm")
    before = int(resident.read_text().split()[1])
    assert faults(large, times=2) >= 2 * large // PAGE // 512  # mapped anew, by pages of 4 KiB or of 2 MiB
    assert int(resident.read_text().split()[1]) - before < large // PAGE // 2


@pytest.mark.parametrize(
    "settings", [{"MALLOC_TRIM_THRESHOLD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}]
)
def test_settings_of_the_user_stay(settings: dict[str, str]) -> None:
    assert not keep_freed_memory(settings)
