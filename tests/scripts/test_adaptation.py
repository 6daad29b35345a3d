"""The comparison of ways to teach facts: its curves by hand, its report of constructed runs, and all of it in small."""

from __future__ import annotations

import csv
import importlib
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
    return curves.Point(step, 2 * step, figures)


def test_a_curve_is_read_where_it_first_reaches_a_value(script: Any) -> None:
    curves = script("curves")
    curve = [point(curves, *values) for values in ((0, 0.0, 0.8), (10, 0.6, 0.7), (20, 1.0, 0.6), (30, 0.5, 0.4))]
    learned = curves.first_at(curve, "learned_paraphrase", 0.8)
    assert (learned.step, learned.seconds) == (15, 30)
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


def finished(folder: Path, rows: list[dict[str, float]]) -> None:
    """Writes what the report reads of a run."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "trained_bytes": 8000}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_report_of_constructed_runs(script: Any, tmp_path: Path) -> None:
    curves, study_of, report, plans = (script(name) for name in ("curves", "study", "report", "plans"))
    folder = tmp_path / "facts"
    plan = replace(plans.FACTS, n_facts=6, steps=20, evaluations=2, rate_factor=1)
    study = study_of.Study(plan, folder, range(1, 3), None, ["lora", "full"])
    finished(folder / "tuning" / "lora-1", [{"step": 0}])
    for name, setting in {"lora": ["finetune.rank=4", "optim.lr=0.001"], "full": ["optim.lr=0.0001"]}.items():
        (folder / "tuning" / f"{name}.json").write_text(json.dumps({"chosen": setting}))
    (folder / "settings.json").write_text(json.dumps({"lora": ["finetune.rank=4"], "full": ["optim.lr=0.0001"]}))
    for seed in (1, 2):
        start = {"alone": {"seen": 0.0, "paraphrase": 0.0, "question": 0.0}, "in_context": {"paraphrase": 0.9}}
        (folder / f"start-{seed}.json").write_text(json.dumps(start))
        finished(folder / f"start-{seed}", [{"step": 0}])
        for method, kept in (("lora", 0.3), ("full", 0.2 * seed)):
            if (method, seed) != ("lora", 2):
                points = [point(curves, 10, 0.6, 0.7), point(curves, 20, 1.0, kept)]
                rows = [
                    {"step": p.step, "seconds": p.seconds} | {f"val/{k}": v for k, v in p.figures.items()}
                    for p in points
                ]
                finished(folder / f"{method}-{seed}", rows)
    path = report.write_report([study], tmp_path / "out")
    text = path.read_text()
    by_title = {part.splitlines()[0].split(":")[0]: part for part in text.split("### ")[1:]}
    cells = {
        title: {row.split(" | ")[0].strip("| "): row.split(" | ") for row in part.splitlines() if row.startswith("| ")}
        for title, part in by_title.items()
    }
    # 80% learned half-way between 0.7 and 0.3 of A: 0.5 of 0.8 is left.
    assert cells["Equal learning"]["LoRA"][5] == "37.5"
    assert cells["Equal learning"]["LoRA"][8] == "15"
    assert cells["Equal learning"]["LoRA"][-1] == "1 of 2 |"
    assert cells["Equal steps"]["full"][5] == "62.5 (50.0 to 75.0)"
    assert cells["Equal steps"]["full, replay"][-1] == "0 of 2 |"
    assert "| paraphrase | 0.0 | 90.0 |" in text
    assert "finetune.rank=4" in cells["Commands"]["LoRA"][1]
    assert (path.parent / "facts-lost.png").stat().st_size > 5000
    with (path.parent / "curves.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9


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
        *("--text", "text.txt", "--seeds", "1", "--folder", "runs"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    report = next((tmp_path / "runs").glob("*-adaptation/report.md")).read_text()
    assert "failed" not in done.stdout + report, report
    assert report.count(" 1 of 1 |") >= 2 * 2 * 16  # equal steps and equal seconds
    assert "| removed to the last bit, % | 100 |" in report
