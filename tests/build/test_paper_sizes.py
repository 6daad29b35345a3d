"""Presets and experiments against the parameters that "Memory Layers at Scale" (arXiv 2412.09764) prints.

The closed forms here use none of the package's counts. Letters: D model dimension, G dimension of keys and values of
attention, F of the FFN, Q of a query, S sub-keys per half.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from tree import ROOT

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.build.variants import variants
from pkm_lightning.model import model_cost

PAGE = ROOT / "docs" / "presets.md"
#: Layers, D, G, F and vocabulary of each base, whose embedding and unembedding are two matrices.
BASES = {
    "134m": (12, 768, 768, 2048, 32_000),
    "373m": (24, 1024, 1024, 2816, 32_000),
    "720m": (22, 1536, 1536, 4096, 32_000),
    "1.3b": (22, 2048, 2048, 5632, 32_000),
    "8b": (32, 4096, 1024, 14_336, 128_256),
}
#: Table 1: billions of parameters. The row of Memory+ 1m repeats the figure of Memory, which is not that of its model.
PRINTED = {
    "dense": "1.3",
    "moe": "3.545",
    "peer": "3.646",
    "memory": "3.377",
    "memory_plus": "3.377",
    "memory_plus_4m": "9.823",
    "memory_plus_16m": "35.618",
    "memory_plus_64m": "138.748",
}
HEADS = 4


def attention(base: str) -> int:
    _, dim, keys, _, _ = BASES[base]
    return 2 * dim * (dim + keys)


def ffn(base: str) -> int:
    _, dim, _, hidden, _ = BASES[base]
    return 3 * dim * hidden


def matrices(base: str, in_place_of_ffns: int = 0, added: int = 0) -> int:
    """Counts all parameters but the gains of norms, with `added` ones `in_place_of_ffns`."""
    layers, dim, _, _, vocabulary = BASES[base]
    return layers * attention(base) + (layers - in_place_of_ffns) * ffn(base) + 2 * vocabulary * dim + added


def addressing(dim: int, query: int, sub_keys: int) -> int:
    """Counts the queries' matrix and bias, and the sub-keys of both halves of every head."""
    return HEADS * query * (dim + 1) + HEADS * sub_keys * query


def by_formula(base: str, variant: str) -> int:
    layers, dim, _, _, _ = BASES[base]
    if variant == "dense":
        return matrices(base)
    if variant == "moe":
        experts = {"134m": 16, "373m": 8, "720m": 6, "1.3b": 4}[base]
        return matrices(base, layers, layers * experts * (ffn(base) + dim))
    if variant == "peer":
        return matrices(base, 1, 2 * 768**2 * dim + addressing(dim, 256, 768))
    if variant == "memory":
        return matrices(base, 1, 1024**2 * dim + addressing(dim, 256, 1024))
    sub_keys = {"memory_plus": 1024, "memory_plus_4m": 2048, "memory_plus_16m": 4096, "memory_plus_64m": 8192}[variant]
    sub_keys = 4096 if base == "8b" else sub_keys
    return matrices(base, 3, sub_keys**2 * dim + 3 * (2 * dim**2 + addressing(dim, dim // 2, sub_keys)))


@functools.cache
def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        return compose(name, overrides=list(overrides))


def experiment(base: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants of `experiment=paper_BASE` and their configurations, of which only FFNs are composed anew."""
    shared = composed("compare", f"experiment=paper_{base}")
    for name, own in shared.variants.items():
        of_ffn = composed("config", f"ffn={own['ffn']}")
        settings = OmegaConf.merge(of_ffn, {"model": shared.model})
        for key, value in own.items():
            if key != "ffn":
                OmegaConf.update(settings, key, value)
        resolved: Any = OmegaConf.to_container(settings, resolve=True)
        yield name, resolved


@pytest.mark.parametrize("base", BASES)
def test_models_of_the_paper_have_its_sizes_and_the_page_lists_them(base: str) -> None:
    page = PAGE.read_text()
    counted = {}
    for variant, settings in experiment(base):
        model = build_meta_model(settings)
        total = model_cost(model, 1).params_total
        gains = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
        assert total - gains == by_formula(base, variant), variant
        printed = PRINTED[variant] if base == "1.3b" else ""
        if printed:
            digits = len(printed.partition(".")[2])
            reproduced = f"{(total - gains) / 1e9:.{digits}f}" == printed
            assert reproduced is (variant != "memory_plus"), variant
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `paper_{base}` | {variant} |"))
        layers = variants(settings)[0].layers(settings["model"]["n_layers"])
        shown = "all" if len(layers) == BASES[base][0] else ", ".join(map(str, layers))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:] == [shown, f"{total:,}", printed]
        counted[variant] = total
    nominal = float(base[:-1]) * (1e9 if base.endswith("b") else 1e6)
    assert counted["dense"] == pytest.approx(nominal, rel=0.03)
    assert settings["model"]["vocab_size"] == BASES[base][-1]
    if "moe" in counted:  # the paper takes as many experts as exceed Memory
        assert counted["moe"] > counted["memory"]


def test_the_page_lists_no_other_experiment() -> None:
    listed = set(re.findall(r"^\| `(paper_[^`]+)` ", PAGE.read_text(), re.M))
    assert listed == {path.stem for path in Path(ROOT / "configs" / "experiment").glob("paper_*.yaml")}
