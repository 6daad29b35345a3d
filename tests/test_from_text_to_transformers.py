"""The whole way of a user, in processes of their own: own text, answers, scores, transformers; then all of it again
from a copy of the folder elsewhere, with an empty cache and the text gone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TASK = {
    "task": "towers",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "towers.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
#: Loads a folder with transformers alone, and of a memory model with the classes that this package registers.
LOAD = """
import sys, torch
folder, registers = sys.argv[1:]
if registers == "yes":
    import pkm_lightning.huggingface
else:
    sys.modules["pkm_lightning"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Tower number 7 has", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(repr(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


def call(*arguments: str, cwd: Path, cache: Path) -> str:
    """Runs a command that must succeed in `cwd`, and returns its standard output."""
    environment = {**os.environ, "PKM_LIGHTNING_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def use(run: str, folder: Path, cache: Path, *, plain: bool) -> list[str]:
    """Asks, scores and exports `run` in `folder`; returns what came out."""
    ours = ("-m", "pkm_lightning")
    answer = call(
        *ours, "generate", f"run_dir={run}", "prompt=Tower number 7 has", "max_new_tokens=8", cwd=folder, cache=cache
    )
    call(
        *ours,
        "evaluate",
        f"run_dir={run}",
        "tasks=[towers]",
        "tasks_dir=tasks",
        "out=scores.json",
        cwd=folder,
        cache=cache,
    )
    scores = json.loads((folder / "scores.json").read_text())["results"]["towers"]
    call(*ours, "validate", f"run_dir={run}", cwd=folder, cache=cache)
    loss = json.loads((folder / run / "validate.json").read_text())["val/loss"]
    call(*ours, "export", f"run_dir={run}", "format=hf", "dir=exported", cwd=folder, cache=cache)
    (folder / "load.py").write_text(LOAD)
    loaded = call("load.py", "exported", "no" if plain else "yes", cwd=folder, cache=cache)
    assert loaded.splitlines()[-1] == repr(answer.removesuffix("\n"))
    return [answer, str(scores["acc,none"]), str(loss)]


@pytest.mark.slow
@pytest.mark.parametrize("ffn", ["dense", "memory_plus"])
def test_own_text_is_trained_asked_scored_and_loaded_elsewhere(tmp_path: Path, ffn: str) -> None:
    here, there, cache = tmp_path / "here", tmp_path / "there", tmp_path / "cache"
    (here / "tasks").mkdir(parents=True)
    sentences = [f"Tower number {i} has {i * 7 % 97} steps and {i * 13 % 89} windows.\n" for i in range(300)]
    (here / "text.txt").write_text("".join(sentences))
    (here / "tasks" / "towers.yaml").write_text(yaml.safe_dump(TASK))
    questions = [
        {"question": f"Tower number {i} has", "choices": [f" {i * 7 % 97} steps", f" {i} doors"], "gold": 0}
        for i in range(20)
    ]
    (here / "tasks" / "towers.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    call(
        *("-m", "pkm_lightning", "fit", f"ffn={ffn}", "data=text", "data.path=text.txt", "data.vocab_size=400"),
        *("data.seq_len=32", "trainer.max_steps=60", "trainer.val_check_interval=60", "run_dir=run"),
        cwd=here,
        cache=cache,
    )
    first = use("run", here, cache, plain=ffn == "dense")
    there.mkdir()
    shutil.copytree(here / "run", there / "copied")
    shutil.copytree(here / "tasks", there / "tasks")
    shutil.rmtree(here)
    shutil.rmtree(cache)
    assert use("copied", there, tmp_path / "empty", plain=ffn == "dense") == first
    assert not (tmp_path / "empty").exists()
