"""Names of the metrics of a final test, whether higher or lower is better, and their values in run.json's `metrics`.

`recall_FORM`, `bits_FORM` and `choice_FORM` are measured on questions of one form; higher is better. Losses and
perplexities are better when lower. Data without a test end with a validation: `val/loss` and `val/perplexity`; runs of
a sweep have the figures of their last validation beside the test's, `val/recall_FORM` included. Names of the final test
that end in `_without_table` are the same figures with every read of a value table set to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pkm_lightning.errors import ConfigError

QUESTION_KINDS = ("recall", "bits", "choice")
#: End of the name of a metric that is measured with every read of a value table set to zero.
WITHOUT_TABLE = "_without_table"
LOWER_IS_BETTER = (
    *("test/loss", "test/perplexity", "val/loss", "val/perplexity"),
    *(f"test/loss{WITHOUT_TABLE}", f"test/perplexity{WITHOUT_TABLE}"),
)


def kind_of(metric: str) -> str:
    """Returns one of `QUESTION_KINDS`, or an empty string for a loss or perplexity."""
    kind, _, form = metric.partition("_")
    return kind if kind in QUESTION_KINDS and form else ""


def form_of(metric: str) -> str:
    """Returns the form of the questions that a metric is measured on."""
    return metric.partition("_")[2]


def higher_is_better(metric: str) -> bool:
    """Returns True for metrics of questions, of the test or of validations, False for losses and perplexities."""
    return bool(kind_of(metric.removeprefix("val/")))


def metric_value(metrics: Mapping[str, Any], metric: str) -> float:
    """Returns the value in `metrics`, or nan where it is missing or was not finite (JSON null)."""
    value = metrics.get(f"test/{metric}" if kind_of(metric) else metric)
    return math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def check_metric(key: str, metric: str, *more: str) -> str:
    """Returns `metric` by its short name: `test/recall_FORM` becomes `recall_FORM`.

    Args:
        key: the configuration key that named it.
        metric: the name to check.
        more: further names that are allowed.

    Raises:
        ConfigError: the name is none of the module's, nor one of `more`.
    """
    short = metric.removeprefix("test/")
    if kind_of(short) or kind_of(metric.removeprefix("val/")):
        return short
    if metric not in (*LOWER_IS_BETTER, *more):
        names = ", ".join((*more, *LOWER_IS_BETTER, *(f"{kind}_FORM" for kind in QUESTION_KINDS)))
        raise ConfigError(f"{key}={metric} is not a metric that can be compared; allowed: {names}.")
    return metric
