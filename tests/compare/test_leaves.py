"""A configuration as leaves, and the same configuration in another directory."""

from __future__ import annotations

from pkm_lightning.compare.leaves import move_paths, portable_leaves

CONFIG = {
    "run_dir": "/runs/a",
    "resume": "never",
    "callbacks": {"csv": {"path": "/runs/a/metrics.csv"}, "files": ["/runs/a", "/runs/ab/x", 3]},
    "data": {"path": "/runs/ab", "note": "see /runs/a"},
}


def test_paths_under_a_directory_are_moved_and_no_others() -> None:
    there = move_paths(CONFIG, "/runs/a", "/b")
    assert there["run_dir"] == "/b"
    assert there["callbacks"] == {"csv": {"path": "/b/metrics.csv"}, "files": ["/b", "/runs/ab/x", 3]}
    assert there["data"] == CONFIG["data"]
    assert move_paths(there, "/b", "/runs/a") == CONFIG


def test_portable_leaves_do_not_depend_on_the_directory() -> None:
    leaves = portable_leaves(CONFIG)
    assert leaves == portable_leaves(move_paths(CONFIG, "/runs/a", "/elsewhere"))
    assert not leaves.keys() & {"run_dir", "resume"}
    assert leaves["data.path"] == "/runs/ab"
    assert portable_leaves({"seed": 1}) == {"seed": 1}
