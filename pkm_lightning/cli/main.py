"""Splits off the verb, lets Hydra compose the configuration, runs the verb, and prints errors in one line.

The module of a verb has `run(job)`; a `PkmError` that it raises reaches the user without a traceback.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pkm_lightning.cli.edit_words import with_action
from pkm_lightning.cli.environment import check_rank_variables
from pkm_lightning.errors import PkmError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from pkm_lightning.cli.sweep_record import JobFailure

VERBS = {
    "fit": "train a model; an interrupted run in the same run_dir is resumed",
    "validate": "loss and recall of a run (run_dir=) or a checkpoint (ckpt=) on the validation data",
    "test": "the same on the full test questions",
    "evaluate": "score a model on tasks=[NAME,...] of lm-evaluation-harness or of your own folder, tasks_dir=DIR",
    "predict": "answer prompt=TEXT or prompts_file=FILE, written as JSON lines; also with several ranks",
    "generate": "continue prompt=TEXT or prompts_file=FILE: greedy or sampled, streamed to the terminal",
    "chat": "talk to a model in the terminal",
    "inspect": "the slots that text=TEXT reads, what they add, who else reads them; without mask=[SLOT,...]",
    "export": "write the weights of ckpt=PATH or run_dir=RUN: file=model.safetensors, or format=hf|ngram dir=FOLDER",
    "edit": "write facts=FILE into a run as a small file of deltas; edit list | show | remove | apply | merge",
    "compare": "train ffn=NAME,NAME,... x seeds=N, one process per run, into out=DIR with one report",
    "prepare": "tokenise data=text data.path=FILES ahead of fit, or into out=DIR; data=benchmarks: sets for evaluate",
    "report": "the report again, from run directories alone: runs=[DIR,...] out=DIR",
    "info": "parameters, FLOPs, bytes and memory; of ffn=NAME,NAME,... and strategy=NAME,NAME,... side by side",
}

#: Configurations of verbs that have keys of their own.
PRIMARY_CONFIGURATIONS = {
    "compare": "compare",
    "report": "compare",
    "predict": "generate",
    "generate": "generate",
    "chat": "generate",
    "evaluate": "evaluate",
    "inspect": "inspect",
    "export": "export",
    "edit": "edit",
    "prepare": "prepare",
}

#: Those with keys whose values are texts.
_WITH_TEXTS = ("generate", "inspect", "edit")

USAGE = """usage: python -m pkm_lightning VERB [KEY=VALUE ...] [-m] [--config-dir=DIR] [--cfg job]

verbs:
{verbs}

examples:
  python -m pkm_lightning fit ffn=dense model=tiny trainer.max_steps=200 seed=1
  python -m pkm_lightning fit -m ffn=dense,memory_plus seed=1,2,3
  python -m pkm_lightning info ffn=dense,moe,memory_plus match=flops
  python -m pkm_lightning compare ffn=dense,moe,memory_plus match=flops seeds=3 out=runs/compared
  python -m pkm_lightning test run_dir=runs/2030-01-31/12-00-00
  python -m pkm_lightning generate run_dir=runs/2030-01-31/12-00-00 prompt="The capital of France is"
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `argv`, by default that of the process.

    Exits with 0 on success, 2 on an error that is the user's to mend, 75 if another process of the run was lost, 129,
    130, 138 or 143 after an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else None
    if verb in (None, "-h", "--help"):
        print(_usage(), file=sys.stderr if verb is None else sys.stdout)
        sys.exit(2 if verb is None else 0)
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}; allowed: {', '.join(VERBS)}.{nearest(str(verb), VERBS)}", file=sys.stderr)
        print("\n" + _usage(), file=sys.stderr)
        sys.exit(2)
    sys.exit(_run(str(verb), arguments[1:]))


def _usage() -> str:
    return USAGE.format(verbs="\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items()))


def _run(verb: str, arguments: list[str]) -> int:
    try:
        check_rank_variables(os.environ)
    except PkmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Not at the top: `--help` and a mistyped verb are answered without Hydra, which takes half a second to import.
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from pkm_lightning.cli.composition_errors import explain, explain_composition
    from pkm_lightning.cli.job import Job, log_to_stderr, quieten_libraries
    from pkm_lightning.cli.moved_tables import with_added_keys
    from pkm_lightning.cli.saved_overrides import on_saved_run
    from pkm_lightning.cli.sweep import SweepRefusal, check_sweep, tidy_sweep
    from pkm_lightning.cli.sweep_record import JobFailure, note_failure
    from pkm_lightning.cli.texts import with_quoted_texts
    from pkm_lightning.cli.variants import split_variants

    # Hydra would print its own abridged traceback; with this it hands exceptions on to us.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    arguments = with_quoted_texts(arguments) if PRIMARY_CONFIGURATIONS.get(verb) in _WITH_TEXTS else arguments
    given = arguments
    try:
        check_sweep(verb, arguments := with_action(verb, arguments))
        arguments, variants = split_variants(arguments) if verb in ("info", "compare") else (arguments, [])
        arguments, strategies = split_variants(arguments, "strategy") if verb == "info" else (arguments, [])
        arguments = on_saved_run(verb, with_added_keys(verb, arguments))
    except PkmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv = [sys.argv[0], *arguments]
    failures: list[JobFailure] = []
    composed = False

    def job(config: DictConfig) -> float | None:
        nonlocal composed
        composed = True
        # Before the imports below: matplotlib logs that it builds a cache of fonts.
        quieten_libraries()
        if verb == "info":  # programs read what it prints
            log_to_stderr()
        run = importlib.import_module(f"pkm_lightning.cli.{verb}").run
        if verb != "info":  # short, and it makes few objects
            _start_collections()
        try:
            made = Job(verb, arguments, config, variants, given, strategies)
        except (PkmError, OmegaConfBaseException) as error:  # Hydra would print a line of its own before it
            note_failure(failures, JobFailure(explain(error, arguments), 2))
            return None
        return made.execute(run, failures)

    name = PRIMARY_CONFIGURATIONS.get(verb, "config")
    try:
        with tidy_sweep():
            hydra.main(version_base="1.3", config_path="pkg://pkm_lightning.configs", config_name=name)(job)()
    except (PkmError, OSError, HydraException, OmegaConfBaseException, SweepRefusal) as error:
        print(f"error: {explain(error, arguments, name)}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, KeyError) as error:
        if composed and not failures:
            raise
        # A sweeper raises where no run has a value; the reasons of the runs follow.
        reason = f"the sweep has no result ({explain(error)})" if failures else explain_composition(error, given)
        return _report([JobFailure(reason, 2), *failures])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return _report(failures)


def _start_collections() -> None:
    """Enables the collections that `__main__` has disabled, which then pass over all that was imported."""
    if gc.isenabled():  # by an earlier job of a sweep, whose leftovers must not stay, or in a program
        return
    gc.freeze()  # half a second less per collection
    # Libraries that count what they leave at the end of the process would miss what is frozen.
    atexit.register(gc.unfreeze)
    gc.enable()


def _report(failures: Sequence[JobFailure]) -> int:
    """Prints why jobs failed, each reason once; returns the exit code."""
    lines = [f"{'error: ' if failure.exit_code == 2 else ''}{failure.message}" for failure in failures]
    for line in dict.fromkeys(line for line in lines if line):
        print(line, file=sys.stderr)
    return failures[-1].exit_code if failures else 0
