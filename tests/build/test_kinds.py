"""Kinds of values by annotation: what fits, what is refused, and what the signature of any class declares."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, Optional, TypedDict, Unpack

import lightning as L
import pytest
import torch

from pkm_lightning.build.kinds import Range, check_kind, check_kinds, keyword_annotations
from pkm_lightning.data import TextDataModule
from pkm_lightning.errors import ConfigError
from pkm_lightning.strategies import DDP

if TYPE_CHECKING:
    from fractions import Fraction

Steps = NewType("Steps", int)


class Colour(enum.Enum):
    RED = "red"


class Keys(TypedDict):
    size: Annotated[int, Range(1, 8)]
    name: str


FITS: list[tuple[Any, Any]] = [
    (1, int), (1, float), (1.5, float), (True, bool), ("x", str), (None, None), (None, Optional[int]),  # noqa: UP045
    (3, int | None), ("auto", int | str), ([1, 2], list[int]), ((1, 2), Sequence[int]), ([], Sequence[str]),
    ([0.9, 1], tuple[float, float]), ([1, 2, 3], tuple[int, ...]), ({"a": 1}, Mapping[str, float]), ({}, dict),
    ("a/b", Path), ("red", Colour), ("warn", bool | Literal["warn"]), (8, Annotated[int, Range(1, 8)]), (5, Steps),
    (..., Any), (3, object), ({"_target_": "datetime.timedelta"}, timedelta), (timedelta(1), timedelta),
    ({"size": 3, "name": "x"}, Keys), (1e400, float), ([[1], [2]], list[list[int]]), (print, Callable[[int], int]),
    (0.9, float | torch.Tensor), (2**63 - 1, int),
]  # fmt: skip

REFUSED: list[tuple[Any, Any, str]] = [
    (1.5, int, "key=1.5 is not a whole number."),
    (64.0, int, "key=64.0 is not a whole number; write 64."),
    (True, int, "key=true is not a whole number."),
    (None, int, "key=null is not a whole number."),
    ([1], int | None, r"key=\[1\] is not a whole number or null."),
    ("x", float, "key='x' is not a number."),
    (math.nan, float, "key=nan is not finite; give a number."),
    (True, float, "key=true is not a number."),
    (2**63, int, "key=9223372036854775808 is not a whole number of at most 9223372036854775807."),
    (3, bool, "key=3 is neither true nor false; set key=true or key=false."),
    (2024, str, "key=2024 is not text; if it is meant as text, quote it: \"key='2024'\"."),
    ([2024], list[str], r"key\[0\]=2024 is not text; if it is meant as text, quote it: \"key=\['TEXT',\.\.\.\]\"."),
    (1e3, str, "key=1000.0 is not text; if it is meant as text, quote it: \"key='TEXT'\"."),
    (1e9, Annotated[int, Range(1, 8)], "key=1000000000.0 is not a whole number of at most 8."),
    ("x", Sequence[str], r"key='x' is not a list; write key=\[x\]\.$"),
    ("x", Sequence[int], r"key='x' is not a list\.$"),
    ([0.9], tuple[float, float], r"key=\[0.9\] is not a list of 2."),
    ([0.9, "a"], tuple[float, float], r"key\[1\]='a' is not a number."),
    ([[1], ["a"]], list[list[int]], r"key\[1\]\[0\]='a' is not a whole number."),
    (3, Mapping[str, int], r"key=3 is not a mapping \{KEY: VALUE\}."),
    ({"a": "x"}, dict[str, int], "key.a='x' is not a whole number."),
    (3, Path, "key=3 is not a path."),
    (5, timedelta | None, "key=5 is not a timedelta or null."),
    ("wran", Literal["warn", "skip"], "key='wran' is not known; allowed: warn, skip. Did you mean 'warn'?"),
    (9, Annotated[int, Range(1, 8)], "key=9 is out of range; allowed: 1 to 8."),
    (1e400, Annotated[float, Range(0)], "key=inf is not finite; give a number."),
    (1.5, Steps, "key=1.5 is not a whole number."),
    ({"name": "x"}, Keys, "key.size is missing"),
    ({"size": 9, "name": "x"}, Keys, "key.size=9 is out of range; allowed: 1 to 8."),
    ("a" * 99, int, r"key='a+\.\.\. is not a whole number."),
]


@pytest.mark.parametrize(("value", "annotation"), FITS, ids=str)
def test_fits(value: Any, annotation: Any) -> None:
    check_kind("key", value, annotation)


@pytest.mark.parametrize(("value", "annotation", "message"), REFUSED, ids=str)
def test_refused(value: Any, annotation: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_kind("key", value, annotation)


class Plain:
    """As users write it: an implicit Optional, a name that is imported for type checking only, and no annotation."""

    def __init__(self, size: int = None, share: Fraction = None, other=3, *rest: int):  # type: ignore[no-untyped-def,assignment]  # noqa: RUF013
        self.size = size


class Receives:
    def __init__(self, *, name: str, **keys: Unpack[Keys]) -> None:
        self.name = name


class PassesOn(Receives):
    def __init__(self, depth: int, **options: Any) -> None:
        super().__init__(**options)


def test_the_signature_of_a_users_class_is_all_it_needs() -> None:
    for fitting in ({"size": None, "share": "1/2", "other": "x"}, {"size": 3}):
        check_kinds(Plain, fitting, "ffn")
    with pytest.raises(ConfigError, match=r"ffn\.size='x' is not a whole number"):
        check_kinds(Plain, {"size": "x"}, "ffn")


def test_options_that_are_passed_on_are_those_of_the_base() -> None:
    assert sorted(keyword_annotations(PassesOn)) == ["depth", "name", "size"]
    with pytest.raises(ConfigError, match=r"x\.size=9 is out of range"):
        check_kinds(PassesOn, {"depth": 1, "size": 9}, "x")


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (torch.optim.AdamW, {"betas": 0.9}, r"key\.betas=0.9 is not a list of 2"),
        (torch.optim.AdamW, {"fused": 3}, r"key\.fused=3 is not true or false or null|key\.fused=3"),
        (L.Trainer, {"max_epochs": "x"}, r"key\.max_epochs='x' is not a whole number or null"),
        (L.Trainer, {"deterministic": "maybe"}, r"key\.deterministic='maybe' is not true or false, warn or null"),
        (DDP, {"timeout": 5}, r"key\.timeout=5 is not a timedelta"),
        (TextDataModule, {"seq_len": 64.0}, r"key\.seq_len=64.0 is not a whole number; write 64"),
    ],
)
def test_foreign_classes_and_shared_options(cls: type, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_kinds(cls, config, "key")
