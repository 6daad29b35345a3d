"""The address at which the ranks of a run meet."""

from __future__ import annotations

import os
import socket

from lightning.fabric.plugins.environments import ClusterEnvironment

from pkm_lightning.errors import ConfigError


def check_meeting_point(environment: ClusterEnvironment) -> None:
    """Refuses an address and port at which rank 0, this process, cannot await the others: torch would try for minutes.

    Raises:
        ConfigError: the port is in use or reserved, or the address has no meaning.
    """
    address, port = environment.main_address, environment.main_port
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={address} is not known to this machine ({error.strerror}); set the environment variable to "
            "the name of the machine of rank 0, or unset it where all ranks run on this one."
        ) from None
    # torchrun waits at the port itself, and its ranks find it there.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(
            f"MASTER_PORT={port} cannot be used on this machine ({os.strerror(error.errno or 0)}); set the environment "
            "variable to a free port, the same for all ranks, or unset it where all ranks run on this one."
        ) from None
