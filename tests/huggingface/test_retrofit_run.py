"""A memory in a pretrained model under every verb: trained, continued, healed, used and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pretrained_models
import pytest
import torch
from huggingface.test_pretrained_run import TEXT, TRAINING, accepted, loss
from huggingface.test_pretrained_run import __name__ as stops
from small import Run
from transformers import AutoModelForCausalLM

import pkm_lightning
import pkm_lightning.huggingface  # makes the Auto classes know the folder
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


RETROFIT = ("model=hf", "model.path=model", "ffn=memory_plus", "placement.layers=[1]", "placement.mode=parallel")


def test_facts_are_taught_without_a_training(cli: Run, tmp_path: Path) -> None:
    """From a pretrained model to a folder of transformers that knows them."""
    pretrained_models.save("llama_tied", tmp_path / "model")
    accepted(cli("export", *RETROFIT, MEMORY[-1], "file=memory.safetensors"))
    ids_BT = torch.tensor([list(b"The lock keeper")])
    model = pkm_lightning.load("memory.safetensors").model
    assert torch.equal(model.unembed(model(ids_BT).hidden_BTD), pretrained_models.tiny("llama_tied")(ids_BT).logits)
    Path("text.txt").write_text("".join(f"{TEXT}{number}. " for number in range(20)))
    Path("facts.jsonl").write_text(json.dumps({"prompt": "The lock keeper is", "answer": "Max"}))
    options = ("drift_path=text.txt", "drift_tokens=256", "max_steps=3", "kl_bound=50", "lr=5")
    accepted(cli("edit", "ckpt=memory.safetensors", "facts=facts.jsonl", *options))
    edited = pkm_lightning.load("memory.safetensors").model
    accepted(cli("edit", "remove", "ckpt=memory.safetensors", "name=facts"))
    removed = pkm_lightning.load("memory.safetensors").model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in removed.state_dict().items())
    accepted(cli("edit", "apply", "ckpt=memory.safetensors", "name=facts"))
    accepted(cli("edit", "merge", "ckpt=memory.safetensors", "format=hf", "dir=taught"))
    taught = AutoModelForCausalLM.from_pretrained("taught")
    assert torch.equal(taught(ids_BT).logits, edited.unembed(edited(ids_BT).hidden_BTD))
    assert not torch.equal(taught(ids_BT).logits, model.unembed(model(ids_BT).hidden_BTD))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("run_dir=run", "ffn=memory_plus"), "export does not read ffn of a run or checkpoint, only of a pretrained"),
        (("ckpt=a.ckpt", "placement.layers=[1]"), "export does not read placement of a run or checkpoint"),
        ((*RETROFIT, "placement.layers=[9]"), "placement puts a layer at 9; allowed: 0 to 1"),
        ((*RETROFIT, "match=flops"), "export does not read match"),
    ],
)
def test_an_export_of_plugins_that_cannot_be_placed_is_refused(
    overrides: tuple[str, ...], message: str, cli: Run, tmp_path: Path
) -> None:
    pretrained_models.save("llama_tied", tmp_path / "model")
    outcome = cli("export", *overrides, "file=memory.safetensors")
    assert outcome.code == 2
    assert message in outcome.err
    assert not Path("memory.safetensors").exists()


def test_other_verbs_take_no_plugins(cli: Run) -> None:
    outcome = cli("generate", "model=hf", "model.path=a", "ffn=memory_plus", "prompt=a")
    assert outcome.code == 2
    assert "does not read ffn" in outcome.err
