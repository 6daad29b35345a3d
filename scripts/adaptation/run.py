"""Teaching a trained model new facts: what each method learns, what it forgets, in one report.

    python scripts/adaptation/run.py [--models facts,smollm2] [--model SmolLM2.gguf] [--text wiki.txt] [--out FOLDER]

Needs: pip install 'pkm_lightning[facts,hf,lora]'. `--models facts` trains and teaches the default model of facts alone.
The same command continues what was stopped, also in another clone that has the folder of records alone; `--smoke` runs
everything on tiny models in few minutes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from measure import Benchmarks
from plans import Plan, plans, smoke
from report import write_report
from schedule import run_all
from study import Study
from workers import Workers

#: Of `prepare data=benchmarks`.
_TASKS = ("pkm_nq_open", "pkm_triviaqa", "pkm_openbookqa")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing and writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", default="facts", help="of: facts, smollm2; separated by commas")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as a .gguf file or a folder")
    parser.add_argument("--text", type=Path, help="plain text for smollm2: nine tenths are old data, one is measured")
    parser.add_argument("--sets", type=Path, help="folder of prepare data=benchmarks, for smollm2")
    parser.add_argument("--limit", type=int, default=50, help="questions per benchmark")
    parser.add_argument("--methods", help="names, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, with one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/adaptation"), help="for runs, which may be lost")
    parser.add_argument("--out", type=Path, help="for records and report; default: results in --folder")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps")
    parser.add_argument("--report", action="store_true", help="the report alone, of what has run")
    parsed = parser.parse_args(arguments)
    out = parsed.out or parsed.folder / "results"
    studies = []
    for plan in plans(parsed.models.split(","), parsed.model):
        if plan.pretrained is not None and parsed.text is None:
            parser.error("--models smollm2 needs --text FILE, a plain text.")
        name = f"{plan.name}-smoke" if parsed.smoke else plan.name
        study = Study(
            smoke(plan) if parsed.smoke else plan,
            parsed.folder / name,
            out / name,
            range(1, parsed.seeds + 1),
            parsed.text,
            parsed.methods.split(",") if parsed.methods else None,
            _benchmarks(parsed.sets, parsed.limit, plan),
        )
        studies.append(study)
    if not parsed.report:
        with Workers(parsed.jobs) as workers:
            for study in studies:
                run_all(study, workers)
    print(f"report: {write_report(studies, out)}")


def _benchmarks(sets: Path | None, limit: int, plan: Plan) -> Benchmarks | None:
    """Returns the question sets for a pretrained model; a model of facts alone answers none of them."""
    return None if sets is None or plan.pretrained is None else Benchmarks(_TASKS, sets, limit)


if __name__ == "__main__":
    main()
