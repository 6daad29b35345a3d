"""For every test: shapes checked, torch seeded, threads limited, one data cache; the command line as a fixture."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import shape_checks

shape_checks.install()

import pytest  # noqa: E402  the checks come before anything could import the package
import torch  # noqa: E402

# Without a GPU the Triton kernels run in the interpreter. It must be chosen before Lightning imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from rank_group import Groups, groups  # noqa: E402
from small import Outcome, Run  # noqa: E402

from pkm_lightning.cli.main import main  # noqa: E402

# Threads that fight for shared cores cost far more than they bring; the processes that tests start inherit the limit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False here")


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One data cache for all workers and for the processes that tests start."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data-cache"
    before = os.environ.get("PKM_LIGHTNING_CACHE")
    os.environ["PKM_LIGHTNING_CACHE"] = str(folder)
    yield
    if before is None:
        del os.environ["PKM_LIGHTNING_CACHE"]
    else:
        os.environ["PKM_LIGHTNING_CACHE"] = before


@pytest.fixture(scope="session")
def ranks() -> Iterator[Groups]:
    """`ranks(2).run(job, ...)`: one spawned group a size for all tests, which run on one worker."""
    with groups() as made:
        yield made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """`cli("fit", "seed=1")`, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    argv, handlers = list(sys.argv), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        printed = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    yield run
    sys.argv = argv
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    GlobalHydra.instance().clear()
    assert {s: signal.getsignal(s) for s in handlers} == handlers, "signal handlers must be put back"
