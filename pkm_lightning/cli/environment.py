"""Variables by which a launcher numbers the ranks, checked before a library reads them while it is imported."""

from __future__ import annotations

from collections.abc import Mapping

from pkm_lightning.errors import ConfigError

_LARGEST_PORT = 65535
_NUMBERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_NTASKS",
)


def check_rank_variables(environment: Mapping[str, str]) -> None:
    """Refuses numbers of ranks and a port that are none, and ranks beyond their number.

    Raises:
        ConfigError: naming the variable, its value and what is allowed.
    """
    for name in _NUMBERS:
        value = environment.get(name)
        if value is not None and not _is_number(value):
            raise ConfigError(
                f"the environment variable {name}={value!r} is not a whole number of 0 or more; unset it, or start the "
                "ranks with torchrun or srun, which set it."
            )
    for name, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if name in environment and count in environment and int(environment[name]) >= int(environment[count]):
            raise ConfigError(
                f"the environment variables {name}={environment[name]} and {count}={environment[count]} contradict "
                f"each other: ranks are numbered from 0 to {count} - 1; unset both, or start the ranks with torchrun "
                "or srun."
            )
    port = environment.get("MASTER_PORT")
    if port is not None and not (_is_number(port) and 1 <= int(port) <= _LARGEST_PORT):
        raise ConfigError(
            f"the environment variable MASTER_PORT={port!r} is not a port; allowed: 1 to {_LARGEST_PORT}. Without it a "
            "free one is chosen for the ranks of one machine."
        )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
