"""`edit` as a method: the first facts of B written into a model, what that costs, and their exact removal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import fit, run_command
from plans import Plan
from records import write
from tasks import further_questions

import pkm_lightning
from pkm_lightning.adaptation.facts_file import read_facts
from pkm_lightning.adaptation.questions import first_of_each_form, known_questions, questions_about, recall_by_form
from pkm_lightning.adaptation.retention import (
    bytes_changed,
    drift,
    parameter_digests,
    sample_of_run,
    sample_of_text,
    start_log_probabilities,
)
from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.data.base import Batch, RecallItem
from pkm_lightning.data.facts.invented_files import FACTS
from pkm_lightning.data.held_out import HELD_OUT
from pkm_lightning.storage import write_beside

_NAME = "study"


def edit_start(
    plan: Plan, run: Path, overrides: Sequence[str] | None, task: Path, text: Path | None, log: Path, record: Path
) -> None:
    """Writes the figures of an edit of `plan.edited_facts` facts; the run is as before afterwards.

    Args:
        plan: the model.
        run: one with a value table.
        overrides: of `fit`, which trains it if it is missing; None for one that is there.
        task: folder of the facts.
        text: other text for loss and KL; None for the held-out data of `run`.
        log: for the output of the commands.
        record: file of the figures.

    Raises:
        CommandFailed: a command ended with an error.
    """
    if overrides is not None:
        fit(run, log, overrides)
    facts = (task / FACTS).read_text(encoding="utf-8").splitlines(keepends=True)[: plan.edited_facts]
    file = edited_facts(task)
    write_beside(file, "".join(facts))
    before = pkm_lightning.load(run, edits=[])
    sample = _sample(plan, before, run, text)
    start_MW = start_log_probabilities(before.model, sample, device=before.device)
    digests = parameter_digests(dict(before.model.named_parameters()))
    known = first_of_each_form(known_questions(str(run), "run")[0], plan.questions)
    learned = questions_about(read_facts(file))
    further = [item for path in further_questions(task) for item in questions_about(read_facts(path), path.stem)]
    items = [*learned, *first_of_each_form(further, plan.questions)]
    figures: dict[str, Any] = {
        "facts": len(facts),
        "before": _recall(before, items),
        "known_before": _recall(before, known),
    }
    loss_before, _ = drift(before.model, sample, start_MW, device=before.device)
    wall, processor = time.monotonic(), time.process_time()
    run_command(log, "edit", f"run_dir={run}", f"facts={file}", f"name={_NAME}", "overwrite=true", *plan.edit)
    figures["seconds"] = round(time.process_time() - processor, 1)
    figures["wall"] = round(time.monotonic() - wall, 1)
    figures["bytes"] = (run / "edits" / f"{_NAME}.safetensors").stat().st_size
    edited = pkm_lightning.load(run)
    loss, kl = drift(edited.model, sample, start_MW, device=edited.device)
    figures |= {"learned": _recall(edited, items), "known": _recall(edited, known)}
    figures |= {"loss_change": loss - loss_before, "kl": kl}
    run_command(log, "edit", "remove", f"run_dir={run}", f"name={_NAME}")
    after = pkm_lightning.load(run)
    changed = bytes_changed(dict(after.model.named_parameters()), digests)
    again, _ = drift(after.model, sample, start_MW, device=after.device)
    figures["removed_exactly"] = changed == 0 and again == loss_before
    write(record, figures)


def edited_facts(task: Path) -> Path:
    """Returns the file of the facts of `task` that are edited; beside its folder, which holds nothing else."""
    return task.with_name(f"{task.name}-edited.jsonl")


def _recall(loaded: LoadedModel, items: Sequence[RecallItem]) -> dict[str, float]:
    return recall_by_form(loaded.model, loaded.codec(), items, device=loaded.device)


def _sample(plan: Plan, loaded: LoadedModel, run: Path, text: Path | None) -> list[Batch]:
    if text is None:
        return sample_of_run(loaded.tokenizer, run / HELD_OUT, plan.positions)  # type: ignore[arg-type]
    return sample_of_text(loaded.codec(), text.read_text(encoding="utf-8"), positions=plan.positions, seq_len=128)
