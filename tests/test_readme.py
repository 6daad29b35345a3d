"""Every command of the README runs: those of the package really, at a small size; those of make as far as `make -n`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from processes import finish, start
from small import SMALL_RUN, Run
from tree import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]
OURS = [c for c in COMMANDS if c.startswith("python -m pkm_lightning ")]
#: Without several processes, sweeps and large models, which take most of the time and leave nothing to later commands.
QUICK = [c for c in OURS if not any(word in c for word in ("strategy=", "model=", "match=", "fit -m "))]
#: Sizes of what the commands train; a command's own overrides come after them.
FACTS = [o for o in SMALL_RUN if o.startswith("data.")]
SHORT = {"trainer.max_steps": 4, "trainer.val_check_interval": 4, "callbacks.step_checkpoint.every_n_steps": 4}
RUN = [o for o in SMALL_RUN if not o.startswith("data.") and o != "logger=none" and o.split("=")[0] not in SHORT]
RUN += [f"{name}={value}" for name, value in SHORT.items()]
TEXTS = ["data.vocab_size=270", "data.seq_len=16", "data.global_batch_size=2"]


def furnish(folder: Path) -> None:
    """Puts there what the commands name: the README's own FFN, a config folder, texts, answers, prompts."""
    (folder / "my_ffn.py").write_text(re.findall(r"```python\n(.*?)```", README, re.S)[0])
    (folder / "my_configs" / "ffn").mkdir(parents=True)
    (folder / "my_configs" / "ffn" / "mine.yaml").write_text("_target_: my_ffn.MyFFN\n")
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    records = [{"prompt": f"{i} and one is", "answer": str(i + 1)} for i in range(60)]
    (folder / "my_answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "prompts.txt").write_text("The capital of France is\n")


def test_the_readme_shows_all_verbs() -> None:
    assert {shlex.split(command)[3] for command in OURS} >= {"fit", "compare", "test", "predict", "info"}
    assert len(COMMANDS) == len(OURS) + len([c for c in COMMANDS if c.startswith("make")])


def small_version(command: str) -> list[str]:
    """The command's verb and arguments with the sizes of the small run; what else it sets stays as it is."""
    verb, *arguments = shlex.split(command)[3:]
    if verb == "compare":
        return [
            verb,
            *[a for a in arguments if not a.startswith("seeds=")],
            "seeds=1",
            "report.resamples=100",
            *RUN,
            *FACTS,
        ]
    if verb != "fit":
        return [verb, *arguments]
    named = {argument.split("=")[0] for argument in arguments}
    kept = [a for a in arguments if not a.startswith("trainer.max_steps=")]
    sizes = [*RUN, *(TEXTS if {"data=text", "data=jsonl"} & set(arguments) else FACTS)]
    flags = [a for a in kept if a.startswith("-")]
    return [verb, *flags, *[s for s in sizes if s.lstrip("~").split("=")[0] not in named - {"trainer.max_steps"}],
            *[a for a in kept if a not in flags]]  # fmt: skip


@pytest.mark.parametrize("commands", [QUICK, pytest.param(OURS, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_every_command_of_the_package_runs(cli: Run, tmp_path: Path, commands: list[str]) -> None:
    """In order and in one place, since later commands use what earlier ones leave."""
    furnish(tmp_path)
    for command in commands:
        arguments = small_version(command)
        spread = any(argument.startswith("strategy=") for argument in arguments)
        if spread and arguments[0] == "fit":  # starts its other ranks by running the program again
            finish(start(*arguments, cwd=tmp_path))
        else:
            shown = cli(*arguments)
            assert shown.code == 0, f"{command}\n{shown.err}"
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert len(targets) >= 8
    assert all(re.search(rf"^  {target} +\S", shown, re.M) for target in targets)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_a_make_target_exists(command: str) -> None:
    subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_make_fit_from_a_fresh_clone(tmp_path: Path) -> None:
    """The whole promise: install, train on real facts, end with answers that are mostly right."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    done = subprocess.run(["make", "fit"], cwd=tmp_path / "clone", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "clone" / "runs").rglob("run.json")
    record = json.loads(file.read_text())
    assert record["status"] == "finished"
    assert record["metrics"]["recall"]["paraphrase"]["recall"] > 0.7
    assert record["metrics"]["recall"]["control"]["recall"] < 0.05
    assert record["peak_memory_bytes"] < 4e9
    second = subprocess.run(["make", "setup"], cwd=tmp_path / "clone", capture_output=True, text=True, check=True)
    assert "pip" not in second.stdout
