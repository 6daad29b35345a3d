"""Where the scores of `evaluate` go: the harness's JSON, the run's TensorBoard and record, a table on the screen."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import pkm_lightning
from pkm_lightning.cli.run_directory import add_to_record
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.inference.harness_settings import HarnessSettings
from pkm_lightning.storage import write_beside
from pkm_lightning.training.machine import now

if TYPE_CHECKING:
    from pkm_lightning.build.loading import LoadedModel
    from pkm_lightning.inference.harness_results import Score

_log = logging.getLogger(__name__)


def write_json(path: Path, results: Mapping[str, Any], loaded: LoadedModel, settings: HarnessSettings) -> None:
    """Writes the results as the harness's own command does, with the model and the settings under `config`."""
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    config = {
        "model": "pkm_lightning",
        "model_args": {"path": str(loaded.path), "context": loaded.context, "edits": _edits(loaded)},
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "batch_size": settings.batch_size,
        "device": str(loaded.device),
    }
    versions = {"lm_eval_version": lm_eval.__version__, "pkm_lightning_version": pkm_lightning.__version__}
    content = {**results, "config": config, "date": now(), **versions}
    text = json.dumps(content, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_beside(path, text + "\n")


def _edits(loaded: LoadedModel) -> list[str]:
    return [] if loaded.edits is None else list(loaded.edits.applied)


def keep_in_run(folder: Path, loaded: LoadedModel, scores: Sequence[Score], results: Mapping[str, Any]) -> None:
    """Adds the scores to the record and the TensorBoard folder of the run that `loaded` belongs to."""
    step = int(loaded.path.stem.removeprefix("step-"))
    by_task: dict[str, dict[str, Any]] = {}
    for score in scores:
        shots = results.get("n-shot", {}).get(score.task)
        kept = by_task.setdefault(score.task, {"step": step, "n": score.n, "num_fewshot": shots})
        if edits := _edits(loaded):
            kept["edits"] = edits
        kept[score.metric], kept[f"{score.metric}_stderr"] = score.value, score.stderr
    try:
        add_to_record(folder, "evaluation", by_task)
    except RunDirectoryError as error:
        _log.warning("the scores are not in run.json: %s", error)
    board = folder / "tensorboard"
    if board.is_dir():
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(board)) as writer:
            for score in scores:
                writer.add_scalar(f"eval/{score.task}_{score.metric}", score.value, step)


def show(scores: Sequence[Score]) -> None:
    """Prints one row per figure."""
    table = Table()
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("value", "stderr", "n"):
        table.add_column(name, justify="right")
    for score in scores:
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        # A perplexity may be large.
        value = f"{score.value:.4f}" if abs(score.value) < 1e5 else f"{score.value:.4g}"
        table.add_row(score.task, score.metric, value, stderr, str(score.n))
    Console(markup=False, emoji=False).print(table)
