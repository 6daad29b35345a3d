"""Tasks of lm-evaluation-harness run on a model, and the scores that come of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.evaluator import evaluate

from pkm_lightning.inference.harness_tasks import fixed_seeds

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@dataclass(frozen=True)
class Score:
    """One figure of a task.

    Attributes:
        task: name of a task or group.
        metric: such as `acc_norm`, followed by the filter of the answers where a task has several.
        value: the figure.
        stderr: its standard error; None where the harness has none.
        n: questions behind it.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int


def run_tasks(
    lm: LM, tasks: dict[str, Any], *, limit: int | None, bootstraps: int = 100_000, progress: bool = True
) -> dict[str, Any]:
    """Returns the harness's results of a model.

    Args:
        lm: the model.
        tasks: from `load_tasks`.
        limit: first questions of each task that are asked; None for all.
        bootstraps: resamples for standard errors that have no formula; 0 leaves these out.
        progress: whether the harness may show its progress bars.
    """
    # It builds its prompts behind a bar that no argument switches off (lm_eval 0.4.13).
    hidden = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    with fixed_seeds(), hidden:
        results = evaluate(lm, tasks, limit=limit, bootstrap_iters=bootstraps, log_samples=False)
    assert results is not None  # only ranks other than the first have none, and the model calls itself the first
    return dict(results)


def scores_of(results: Mapping[str, Any]) -> list[Score]:
    """Returns the figures of all tasks and groups, in the order of `results`."""
    scores = []
    for task, figures in results["results"].items():
        n = results.get("n-samples", {}).get(task, {}).get("effective") or figures.get("sample_len") or 0
        filters = {key.partition(",")[2] for key in figures if "," in key}
        for key, value in figures.items():
            # A metric is named with its filter; beside them stand names and counts.
            metric, _, answers = key.partition(",")
            if not answers or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{answers}")
            name = metric if len(filters) == 1 else f"{metric}_{answers}"
            scores.append(Score(task, name, float(value), stderr if isinstance(stderr, float) else None, int(n)))
    return scores
