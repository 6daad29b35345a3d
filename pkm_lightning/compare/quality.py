"""The metric that a report is about: recall or bits of one form of questions, or a loss or perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkm_lightning.compare.metric import (
    LOWER_IS_BETTER,
    WITHOUT_TABLE,
    form_of,
    higher_is_better,
    kind_of,
    metric_value,
)
from pkm_lightning.compare.records import Run
from pkm_lightning.compare.run_files import Answers
from pkm_lightning.errors import ConfigError, nearest

# Forms of recall items in words.
_FORMS = {
    "paraphrase": "held-out paraphrases",
    "question": "questions",
    "seen": "statements as seen in training",
    "control": "facts never trained",
    "unseen_template": "unseen wordings",
}
#: Figures of `callbacks.stored_bits` in words.
_STORED = {
    "bits_person": "bits per person",
    "bits_person_clipped": "bits per person, clipped",
    "bits_per_parameter": "bits per parameter",
    "bits_per_active_parameter": "bits per active parameter",
    "bits_per_byte": "bits per byte",
}


@dataclass(frozen=True)
class Quality:
    """A metric of runs.

    Args:
        metric: its name, see `pkm_lightning.compare.metric`.
    """

    metric: str

    @property
    def higher_is_better(self) -> bool:
        """True for recall, bits and choice, False for losses and perplexities."""
        return higher_is_better(self.metric)

    @property
    def label(self) -> str:
        """The metric in words."""
        words = {
            "recall": f"recall of {self._asked}",
            "bits": f"bits per fact, {self._asked}",
            "choice": f"best of four, {self._asked}",
        }
        metric = self.metric.removesuffix(WITHOUT_TABLE)
        if metric in _STORED:
            return _STORED[metric]
        return words.get(kind_of(metric), metric) + (", without table" if metric != self.metric else "")

    @property
    def short_label(self) -> str:
        """The kind of metric in words, for the side of a plot whose title has the rest."""
        return {"recall": "recall", "bits": "bits per fact", "choice": "best of four"}.get(
            kind_of(self.metric), self.label
        )

    @property
    def is_share(self) -> bool:
        """The metric is a share, which reports write in percent."""
        return kind_of(self.metric) in ("recall", "choice")

    @property
    def unit(self) -> str:
        """Unit of a difference between two values, `points` being percentage points; may be empty."""
        return "points" if self.is_share else "bits" if kind_of(self.metric) == "bits" else ""

    @property
    def control(self) -> Quality | None:
        """The same metric on subjects that training never showed: chance; None for losses and for itself."""
        kind, form = kind_of(self.metric), form_of(self.metric)
        return Quality(f"{kind}_control") if kind and form not in ("control", f"control{WITHOUT_TABLE}") else None

    def predicate(self, value: float) -> str:
        """Returns what a variant does in words: `recalls 79.2% of held-out paraphrases`."""
        metric, shown = self.metric.removesuffix(WITHOUT_TABLE), self.format(value)
        words = {
            "recall": f"recalls {shown} of {self._asked}",
            "bits": f"knows {shown} bits per fact ({self._asked})",
            "choice": f"ranks the right one of four options first for {shown} of {self._asked}",
        }
        without = " without its table" if metric != self.metric else ""
        return words.get(kind_of(metric), f"has a {metric} of {shown}") + without

    @property
    def curve(self) -> str:
        """Its column in metrics.csv, written by validations."""
        return f"val/{self.metric}" if kind_of(self.metric) else self.metric.replace("test/", "val/", 1)

    def value(self, run: Run) -> float:
        """Returns the value of a run's final test, or nan if it has none."""
        values = self.per_fact(run)
        return metric_value(run.record.get("metrics") or {}, self.metric) if values is None else float(values.mean())

    def per_fact(self, run: Run) -> np.ndarray | None:
        """Returns the values per question, whose mean is the metric; None where it is no mean over known questions."""
        answers = self._answers(run)
        if answers is None:
            return None
        return answers.exact.astype(np.float64) if kind_of(self.metric) == "recall" else answers.bits

    def prompts(self, run: Run) -> tuple[str, ...]:
        """Returns the questions in the order of `per_fact`."""
        answers = self._answers(run)
        return () if answers is None else answers.prompts

    def format(self, value: float) -> str:
        """Formats a value for a table."""
        if not math.isfinite(value):
            return "-"
        return f"{value:.1%}" if self.is_share else f"{value:.3f}"

    def format_interval(self, low: float, high: float) -> str:
        """Formats the ends of an interval; empty where they are not known."""
        return f"{self.format(low)} to {self.format(high)}" if math.isfinite(low) and math.isfinite(high) else ""

    def format_difference(self, value: float, low: float = math.nan, high: float = math.nan) -> str:
        """Formats a difference in its `unit`, and the ends of its interval in brackets where they are known."""

        def signed(number: float) -> str:
            return f"{100 * number:+.1f}" if self.is_share else f"{number:+.3f}"

        if not math.isfinite(value):
            return "-"
        is_known = math.isfinite(low) and math.isfinite(high)
        return signed(value) + (f" ({signed(low)} to {signed(high)})" if is_known else "")

    @property
    def _asked(self) -> str:
        form = form_of(self.metric.removesuffix(WITHOUT_TABLE))
        return _FORMS.get(form, form.replace("_", " "))

    def _answers(self, run: Run) -> Answers | None:
        # recall.csv has no column for `choice`.
        return run.answers.get(form_of(self.metric)) if kind_of(self.metric) in ("recall", "bits") else None


def choose_quality(metric: str, runs: Sequence[Run]) -> Quality:
    """Returns the metric that `report.metric` names.

    `auto` is the first of these that any run has: recall of held-out paraphrases, test loss, validation loss.

    Raises:
        ConfigError: no finished run has the metric.
    """
    finished = [run for run in runs if run.ok]
    if metric == "auto":
        candidates = (Quality(name) for name in ("recall_paraphrase", "test/loss", "val/loss"))
        present = (quality for quality in candidates if any(math.isfinite(quality.value(run)) for run in finished))
        return next(present, Quality("test/loss"))
    quality = Quality(metric)
    if finished and not any(math.isfinite(quality.value(run)) for run in finished):
        known = {key for run in finished for key in run.record.get("metrics", {})}
        short = {key.removeprefix("test/") for key in known if key.startswith("test/")}
        names = sorted({name for name in short if kind_of(name)} | (known & set(LOWER_IS_BETTER)))
        raise ConfigError(
            f"report.metric={metric} is a metric of no run; allowed: auto, {', '.join(names)}.{nearest(metric, names)}"
        )
    return quality
