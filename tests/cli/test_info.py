"""`info` prints what a configuration costs, and allocates nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import Run

PRESETS = {"134m": 134e6, "373m": 373e6, "720m": 720e6, "1.3b": 1.3e9, "8b": 8.03e9}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_as_large_as_their_names_say(cli: Run, preset: str) -> None:
    shown = cli("info", "ffn=dense", f"model={preset}", "format=json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["params"]["total"] == pytest.approx(PRESETS[preset], rel=0.05)


def test_the_table_and_the_json_agree(cli: Run, tmp_path: Path) -> None:
    figures = json.loads(cli("info", "format=json").out)
    shown = cli("info").out
    assert f"{figures['params']['total']:,} / {figures['params']['active']:,}" in shown
    assert f"{figures['flops_per_token']['train']:,}" in shown
    assert f"{figures['bytes_per_token']['decode']:,}" in shown
    assert figures["table"] == {"rows": 65536, "dim": 64, "bytes": 65536 * 64 * 4}
    assert figures["optimizer_bytes"] == 2 * figures["weight_bytes"] == 8 * figures["params"]["total"]
    assert list(tmp_path.iterdir()) == []


def test_matching_flops_brings_the_trunk_within_two_percent(cli: Run) -> None:
    dense = json.loads(cli("info", "ffn=dense", "format=json").out)
    sized = json.loads(cli("info", "match=flops", "format=json").out)
    assert sized["flops_per_token"]["trunk"]["decode"] == pytest.approx(
        dense["flops_per_token"]["trunk"]["decode"], rel=0.02
    )


def test_a_table_of_64_billion_values_is_described_at_once(cli: Run) -> None:
    shown = cli("info", "model=8b", "ffn.n_keys=4096", "format=json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["params"]["table"] == 4096**2 * 4096
