"""Damaged and hostile files under a report: refused in a sentence, or one failed run and no traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from run_folders import FakeRun
from studies import SETTINGS

from pkm_lightning.compare import plots, report
from pkm_lightning.compare.records import read_runs
from pkm_lightning.compare.run_files import read_yaml
from pkm_lightning.compare.study import make_study
from pkm_lightning.errors import RunDirectoryError

_NO_SWEEP = '{"schema": 1, "command": [], "base": [], "sweep": {"results": {}}}'


_WHOLE: dict[str, Any] = {
    "schema": 1,
    "command": ["compare"],
    "base": ["seed=1"],
    "arms": {"a": ["ffn=pkm"]},
    "seeds": [1],
    "sweep": {
        "learning_rates": [1, 2e-3], "seeds": [1001], "data_seed": 0, "metric": "test/loss",
        "results": {"a": {"0.002": 1.5, "1": None}}, "chosen": {"a": 0.002},
    },
    "seconds": None,
    "steps_per_second": {"a": 3},
    "failures": {"a/seed-1": "killed"},
    "earlier": [["compare"]],
}  # fmt: skip


def _sweep(**changes: Any) -> dict[str, Any]:
    return {"sweep": {**_WHOLE["sweep"], **changes}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"schema": 0}', "it has schema 0"),
        ('{"schema": true}', "it has schema True"),
        (_NO_SWEEP, r"sweep\.learning_rates"),
        ('{"schema": 1, "command": []}', "base is missing"),
        ({"colour": "red"}, "colour"),
        ({"command": "compare"}, "command"),
        ({"base": [1]}, "base"),
        ({"arms": {"a": "ffn=pkm"}}, "arms"),
        ({"seeds": [1.5]}, "seeds"),
        ({"seeds": {"1": 1}}, "seeds"),
        ({"seconds": "60"}, "seconds"),
        ({"steps_per_second": {"a": float("inf")}}, "steps_per_second"),
        ({"steps_per_second": {"a": 10**400}}, "steps_per_second"),
        ({"steps_per_second": {"a": True}}, "steps_per_second"),
        ({"failures": {"a": 3}}, "failures"),
        ({"failures": {"../../b": "killed"}}, "failures names"),
        ({"earlier": ["compare"]}, "earlier"),
        (_sweep(learning_rates="1e-3"), r"sweep\.learning_rates"),
        (_sweep(results={"a": [1.5]}), r"sweep\.results"),
        (_sweep(results={"a": {"1": "low"}}), r"sweep\.results"),
        (_sweep(chosen={"a": None}), r"sweep\.chosen"),
        ({"sweep": []}, "sweep"),
    ],
)
def test_a_damaged_comparison_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    FakeRun("a", 1).write(tmp_path)
    (tmp_path / "compare.json").write_text(content if isinstance(content, str) else json.dumps({**_WHOLE, **content}))
    with pytest.raises(RunDirectoryError, match=rf"compare\.json is damaged \(.*{reason}.*\); remove it"):
        read_runs([tmp_path])


def test_a_comparison_of_a_newer_version_is_not_called_damaged(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path)
    (tmp_path / "compare.json").write_text(json.dumps(_WHOLE))
    assert read_runs([tmp_path])[1][0].steps_per_second == {"a": 3}
    (tmp_path / "compare.json").write_text(json.dumps({**_WHOLE, "schema": 2, "new": 1}))
    with pytest.raises(RunDirectoryError, match=r"written by a newer version.*schema 2, this one reads 1") as refused:
        read_runs([tmp_path])
    assert "remove" not in str(refused.value)


def test_damaged_files_make_their_run_fail_and_no_other(tmp_path: Path) -> None:
    config = FakeRun("a", 1).write(tmp_path) / "config.yaml"
    record = FakeRun("b", 1).write(tmp_path) / "run.json"
    FakeRun("c", 1).write(tmp_path)
    config.write_text("{")
    record.write_text("{")
    runs, _ = read_runs([tmp_path])
    assert [run.failure for run in runs] == ["config.yaml is missing or damaged", "no record of a run", ""]


def test_records_with_other_kinds_of_values_affect_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "all_plots", lambda study: ())
    FakeRun("whole", 1, n_facts=10).write(tmp_path / "runs")
    for key in (
        "params.total",
        "flops_per_token.trunk.train",
        "tokens",
        "seconds.train",
        "metrics",
        "peak_memory_bytes",
    ):
        for number, value in enumerate(["x", [], {}, {"a": [1]}, True, 10**400, math.inf]):
            file = FakeRun(f"{key}-{number}", 1, n_facts=10).write(tmp_path / "runs") / "run.json"
            record = node = json.loads(file.read_text())
            *parents, last = key.split(".")
            for name in parents:
                node = node[name]
            node[last] = value
            file.write_text(json.dumps(record))
    study = make_study([tmp_path / "runs"], SETTINGS)
    report.write_report(study, tmp_path / "report")
    runs = {run.variant: run for run in study.runs}
    assert runs.pop("whole").ok
    # An empty mapping stands where a run has measured nothing.
    failures = {name: run.failure for name, run in runs.items() if not name.endswith("-2")}
    assert len(failures) == 36
    assert all("run.json" in failure for failure in failures.values()), failures


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("recall.csv", b"form,relation\nparaphrase,x\n"),
        ("recall.csv", b"form,relation,prompt,truth,exact,bits,prior_bits,decile\na,b,c,d,1,?,2,3\n"),
        ("metrics.csv", b"step,tokens\n\xff\xfe\n"),
        ("run.json", b'{"status": "finished", "seed": null, "metrics": {}}'),
        ("run.json", b"[" * 100_000),
        ("config.yaml", b"data: 3\nffn: {}\noptim: {lr: 0.1}\nmodel: {dim: 64, n_layers: 3}\n"),
        ("config.yaml", b"ffn: {}\noptim: {lr: 1" + b"0" * 400 + b"}\nmodel: {dim: 64, n_layers: 3}\n"),
        ("config.yaml", b"ffn: " + b"[" * 1_200),
        ("config.yaml", b"ffn: {}\noptim: {lr: high}\nmodel: {dim: 64, n_layers: 3}\n"),
        ("config.yaml", b"- a\n- list\n"),
        ("run.json", b'{"status": "finished", "seed": 1, "metrics": [1], "data": 3}'),
        ("run.json", b'{"status": "failed", "seed": 1, "metrics": [1], "data": 3, "versions": 4, "started": 5}'),
        ("run.json", b'{"status": "failed", "seed": 1, "metrics": {"recall": 5}, "best_validation": 3}'),
        (
            "run.json",
            b'{"status": "failed", "seed": 1, "metrics": {"recall": {"seen": {"by_decile": 3}}}, "params": 1}',
        ),
    ],
)
def test_a_damaged_file_affects_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes
) -> None:
    monkeypatch.setattr(plots, "all_plots", lambda study: ())
    (FakeRun("a", 1).write(tmp_path / "runs") / file).write_bytes(content)
    FakeRun("b", 1).write(tmp_path / "runs")
    study = make_study([tmp_path / "runs"], SETTINGS)
    runs = {run.variant: run for run in study.runs}
    assert runs["a"].failure
    assert runs["b"].ok
    report.write_report(study, tmp_path / "report")


_LAYERS = list(zip("abcdefghi", "bcdefghij", strict=True))
YAML = {
    "aliases": (
        "a: &a [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n"
        + "".join(f"{c}: &{c} [{','.join(['*' + b] * 9)}]\n" for b, c in _LAYERS),
        "aliases stand for more text",
    ),
    "merge keys": (
        "a: &a {k: 1, l: 2}\n" + "".join(f"{c}: &{c} {{<<: [{','.join(['*' + b] * 9)}]}}\n" for b, c in _LAYERS),
        "aliases stand for more text",
    ),
    "long texts": (f"a: &a {'x' * 30_000}\nb: [{','.join(['*a'] * 3_000)}]\n", "aliases stand for more text"),
    "cycle": ("a: &a [*a]\n", "aliases stand for more text"),
    "deep": ("[" * 1_200, "nested too deeply"),
    "large": ("x" * (2**20 + 1), "larger than"),
    "code": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "no date": ("a: 2020-99-99", "month must be"),
    "no number": ("a: !!int ''", "index out of range"),
    "digits": (f"a: {'9' * 5_000}", "5000 digits"),
    "control": ("a: \0", "unacceptable character"),
}


@pytest.mark.parametrize("kind", YAML)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    text, reason = YAML[kind]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_yaml(tmp_path / "config.yaml")


def test_an_alias_that_repeats_little_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(tmp_path / "config.yaml") == {"a": [1, 2], "b": [1, 2]}
