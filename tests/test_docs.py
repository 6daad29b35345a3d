"""The commands of docs/many-nodes.md run, two nodes of two ranks on this machine; its SLURM script says the same."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launches import end, free_port, torchrun
from small import SMALL_RUN, Run
from tree import ROOT

PAGE = (ROOT / "docs" / "many-nodes.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
TORCHRUN = [line for block in BLOCKS for line in block.splitlines() if line.startswith("torchrun ")]
(SCRIPT,) = (block for block in BLOCKS if "#SBATCH" in block)


def overrides(command: str) -> list[str]:
    """What follows the verb."""
    words = shlex.split(command)
    return words[words.index("fit") + 1 :]


@pytest.mark.slow
def test_the_torchrun_commands_train_on_two_nodes_of_two_ranks(tmp_path: Path) -> None:
    assert len(TORCHRUN) == 2
    port, agents = free_port(), []
    for command in TORCHRUN:
        small = command.replace("--nproc-per-node=8", "--nproc-per-node=2").replace("devices=8", "devices=2")
        small = small.replace("node0", "127.0.0.1").replace("29500", str(port)).replace("/shared/runs/", "")
        words = shlex.split(small)
        module = words.index("-m")
        agents.append(torchrun(*words[1:module], command=[*words[module:], *SMALL_RUN], cwd=tmp_path))
    ended = end(agents)
    assert [code for code, _ in ended] == [0, 0], ended
    record = json.loads((tmp_path / "big" / "run.json").read_text())
    assert (record["status"], record["world_size"]) == ("finished", 4)


def test_the_slurm_script_starts_what_torchrun_starts(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(SCRIPT)
    subprocess.run(["bash", "-n", str(script)], check=True)
    (command,) = (line for line in SCRIPT.splitlines() if line.startswith("srun "))
    assert all(overrides(command) == overrides(other) for other in TORCHRUN)
    for option, key in (("--nodes", "num_nodes"), ("--ntasks-per-node", "devices"), ("--gpus-per-node", "devices")):
        found = re.search(rf"^#SBATCH {option}=(\d+)$", SCRIPT, re.M)
        assert found
        assert f"trainer.{key}={found.group(1)}" in overrides(command)


WATCHING = (ROOT / "docs" / "watching.md").read_text()
WATCHED = [line for block in re.findall(r"```bash\n(.*?)```", WATCHING, re.S) for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("command", WATCHED)
def test_the_commands_of_watching_run(cli: Run, command: str) -> None:
    shown = cli("fit", *SMALL_RUN, *overrides(command))
    assert shown.code == 0, shown.err


COMPARING = (ROOT / "docs" / "comparing.md").read_text()


@pytest.mark.slow
def test_the_commands_of_comparing_run(cli: Run, tmp_path: Path) -> None:
    """In one place, since the last one reports on what the others leave."""
    commands = [line for block in re.findall(r"```bash\n(.*?)```", COMPARING, re.S) for line in block.splitlines()]
    # PEER finds no size for equal FLOPs among very few keys.
    small = [o for o in SMALL_RUN if not o.startswith(("~", "model.memory.n_keys="))]
    for command in commands:
        verb, *own = shlex.split(command)[3:]
        sizes = ["seeds=1", "lr_sweep=null", "jobs=2", *small] if verb == "compare" else []
        shown = cli(verb, *[o for o in own if not o.startswith("seeds=")], *sizes, "report.resamples=100")
        assert shown.code == 0, f"{command}\n{shown.err}"
    assert "moe_2" in (tmp_path / "runs" / "all" / "report.md").read_text()


@pytest.mark.parametrize("page", [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing
