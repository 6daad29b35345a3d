"""What the starting model answers, alone and with the facts in its prompt: the floor and the ceiling of the methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from plans import Plan
from tasks import chains, further_questions

import pkm_lightning
from pkm_lightning.adaptation.facts_file import Fact, read_facts
from pkm_lightning.adaptation.questions import first_of_each_form, questions_about, recall_by_form
from pkm_lightning.data.base import RecallItem, answer_ids
from pkm_lightning.data.facts.invented_files import FACTS
from pkm_lightning.inference.generation import greedy
from pkm_lightning.inference.recall import normalise
from pkm_lightning.storage import write_beside

_QUESTIONS_AT_ONCE = 8


def measure_start(plan: Plan, start: str, task: Path, draw: int, out: Path) -> dict[str, dict[str, float]]:
    """Returns the shares of right answers by form, `alone` and `in_context`; from `out`, if they are there.

    In context the prompt begins with the fact as a sentence, or with both facts of a question of two. Then an answer
    is right that begins with the truth: a model that was not taught to stop goes on.
    """
    if out.exists():
        content: dict[str, dict[str, float]] = json.loads(out.read_text())
        return content
    loaded = pkm_lightning.load(start)
    codec = loaded.codec()
    items = questions_about(read_facts(task / FACTS))
    for file in further_questions(task):
        items += questions_about(read_facts(file), file.stem)
    alone = first_of_each_form(items, plan.questions)
    measured = {"alone": recall_by_form(loaded.model, codec, alone, device=loaded.device), "in_context": {}}
    for form, pairs in _with_context(plan, task, draw).items():
        prompts = [f"{context}\n{item.prompt}" for context, item in pairs]
        longest = max(len(answer_ids(codec, item.answer)) for _, item in pairs)
        with torch.no_grad():
            answers = greedy(loaded.model, codec, prompts, device=loaded.device, max_new_tokens=longest + 2)
        right = [
            normalise(answer).startswith(normalise(item.answer))
            for answer, (_, item) in zip(answers, pairs, strict=True)
        ]
        measured["in_context"][form] = sum(right) / len(right)
    write_beside(out, json.dumps(measured, indent=1) + "\n")
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

    def scores(self, start: str, out: Path) -> dict[str, float]:
        """Returns the scores of the starting model by the names that a run logs; from `out`, if they are there."""
        if not out.exists():
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
            scores = {f"eval/{score.task}_{score.metric}": score.value for score in scores_of(results)}
            write_beside(out, json.dumps(scores, indent=1) + "\n")
        content: dict[str, float] = json.loads(out.read_text())
        return content


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
