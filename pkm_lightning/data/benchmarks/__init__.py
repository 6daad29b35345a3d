"""Public question sets, read out of packages that carry them, and their tasks for lm-evaluation-harness.

`packages` finds the files and reads members of archives, `records` parses them, `sets` lists what is where, `tasks` has
the prompts and metrics, `prepare` writes JSON lines and YAML. Nothing of a package is installed, executed or unpickled.

A record of an open question is `{"question", "answers"}`, with every accepted answer; one of a choice is
`{"passage", "question", "choices", "gold"}` with the index of the right choice, in the order of the source. Only sets
that have passages have that field.
"""

from __future__ import annotations

from pkm_lightning.data.benchmarks.prepare import MANIFEST, SetReport, prepare_benchmarks

__all__ = ["MANIFEST", "SetReport", "prepare_benchmarks"]
