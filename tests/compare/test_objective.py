"""Objectives of sweeps: figures of validation, and which values of them are better."""

from __future__ import annotations

import pytest

from pkm_lightning.compare.objective import ObjectiveError, check_objective, direction_of
from pkm_lightning.errors import ConfigError


@pytest.mark.parametrize(
    ("objective", "mode", "direction"),
    [
        (None, "auto", "minimize"),
        ("val/perplexity", "auto", "minimize"),
        ("val/recall_paraphrase", "auto", "maximize"),
        ("val/bits_question", "auto", "maximize"),
        ("val/recall_control", "min", "minimize"),
        ("eval/piqa_acc", "max", "maximize"),
    ],
)
def test_recall_is_maximised_and_loss_minimised(objective: str | None, mode: str, direction: str) -> None:
    assert direction_of(objective, mode) == direction


def test_a_direction_that_nobody_knows_is_asked_for() -> None:
    with pytest.raises(ObjectiveError, match=r"objective=val/mine: .* set objective_mode=min or max"):
        direction_of("val/mine")
    with pytest.raises(ConfigError, match="objective_mode='down' is not known"):
        direction_of("val/loss", "down")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("test/recall_seen", "objective=test/recall_seen is a figure of the test.*Did you mean val/recall_seen"),
        ("train/loss", "objective=train/loss is a figure of training.*Did you mean 'val/loss'"),
        ("recall_seen", "objective=recall_seen is no figure of validation.*Did you mean val/recall_seen"),
        ("val/", "objective=val/ is no figure of validation"),
        ("loss", "objective=loss is no figure of validation"),
    ],
)
def test_what_is_no_figure_of_validation_is_refused(objective: str, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        check_objective("objective", objective)


def test_figures_of_validation_are_accepted() -> None:
    for objective in ("val/loss", "val/recall_seen", "val/mine", "eval/piqa_acc"):
        check_objective("objective", objective)
