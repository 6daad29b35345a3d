"""Which plots a report has, and the numbers on their axes."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_folders import FakeRun, ladder
from studies import study_of

from pkm_lightning.compare import plots
from pkm_lightning.compare.axes import log_axis
from pkm_lightning.compare.plot_style import STYLE, VariantStyles
from pkm_lightning.compare.study import Study

NUMBER = re.compile(r"-?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?( [kMGT]|%)?")
CURVES = {"quality_by_tokens", "quality_by_seconds", "loss_by_tokens", "loss_by_seconds"}
USAGE = {"usage_used_percent", "usage_kl_count"}
BARS = {"bits_per_parameter", "tokens_per_second", "peak_memory_bytes"}


def drawn(study: Study) -> dict[str, Axes]:
    """Draws the panels of a study without writing them."""
    panels = {}
    with mpl.rc_context(STYLE):
        for panel in plots._panels(study, VariantStyles(study)):
            axes = Figure().subplots()
            if panel.draw(axes):
                panels[panel.name] = axes
    return panels


@pytest.fixture(scope="module")
def of_a_ladder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Axes]:
    """Returns the panels of dense models of four sizes, an MoE and Memory+."""
    return drawn(study_of(tmp_path_factory.mktemp("ladder"), *ladder((1,))))


def labels(axes: Axes, name: str) -> list[str]:
    axis = getattr(axes, f"{name}axis")
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    return axis.get_major_formatter().format_ticks(ticks)


def test_plots_whose_axis_says_nothing_are_left_out(tmp_path: Path, of_a_ladder: dict[str, Axes]) -> None:
    uniform = {"config": {"data": {"exposure_distribution": "uniform"}}}
    equal = [FakeRun("dense", 1, 0.4, "Dense", **uniform), FakeRun("memory", 1, 0.8, **uniform)]
    study = study_of(tmp_path / "equal", *equal)
    assert set(drawn(study)) == CURVES | USAGE | BARS, "equal FLOPs, parameters, bytes and exposures"
    costs = {"bytes_per_token": {"decode": 99_000}, "params": {"total": 90_000}}
    study = study_of(tmp_path / "flops", equal[0], FakeRun("memory", 1, 0.8, record=costs, **uniform))
    assert set(drawn(study)) == CURVES | USAGE | BARS | {"quality_by_params_total", "quality_by_bytes_decode"}
    assert set(of_a_ladder) == plots.known_names()
    assert set(drawn(study_of(tmp_path / "alone", equal[0]))) == CURVES | USAGE, "no bars of one variant"
    once = equal[0].write(tmp_path / "once" / "x")
    lines = (once / "metrics.csv").read_text().splitlines()
    (once / "metrics.csv").write_text("\n".join([lines[0], *lines[-2:]]))
    assert set(drawn(study_of(tmp_path / "once"))) == set(), "one validation is no curve"


def test_ticks_are_plain_and_alike(of_a_ladder: dict[str, Axes]) -> None:
    bars = dict.fromkeys(BARS, "x")
    for name, axes in of_a_ladder.items():
        for axis in bars.get(name, "xy"):
            shown = labels(axes, axis)
            assert len(shown) > 1, (name, axis)
            assert not [label for label in shown if not NUMBER.fullmatch(label)], (name, axis, shown)
    for name in ("quality_by_compute", "quality_by_seconds", "quality_by_params_total", "usage_used_percent"):
        assert all(label.endswith("%") for label in labels(of_a_ladder[name], "y"))
    assert labels(of_a_ladder["usage_used_percent"], "y")[:2] == ["55%", "60%"]
    assert labels(of_a_ladder["quality_by_tokens"], "x")[:2] == ["0.2 M", "0.4 M"]
    assert labels(of_a_ladder["quality_by_compute"], "x") == ["0.5 k", "1 k", "2 k"]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (172_800, 1_382_400, ["0.2 M", "0.5 M", "1 M"]),
        (345_000, 352_000, ["346 k", "348 k", "350 k", "352 k"]),
        (200, 4e9, ["100", "10 k", "1 M", "100 M"]),
        (0.0107, 2.4, ["0.01", "0.1", "1"]),
        (0.2, 0.25, ["0.2", "0.21", "0.22", "0.23", "0.24", "0.25"]),
    ],
)
def test_a_logarithmic_axis_has_a_few_round_numbers(low: float, high: float, shown: list[str]) -> None:
    axes = Figure().subplots()
    axes.plot([low, high], [low, high])
    log_axis(axes.xaxis, is_count=low > 1)
    assert labels(axes, "x") == shown
