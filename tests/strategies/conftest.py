"""One spawned group of ranks a size for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_group import Groups, groups


@pytest.fixture(scope="session")
def ranks() -> Iterator[Groups]:
    """`ranks(2).run(job, ...)`."""
    with groups() as made:
        yield made
