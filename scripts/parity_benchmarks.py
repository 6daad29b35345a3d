"""Scores a pretrained model on tasks of lm-evaluation-harness by `model=hf` and by the harness's own `hf` model.

Writes both scores, the largest difference of log-likelihoods and the share of equal answers to a CSV file:

    python scripts/parity_benchmarks.py model.gguf sets --tasks pkm_piqa pkm_nq_open --limit 50 --out parity.csv
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from parity_pretrained import configuration

from pkm_lightning.data.base import begin_ids
from pkm_lightning.data.pretrained_files import weights_alone
from pkm_lightning.huggingface.loading import load_pretrained
from pkm_lightning.inference.harness import HarnessModel
from pkm_lightning.inference.harness_results import run_tasks, scores_of
from pkm_lightning.inference.harness_tasks import load_tasks

BATCH_SIZE = 8


def main() -> None:
    """Reads the arguments, scores, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder or .gguf file")
    parser.add_argument("tasks_dir", type=Path, help="folder of tasks, as prepare writes it")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks")
    parser.add_argument("--limit", type=int, default=50, help="questions per task, the first ones")
    parser.add_argument("--num_fewshot", type=int, default=None, help="solved examples before each question")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    arguments = parser.parse_args()
    facts = {
        "date": datetime.date.today().isoformat(),
        "model": arguments.model.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": lm_eval.__version__,
    }
    package, reference = package_model(arguments.model), reference_model(arguments.model)
    for task in arguments.tasks:
        package.kept, reference.kept = [], []  # type: ignore[attr-defined]
        (first, seconds), (second, reference_seconds) = (scored(lm, task, arguments) for lm in (package, reference))
        agreement = compared(package.kept, reference.kept)  # type: ignore[attr-defined]
        times = {"seconds": f"{seconds:.0f}", "reference_seconds": f"{reference_seconds:.0f}"}
        for score, expected in zip(first, second, strict=True):
            assert (score.task, score.metric) == (expected.task, expected.metric)
            scores = {
                "package": f"{score.value:.4f}",
                "reference": f"{expected.value:.4f}",
                "stderr": f"{score.stderr or 0:.4f}",
            }
            add(
                arguments.out,
                {
                    **facts,
                    "task": task,
                    "num_fewshot": arguments.num_fewshot,
                    "metric": score.metric,
                    "n": score.n,
                    **scores,
                    **agreement,
                    **times,
                },
            )


def add(path: Path, row: dict[str, Any]) -> None:
    """Adds a line to a CSV file, which begins with the names of the columns."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def package_model(path: Path) -> LM:
    """Returns the model as this package evaluates it."""
    loaded = load_pretrained(configuration(path))
    codec = loaded.codec()
    return keeping(HarnessModel)(
        loaded.model,
        codec,
        context=loaded.context,
        device=loaded.device,
        batch_size=BATCH_SIZE,
        **begin_ids(codec),
    )


def reference_model(path: Path) -> LM:
    """Returns the model as the harness reads it with transformers."""
    settings = {"dtype": "float32", "device": "cpu", "batch_size": BATCH_SIZE}
    if path.is_dir():
        return keeping(HFLM)(pretrained=str(path), **settings)
    # Its tokenizer too is that of the GGUF file, whatever lies beside that.
    with weights_alone(path) as arguments:
        place, name = arguments["pretrained_model_name_or_path"], arguments["gguf_file"]
        return keeping(HFLM)(pretrained=place, gguf_file=name, **settings)


def keeping(cls: type) -> Any:
    """Returns a subclass of an adapter that keeps its answers in `kept`."""

    class Keeping(cls):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            answers = super().loglikelihood(requests, disable_tqdm)
            self.kept += [answer[0] for answer in answers]
            return answers

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            answers = super().generate_until(requests, disable_tqdm)
            self.kept += answers
            return answers

    return Keeping


def scored(lm: LM, task: str, arguments: argparse.Namespace) -> tuple[list[Any], float]:
    """Returns the scores of one task and the seconds that they took."""
    start = time.perf_counter()
    tasks = load_tasks((task,), tasks_dir=arguments.tasks_dir, num_fewshot=arguments.num_fewshot)
    scores = scores_of(run_tasks(lm, tasks, limit=arguments.limit))
    return scores, time.perf_counter() - start


def compared(package: list[Any], reference: list[Any]) -> dict[str, str]:
    """Returns the largest difference of log-likelihoods, or the share of equal texts."""
    pairs = list(zip(package, reference, strict=True))
    numbers = [abs(a - b) for a, b in pairs if isinstance(a, float)]
    texts = [a == b for a, b in pairs if isinstance(a, str)]
    return {
        "max_difference": f"{max(numbers):.2e}" if numbers else "",
        "equal_answers": f"{sum(texts) / len(texts):.3f}" if texts else "",
    }


if __name__ == "__main__":
    main()
