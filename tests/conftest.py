"""Set-up of all tests: shape checks, seed, threads, data cache; fixtures for groups of ranks and the command line."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import compositions
import shape_checks

gc.disable()  # until all is imported and collected, which takes a million objects that stay
shape_checks.install()
compositions.keep_compositions()

import hypothesis  # noqa: E402  the checks come before anything could import the package
import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU the Triton kernels run in the interpreter. It must be chosen before Lightning imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from compile_once import compile_in_turn  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from logged_figures import leave_on_the_cpu  # noqa: E402
from rank_group import Groups, groups  # noqa: E402
from small import Outcome, Run  # noqa: E402

from pkm_lightning.cli.main import main  # noqa: E402
from pkm_lightning.data.facts import subjects  # noqa: E402

# With several workers on few cores, more threads per process are slower. Processes that tests start inherit the limit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
compile_in_turn()
leave_on_the_cpu()
torch.set_num_threads(1)
# Without a device torch keeps each seed for it, with the stack of the call: a millisecond per test.
if not torch.accelerator.is_available():
    for module in (torch.cuda.random, torch.xpu.random, torch.mtia):
        module._lazy_call = lambda *_, **__: None
# What tests write need not survive a power cut.
os.fsync = lambda descriptor: None
# A second per data set with facts, of which tests build some dozens.
subjects.LOADERS.update({domain: functools.cache(load) for domain, load in subjects.LOADERS.items()})
# How long an example takes depends on what else runs on the machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# A shell without job control starts a suite in the background with SIGINT ignored, which all processes would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False here")


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Shares one data cache between all workers and the processes that tests start."""
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
    """Provides groups of ranks, one per size for all tests: `ranks(2).run(job, ...)`."""
    with groups() as by_size:
        yield by_size


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Tests that use `ranks` run on one xdist worker, so that only that worker starts the groups.
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is there by now need not be searched again and again, nor by pytest at the end
    atexit.register(gc.unfreeze)
    gc.set_threshold(700, 10, 40)  # the last is 10: full collections took a twentieth of the time
    gc.enable()


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Provides `cli("fit", "seed=1")`, which runs a command in this process and in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    argv, handlers = list(sys.argv), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    imported = set(sys.modules)

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()  # drop what was printed before
        with pytest.raises(SystemExit) as exit_info:
            main(list(arguments))
        output = capfd.readouterr()
        return Outcome(int(exit_info.value.code or 0), output.out, output.err)

    yield run
    sys.argv = argv
    # Plugins that the test has written to its directory must not be visible to the next test.
    for name in sys.modules.keys() - imported:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    GlobalHydra.instance().clear()
    assert {s: signal.getsignal(s) for s in handlers} == handlers, "the command must restore the signal handlers"
