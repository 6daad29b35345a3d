"""Measures the residual stream of a pretrained model, and what its FFNs read: on text and on random tokens.

    python scripts/measure_stream.py model.gguf text.txt --out stream.csv

Medians over tokens. From random tokens plugins are initialised (`pkm_lightning.build.stream_scale`); the text shows
how well that does for text.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch import Tensor

from pkm_lightning.cli.job import plain
from pkm_lightning.huggingface.loading import load_pretrained


def main() -> None:
    """Reads the arguments, measures, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder or .gguf file")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the text that are read")
    arguments = parser.parse_args()
    overrides = [
        "model=hf",
        f"model.path={arguments.model}",
        "data=text",
        f"data.path={arguments.text}",
        "run_dir=null",
    ]
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        loaded = load_pretrained(plain(compose("config", overrides=overrides)))
    ids = loaded.codec().encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(loaded.model.embedding.num_embeddings, (4, 16), generator=generator)
    facts = {"date": datetime.date.today().isoformat(), "model": arguments.model.name, "torch": torch.__version__}
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*facts, "tokens", "layer", "stream_length", "ffn_input_rms", "ffn_output_length"]
        )
        writer.writeheader()
        for tokens, ids_BT in (("text", torch.tensor([ids])), ("random", drawn)):
            for layer, scales in enumerate(measured(loaded.model, ids_BT)):
                writer.writerow({**facts, "tokens": tokens, "layer": layer, **scales})
    print(arguments.out.read_text())


@torch.no_grad()
def measured(model: Any, ids_BT: Tensor) -> list[dict[str, float]]:
    """Returns the scales of each layer for token ids."""
    layers: list[dict[str, float]] = []
    hooks = []
    for block in model.blocks:
        scales: dict[str, float] = {}
        layers.append(scales)
        hooks += [block.register_forward_pre_hook(partial(_stream, scales))]
        hooks += [block.mlp.register_forward_hook(partial(_ffn, scales))]
    model(ids_BT)
    for hook in hooks:
        hook.remove()
    return layers


def _stream(scales: dict[str, float], _: Any, inputs: tuple[Tensor, ...]) -> None:
    scales["stream_length"] = _median(inputs[0])


def _ffn(scales: dict[str, float], _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    scales["ffn_input_rms"] = round(_median(inputs[0]) / inputs[0].shape[-1] ** 0.5, 4)
    scales["ffn_output_length"] = _median(output)


def _median(x_BTD: Tensor) -> float:
    return round(x_BTD.norm(dim=-1).median().item(), 4)


if __name__ == "__main__":
    main()
