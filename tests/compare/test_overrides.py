"""Overrides of the command line and of variants, read and written."""

from __future__ import annotations

import pytest

from pkm_lightning.compare.overrides import key_of, last_of_each, sets_key


@pytest.mark.parametrize("override", ["optim.lr=1", "+optim.lr=1", "++optim.lr=a=b", "~optim.lr", "~optim.lr=1"])
def test_an_override_sets_its_key_in_every_form(override: str) -> None:
    assert key_of(override) == "optim.lr"
    assert sets_key(["seed=1", override], "optim.lr")


def test_a_key_with_the_same_beginning_is_another_key() -> None:
    assert not sets_key(["optim.lr_factor=1", "optim=sgd"], "optim.lr")


def test_the_last_of_each_key_stays_and_a_deletion_too() -> None:
    assert last_of_each(["ffn=moe", "~callbacks", "+ffn=pkm"]) == ("+ffn=pkm", "~callbacks")
    assert last_of_each(["~callbacks", "callbacks=none"]) == ("~callbacks", "callbacks=none")
    overrides = ["placement=all", "+x=1", "placement=middle", "x=2"]
    assert last_of_each(overrides) == ("placement=middle", "x=2")
