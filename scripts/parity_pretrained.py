"""Compares a pretrained model through `model=hf` with transformers itself, token by token, and writes a CSV file.

    python scripts/parity_pretrained.py model.gguf text.txt --out parity.csv

Per way of running the model: the largest and the mean difference of log-likelihoods per token in nats, and the share of
positions at which the most likely next token is the same.

Letters: W vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra import compose, initialize_config_module
from torch import Tensor
from transformers import AutoModelForCausalLM

from pkm_lightning.cli.job import plain
from pkm_lightning.data.pretrained_files import quiet_transformers, weights_alone
from pkm_lightning.huggingface.loading import load_pretrained


def main() -> None:
    """Reads the arguments, compares, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder or .gguf file")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the text that are read")
    arguments = parser.parse_args()
    loaded = load_pretrained(configuration(arguments.model))
    ids = loaded.codec().encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
    ids_BT = torch.tensor([ids])
    with torch.no_grad():
        theirs = log_likelihoods(reference(arguments.model)(ids_BT).logits)
        rows = [compared(way, log_likelihoods(logits), theirs, ids_BT) for way, logits in ours(loaded.model, ids_BT)]
    facts = {
        "date": datetime.date.today().isoformat(),
        "model": arguments.model.name,
        "text": arguments.text.name,
        "tokens": len(ids),
        "dtype": "float32",
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *rows[0]])
        writer.writeheader()
        writer.writerows({**facts, **row} for row in rows)
    print(arguments.out.read_text())


def configuration(path: Path) -> dict[str, Any]:
    """Returns the composed configuration of `model=hf`."""
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        return plain(compose("config", overrides=["model=hf", f"model.path={path.absolute()}"]))


def reference(path: Path) -> Any:
    """Returns the model as transformers alone reads it."""
    with quiet_transformers(), weights_alone(path) as arguments:
        return AutoModelForCausalLM.from_pretrained(**arguments).eval()


def ours(model: Any, ids_BT: Tensor) -> list[tuple[str, Tensor]]:
    """Returns the logits of three ways to read the same text: whole, as a packed document, and with the cache."""
    whole = model.unembed(model(ids_BT).hidden_BTD)
    packed = model.unembed(model(ids_BT, doc_ids_BT=torch.zeros_like(ids_BT)).hidden_BTD)
    cache = model.new_cache(1, ids_BT.shape[1])
    half = ids_BT.shape[1] // 2
    parts = ids_BT.split([half, *[1] * (ids_BT.shape[1] - half)], dim=1)
    cached = torch.cat([model.unembed(model(part, cache=cache).hidden_BTD) for part in parts], dim=1)
    return [("whole", whole), ("packed", packed), ("cached", cached)]


def log_likelihoods(logits_BTW: Tensor) -> Tensor:
    """Returns log-probabilities of all tokens."""
    return logits_BTW.double().log_softmax(-1)


def compared(way: str, ours_BTW: Tensor, theirs_BTW: Tensor, ids_BT: Tensor) -> dict[str, Any]:
    """Returns one row of the table."""
    targets_BT1 = ids_BT[:, 1:, None]
    differences = (ours_BTW[:, :-1].gather(-1, targets_BT1) - theirs_BTW[:, :-1].gather(-1, targets_BT1)).abs()
    return {
        "way": way,
        "loss": f"{-ours_BTW[:, :-1].gather(-1, targets_BT1).mean():.6f}",
        "max_difference": f"{differences.max():.2e}",
        "mean_difference": f"{differences.mean():.2e}",
        "same_choice": f"{(ours_BTW.argmax(-1) == theirs_BTW.argmax(-1)).float().mean():.4f}",
    }


if __name__ == "__main__":
    main()
