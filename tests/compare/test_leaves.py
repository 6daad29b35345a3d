"""A configuration as leaves, and the same configuration elsewhere."""

from __future__ import annotations

from pkm_lightning.compare.leaves import move_paths, portable_leaves

CONFIG = {
    "run_dir": "/runs/a",
    "resume": "never",
    "callbacks": {"csv": {"path": "/runs/a/metrics.csv"}, "files": ["/runs/a", "/runs/ab/x", 3]},
    "data": {"path": "/runs/ab", "note": "see /runs/a"},
}


def test_paths_under_a_directory_move_with_it_and_no_others() -> None:
    there = move_paths(CONFIG, "/runs/a", "/b")
    assert there["run_dir"] == "/b"
    assert there["callbacks"] == {"csv": {"path": "/b/metrics.csv"}, "files": ["/b", "/runs/ab/x", 3]}
    assert there["data"] == CONFIG["data"]
    assert move_paths(there, "/b", "/runs/a") == CONFIG


def test_what_a_run_is_does_not_depend_on_where_it_lies() -> None:
    leaves = portable_leaves(CONFIG)
    assert leaves == portable_leaves(move_paths(CONFIG, "/runs/a", "/elsewhere"))
    assert not leaves.keys() & {"run_dir", "resume"}
    assert leaves["data.path"] == "/runs/ab"
    assert portable_leaves({"seed": 1}) == {"seed": 1}
