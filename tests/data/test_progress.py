"""Long preparations report bytes, tokens per second and the time left: on a bar, or in the log."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from pkm_lightning.data import heartbeat
from pkm_lightning.data.progress import BuildProgress


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO"), BuildProgress("data.path=x: tokenises", 100_000_000) as progress:
        for done in range(0, 40_000_000, 10_000_000):
            progress.update(done, 1_000_000)
    # 4 s at each look at the clock, two looks per update; the bytes of the first update were read before it.
    assert [record.message for record in caplog.records] == [
        "data.path=x: tokenises: 10.0 of 100.0 MB, 2.0 million tokens, 166,667 tokens/s, 108 s left",
        "data.path=x: tokenises: 30.0 of 100.0 MB, 4.0 million tokens, 142,857 tokens/s, 65 s left",
    ]


def test_what_was_done_before_an_interruption_makes_the_rest_no_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeat, "SECONDS", 0.0)
    progress = BuildProgress("x", 1_000_000)
    progress._heartbeat = heartbeat.Heartbeat(0.0)
    with caplog.at_level("INFO"):
        progress.update(900_000, 0)
        assert "left" not in caplog.text
        time.sleep(0.2)
        progress.update(900_100, 100)
    left = re.search(r", (\d+) min left", caplog.text)
    assert left
    assert int(left[1]) >= 3


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    with BuildProgress("tokenises", 2_000_000) as progress:
        progress.update(1_000_000, 500)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "tokenises" in shown.err
    assert "1.0/2.0 MB" in shown.err
    assert "tokens/s" in shown.err
