"""Every command of README and docs/ runs or composes; links lead somewhere; SLURM starts what torchrun starts."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from launches import end, free_port, torchrun
from pages import OURS, PAGES, README, blocks, commands, compositions, furnish, of_the_package, small_version, words
from processes import finish, start
from small import SMALL_RUN, Run
from tree import ROOT, listed_files

from pkm_lightning.build.run import resolve
from pkm_lightning.cli.edit_words import ACTIONS
from pkm_lightning.cli.job import plain

NODES = ROOT / "docs" / "many-nodes.md"
TORCHRUN = [command for command in commands(NODES) if command.startswith("torchrun ")]
(SCRIPT,) = (block for block in blocks(NODES) if block.startswith("#!"))
SHOWN = {page: of_the_package(page) for page in PAGES}
(MINE,) = (command for command in SHOWN[ROOT / "docs" / "first-run.md"] if command.endswith(" fit run_dir=runs/mine"))
#: Different commands, whatever comment follows them.
COMMANDS = list({tuple(words(command)): command for shown in SHOWN.values() for command in shown}.values())
#: The quick test runs each verb that uses a run, and its kinds of data, once; the other commands it composes.
QUICK = re.compile(
    r"lightning ((test|generate|predict|chat) run_dir=runs/mine(?!.*(samples=|edits=))|"
    r"(predict|validate) .*mine\.safetensors (?!table)|export run_dir=runs/mine (file=mine\.|format)|"
    r"edit (|remove |list )run_dir=runs/mine(?!.*format)|inspect .*Paris.* mask_table|prepare .*out=prep/texts|"
    r"info data=text .*mine\.model|(fit|info) --config-dir|fit (finetune=sparse init_from|data=hf .*val_split))"
)
#: What needs what other commands write is only composed; test_prepare, test_mix, test_finetuning and others run it.
LATER = re.compile(r"data\.path=prepared/|path: prep/|table\.path=mine|replay_path=runs/")
QUICK_VERBS = (
    *("fit", "prepare", "info", "test", "validate", "predict", "generate", "chat", "inspect", "export", "edit"),
)
#: Pages whose programs use what their commands leave.
PROGRAMS = ("trained-models", "editing", "hugging-face", "inspecting")


def run_programs(page: Path) -> None:
    for program in blocks(page, "python"):
        exec(program, {})


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    kinds = (OURS, "torchrun ", "make ", "source .venv/bin/activate")
    assert [command for page in PAGES for command in commands(page) if not command.startswith(kinds)] == []


def run(cli: Run, command: str, *, silent: bool, cwd: Path) -> None:
    arguments = small_version(command, silent=silent)
    if arguments[0] == "fit" and any(argument.startswith("strategy=") for argument in arguments):
        finish(start(*arguments, cwd=cwd))  # starts its other ranks by running the program again
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who was\n")))  # for `chat`
        shown = cli(*arguments)
    assert shown.code == 0, f"{command}\n{shown.err}"


def test_commands_that_use_a_run_or_files_of_the_user_run(cli: Run, tmp_path: Path) -> None:
    # In one place, since later commands use what earlier ones leave.
    furnish(tmp_path)
    chosen = [command for command in COMMANDS if QUICK.search(command)]
    assert {words(command)[0] for command in chosen} == set(QUICK_VERBS)
    for command in [MINE, *chosen]:
        run(cli, command, silent=True, cwd=tmp_path)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    for page in PROGRAMS[:2]:
        run_programs(ROOT / "docs" / f"{page}.md")


def test_the_other_commands_compose_and_could_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composes every key and option; of `fit` in one process it checks the values as well."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    others = [command for command in COMMANDS if not QUICK.search(command)]
    later = [command for command in others if LATER.search(command)]
    at_once = compositions([*(command for command in others if command not in later), *TORCHRUN])
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        for kind, overrides in (*at_once, *compositions(later)):
            config = compose("config" if kind == "fit" else kind, overrides=overrides)
            if kind == "fit" and (kind, overrides) in at_once:
                resolve(plain(config), training=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, shown in SHOWN.items() if shown], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(cli: Run, tmp_path: Path, page: Path) -> None:
    furnish(tmp_path)
    # README repeats commands of the pages, which run there.
    others = [words(command) for other, shown in SHOWN.items() for command in shown if other != page == README]
    chosen = [command for command in SHOWN[page] if words(command) not in others]
    if any("runs/mine" in command for command in chosen) and MINE not in chosen:
        run(cli, MINE, silent=False, cwd=tmp_path)
    for command in chosen:
        run(cli, command, silent=False, cwd=tmp_path)
    if page.stem in PROGRAMS:
        run_programs(page)
    if page.stem == "comparing":  # its last command reports on what the others leave
        assert "moe_2" in (tmp_path / "runs" / "all" / "report.md").read_text()


@pytest.mark.slow
def test_the_torchrun_commands_train_on_two_nodes_of_two_ranks(tmp_path: Path) -> None:
    assert len(TORCHRUN) == 2
    port, agents = free_port(), []
    for command in TORCHRUN:
        small = command.replace("--nproc-per-node=8", "--nproc-per-node=2").replace("devices=8", "devices=2")
        small = small.replace("node0", "127.0.0.1").replace("29500", str(port)).replace("/shared/runs/", "")
        arguments = shlex.split(small)
        module = arguments.index("-m")
        agents.append(torchrun(*arguments[1:module], command=[*arguments[module:], *SMALL_RUN], cwd=tmp_path))
    ended = end(agents)
    assert [code for code, _ in ended] == [0, 0], ended
    record = json.loads((tmp_path / "big" / "run.json").read_text())
    assert (record["status"], record["world_size"]) == ("finished", 4)


def test_the_slurm_script_starts_what_torchrun_starts(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(SCRIPT)
    subprocess.run(["bash", "-n", str(script)], check=True)
    (command,) = (line for line in SCRIPT.splitlines() if line.startswith("srun "))
    assert all(words(command) == words(other) for other in TORCHRUN)
    for option, key in (("--nodes", "num_nodes"), ("--ntasks-per-node", "devices"), ("--gpus-per-node", "devices")):
        value = re.search(rf"^#SBATCH {option}=(\d+)$", SCRIPT, re.M)
        assert value
        assert f"trainer.{key}={value.group(1)}" in words(command)


def headings(page: Path) -> set[str]:
    """Returns the anchors of the headings of `page`, as GitHub derives them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_relative_links_lead_to_files_and_headings() -> None:
    """Checks every Markdown file of the project."""
    broken = []
    for name in listed_files():
        if name.suffix != ".md":
            continue
        page = ROOT / name
        # What looks like a link in code is an index, as in `ids[t](x)`.
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^()\s]+)\)|^\[[^\]]+\]: (\S+)", text, re.M):
            path, _, anchor = "".join(link).partition("#")
            if ":" in path:
                continue
            target = page.parent / path if path else page
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
                broken.append(f"{name}: {''.join(link)}")
    assert broken == []


@pytest.mark.parametrize("index", [README, ROOT / "docs" / "README.md"], ids=["README", "docs"])
def test_an_index_lists_every_page(index: Path) -> None:
    links = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.md)", index.read_text())}
    pages = set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "README.md"}
    assert pages - links == set()


def test_every_promise_is_held_by_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    held = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(held) > 50
    for file, name in held:
        assert (ROOT / file).is_file(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    for row in re.findall(r"^\| .+ \|$", page, re.M):
        assert "tests/" in row or row == "| promise | test |", row


@pytest.mark.parametrize(
    "group", ["ffn", "placement", "table", "table/optimizer", "model", "data", "strategy", "logger"]
)
def test_every_option_of_a_group_is_listed(group: str) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    options = {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")} - {"pretrained"}  # that of model=hf
    assert sorted(option for option in options if f"`{option}`" not in page) == []


def test_the_keys_of_edit_are_listed_with_their_defaults() -> None:
    defaults = yaml.safe_load((ROOT / "configs" / "edit.yaml").read_text())
    page = (ROOT / "docs" / "editing.md").read_text()
    cells = re.findall(r"^\| (`.+?`) \|", page, re.M)
    listed = dict(re.findall(r"`(\w+)=?([^`]*)`", " ".join(cells)))
    assert listed.keys() == set(ACTIONS["write"])
    for name, default in defaults.items():
        if isinstance(default, int | float) and name in listed:
            assert yaml.safe_load(listed[name]) == default, name
