"""The figure that a report is about: recall of a form, bits of a form, or a metric of the test such as its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkm_lightning.compare.metric import LOWER, form_of, higher_is_better, kind_of, value_in
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
        metric: as `pkm_lightning.compare.metric` names it.
    """

    metric: str

    @property
    def higher_is_better(self) -> bool:
        """Recall, bits and choice; of losses and perplexities the lower is better."""
        return higher_is_better(self.metric)

    @property
    def label(self) -> str:
        """The figure in words."""
        form = _FORMS.get(form_of(self.metric), form_of(self.metric).replace("_", " "))
        words = {"recall": f"recall, {form}", "bits": f"bits a fact, {form}", "choice": f"best of four, {form}"}
        return words.get(kind_of(self.metric), self.metric)

    @property
    def curve(self) -> str:
        """Its column in metrics.csv, at validations."""
        return f"val/{self.metric}" if kind_of(self.metric) else self.metric.replace("test/", "val/", 1)

    def value(self, run: Run) -> float:
        """Of a run's final test; nan where it has none."""
        values = self.of_facts(run)
        return value_in(run.record.get("metrics") or {}, self.metric) if values is None else float(values.mean())

    def of_facts(self, run: Run) -> np.ndarray | None:
        """Its value for each question, whose mean it is; None where it is no mean over questions that are known."""
        answers = self._answers(run)
        if answers is None:
            return None
        return answers.exact.astype(np.float64) if kind_of(self.metric) == "recall" else answers.bits

    def prompts(self, run: Run) -> tuple[str, ...]:
        """The questions that `of_facts` is about."""
        answers = self._answers(run)
        return () if answers is None else answers.prompts

    def written(self, value: float) -> str:
        """`value` as a reader wants it."""
        if not math.isfinite(value):
            return "-"
        return f"{value:.1%}" if kind_of(self.metric) in ("recall", "choice") else f"{value:.3f}"

    def _answers(self, run: Run) -> Answers | None:
        return run.answers.get(form_of(self.metric)) if kind_of(self.metric) in ("recall", "bits") else None


def choose_quality(metric: str, runs: Sequence[Run]) -> Quality:
    """The figure that `report.metric` names; for `auto` the first that any run has: recall of held-out paraphrases, the
    loss of the test, or of the last validation.

    Raises:
        ConfigError: a metric that no finished run has.
    """
    finished = [run for run in runs if run.ok]
    if metric == "auto":
        candidates = [Quality(name) for name in ("recall_paraphrase", "test/loss", "val/loss")]
        found = (own for own in candidates if any(math.isfinite(own.value(run)) for run in finished))
        return next(found, Quality("test/loss"))
    quality = Quality(metric)
    if finished and not any(math.isfinite(quality.value(run)) for run in finished):
        known = {key for run in finished for key in run.record.get("metrics", {})}
        short = {key.removeprefix("test/") for key in known if key.startswith("test/")}
        names = sorted({name for name in short if kind_of(name)} | (known & set(LOWER)))
        raise ConfigError(
            f"report.metric={metric} is a figure of no run; allowed: auto, {', '.join(names)}.{nearest(metric, names)}"
        )
    return quality
