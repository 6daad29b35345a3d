"""What the starting model answers, alone and with the facts in its prompt: the floor and the ceiling of the methods."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from commands import fit
from plans import Plan
from records import read, write
from tasks import chains, further_questions

import pkm_lightning
from pkm_lightning.adaptation.facts_file import Fact, read_facts
from pkm_lightning.adaptation.questions import first_of_each_form, questions_about, recall_by_form
from pkm_lightning.adaptation.retention import parameter_digests
from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.data.base import RecallItem, answer_ids
from pkm_lightning.data.facts.invented_files import FACTS
from pkm_lightning.inference.generation import greedy
from pkm_lightning.inference.recall import normalise

_QUESTIONS_AT_ONCE = 8


def prepare_start(
    plan: Plan, start: str, overrides: Sequence[str] | None, task: Path, seed: int, log: Path, record: Path
) -> None:
    """Trains a starting model that is missing, and writes what it answers: `alone` and `in_context`, by form.

    In context the prompt begins with the fact as a sentence, or with both facts of a question of two. Then an answer
    is right that begins with the truth: a model that was not taught to stop goes on. `digests` are of the weights, of
    each model that this was measured or continued with: several mean that a later training gave another model.

    Args:
        plan: the model.
        start: its place.
        overrides: of `fit`, which trains it if it is missing; None for one that is there.
        task: folder of the facts of `seed`.
        seed: also the draw of the facts.
        log: for the output of the command.
        record: the file that is written.

    Raises:
        CommandFailed: `fit` ended with an error.
    """
    if overrides is not None:
        fit(Path(start), log, overrides)
    # An edit that was interrupted may have been left in it.
    loaded = pkm_lightning.load(start, edits=[])
    digest, content = _digest(loaded), read(record)
    if content is None:
        content = {**_answers(plan, loaded, task, seed), "digests": [digest]}
    elif digest not in content["digests"]:
        content["digests"].append(digest)
    write(record, content)


def _digest(loaded: LoadedModel) -> str:
    """Returns a SHA-256 over the names and bits of all parameters."""
    digest = hashlib.sha256()
    for name, hashes_R in sorted(parameter_digests(dict(loaded.model.named_parameters())).items()):
        digest.update(name.encode() + hashes_R.numpy().tobytes())
    return digest.hexdigest()


def _answers(plan: Plan, loaded: LoadedModel, task: Path, seed: int) -> dict[str, dict[str, float]]:
    codec = loaded.codec()
    items = questions_about(read_facts(task / FACTS))
    for file in further_questions(task):
        items += questions_about(read_facts(file), file.stem)
    alone = first_of_each_form(items, plan.questions)
    measured = {"alone": recall_by_form(loaded.model, codec, alone, device=loaded.device), "in_context": {}}
    for form, pairs in _with_context(plan, task, seed).items():
        prompts = [f"{context}\n{item.prompt}" for context, item in pairs]
        longest = max(len(answer_ids(codec, item.answer)) for _, item in pairs)
        with torch.no_grad():
            answers = greedy(loaded.model, codec, prompts, device=loaded.device, max_new_tokens=longest + 2)
        right = [
            normalise(answer).startswith(normalise(item.answer))
            for answer, (_, item) in zip(answers, pairs, strict=True)
        ]
        measured["in_context"][form] = sum(right) / len(right)
    return measured


@dataclass(frozen=True)
class Benchmarks:
    """Public question sets for lm-evaluation-harness: names of tasks, their folder, and questions per task."""

    tasks: tuple[str, ...]
    folder: Path
    limit: int

    def overrides(self, step: int) -> list[str]:
        """Returns the overrides of a run that is scored after `step`."""
        return [
            f"callbacks.evaluate.tasks=[{','.join(self.tasks)}]",
            f"callbacks.evaluate.tasks_dir={self.folder}",
            f"callbacks.evaluate.limit={self.limit}",
            f"callbacks.evaluate.every_n_steps={step}",
        ]

    def write_scores(self, start: str, record: Path) -> None:
        """Writes the scores of the starting model by the names that a run logs."""
        # An extra, which takes seconds to import.
        from pkm_lightning.inference.harness import HarnessModel
        from pkm_lightning.inference.harness_results import run_tasks, scores_of
        from pkm_lightning.inference.harness_tasks import load_tasks

        loaded = pkm_lightning.load(start)
        model = HarnessModel(
            loaded.model,
            loaded.codec(),
            context=loaded.context,
            device=loaded.device,
            batch_size=_QUESTIONS_AT_ONCE,
            progress=False,
        )
        tasks = load_tasks(list(self.tasks), tasks_dir=self.folder, num_fewshot=None)
        results = run_tasks(model, tasks, limit=self.limit, bootstraps=0, progress=False)
        write(record, {f"eval/{score.task}_{score.metric}": score.value for score in scores_of(results)})


def _with_context(plan: Plan, task: Path, draw: int) -> dict[str, list[tuple[str, RecallItem]]]:
    """Returns questions with the sentences that answer them, by form."""
    pairs: dict[str, list[tuple[str, RecallItem]]] = {}
    for context, item in _facts_in_context(task):
        pairs.setdefault(item.form, []).append((context, item))
    for chain in chains(plan, draw):
        context = " ".join(fact.sentence for fact in chain.facts)
        (item,) = questions_about([Fact(chain.question, chain.answer)], "composition")
        pairs.setdefault("composition", []).append((context, item))
    return {form: entries[: plan.questions] for form, entries in pairs.items()}


def _facts_in_context(task: Path) -> Iterator[tuple[str, RecallItem]]:
    for fact in read_facts(task / FACTS):
        for item in questions_about([fact]):
            if item.form != "seen":
                yield f"{fact.prompt} {fact.answer}.", item
