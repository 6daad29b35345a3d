"""The comparison of ways to teach facts: its curves by hand, its report of constructed runs, and all of it in small."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tree import ROOT

from pkm_lightning.adaptation.facts_file import read_facts
from pkm_lightning.data.facts.selection import FactsChoice, choose_facts

FOLDER = ROOT / "scripts" / "adaptation"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Provides `script("curves")`, a module of the comparison, which its command finds beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = {path.stem for path in FOLDER.glob("*.py")}

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    for name in names & sys.modules.keys():
        del sys.modules[name]


def point(curves: Any, step: float, learned: float, recall: float, loss: float = 0.0) -> Any:
    """Returns an evaluation at which A is recalled to `recall` of the 0.8 that it was."""
    figures = dict.fromkeys(curves.FIGURES, math.nan) | {
        "learned_paraphrase": learned, "known_paraphrase": recall, "known_paraphrase_change": recall - 0.8,
        "known_loss": 2 + loss, "known_loss_change": loss, "known_kl": step / 100, "bytes_changed": 5,
    }  # fmt: skip
    return curves.Point(step, 2 * step, 3 * step, figures)


def test_a_curve_is_read_where_it_first_reaches_a_value(script: Any) -> None:
    curves = script("curves")
    curve = [point(curves, *values) for values in ((0, 0.0, 0.8), (10, 0.6, 0.7), (20, 1.0, 0.6), (30, 0.5, 0.4))]
    learned = curves.first_at(curve, "learned_paraphrase", 0.8)
    assert (learned.step, learned.seconds, learned.wall) == (15, 30, 45)
    assert learned.figures["known_kl"] == pytest.approx(0.15)
    assert learned.value("lost") == pytest.approx((0.8 - 0.65) / 0.8)
    assert curves.first_at(curve, "seconds", 40).step == 20
    assert curves.first_at(curve, "step", 30).step == 30
    assert curves.first_at(curve, "step", 31) is None
    assert curves.first_at(curve[:2], "learned_paraphrase", 0.8) is None
    assert curves.first_at([], "step", 1) is None


def test_loss_is_of_recall_or_else_of_perplexity(script: Any) -> None:
    curves = script("curves")
    assert curves.lost(point(curves, 1, 0.0, 0.6).figures) == pytest.approx(0.25)
    without = {**point(curves, 1, 0.0, 0.0, loss=0.1).figures, "known_paraphrase": math.nan}
    assert curves.lost(without) == pytest.approx(math.exp(0.1) - 1)
    start = curves.start_point({"paraphrase": 0.05}, point(curves, 10, 0.6, 0.7, loss=0.3))
    assert (start.step, start.value("learned_paraphrase"), start.value("lost")) == (0, 0.05, 0)
    assert start.figures["known_paraphrase"] == pytest.approx(0.8)
    assert start.figures["known_loss"] == pytest.approx(2.0)


def test_means_have_an_interval_over_seeds(script: Any) -> None:
    spread = script("curves").spread
    mean, low, high = spread([1.0, 2.0, 6.0, math.nan])
    assert (mean, low, high) == (3.0, 1.0, 6.0)
    assert spread([4.0])[0] == 4.0
    assert math.isnan(spread([4.0])[1])
    assert all(map(math.isnan, spread([])))


def test_no_reported_fact_decides_a_setting_and_no_question_is_learned(script: Any, tmp_path: Path) -> None:
    tasks, plans = script("tasks"), script("plans")
    run = FactsChoice(
        people=3600, people_relations=("birth_date", "birth_city", "debut_year"), countries=240,
        country_relations=("capital", "currency"), cities=1000, control_subjects=250, exposures=36,
        exposure_distribution="uniform", zipf_exponent=1.0, max_exposures=2000, question_subjects=0.5,
        question_share=0.3, seed=0, eval_facts=500,
    )  # fmt: skip
    seen = {fact.subject for fact in choose_facts(run)}
    small = {"facts": replace(plans.FACTS, n_facts=30), "smollm2": replace(plans.SMOLLM2, n_facts=30)}
    for plan in small.values():
        folders = [tasks.task_folder(plan, tmp_path, draw) for draw in (0, 1)]
        facts = [read_facts(folder / "facts.jsonl") for folder in folders]
        assert [len(one) for one in facts] == [30, 30]
        assert not {fact.prompt for fact in facts[0]} & {fact.prompt for fact in facts[1]}
        for one, folder in zip(facts, folders, strict=True):
            learned = {json.loads(line)["prompt"] for line in (folder / "train.jsonl").read_text().splitlines()}
            assert len(learned) == 120
            assert not any(fact.question in learned or set(fact.test_prompts) & learned for fact in one)
            assert not any(name in fact.prompt for name in seen for fact in one if plan.task == "ballplayers")


@pytest.fixture
def study(script: Any, tmp_path: Path) -> Any:
    """A comparison of LoRA and full finetuning with two seeds, whose records are those of tries and starting models."""
    plans, records, study_of = script("plans"), script("records"), script("study")
    plan = replace(plans.FACTS, n_facts=6, steps=20, evaluations=2, tries=2, rate_factor=1)
    study = study_of.Study(plan, tmp_path / "runs", tmp_path / "records", range(1, 3), None, ["lora", "full"])
    start = {"alone": {"seen": 0.0, "paraphrase": 0.0, "question": 0.0}, "in_context": {"paraphrase": 0.9}}
    for seed in study.seeds:
        records.write(study.record_file(f"start-{seed}"), {**start, "digests": ["1f"]})
    for method in study.chosen_methods():
        for name, learned in zip(study.tries(method), (0.6, 0.5), strict=True):
            record(script, study, name, [(20, learned, 0.7)])
    return study


def record(
    script: Any, study: Any, name: str, values: list[tuple[float, float, float]], command: list[str] | None = None
) -> None:
    """Writes the record of a run with these steps, shares learned and recalls of A, by default of its command now."""
    curves, records = script("curves"), script("records")
    curve = [records.plain(point(curves, *of_step)) for of_step in values]
    commands = {
        study.run_name(method, seed, old): (method, seed, old)
        for seed in study.seeds
        for method, old in study.variants()
    }
    if command is None:
        command = study.shown(study.command(*commands[name])) if name in commands else []
    content = {"command": command, "trained_bytes": 8000, "cpu_seconds": 70.0, "curve": curve, "device": "abacus"}
    records.write(study.record_file(name), content)


def test_the_report_of_constructed_records(script: Any, study: Any) -> None:
    report = script("report")
    for seed in study.seeds:
        for method, recall in (("lora", 0.3), ("full", 0.2 * seed)):
            if (method, seed) != ("lora", 2):
                record(script, study, f"{method}-{seed}", [(10, 0.6, 0.7), (20, 1.0, recall)])
    path = report.write_report([study], study.records)
    text = path.read_text()
    by_title = {part.splitlines()[0].partition(" of B")[0]: part for part in text.split("### ")[1:]}
    cells = {
        title.split(": ")[-1] if "learning" in title else title.split(":")[0]: {
            row.split(" | ")[0].strip("| "): row.split(" | ") for row in part.splitlines() if row.startswith("| ")
        }
        for title, part in by_title.items()
    }
    # 80% learned half-way between 0.7 and 0.3 of A: 0.5 of 0.8 is left.
    learned = cells["when 80% of the paraphrases"]["LoRA"]
    assert (learned[5], learned[8:11], learned[-1]) == ("37.5", ["15", "30", "45"], "1 of 2 |")
    # 50% where five sixths of the way to the first evaluation are gone.
    assert cells["when 50% of the paraphrases"]["LoRA"][8] == "8"
    assert cells["Equal steps"]["full"][5] == "62.5 (50.0 to 75.0)"
    assert cells["Equal steps"]["full, replay"][-1] == "0 of 2 |"
    assert "| paraphrase | 0.0 | 90.0 |" in text
    assert "finetune.rank=16" in cells["Commands"]["LoRA"][1]
    assert "| LoRA (chosen) | `finetune.rank=16" in text
    assert str(study.folder) not in text
    assert "Runs: abacus, one thread each, at commit unknown." in text
    assert (path.parent / "facts-lost.png").stat().st_size > 5000
    with (path.parent / "curves.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9


def test_a_setting_is_chosen_by_what_is_lost_where_enough_is_learned(script: Any, study: Any) -> None:
    lora = study.chosen_methods()[0]
    names = list(study.tries(lora))
    for values, best in (
        # Harmless, but without learning; the same learned with less lost; nothing learned enough: the most.
        (([(20, 0.1, 0.8)], [(20, 0.9, 0.1)]), 1),
        (([(10, 0.8, 0.6), (20, 0.9, 0.2)], [(10, 0.8, 0.5), (20, 1.0, 0.5)]), 0),
        (([(10, 0.3, 0.8), (20, 0.4, 0.8)], [(10, 0.45, 0.2), (20, 0.2, 0.2)]), 1),
    ):
        for name, of_try in zip(names, values, strict=True):
            record(script, study, name, of_try)
        assert study.setting(lora) == study.tries(lora)[names[best]]


class Inline:
    """Workers that note the names of the jobs and do none, or fail."""

    processes = 2

    def __init__(self, message: str | None = None) -> None:
        self.names: list[str] = []
        self._message = message

    def run(self, jobs: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
        """Yields each job as finished."""
        self.names += jobs
        yield from ((name, self._message) for name in jobs)


def test_only_runs_without_a_record_are_done_with_what_they_start_from(script: Any, study: Any) -> None:
    schedule, workers = script("schedule"), Inline()
    names = [study.run_name(method, seed, old) for seed in study.seeds for method, old in study.variants()]
    for name in names:
        if name != "full-replay-2":
            record(script, study, name, [(20, 0.6, 0.7)])
    schedule.run_all(study, workers)
    assert workers.names == ["start-2", "full-replay-2"]
    study.record_file("full-try1").unlink()
    record(script, study, "full-replay-2", [(20, 0.6, 0.7)])
    record(script, study, "lora-1", [(20, 0.6, 0.7)], command=["optim.lr=9"])
    schedule.run_all(study, again := Inline())
    assert again.names == ["start-1", "full-try1", "lora-1"]
    assert study.curve(study.chosen_methods()[0], 1, False) == []


def test_the_committed_records_are_those_of_the_commands(script: Any, tmp_path: Path) -> None:
    """Else the next report leaves out what has run."""
    study, plans = script("study"), script("plans")
    for plan in (plans.FACTS, replace(plans.SMOLLM2, pretrained="SmolLM2-135M-Instruct.Q4_1.gguf")):
        records = ROOT / "scripts/results/2026-11-30-adaptation" / plan.name
        whole = study.Study(plan, tmp_path, records, range(1, 4), None)
        for (method, replayed), seed in itertools.product(whole.variants(), whole.seeds):
            record = whole.record(whole.run_name(method, seed, replayed))
            assert record is None or whole.run_record(method, seed, replayed) == record


def test_a_failure_is_noted_until_the_run_succeeds(script: Any, study: Any) -> None:
    schedule = script("schedule")
    study.record_file("start-1").unlink()
    with pytest.raises(SystemExit, match="start-1"):
        schedule.run_all(study, Inline("error: no memory"))
    assert study.failures()["start-1"] == "error: no memory"
    schedule.run_all(study, Inline())
    assert study.failures() == {}


def test_records_of_another_plan_are_refused(script: Any, study: Any) -> None:
    records, file = script("records"), study.record_file("plan")
    records.check_plan(file, study.plan)
    records.check_plan(file, replace(study.plan, pretrained=None))
    with pytest.raises(SystemExit, match="another n_facts, steps; give another folder"):
        records.check_plan(file, replace(study.plan, n_facts=7, steps=21))


@pytest.mark.slow
def test_everything_in_small(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from pretrained_models import CONFIGS, VOCAB

    from pkm_lightning.data.tokenizer import bytes_tokenizer

    # Sentences in bytes are longer than the context of the other tiny models.
    settings = {**CONFIGS["llama"].to_dict(), "max_position_embeddings": 512, "vocab_size": VOCAB}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.save_pretrained(tmp_path / "tiny")
    bytes_tokenizer().save(tmp_path / "tiny" / "tokenizer.json")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    command = [
        *(sys.executable, str(FOLDER / "run.py"), "--smoke", "--models", "facts,smollm2", "--model", "tiny"),
        *("--text", "text.txt", "--seeds", "1", "--folder", "runs", "--out", "records"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "records" / "report.md").read_text()
    assert "failed" not in done.stdout + report, report
    assert report.count(" 1 of 1 |") >= 2 * (12 + 6)  # equal steps and equal seconds
    assert "| removed to the last bit, % | 100 |" in report
