"""The model card of an exported folder: what the model is, its data with their licences, its figures, its commands."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import pkm_lightning
from pkm_lightning.build.instantiate import check_trusted, instantiate
from pkm_lightning.build.replay import add_replay
from pkm_lightning.checkpoints.export import weight_shapes
from pkm_lightning.checkpoints.reader import SavedCheckpoint
from pkm_lightning.data.datamodule import TokenDataModule
from pkm_lightning.errors import PkmError
from pkm_lightning.storage import open_regular

#: As configs/data/loader/batches.yaml has it.
_CACHE = "${oc.env:PKM_LIGHTNING_CACHE,'~/.cache/pkm_lightning'}"


def model_card(checkpoint: SavedCheckpoint, run_dir: Path | None, *, needs_package: bool) -> str:
    """Returns the text of README.md.

    Args:
        checkpoint: whose weights the folder holds.
        run_dir: of the run, where it is known: its figures are in run.json and test.json.
        needs_package: whether transformers knows the class from this package only.
    """
    config = checkpoint.config
    record = {} if run_dir is None else _json(run_dir / "run.json")
    # Of a pretrained model that was not trained here the configuration names data that it has never seen.
    is_trained = "architecture" not in config["model"] or int(checkpoint.skeleton["tokens_seen"]) > 0
    return "\n".join(
        [
            *("---", "library_name: transformers", "pipeline_tag: text-generation"),
            *("tags:", *(f"- {tag}" for tag in ("pkm_lightning", *map(str.lower, _names(config)))), "---", ""),
            *(f"# {_title(config)}", ""),
            *_model(checkpoint, record),
            *("## Load", "", "```python", *_load(needs_package=needs_package), "```", ""),
            *(_data(checkpoint, record) if is_trained else []),
            *_figures(run_dir, record),
            *(_again(config) if is_trained else []),
        ]
    )


def _title(config: Mapping[str, Any]) -> str:
    pretrained = config["model"].get("architecture") or {}
    kind = (pretrained.get("architectures") or [" + ".join(_names(config))])[0]
    return f"{kind}, {config['model']['n_layers']} layers of {config['model']['dim']}"


def _model(checkpoint: SavedCheckpoint, record: Mapping[str, Any]) -> list[str]:
    config, model = checkpoint.config, checkpoint.config["model"]
    total = sum(math.prod(shape) for shape, dtype in weight_shapes(checkpoint).values() if dtype.is_floating_point)
    base = f", other layers `{model['base_ffn']['_target_']}`" if "base_ffn" in model else ""
    extras = "".join(f", `{extra['ffn']['_target_']}`" for extra in _extras(config))
    rows = {
        "FFN": f"`{config['ffn']['_target_']}`{extras}{base}",
        "layers, dimension": f"{model['n_layers']}, {model['dim']}",
        **({"heads, key-value heads": f"{model['n_heads']}, {model['n_kv_heads']}"} if "n_heads" in model else {}),
        "vocabulary": f"{model['vocab_size']:,}",
        "weights": f"{total:,}",
        **({"active per token": f"{record['params']['active']:,}"} if "params" in record else {}),
        **({"trained for": _trained_for(checkpoint)} if int(checkpoint.skeleton["tokens_seen"]) else {}),
        "made with": f"pkm_lightning {pkm_lightning.__version__}",
    }
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]


def _trained_for(checkpoint: SavedCheckpoint) -> str:
    length = checkpoint.config["data"].get("seq_len")
    tokens = f"{int(checkpoint.skeleton['tokens_seen']):,} tokens"
    return tokens if length is None else f"{tokens} in sequences of {length}"


def _load(*, needs_package: bool) -> list[str]:
    return [
        *(["import pkm_lightning.huggingface  # pip install 'pkm_lightning[hf]'"] if needs_package else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'inputs = tokenizer("The capital of France is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
    ]


def _data(checkpoint: SavedCheckpoint, record: Mapping[str, Any]) -> list[str]:
    config = checkpoint.config
    lines = ["## Data", "", f"`{config['data']['_target_']}`, seed {config['seed']}."]
    fingerprint = record.get("data") or checkpoint.skeleton.get("data")
    if fingerprint:
        lines += ["", f"Fingerprint of the data set: `{fingerprint}`."]
    sources = data_sources(config)
    if sources:
        lines += ["", "| source | version | licence | attribution |", "|---|---|---|---|"]
        keys = ("name", "version", "licence", "attribution")
        lines += ["| " + " | ".join(str(source.get(key) or "") for key in keys) + " |" for source in sources]
    return [*lines, ""]


def data_sources(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the sources of prepared data with their licences, from the manifest of the cache; none if it is gone.

    Nothing is prepared, and classes of others are not constructed.
    """
    try:
        check_trusted(config["data"], "data")
        data = instantiate(config["data"], "data")
        if not isinstance(data, TokenDataModule):
            return []
        add_replay(data, config)
        replayed = [] if data.replay is None else data.replay.data.prepared_sources()
        return [*data.prepared_sources(), *replayed]
    except (PkmError, OSError, ValueError, KeyError):
        return []


def _figures(run_dir: Path | None, record: Mapping[str, Any]) -> list[str]:
    metrics = {**record.get("metrics", {}), **({} if run_dir is None else _json(run_dir / "test.json"))}
    # Booleans are integers in Python; what is nested are details.
    numbers = {name: value for name, value in metrics.items() if type(value) in (int, float)}
    rows = [f"| {name} | {value:.4g} |" for name, value in numbers.items()]
    if not rows:
        return []
    return ["## Figures", "", "Of the run's last test.", "", "| metric | value |", "|---|---|", *rows, ""]


def _again(config: Mapping[str, Any]) -> list[str]:
    """Returns the section that makes the model again: the whole configuration, which is a primary one of Hydra."""
    here = {**config, "run_dir": "runs/again", **dict.fromkeys(("ckpt", "file", "dir", "out", "format"))}
    # Hydra makes no folders of its own, as in the package's primary configuration.
    primary = {**_moved(here, str(config.get("run_dir"))), "hydra": {"run": {"dir": "."}, "output_subdir": None}}
    text = yaml.safe_dump(primary, sort_keys=False, width=120, allow_unicode=True)
    return [
        *("## Make it again", "", "With this as `config.yaml` in the working directory:", "", "```bash"),
        "python -m pkm_lightning fit --config-path=$PWD --config-name=config",
        *(
            "```",
            "",
            "<details><summary>config.yaml</summary>",
            "",
            "```yaml",
            text.rstrip(),
            "```",
            "",
            "</details>",
            "",
        ),
    ]


def _moved(node: Any, run_dir: str) -> Any:
    """Returns `node` with the paths of the machine where it was trained replaced by those of the reader's."""
    if isinstance(node, Mapping):
        return {name: _CACHE if name == "cache_dir" else _moved(part, run_dir) for name, part in node.items()}
    if isinstance(node, list):
        return [_moved(part, run_dir) for part in node]
    inside = isinstance(node, str) and (node == run_dir or node.startswith(f"{run_dir}/"))
    return "${run_dir}" + node[len(run_dir) :] if inside else node


def _extras(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list((config.get("extra_ffns") or {}).values())


def _names(config: Mapping[str, Any]) -> list[str]:
    """Returns the classes of all variants, each once."""
    return list(dict.fromkeys(_name(variant["ffn"]) for variant in (config, *_extras(config))))


def _name(described: Mapping[str, Any]) -> str:
    return str(described["_target_"]).rsplit(".", 1)[-1]


def _json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, or nothing: the card says what is known."""
    try:
        with open_regular(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
