"""The figure that a report is about: recall of a form, bits of a form, or a metric of the test such as its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkm_lightning.compare.records import Answers, Run
from pkm_lightning.errors import ConfigError, nearest

#: Forms of recall items in words.
_FORMS = {
    "paraphrase": "held-out paraphrases",
    "question": "questions",
    "seen": "as seen in training",
    "control": "never trained",
    "unseen_template": "unseen wordings",
}


@dataclass(frozen=True)
class Quality:
    """A figure of a run.

    Args:
        metric: `recall_FORM`, `bits_FORM`, or a key of `metrics` in run.json.
    """

    metric: str

    @property
    def higher_is_better(self) -> bool:
        """Recall and bits; of losses and perplexities the lower is better."""
        return self._kind in ("recall", "bits")

    @property
    def label(self) -> str:
        """The figure in words."""
        form = _FORMS.get(self._form, self._form.replace("_", " "))
        return {"recall": f"recall, {form}", "bits": f"bits a fact, {form}"}.get(self._kind, self.metric)

    @property
    def curve(self) -> str:
        """Its column in metrics.csv, at validations."""
        return f"val/{self.metric}" if self._kind in ("recall", "bits") else self.metric.replace("test/", "val/", 1)

    def value(self, run: Run) -> float:
        """Of a run's final test; nan where it has none."""
        values = self.of_facts(run)
        if values is not None:
            return float(values.mean())
        metrics = run.record.get("metrics") or {}
        found = metrics.get(f"test/{self.metric}" if self._kind in ("recall", "bits") else self.metric)
        return math.nan if found is None else float(found)

    def of_facts(self, run: Run) -> np.ndarray | None:
        """Its value for each question, whose mean it is; None where it is no mean over questions."""
        answers = self._answers(run)
        if answers is None:
            return None
        values = answers.exact.astype(np.float64) if self._kind == "recall" else answers.bits
        return values if np.isfinite(values).all() else None

    def prompts(self, run: Run) -> tuple[str, ...]:
        """The questions that `of_facts` is about."""
        answers = self._answers(run)
        return () if answers is None else answers.prompts

    def written(self, value: float) -> str:
        """`value` as a reader wants it."""
        if not math.isfinite(value):
            return "-"
        return f"{value:.1%}" if self._kind == "recall" else f"{value:.3f}"

    @property
    def _kind(self) -> str:
        kind, _, form = self.metric.partition("_")
        return kind if form and "/" not in self.metric else ""

    @property
    def _form(self) -> str:
        return self.metric.partition("_")[2]

    def _answers(self, run: Run) -> Answers | None:
        if self._kind not in ("recall", "bits"):
            return None
        return run.answers.get(self._form)


def choose_quality(metric: str, runs: Sequence[Run]) -> Quality:
    """The figure that `report.metric` names; for `auto` recall of held-out paraphrases where all runs have it.

    Raises:
        ConfigError: a metric that no finished run has.
    """
    finished = [run for run in runs if run.ok]
    if metric == "auto":
        recall = Quality("recall_paraphrase")
        asked = bool(finished) and all(math.isfinite(recall.value(run)) for run in finished)
        return recall if asked else Quality("test/loss")
    quality = Quality(metric)
    if finished and not any(math.isfinite(quality.value(run)) for run in finished):
        forms = {form for run in finished for form in run.answers}
        known = {key for run in finished for key in run.record.get("metrics", {}) if key.startswith("test/")}
        names = sorted({f"{kind}_{form}" for kind in ("recall", "bits") for form in forms} | known)
        raise ConfigError(
            f"report.metric={metric} is a figure of no run; allowed: auto, {', '.join(names)}.{nearest(metric, names)}"
        )
    return quality
