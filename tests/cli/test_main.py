"""Verbs, help, and the errors of the command line: one line each, before anything is written."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from small import SMALL_RUN, Run, resolved

from pkm_lightning.__main__ import run
from pkm_lightning.cli.composition_errors import explain
from pkm_lightning.cli.main import VERBS
from pkm_lightning.errors import PkmError


def test_without_a_verb_the_verbs_and_three_examples(cli: Run) -> None:
    shown = cli()
    assert shown.code == 2
    assert all(f"  {verb} " in shown.err for verb in VERBS)
    assert shown.err.count("python -m pkm_lightning ") >= 4  # the usage line and three examples


def test_help_is_no_error(cli: Run) -> None:
    shown = cli("--help")
    assert shown.code == 0
    assert "usage:" in shown.out


def test_help_imports_neither_hydra_nor_torch() -> None:
    code = (
        "import sys; sys.argv = ['pkm-lightning', '--help']\n"
        "from pkm_lightning.__main__ import run\n"
        "try:\n    run()\nexcept SystemExit:\n    print(*sorted({'hydra', 'torch', 'lightning'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_info_ends_its_process_with_all_it_printed_and_imports_what_it_uses() -> None:
    code = (
        "import atexit, runpy, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "sys.argv[1:] = ['info', 'format=json']\nrunpy.run_module('pkm_lightning', run_name='__main__', alter_sys=True)"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=buffered)
    assert json.loads(done.stdout)["ffn"] == "MemoryPlus"
    imported = {name.partition(".")[0] for name in done.stderr.split()}
    assert {"torch", "lightning"} <= imported
    # Where transformers is installed torchmetrics imports it, and with it much else.
    assert not imported & {"deepspeed", "tensorboard", "accelerate", "datasets", "lm_eval"}


def test_info_hands_on_the_exit_code_of_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(sys, "argv", ["pkm-lightning", "info", "ffn=dense,"])
    monkeypatch.setattr("pkm_lightning.__main__._leave", codes.append)
    try:
        run()
    finally:
        gc.enable()
    assert codes == [2]


def test_a_process_ends_with_its_threads_its_handlers_and_its_output() -> None:
    code = (
        "import atexit, sys, threading, time\nfrom pkm_lightning import __main__ as command\n"
        "sys.modules['torch'] = sys  # stands for it: what imports nothing large ends as always\n"
        "def main():\n"
        "    atexit.register(print, 'handler')\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "    print('verb')\n    sys.exit(3)\n"
        "command.main = main\ncommand.run()\nprint('not reached')"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=buffered)
    assert (done.returncode, done.stdout, done.stderr) == (3, "verb\nthread\nhandler\n", "")


def test_cfg_job_prints_the_composed_configuration(cli: Run) -> None:
    shown = cli("fit", "--cfg", "job", "ffn=dense", "seed=7")
    assert shown.code == 0
    assert "_target_: pkm_lightning.ffn.Dense" in shown.out
    assert "seed: 7" in shown.out


# What is typed after `fit`, and what the one line must hold: the value, the key, the allowed values or the way out.

#: One of each way that an error takes to the command line: from Hydra, Lightning, a class, before and after the data.
AT_THE_COMMAND_LINE = {
    "group option": (["ffn=memry_plus"], ["ffn=memry_plus", "dense", "Did you mean 'memory_plus'?"]),
    "group": (["fnn=dense"], ["fnn", "Did you mean 'ffn'?"]),
    "key": (["trainer.max_step=3"], ["trainer.max_step", "Did you mean 'max_steps'?"]),
    "key of a chosen group": (["data=jsonl", "data.path=x", "data.loss=all"], ["data has", "text_field"]),
    "syntax": (["seed"], ["'seed' is not an override", "KEY=VALUE"]),
    "n_keys": (["ffn.n_keys=0"], ["ffn.n_keys=0", "1 to 46340"]),
    "precision": (["trainer.precision=31"], ["trainer", "31", "bf16-mixed"]),
    "missing target": (["ffn=custom"], ["ffn._target_"]),
    "argument of a class": (["+ffn.colour=red"], ["colour", "n_keys"]),
    "checkpoint for fit": (["ckpt=some.ckpt"], ["ckpt=some.ckpt", "run_dir="]),
    "resume": (["resume=yes"], ["resume", "auto, always, never"]),
    "batch": (["data.global_batch_size=7", "trainer.accumulate_grad_batches=2"], ["data.global_batch_size=7"]),
    "no option": (["ffn=null"], ["ffn"]),
    "text that does not exist": (["data=text", "data.path=nowhere.txt"], ["nowhere.txt"]),
}
#: Refused by `resolve`, which the line above shows to reach the command line.
WHEN_RESOLVED = {
    "text for a number": (["ffn.knn=abc"], ["ffn.knn='abc'", "not a whole number"]),
    "fraction": (["ffn.knn=1.5"], ["ffn.knn=1.5", "whole"]),
    "null dimension": (["model.dim=null"], ["model.dim=null", "not a whole number"]),
    "no heads": (["model.n_heads=0"], ["model.n_heads=0"]),
    "a number for layers": (["placement.layers=3"], ["placement.layers=3", "list"]),
    "negative clipping": (["optim.clip_norm=-1"], ["optim.clip_norm=-1"]),
    "no log steps": (["trainer.log_every_n_steps=0"], ["trainer.log_every_n_steps=0"]),
    "no validation steps": (["trainer.val_check_interval=0"], ["trainer.val_check_interval=0"]),
    "no checkpoint steps": (["callbacks.step_checkpoint.every_n_steps=0"], ["every_n_steps=0"]),
    "no window": (["callbacks.throughput.window=0"], ["callbacks.throughput.window=0", "1"]),
    "one sample": (["callbacks.samples.prompts=hello"], ["callbacks.samples.prompts='hello'", "list"]),
    "negative samples": (["callbacks.samples.items=-1"], ["callbacks.samples.items=-1", "0"]),
    "no answers": (["callbacks.samples.max_new_tokens=0"], ["callbacks.samples.max_new_tokens=0", "1"]),
    "one prompt": (["data.prompts=hello"], ["data.prompts='hello'", "list"]),
    "negative rate": (["optim.lr=-1"], ["optim.lr=-1"]),
    "seed": (["seed=abc"], ["seed='abc'", "not a whole number"]),
    "knn": (["ffn.knn=65537"], ["ffn.knn=65537", "1 to 65536"]),
    "odd key dimension": (["ffn.key_dim=31"], ["ffn.key_dim=31", "odd", "32"]),
    "heads": (["model.n_heads=5"], ["model.dim=64", "model.n_heads=5", "4, 8, 16, 32"]),
    "kv heads": (["model.n_kv_heads=3"], ["model.n_heads=4", "model.n_kv_heads=3", "1, 2, 4"]),
    "layers": (["placement.layers=[0,2]"], ["2", "0 to 1", "model.n_layers=2"]),
    "layer twice": (["placement.layers=[1,1]"], ["repeats a layer"]),
    "write_after": (["placement.write_after=1"], ["placement.write_after=1", "placement.mode=parallel"]),
    "mode": (["placement.mode=paralel"], ["placement.mode='paralel'", "Did you mean 'parallel'?"]),
    "match": (["match=flop"], ["match='flop'", "Did you mean 'flops'?"]),
    "unreachable match": (["match=flops", "match_budget=10"], ["ffn.value_dim", "budget 10"]),
    "schedule": (["optim.schedule=cos"], ["optim.schedule='cos'", "cosine"]),
    "warm-up": (["optim.warmup_share=1.5"], ["optim.warmup_share=1.5", "0 to 1"]),
    "no steps": (["trainer.max_steps=-1"], ["trainer.max_steps=-1"]),
    "vocabulary of the model": (["model.vocab_size=300"], ["model.vocab_size=300", "auto"]),
    "vocabulary of the data": (["data.vocab_size=200"], ["data.vocab_size=200", "258"]),
    "devices": (["trainer.devices=2"], ["trainer.devices=2", "strategy=ddp"]),
    "unknown module": (["ffn=custom", "ffn._target_=no_such.Thing"], ["no_such.Thing", "import path"]),
    "function as a class": (["ffn=custom", "ffn._target_=os.getcwd"], ["os.getcwd", "not a class"]),
    "key added to the model": (["+model.n_head=3"], ["model.n_head", "Did you mean 'n_heads'?"]),
    "no data module": (["data=custom", "data._target_=torch.nn.ReLU"], ["torch.nn.ReLU", "LightningDataModule"]),
    "text without a path": (["data=text"], ["data.path"]),
}


def arguments(overrides: list[str]) -> list[str]:
    """The small run without what `overrides` replace or contradict, then they."""
    keys = {o.split("=")[0] for o in overrides}
    foreign = tuple(
        prefix
        for prefix, causes in (("data.", ("data=",)), ("model.memory", ("ffn.n", "ffn.knn")))
        if any(o.startswith(causes) for o in overrides)
    )
    return [*(o for o in SMALL_RUN if o.split("=")[0] not in keys and not o.startswith(foreign or "-")), *overrides]


@pytest.mark.parametrize("what", AT_THE_COMMAND_LINE)
def test_bad_input_gets_one_helpful_line(cli: Run, tmp_path: Path, what: str) -> None:
    overrides, texts = AT_THE_COMMAND_LINE[what]
    shown = cli("fit", *arguments(overrides), "run_dir=run")
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert shown.code == 2, shown
    assert len(lines) == 1, shown.err
    assert "Traceback" not in shown.err
    for text in texts:
        assert text in lines[0], lines[0]


@pytest.mark.parametrize("what", WHEN_RESOLVED)
def test_bad_values_are_refused_before_anything_starts(tmp_path: Path, what: str) -> None:
    overrides, texts = WHEN_RESOLVED[what]
    with pytest.raises(PkmError) as refused:
        resolved(*arguments(overrides), f"run_dir={tmp_path / 'run'}", training=True)
    assert "\n" not in str(refused.value)
    for text in texts:
        assert text in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_verb_is_named_with_the_nearest(cli: Run) -> None:
    shown = cli("train")
    assert shown.code == 2
    assert "unknown verb 'train'" in shown.err
    assert "Did you mean 'fit'?" in cli("fti").err


def test_a_refused_configuration_leaves_nothing_behind(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, "ffn.knn=999", "run_dir=run").code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["test", "-m", "run_dir=earlier,other"], "-m sweeps fit only; run test once for each run_dir"),
        (["predict", "run_dir=earlier", "hydra.mode=MULTIRUN"], "hydra.mode=MULTIRUN sweeps fit only; run predict"),
        (["fit", "-m", *SMALL_RUN, "ffn=dense,nope", "run_dir=deep/sweep"], "ffn=nope is not known"),
        (["fit", "-m", *SMALL_RUN, "optim.lr=-1,nan", "hydra.sweep.dir=sweep"], "optim.lr=-1 is out of range"),
        (["fit", "-m", *SMALL_RUN, "optim.lr=-1,nan", "run_dir=."], "optim.lr=nan is not finite"),
        (["fit", "-m", *SMALL_RUN, "seed=1,2", "run_dir=earlier"], "run_dir=earlier holds a run, and a sweep would"),
        (["fit", "-m", *SMALL_RUN, "run_dir=other,one"], "run_dir has several values, but the runs of a sweep share"),
        (["fit", "-m", *SMALL_RUN, "optim.lr=-1,-2", "hydra.sweep.subdir=a/${optim.lr}/b"], "optim.lr=-2 is out of"),
        (["fit", "-m", *SMALL_RUN, "optim.lr=1e-3"], "-m has nothing to sweep: no key has several values; give one"),
        (["fit", "-m", *SMALL_RUN, "objective=val/loss,val/perplexity"], "a sweep has one objective, by which its"),
        (["fit", "-m", "seed=1,2", "objective=test/loss"], "objective=test/loss is a figure of the test, which says"),
        (["fit", "-m", "seed=1,2", "objective=val/x", "objective_mode=max"], "objective=val/x is no figure that valid"),
        (["fit", "-m", "seed=1,2", "+trainer.limit_val_batches=0"], "trainer.limit_val_batches=0 switches off the"),
        (["fit", "-m", "seed=1,2", "objective=val/recall_seen", "callbacks.recall.val_items=0"], "needs questions at"),
        (
            ["fit", "-m", *SMALL_RUN, "seed=1,2", "objective=val/recall_x"],
            "it asks: control, paraphrase, question, see",
        ),
        (["fit", "-m", "seed=1,2", "objective=eval/piqa_acc", "objective_mode=max"], "needs callbacks=[default,evalu"),
        (["fit", "-m", "seed=1,2", "hydra/sweeper=ax"], "hydra/sweeper=ax is not installed; install the plugin of Hy"),
        (["compare", "objective=val/loss", "out=x"], "compare does not read objective, only fit; leave it out."),
        (["fit", "-m", "hydra.sweep.dir=earlier"], "hydra.sweep.dir=earlier holds a run, and a sweep would train"),
    ],
)
def test_a_refused_sweep_leaves_nothing_behind(cli: Run, tmp_path: Path, command: list[str], message: str) -> None:
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "run.json").touch()
    shown = cli(*command)
    assert (shown.code, message in shown.err) == (2, True), shown.err
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"earlier", "earlier/run.json"}


def test_an_unwritable_run_directory_is_refused(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shown = cli("fit", *SMALL_RUN, "run_dir=file/run")
    assert shown.code == 2
    assert "run_dir=" in shown.err
    assert "choose another" in shown.err


def _limit_file_size() -> None:
    """Like a full disk, but only for this process: a file cannot grow beyond 64 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_one_line_and_leaves_no_part(cli: Run, tmp_path: Path) -> None:
    assert cli("info", *SMALL_RUN).code == 0
    prepared = cli("fit", *SMALL_RUN, "trainer.max_steps=2", "run_dir=first")  # builds the data
    assert prepared.code == 0, prepared.err
    command = [sys.executable, "-m", "pkm_lightning", "fit", *SMALL_RUN, "run_dir=full"]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limit_file_size, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "step-00000004.ckpt cannot be written" in ended.stderr
    assert "free the disk" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []
    assert '"status": "interrupted"' in (tmp_path / "full" / "run.json").read_text()


def test_streams_that_were_closed_and_an_interruption_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        assert not sys.stdin.isatty()
        assert not sys.stdout.isatty()
        raise KeyboardInterrupt

    monkeypatch.setattr("pkm_lightning.__main__.main", interrupted)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    try:
        with pytest.raises(SystemExit, match="130"):
            run()
        sys.stdin.close()
        sys.stdout.close()
    finally:
        gc.enable()
    assert capsys.readouterr().err == "interrupted\n"


def test_a_verb_that_works_collects_garbage_again(cli: Run) -> None:
    gc.disable()  # as `python -m pkm_lightning` does
    frozen = [gc.get_freeze_count()]
    try:
        for _ in range(2):
            cli("report", "runs=[none]", "out=out")
            frozen.append(gc.get_freeze_count())
        assert gc.isenabled()
    finally:
        gc.unfreeze()
    assert frozen[0] < frozen[1] >= frozen[2]  # what the first job left is not kept


def test_a_reader_that_leaves_is_named() -> None:
    shown = explain(BrokenPipeError(32, "Broken pipe"))
    assert shown.startswith("what read the output closed it before all was written")
