"""A memory in a pretrained model under every verb: trained, continued, healed, used and exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pretrained_models
import pytest
import torch
from huggingface.test_pretrained_run import TEXT, TRAINING, accepted, loss
from huggingface.test_pretrained_run import __name__ as stops
from small import Run

import pkm_lightning
from pkm_lightning.checkpoints import open_checkpoint

MEMORY = (
    *("ffn=memory_plus", "placement.layers=[1]", "placement.mode=parallel", "extra_ffns=engram", "optim=retrofit"),
    *("extra_ffns.engram.placement.layers=[0]", "extra_ffns.engram.ffn.rows=200"),
    "model.memory={n_keys: 8, heads: 2, knn: 3, key_dim: 8}",
)


@pytest.mark.slow
def test_a_memory_is_taught_healed_and_used_without_the_folder(cli: Run, tmp_path: Path) -> None:
    Path("text.txt").write_text("".join(f"{TEXT}{number}. " for number in range(60)))
    pretrained_models.save("llama_tied", tmp_path / "model")
    assert "MemoryPlus" in accepted(cli("info", *TRAINING[:2], *MEMORY))
    before = accepted(cli("validate", *TRAINING[:7], *MEMORY, "trainer.accelerator=cpu"))
    assert loss(before) == loss(accepted(cli("validate", *TRAINING[:7], "trainer.accelerator=cpu")))
    accepted(cli("fit", *TRAINING, *MEMORY, "run_dir=whole"))
    stop = f"+callbacks.stop._target_={stops}.StopInTheThirdStep"
    assert cli("fit", *TRAINING, *MEMORY, "run_dir=run", stop).code == 130
    shutil.rmtree(tmp_path / "model")
    accepted(cli("fit", "run_dir=run", "trust_config=true"))
    whole, again = (
        open_checkpoint(Path(run, "checkpoints/step-00000004.ckpt")).map()["state_dict"] for run in ("whole", "run")
    )
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    # The trunk has not moved by a bit, and the loss has.
    for name, value in pretrained_models.tiny("llama_tied").named_parameters():
        assert torch.equal(whole[f"model.network.{name.replace('layers.1.mlp.', 'layers.1.mlp.base.')}"], value)
    after = accepted(cli("validate", "run_dir=whole"))
    assert loss(after) < loss(before)
    asked = ("max_new_tokens=6", "prompt=The lock keeper")
    Path("out").mkdir()
    accepted(cli("export", "run_dir=whole", "file=out/model.safetensors"))
    answer = pkm_lightning.load("out").answer("The lock keeper", max_new_tokens=6)
    for named in ("run_dir=whole", "ckpt=out/model.safetensors"):
        assert answer in accepted(cli("generate", named, *asked))
    # Stages: the next run has the plugins of the last, and the rates of a pretrained model unless it asks for others.
    stage = [*TRAINING[2:6], *TRAINING[8:]]
    healed = accepted(cli("fit", "init_from=whole", *stage, "run_dir=healed"))
    assert "MemoryPlus + Engram" in healed
    config = open_checkpoint(Path("healed/checkpoints/step-00000004.ckpt")).config
    assert (config["optim"]["lr"], config["optim"]["freeze"]) == (2e-05, [])
    assert config["ffn"] == open_checkpoint(Path("whole/checkpoints/step-00000004.ckpt")).config["ffn"]


def test_other_verbs_take_no_plugins(cli: Run) -> None:
    outcome = cli("generate", "model=hf", "model.path=a", "ffn=memory_plus", "prompt=a")
    assert outcome.code == 2
    assert "does not read ffn" in outcome.err
