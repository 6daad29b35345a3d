"""Small data sources from the real packages, which all test modules share: each package is read once, each cache
folder built once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.data import FactsDataModule, HfDataModule, JsonlDataModule, TextDataModule
from pkm_lightning.data.facts.subjects import LOADERS

LOADER = {
    "seq_len": 64,
    "global_batch_size": 8,
    "num_workers": 0,
    "order_seed": 3,
    "prompts": [],
    "prompts_file": None,
}
FACTS = {
    "people": 60,
    "people_relations": ["birth_date", "debut_year"],
    "countries": 30,
    "country_relations": ["capital"],
    "cities": 0,
    "control_subjects": 20,
    "exposures": 12,
    "exposure_distribution": "uniform",
    "zipf_exponent": 1.0,
    "max_exposures": 100,
    "question_subjects": 0.5,
    "question_share": 0.3,
    "seed": 0,
    "eval_facts": 40,
    "packing": "documents",
    "loss": "answer",
    "tokenizer": "bpe",
    "vocab_size": 600,
}
PARTS = {"val_path": None, "test_path": None, "test_fraction": 0, "seed": 0, "vocab_size": 300}
TEXT = {
    **PARTS,
    "endings": [".txt", ".md"],
    "document_separator": None,
    "packing": "windows",
    "val_fraction": 0.1,
    "tokenizer": "bpe",
}
RECORDS = {
    **PARTS,
    "text_field": "text",
    "prompt_field": "prompt",
    "answer_field": "answer",
    "messages_field": "messages",
    "chat_template": None,
    "skip_nulls": False,
    "packing": "documents",
    "val_fraction": 0.2,
    "tokenizer": "bytes",
}
JSONL = {**RECORDS, "endings": [".jsonl"]}
HF = {
    **RECORDS,
    "name": None,
    "split": "train",
    "val_split": None,
    "test_split": None,
    "streaming": True,
    "limit": None,
}


@pytest.fixture(scope="session", autouse=True)
def _subjects_read_once() -> Iterator[None]:
    """Keeps the subjects of each domain: reading all people takes most of a second."""
    with pytest.MonkeyPatch.context() as patch:
        for domain, load in LOADERS.items():
            patch.setitem(LOADERS, domain, functools.cache(load))
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def facts(cache_dir: Path) -> Callable[..., FactsDataModule]:
    """Makes a facts DataModule; keywords replace the small defaults."""
    return lambda **changes: FactsDataModule(**{**LOADER, **FACTS, "cache_dir": str(cache_dir), **changes})


@pytest.fixture(scope="session")
def prepared(facts: Callable[..., FactsDataModule]) -> FactsDataModule:
    datamodule = facts()
    datamodule.prepare_data()
    return datamodule


@pytest.fixture
def text(cache_dir: Path) -> Callable[..., TextDataModule]:
    return lambda path, **changes: TextDataModule(
        **{**LOADER, **TEXT, "seq_len": 16, "cache_dir": str(cache_dir), "path": path, **changes}
    )


@pytest.fixture
def jsonl(cache_dir: Path) -> Callable[..., JsonlDataModule]:
    return lambda path, **changes: JsonlDataModule(
        **{**LOADER, **JSONL, "cache_dir": str(cache_dir), "path": path, **changes}
    )


@pytest.fixture
def hf(cache_dir: Path) -> Callable[..., HfDataModule]:
    return lambda path, **changes: HfDataModule(
        **{**LOADER, **HF, "cache_dir": str(cache_dir), "path": path, **changes}
    )


@pytest.fixture(scope="session")
def take() -> Callable[[Any, int], list[Any]]:
    """Returns a function that takes the first n items of an endless iterable."""

    def first(iterable: Any, n: int) -> list[Any]:
        iterator: Iterator[Any] = iter(iterable)
        return [next(iterator) for _ in range(n)]

    return first
