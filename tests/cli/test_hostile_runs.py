"""A run directory from a stranger, or damaged on its way: every verb refuses it before it does anything."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import Run

from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.cli import fit
from pkm_lightning.cli.evaluation import SavedRun
from pkm_lightning.cli.resume import saved_config
from pkm_lightning.errors import PkmError

VERBS = {
    "fit": ["run_dir=run"],
    "test": ["run_dir=run"],
    "validate": ["ckpt=run/checkpoints/step-00000012.ckpt"],
    "predict": ["run_dir=run", "data.prompts=[x]"],
    "export": ["run_dir=run", "file=model.safetensors"],
}


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch BOOM",)


def bomb_in_a_folder(path: Path) -> None:
    content = SavedCheckpoint(path).skeleton
    path.unlink()
    path.mkdir()
    torch.save(content, path / "skeleton.pt")
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))


def bomb_in_a_file(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "callbacks": Bomb()}, path)


def flipped_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["model.norm.weight"]
    raw[raw.index(weight.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(raw)


def misfit(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    del state["model.norm.weight"]
    state["model.extra"] = torch.zeros(2)
    state["model.embedding.weight"] = state["model.embedding.weight"][:-1].clone()
    torch.save(content, path)


HARM: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "bomb in a folder": (bomb_in_a_folder, tuple(VERBS), r".metadata names posix.system, code that"),
    "bomb in a file": (bomb_in_a_file, ("fit", "predict"), "is damaged or no checkpoint"),
    "flipped bit": (
        flipped_bit,
        ("fit", "test", "export"),
        "state_dict.model.norm.weight has changed since it was written",
    ),
    "misfit": (
        misfit,
        ("fit", "validate"),
        "does not fit its configuration (missing: model.norm.weight; unexpected: model.extra; of another shape: "
        "model.embedding.weight (",
    ),
}


def as_if_killed(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))


@pytest.mark.parametrize("kind", HARM)
def test_every_verb_refuses_a_harmful_checkpoint(cli: Run, trained: Path, kind: str) -> None:
    as_if_killed(trained)
    harm, verbs, reason = HARM[kind]
    harm(trained / "checkpoints" / "step-00000012.ckpt")
    before = (trained / "run.json").read_bytes(), (trained / "config.yaml").read_bytes()
    for verb in verbs:
        shown = cli(verb, *VERBS[verb])
        assert shown.code == 2, (verb, shown.out)
        assert reason in shown.err, verb
        assert "step-00000012.ckpt" in shown.err
        assert len(shown.err.strip().splitlines()) == 1, shown.err
    assert not Path("BOOM").exists()
    assert not Path("model.safetensors").exists()
    assert before == ((trained / "run.json").read_bytes(), (trained / "config.yaml").read_bytes())


def test_a_bare_checkpoint_may_not_name_places_to_write(cli: Run, trained: Path) -> None:
    path = trained / "checkpoints" / "step-00000012.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["config"]["trainer"]["default_root_dir"] = "/elsewhere"
    torch.save(content, path)
    shown = cli("validate", f"ckpt={path}")
    assert shown.code == 2
    assert "names trainer.default_root_dir=/elsewhere, where a saved configuration may not write" in shown.err


def test_weights_alone_do_not_continue_a_run(cli: Run, trained: Path) -> None:
    as_if_killed(trained)
    path = trained / "checkpoints" / "step-00000012.ckpt"
    assert cli("export", "run_dir=run", "file=model.safetensors").code == 0
    path.write_bytes(Path("model.safetensors").read_bytes())
    shown = cli("fit", "run_dir=run")
    assert shown.code == 2
    assert "holds weights only, from which training cannot continue" in shown.err


def _without(group: str) -> Callable[[dict[str, Any]], object]:
    return lambda config: config.pop(group)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{f"no {group}": (_without(group), f"lacks the group {group}") for group in ("optim", "table", "logger")},
    "a number": (lambda config: config.update(placement=3), "has a int in place of the group placement"),
    "no mapping": (lambda config: config.update(callbacks=["a"]), "has a list in place of the group callbacks"),
    "outside": (
        lambda config: config["callbacks"]["recall"].update(path="/outside.csv"),
        "names callbacks.recall.path=/outside.csv, outside of",
    ),
    "by position": (
        lambda config: config["trainer"].update(
            profiler={"_target_": "lightning.pytorch.profilers.AdvancedProfiler", "_args_": ["evil"]}
        ),
        r"holds trainer\.profiler\._args_, arguments by position",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_harmful_configuration_is_refused(trained: Path, kind: str) -> None:
    change, reason = CONFIGS[kind]
    file = trained / "config.yaml"
    config = yaml.safe_load(file.read_text())
    change(config)
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(PkmError, match=rf"config\.yaml {reason}"):
        saved_config(trained, trust=False, cache=config["data"]["cache_dir"])


def test_a_run_whose_cache_has_moved_is_read_with_the_cache_of_the_command(
    cli: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_killed(trained)
    shutil.rmtree(trained / "heldout")
    cache = tmp_path / "another-cache"
    monkeypatch.setenv("PKM_LIGHTNING_CACHE", str(cache))
    before = (trained / "config.yaml").read_bytes()
    monkeypatch.setattr(SavedRun, "trainer", _refuse)
    monkeypatch.setattr(fit, "_check_checkpoint", _refuse)
    for verb in ("fit", "test"):
        shown = cli(verb, *VERBS[verb])
        assert "reached" in shown.err, (verb, shown.err)
        assert (verb == "fit") or any(cache.iterdir())
    assert before == (trained / "config.yaml").read_bytes()
    config = yaml.safe_load(before)
    assert saved_config(trained, trust=True, cache=str(cache))["data"] == config["data"]
    assert saved_config(trained, trust=False, cache=str(cache))["data"] == {**config["data"], "cache_dir": str(cache)}


def _refuse(*_: Any) -> None:
    raise PkmError("reached")


def test_a_link_out_of_the_directory_is_followed_by_request_only(cli: Run, trained: Path) -> None:
    (trained / "recall.csv").unlink()
    (trained / "recall.csv").symlink_to(Path("elsewhere.csv").absolute())
    for verb, overrides in (("fit", ["resume=always", "seed=1"]), ("test", [])):
        shown = cli(verb, "run_dir=run", *overrides)
        assert shown.code == 2
        assert "recall.csv is a link that leads out" in shown.err
    assert saved_config(trained, trust=True)
