"""A plugin that a program constructs has the defaults that its YAML composes to with the default model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import yaml
from toys import config
from tree import ROOT

import pkm_lightning
from pkm_lightning import ffn
from pkm_lightning.memory import RowOptimizer
from pkm_lightning.model import Transformer

NAMES = sorted({path.stem for path in (ROOT / "configs" / "ffn").glob("*.yaml")} - {"custom", "pretrained"})
#: Widths, which follow from the model around the layer, and a path, which the user has to give.
REQUIRED = {"hidden_dim", "dense_hidden_dim", "path"}
#: What the builder passes; alone a layer is the only one of its model and of its table.
OF_BUILDER = {"n_layers": 1, "table": None, "table_number": 0, "table_reader": 0}


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if p.default is not inspect.Parameter.empty}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_yaml(name: str) -> None:
    text = yaml.safe_load((ROOT / "configs" / "ffn" / f"{name}.yaml").read_text())
    cls = getattr(ffn, text["_target_"].rpartition(".")[2])
    given = {} if text.get("path") != "???" else {"ffn.path": "folder"}
    composed = config(f"ffn={name}", *(f"{key}={value}" for key, value in given.items()))["ffn"]
    keys = {key: value for key, value in composed.items() if not key.startswith("_")}
    own = {key: plain(value) for key, value in defaults(cls).items() if key not in OF_BUILDER}
    for key, value in keys.items():
        if key in REQUIRED and key not in own:
            assert inspect.signature(cls).parameters[key].default is inspect.Parameter.empty
        elif key == "cures":
            # The YAML lists every cure, all off, which is what None means.
            assert own[key] is None
            assert not any(value.values())
        else:
            assert own[key] == value, key
    assert own.keys() <= keys.keys(), "an argument that the YAML does not explain"
    of_builder = {key: value for key, value in defaults(cls).items() if key in OF_BUILDER}
    assert of_builder == {key: OF_BUILDER[key] for key in of_builder}


def test_defaults_of_the_row_optimizer_are_those_of_lazy_adam() -> None:
    keys = yaml.safe_load((ROOT / "configs" / "table" / "optimizer" / "lazy_adam.yaml").read_text())
    own = {key: plain(value) for key, value in defaults(RowOptimizer).items()}
    assert own == {key: keys[key] if key != "eps" else float(keys[key]) for key in own}
    assert defaults(pkm_lightning.TableOptimizer)["rows"] == keys["rule"]


def test_defaults_of_the_transformer_are_those_of_its_yaml() -> None:
    keys = config("model=tiny")["model"]
    of_yaml = {key: value for key, value in defaults(Transformer).items() if key in keys}
    assert len(of_yaml) == 6
    assert of_yaml == {key: keys[key] for key in of_yaml}
