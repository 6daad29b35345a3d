"""From typed arguments to a configuration: what Hydra cannot read, paths, keys that a verb does not read."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from small import Run, resolved

from pkm_lightning.build.checks import remark_rate, remark_row_optimizer, remark_validation
from pkm_lightning.cli.command_keys import check_read
from pkm_lightning.cli.composition_errors import explain, explain_composition
from pkm_lightning.cli.job import log_to_stderr
from pkm_lightning.cli.paths import with_expanded_paths
from pkm_lightning.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("run_dir=runs/ümlaut", "runs/ümlaut"),
        ("run_dir=runs/lr=0.1", "runs/lr=0.1"),
        ("data.path=~/x", "~/x"),
        ("data.path=a&b;c", "a&b;c"),
        ("run_dir=it's", "it's"),
        ("run_dir=a(b)", "a(b)"),
        ('run_dir="x', '"x'),
        ("run_dir=a$b!", "a$b!"),
        ("run_dir={a", "{a"),
        ("data.prompts=[Zürich]", ["Zürich"]),
        ("data.prompts=[Zürich, Wien]", ["Zürich", "Wien"]),
        ("+data.prompts=[Zürich]", ["Zürich"]),
    ],
)
def test_an_unreadable_value_names_its_key_and_the_quoted_form_works(typed: str, value: Any) -> None:
    parser = OverridesParser.create()
    with pytest.raises(HydraException) as error:
        parser.parse_overrides([typed])
    message = explain(error.value)
    key = typed.partition("=")[0]
    assert message.startswith(f"{typed}: the value of {key} has characters that need quotes; write ")
    (suggested,) = shlex.split(message.partition("write ")[2].removesuffix("."))
    override = parser.parse_override(suggested)
    assert (override.input_line.partition("=")[0], override.value()) == (key, value)


@pytest.mark.parametrize("typed", ["seed", "+seed", "--seed"])
def test_an_argument_without_a_value_is_no_override(typed: str) -> None:
    with pytest.raises(HydraException) as error:
        OverridesParser.create().parse_overrides([typed])
    assert explain(error.value) == f"{typed!r} is not an override; write KEY=VALUE, or ~KEY to delete one."


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("extra_ffns=null", "extra_ffns=[]"),
        ("callbacks=null", "callbacks=none"),
        ("ffn@model.base_ffn=null", "ffn@model.base_ffn=NAME"),
    ],
)
def test_a_group_is_not_null(typed: str, advice: str) -> None:
    arguments = ["match_budget=null", typed, "model.dim=8"]
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):  # noqa: SIM117
        with pytest.raises(ValueError, match="must be a string or a list") as error:
            compose("config", overrides=arguments)
    expected = f"{typed}: a group takes the name of an option; write {advice}, or leave it out."
    assert explain_composition(error.value, arguments) == expected
    other = explain_composition(ValueError("another"), arguments)
    assert other == f"match_budget=null {typed}: does not compose (another)."


REFUSED = [
    ("info table.optimizer=sgd", "table.optimizer=sgd names an option of a group; write table/optimizer=sgd."),
    ("info model.base_ffn=moe", "model.base_ffn=moe names an option of a group; write ffn@model.base_ffn=moe."),
    ("info extra_ffns=ple extra_ffns.ple=stem", "extra_ffns.ple=stem is no option of a group; write extra_ffns=ple"),
    ("info extra_ffns=ple extra_ffns.ple.ffn=stem", "; write ffn@extra_ffns.ple.ffn=stem."),
    ("info extra_ffns=ple extra_ffns.ple.placement=all", "; write placement@extra_ffns.ple.placement=all."),
    ("info ffn.placement=all", "placement is a group of its own: write placement=NAME."),
    ("info optim.optimizer=adam", "{KEY: VALUE}; set its keys, as in optim.optimizer.NAME=VALUE."),
    ("info table/learning=dense", "table/learning is not a group; write table.learning=VALUE."),
    ("info table/optimiser=sgd", "Did you mean 'table/optimizer'?"),
    ("info extra_ffns=[stem,dens]", "extra_ffns=dens is not known; allowed: custom, dense, engram, "),
    ("fit callbacks=[default,recal]", "callbacks=recal is not known; allowed: default, "),
    ("fit extra_ffns=ple,stem", "several values; write extra_ffns=[ple,stem] if a list is meant, or sweep them with"),
    (
        "info data.path=a,b",
        "write data.path=[a,b] if a list is meant, \"data.path='a,b'\" if a text, or sweep them with",
    ),
    ("info seed=range(1,3)", "seed=range(1,3) is several values; choose one, or sweep them with fit -m."),
    ("fit ffn=ple,stem", "ffn=ple,stem is several values; choose one, or sweep them with fit -m."),
    (
        "info table/optimizer=factored_adam table.optimizer.bias_correction=row",
        "not a key of the configuration, but of table/optimizer=lazy_adam; choose that, or leave it out.",
    ),
    ("fit finetune.rank=3", "not a key of the configuration, but of finetune=lora; choose that"),
    ("fit finetune.replay_share=0.1", "but of finetune=adapter or full or lora or sparse; choose that"),
    ("fit finetune=lora finetune.r=8", "finetune.r is not a key of the configuration; write finetune.rank=VALUE."),
    ("fit finetune=lora finetune.lora_alpha=8", "; write finetune.alpha=VALUE."),
    ("fit finetune=full finetune.zzz=8", "+finetune.zzz=VALUE would add one. finetune has: _target_, replay_path"),
    ("fit data=invented", "data=invented is for prepare: `prepare data=invented out=FOLDER` writes it, and data=jsonl"),
    ("inspect prompt=x", "prompt is a key of generate, predict only; write text=VALUE."),
    ("generate text=x", "text is a key of inspect only; write prompt=VALUE."),
    ("edit list kl_bond=1", "kl_bond is not a key of the configuration; +kl_bond=VALUE would add one. Did you mean"),
    (
        "info model.base_ffn.n_experts=4",
        ", but of ffn@model.base_ffn=moe or moe_expert_choice; choose that, or leave it out.",
    ),
    (
        "info data=custom data._target_=my.Data data.path=x",
        "; +data.path=VALUE would add one, for an argument of the cla",
    ),
    ("info ffn=custom ffn._target_=my.FFN ffn.width=3", "; +ffn.width=VALUE would add one, for an argument of the cla"),
    ("info ffn=engram_pretrained", "give it as ffn.path=VALUE (folder of a Qwen model of this kind: config.json"),
    ("info data=jsonl", "give it as data.path=VALUE (file, directory (*.jsonl at any depth), glob"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED, ids=[command for command, _ in REFUSED])
def test_a_name_in_the_wrong_place_is_refused_with_the_right_one(cli: Run, command: str, message: str) -> None:
    done = cli(*command.split())
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err
    assert len(done.err) < 600


def test_home_and_variables_mean_the_same_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = {
        "run_dir": "~/run", "ckpt": "$SCRATCH/a.ckpt", "file": None, "out": "${SCRATCH}/x", "runs": ["~/a", "b"],
        "data": {"path": ["~/x", "$HOME/y"], "cache_dir": "~/c", "tokenizer": "~/t.json", "text_field": "~"},
        "callbacks": {"recall": {"path": "~/r.csv"}, "step_checkpoint": {"dirpath": "$UNSET/c"}},
    }  # fmt: skip
    assert with_expanded_paths(config) == {
        "run_dir": "/me/run", "ckpt": "/scratch/a.ckpt", "file": None, "out": "/scratch/x",
        "runs": ["/me/a", "b"],
        "data": {
            "path": ["/me/x", "/me/y"], "cache_dir": "/me/c", "tokenizer": "/me/t.json",
            "text_field": "~",
        },
        "callbacks": {"recall": {"path": "/me/r.csv"}, "step_checkpoint": {"dirpath": "$UNSET/c"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": {"path": ""}}, r"data\.path='' names no file or folder; give data\.path=PATH"),
        ({"data": {"path": ["a", " "]}}, r"data\.path=' ' names no file or folder"),
        ({"data": {"cache_dir": ""}}, r"data\.cache_dir='' names no file"),
        ({"callbacks": {"recall": {"path": ""}}}, r"callbacks\.recall\.path=''"),
        ({"run_dir": ""}, "run_dir='' names no file or folder"),
    ],
)
def test_an_empty_path_is_not_the_working_directory(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_expanded_paths(config)


def test_a_user_without_a_home_is_told_which_key_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    with pytest.raises(ConfigError, match=r"data\.cache_dir=~/\.cache/x is in the home of a user who has none"):
        with_expanded_paths({"data": {"cache_dir": "~/.cache/x"}})


@pytest.mark.parametrize(
    ("verb", "override", "message"),
    [
        ("fit", "format=json", "format=json: fit does not read format, only info, inspect, export, edit"),
        ("fit", "out=x", "fit does not read out, only predict, generate, evaluate, inspect, compare, report, prepare"),
        ("fit", "file=x.safetensors", "only export"),
        ("info", "ckpt=x", "info does not read ckpt"),
        ("predict", "dir=x", "predict does not read dir, only export"),
        ("info", "overwrite=true", "info does not read overwrite"),
        ("validate", "out=x", "validate does not read out"),
        ("test", "file=x", "test does not read file"),
        ("test", "device_memory=8", "test does not read device_memory"),
        ("predict", "resume=never", "predict does not read resume"),
        ("compare", "format=json", "compare does not read format"),
        (
            "export",
            "optim.lr=1",
            "It reads: run_dir, ckpt, edits, model, ffn, extra_ffns, placement, table, seed, format, file, dir",
        ),
        ("export", "data=text", "export does not read data"),
        ("export", "data/loader@data=default", "export does not read data"),
        ("export", "~callbacks.recall", "export does not read callbacks"),
        ("report", "ffn=dense", "report does not read ffn"),
        ("report", "seed=3", "report does not read seed"),
    ],
)
def test_a_key_that_does_nothing_is_refused(verb: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_read(verb, [override], OmegaConf.create({"seed": 1}))


def test_a_key_that_nothing_reads_is_refused_unless_another_refers_to_it() -> None:
    check_read("fit", ["+foo=1"], OmegaConf.create({"foo": 1, "optim": {"lr": "${foo}"}}))
    with pytest.raises(ConfigError, match=r"foo is not a key of the configuration; leave it out"):
        check_read("fit", ["+foo=1"], OmegaConf.create({"foo": 1}))
    with pytest.raises(ConfigError, match=r"sed is not a key of the configuration; leave it out. Did you mean 'seed'"):
        check_read("fit", [], OmegaConf.create({"sed": 1}))
    sizes = {"memory": {"knn": 4, "kn": 1}}
    check_read("fit", [], OmegaConf.create({"model": sizes, "ffn": {"width": "${model.memory.kn}"}}))
    with pytest.raises(ConfigError, match=r"model\.memory\.kn is not a key of .*; leave it out. Did you mean 'knn'"):
        check_read("fit", [], OmegaConf.create({"model": sizes}))


@pytest.mark.parametrize(
    ("interval", "accumulate", "epochs", "remarked"),
    [(700, 1, None, True), (9, 2, None, True), (8, 2, None, False), (4, 1, None, False), (0.5, 1, 1, False)],
)
def test_a_validation_beyond_the_end_is_remarked(
    interval: float, accumulate: int, epochs: int | None, remarked: bool
) -> None:
    trainer = {
        "val_check_interval": interval, "accumulate_grad_batches": accumulate, "max_steps": 4,
        "check_val_every_n_epoch": epochs,
    }  # fmt: skip
    assert bool(remark_validation(trainer)) is remarked


@pytest.mark.parametrize(
    ("model", "rate", "remarked"),
    [({"_target_": "a.Class"}, 0.006, True), ({"_target_": "a.Class"}, 0.00002, False), ({"dim": 64}, 0.006, False)],
)
def test_a_rate_that_destroys_pretrained_weights_is_remarked(
    model: dict[str, Any], rate: float, remarked: bool
) -> None:
    assert bool(remark_rate({"model": model, "optim": {"lr": rate}})) is remarked


def test_every_console_prints_data_as_they_are() -> None:
    """Rich would take brackets in data and paths for markup."""
    root = Path(__file__).parents[2]
    lines = [line for folder in ("pkm_lightning", "callbacks") for file in (root / folder).rglob("*.py")
             for line in file.read_text().splitlines() if " Console(" in line]  # fmt: skip
    assert len(lines) >= 4
    assert [line for line in lines if "markup=False, emoji=False" not in line] == []


def test_the_log_leaves_the_standard_output_to_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(sys.stdout)])
    log_to_stderr()
    root.warning("generated new fontManager")
    shown = capsys.readouterr()
    assert (shown.out, "generated new fontManager" in shown.err) == ("", True)


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["table/optimizer=factored_adam"], "table/optimizer=factored_adam"),
        (["table.optimizer.bias_correction=row"], "table.optimizer.bias_correction"),
        (["table.optimizer.betas=[0.9,0.99]"], "table.optimizer.betas"),
        ([], None),
    ],
)
def test_a_row_optimizer_that_dense_tables_do_not_use_is_remarked(overrides: list[str], setting: str | None) -> None:
    dense = remark_row_optimizer(resolved("table.learning=dense", *overrides).config)
    expected = "has no effect with table.learning=dense: optim.optimizer updates the tables"
    assert dense == (setting and f"{setting} {expected}")
    assert remark_row_optimizer(resolved("table.learning=rows", *overrides).config) is None
