"""Names of figures of a final test, which way is better, and their values in run.json's `metrics`.

`recall_FORM`, `bits_FORM` and `choice_FORM` are of questions of a form; of `test/loss` and `test/perplexity` the lower
is the better. Data without a test end with a validation: `val/loss` and `val/perplexity`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pkm_lightning.errors import ConfigError

OF_QUESTIONS = ("recall", "bits", "choice")
LOWER = ("test/loss", "test/perplexity", "val/loss", "val/perplexity")


def kind_of(metric: str) -> str:
    """One of `OF_QUESTIONS`, or an empty string."""
    kind, _, form = metric.partition("_")
    return kind if kind in OF_QUESTIONS and form else ""


def form_of(metric: str) -> str:
    """The form of the questions that a metric is of."""
    return metric.partition("_")[2]


def higher_is_better(metric: str) -> bool:
    """Of what is asked; of losses and perplexities the lower is better."""
    return bool(kind_of(metric))


def value_in(metrics: Mapping[str, Any], metric: str) -> float:
    """The value, nan where it is missing or was not finite."""
    found = metrics.get(f"test/{metric}" if kind_of(metric) else metric)
    return math.nan if isinstance(found, bool) or not isinstance(found, int | float) else float(found)


def check_metric(key: str, metric: str, *more: str) -> str:
    """`metric` by its short name: `test/recall_FORM` is `recall_FORM`.

    Raises:
        ConfigError: it is none of the names above, nor one of `more`.
    """
    short = metric.removeprefix("test/")
    if kind_of(short):
        return short
    if metric not in (*LOWER, *more):
        names = ", ".join((*more, *LOWER, *(f"{kind}_FORM" for kind in OF_QUESTIONS)))
        raise ConfigError(f"{key}={metric} is no figure that can be compared; allowed: {names}.")
    return metric
