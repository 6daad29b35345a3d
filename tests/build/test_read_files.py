"""Files that a run reads are saved as absolute paths, and may be repeated as they were typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.build.read_files import with_absolute_files
from pkm_lightning.cli.resume import differences, may_change_on_resume

RETENTION = "pkm_lightning.callbacks.Retention"


def nested(key: str, value: Any) -> dict[str, Any]:
    """Returns a configuration with one key."""
    for name in reversed(key.split(".")):
        value = {name: value}
    if "extra_ffns" in value:
        value["table"] = {"path": None}
    if "callbacks" in value:
        value["callbacks"]["retention"]["_target_"] = RETENTION
    return dict(value)


def under(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = node[name]
    return node


@pytest.mark.parametrize(
    "key",
    [
        *("finetune.background", "finetune.background_path", "finetune.replay_path", "table.path"),
        *(f"callbacks.retention.{name}" for name in ("facts", "questions", "known", "text")),
        "extra_ffns.engram.table.path",
    ],
)
def test_a_path_may_be_repeated_as_it_was_typed(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", str(tmp_path))
    typed, same, other = "my/texts.txt", "$HERE/my/texts.txt", "my/others.txt"
    if key.endswith("questions"):
        typed, same, other = ([path] for path in (typed, same, other))  # type: ignore[assignment]
    saved = with_absolute_files(nested(key, typed))
    whole = str(tmp_path / "my" / "texts.txt")
    assert under(saved, key) == ([whole] if key.endswith("questions") else whole)
    assert differences(saved, nested(key, typed)) == differences(saved, nested(key, same)) == []
    changed = differences(saved, nested(key, other))
    assert [text.partition(": ")[0] for text in changed] == ([] if may_change_on_resume(key) else [key])


def test_nothing_else_is_changed() -> None:
    for config in (
        *({}, {"finetune": {}}, {"finetune": None, "callbacks": {"retention": None}}),
        {"finetune": {"background": None, "replay_path": "", "score": "kl"}, "table": {"path": None}},
        {"callbacks": {"other": {"_target_": "mine.Other", "text": "a.txt"}}},
    ):
        assert with_absolute_files(config) == config
