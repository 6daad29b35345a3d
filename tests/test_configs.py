"""Every YAML of every group composes with the defaults, and what it describes can be built."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from shard_folders import text, write_folder
from tree import ROOT

from pkm_lightning.build.finetuning import finetuning_callbacks
from pkm_lightning.build.run import resolve
from pkm_lightning.cli.assembly import assemble
from pkm_lightning.compare.schedule import list_variants
from pkm_lightning.compare.settings import read_settings
from pkm_lightning.training import LanguageModule

CONFIGS = ROOT / "configs"
# Keys that several YAMLs share are no choice of their own.
SHARED = (CONFIGS / "experiment" / "regime", CONFIGS / "data" / "loader")
# Nothing to train on.
PREPARED = CONFIGS / "prepare" / "data"
# Needs the files of a model; tests/huggingface composes, builds and runs both together.
PRETRAINED = (
    CONFIGS / "model" / "hf.yaml",
    *(CONFIGS / "ffn" / f"{n}.yaml" for n in ("pretrained", "engram_pretrained")),
    CONFIGS / "extra_ffns" / "engram_pretrained.yaml",
)
OPTIONS = sorted(
    f"{path.parent.relative_to(CONFIGS)}={path.stem}"
    for path in CONFIGS.rglob("*.yaml")
    if path.parent not in (CONFIGS, *SHARED, PREPARED) and path not in PRETRAINED
)
#: FFNs and experiments bring settings of other groups with them, and layers; methods of finetuning do not go with all
#: strategies: each stands alone.
ALONE = [(option,) for option in OPTIONS if option.startswith(("ffn=", "extra_ffns=", "experiment=", "finetune="))]
#: The options of the other groups side by side, since composing is what takes the time.
TOGETHER = itertools.zip_longest(
    *(
        list(options)
        for _, options in itertools.groupby(
            (option for option in OPTIONS if (option,) not in ALONE), key=lambda option: option.partition("=")[0]
        )
    )
)
COMMANDS = [*ALONE, *(tuple(option for option in row if option) for row in TOGETHER)]
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml") if "match: flops" in p.read_text())
FFNS = [o.removeprefix("ffn=") for o in OPTIONS if o.startswith("ffn=") and o != "ffn=custom"]
# What a user must give, for the options that are nothing without it.
GIVEN = {
    "ffn=custom": ["ffn._target_=pkm_lightning.ffn.Dense", "+ffn.hidden_dim=8"],
    "extra_ffns=custom": [
        *("extra_ffns.custom.ffn._target_=pkm_lightning.ffn.Dense", "+extra_ffns.custom.ffn.hidden_dim=8"),
    ],
    "data=custom": ["data._target_=lightning.pytorch.demos.boring_classes.BoringDataModule", "model.vocab_size=50"],
    "callbacks=evaluate": ["callbacks.evaluate.tasks=[piqa]"],
    "finetune=sparse": ["finetune.score=tf", "init_from=somewhere"],
    **{f"finetune={method}": ["init_from=somewhere"] for method in ("full", "lora")},
    "finetune=adapter": ["init_from=somewhere", "extra_ffns=dense"],
    "strategy=ddp": ["trainer.devices=2"],
    "data=tokens": ["data.path=somewhere/prepared"],
    "data=mix": ["data.sources={books:{path:somewhere/prepared,weight:1}}"],
    "callbacks=slot_revival": [
        "+callbacks.slot_usage={_target_:pkm_lightning.callbacks.SlotUsage,path:usage.json,every_n_steps:null,window:2,"
        "dead_after:1,per_head:false,panels_every_n_steps:null}"
    ],
}


def given(option: str) -> list[str]:
    """What a user must set for `option` besides the option itself."""
    group, _, name = option.partition("=")
    needs_path = "path: ???" in (CONFIGS / group / f"{name}.yaml").read_text()
    return GIVEN.get(option, [f"{group}.path=somewhere"] if needs_path else [])


def composed(overrides: list[str], run_dir: Path, name: str = "config") -> dict[str, Any]:
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        config = compose(name, overrides=[*overrides, f"run_dir={run_dir}", "trainer.accelerator=cpu"])
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return dict(plain)


def test_every_option_is_in_a_command() -> None:
    assert sorted(option for command in COMMANDS for option in command) == OPTIONS


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_option_composes_and_builds(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "somewhere").mkdir()
    if {"data=tokens", "data=mix"} & set(command):
        write_folder(tmp_path, {"train": [text("words")]}).rename(tmp_path / "somewhere" / "prepared")
    needed = [override for option in command for override in given(option)]
    overrides = [override.replace("somewhere", str(tmp_path / "somewhere")) for override in needed]
    # Sizes are solved in tests/build, and for every variant of an experiment in the slow test below.
    run = resolve({**composed([*command, *overrides], tmp_path / "run"), "match": "none"}, training=True)
    assembly = assemble(run)
    config = run.config
    assert isinstance(run.data, L.LightningDataModule)
    assert assembly.trainer.max_steps == config["trainer"]["max_steps"]
    assert len(assembly.callbacks) == len(config["callbacks"]) + len(finetuning_callbacks(config))


@pytest.mark.parametrize("experiment", [pytest.param(e, marks=pytest.mark.slow) for e in EXPERIMENTS])
def test_every_variant_of_an_experiment_has_equal_flops(experiment: str, tmp_path: Path) -> None:
    asked = composed([f"experiment={experiment}"], tmp_path, name="compare")
    variants = list_variants([], read_settings(asked))
    assert len(variants) >= 4
    budget = None
    for variant in variants:
        run = resolve(composed([f"experiment={experiment}", *variant.overrides], tmp_path))
        flops = run.cost.trunk_train_flops
        budget = budget or flops
        assert abs(flops / budget - 1) < 0.03, variant.name


@pytest.mark.parametrize("ffn", FFNS)
def test_the_module_builds_with_its_optimizer(ffn: str, tmp_path: Path) -> None:
    run = resolve(composed([f"ffn={ffn}", "model.memory.n_keys=32"], tmp_path))
    module = LanguageModule(run.config)
    module.configure_model()
    names = [group["name"] for group in module.configure_optimizers()["optimizer"].param_groups]
    assert names == ["matrix", "gain", *(["table"] if module.model.value_tables else [])]


@pytest.mark.parametrize(
    ("ffn", "layers", "mode"),
    [
        ("dense", "all", "replace"),
        ("moe", "all", "replace"),
        ("pkm", "centred", "replace"),
        ("ultramem", "spread", "parallel"),
        ("ultramem_v2", "all", "parallel"),
        ("ple", "all", "after"),
        ("stem", "all", "replace"),
    ],
)
def test_an_ffn_brings_its_papers_placement_and_tables_and_the_user_decides(
    ffn: str, layers: str, mode: str, tmp_path: Path
) -> None:
    config = composed([f"ffn={ffn}"], tmp_path)
    own = config["placement"]
    assert (own["layers"], own["mode"]) == (layers, mode)
    assert config["table"]["shared"] is not ffn.startswith(("ultramem", "stem"))
    chosen = composed([f"ffn={ffn}", "placement=centred", "placement.count=2"], tmp_path)["placement"]
    assert (chosen["layers"], chosen["count"], chosen["mode"]) == ("centred", 2, "replace")


def test_two_ffns_differ_in_nothing_but_the_ffn(tmp_path: Path) -> None:
    """And the placement that an FFN brings: every layer for a dense one, its paper's for a variant."""
    dense, memory = composed(["ffn=dense"], tmp_path), composed(["ffn=memory_plus"], tmp_path)
    assert dense.pop("ffn") != memory.pop("ffn")
    assert {key for key in dense if dense[key] != memory[key]} == {"placement"}
    same = [composed([f"ffn={ffn}", "placement=centred"], tmp_path) for ffn in ("dense", "memory_plus")]
    assert same[0].pop("ffn") != same[1].pop("ffn")
    assert same[0] == same[1]


def test_every_key_has_a_comment() -> None:
    """The YAML is the documentation of every key."""
    bare = []
    for path in CONFIGS.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            key, _, rest = line.strip().partition(":")
            is_leaf = rest.strip() and not key.startswith(("#", "-", "_", "defaults"))
            if path.parent.name in ("ffn", "placement", "data", "optim") and is_leaf and "#" not in rest:
                bare.append(f"{path.relative_to(CONFIGS)}: {line.strip()}")
    assert bare == []
