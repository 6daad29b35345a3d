"""The package runs as a wheel (built through the sdist) and as a bare checkout, whole, with nothing foreign in it."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tree import ROOT, copy_of_the_tree, listed_files

SHIPPED = ("pkm_lightning", "callbacks", "configs")
LINKS = ("callbacks", "configs")

# Prints where the package lies, composes a configuration, and whether that imported an engine that it does not use.
COMPOSE = """
import sys
from importlib.util import find_spec
from pkm_lightning.cli.main import main
for name in ("pkm_lightning", "pkm_lightning.callbacks", "pkm_lightning.configs"):
    print(find_spec(name).origin)
try:
    main(["fit", "--cfg", "job"])
finally:
    print("deepspeed" in sys.modules)
"""

# Nothing but torch, what torch itself needs, and triton can be found.
BLOCKER = """
import importlib, importlib.util, pkgutil, sys
from importlib.machinery import PathFinder
FOUND = {"torch", "torchgen", "functorch", "triton", "pkm_lightning"} | set(sys.stdlib_module_names)
FOUND |= {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock", "typing_extensions"}  # torch's
class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        known = name.partition(".")[0] in FOUND or name.startswith("_sysconfigdata")
        return PathFinder.find_spec(name, path, target) if known else None
sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
import torch
for floor in ("pkm_lightning.ops", "pkm_lightning.memory"):
    package = importlib.import_module(floor)
    for module in pkgutil.walk_packages(package.__path__, floor + "."):
        if not module.name.endswith(".cpu") and ".numba_" not in module.name:  # those need numba
            importlib.import_module(module.name)
from pkm_lightning.ops import weighted_gather
print(weighted_gather(torch.ones(4, 2), torch.zeros(3, 5, dtype=torch.int64), torch.ones(3, 5)).tolist())
for top in ("callbacks", "configs"):
    print(importlib.util.find_spec("pkm_lightning." + top).origin)
"""


def run(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a Python process with `path` alone on PYTHONPATH; it writes no bytecode."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def succeed(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Returns what a process that succeeds prints."""
    done = run(*arguments, cwd=cwd, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with what a clone of the working tree would hold."""
    return copy_of_the_tree(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the sdist and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    succeed("-m", "build", "--no-isolation", "--outdir", str(out), str(checkout), cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    tree = {path for path in listed_files() if path.parts[0] in SHIPPED and not (ROOT / path).is_symlink()}
    expected = {str(path if path.parts[0] == "pkm_lightning" else "pkm_lightning" / path) for path in tree}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_and_sdist_carry_metadata_and_licences(wheel: Path, built: Path) -> None:
    from pkm_lightning import __version__

    archive = zipfile.ZipFile(wheel)
    info = f"pkm_lightning-{__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert (metadata["Version"], metadata["License-Expression"]) == (__version__, "Apache-2.0")
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(archive.namelist())
    assert b"pkm-lightning = pkm_lightning.__main__:run" in archive.read(f"{info}/entry_points.txt")
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "NOTICE", "README.md"} <= names


@pytest.mark.slow
def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    # A wheel of pure Python is installed by unpacking it, which costs less than pip.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    printed = succeed("-c", COMPOSE, cwd=tmp_path, path=site).splitlines()
    package = site / "pkm_lightning"
    assert printed[:3] == [str(package / folder / "__init__.py") for folder in ("", "callbacks", "configs")]
    assert any(line.strip().startswith("_target_: pkm_lightning.") for line in printed)
    assert printed[-1] == "False"


def test_bare_checkout_needs_torch_and_triton_only_for_ops_and_memory(checkout: Path) -> None:
    # Nothing is installed here: the two links make `callbacks` and `configs` parts of the package.
    gathered, *origins = succeed("-c", BLOCKER, cwd=checkout).splitlines()
    assert gathered == str([[5.0, 5.0]] * 3)
    assert origins == [str(checkout / "pkm_lightning" / name / "__init__.py") for name in LINKS]


def test_callbacks_have_one_name(checkout: Path) -> None:
    done = run("-c", "import callbacks", cwd=checkout)
    assert done.returncode != 0
    assert "import pkm_lightning.callbacks" in done.stderr


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative(name: str) -> None:
    assert os.readlink(ROOT / "pkm_lightning" / name) == f"../{name}"
