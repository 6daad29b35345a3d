"""LoRA in pretrained models: nothing changes at first, and an export is a plain model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from hydra import compose, initialize_config_module
from tolerances import assert_close
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pkm_lightning.build.adapters import base_name, merge_adapters
from pkm_lightning.build.model import build_model, complete_trunk, load_pretrained
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.cli.job import plain
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.huggingface.export import write_folder

QUICK = ("gpt2", "llama_tied")
#: What `finetune.targets=null` stands for, in each layer.
PROJECTIONS = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "others": [
        *(f"self_attn.{name}_proj" for name in "kqvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ],
}  # fmt: skip


def adapted(name: str, folder: Path, *overrides: str) -> tuple[Any, dict[str, Any]]:
    """Returns a pretrained model with adapters, and its configuration."""
    path = folder / "model"
    if not path.exists():
        pretrained_models.save(name, path)
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        chosen = [
            "model=hf",
            f"model.path={path}",
            "finetune=lora",
            "finetune.rank=3",
            "data=text",
            "data.path=x",
            "data.seq_len=32",
        ]
        config = complete_trunk(plain(compose("config", overrides=[*chosen, *overrides])))
    model = build_model(config)
    model.init_weights(1)
    load_pretrained(model, config)
    return model.eval(), config


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model.unembed(model(ids_BT).hidden_BTD)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in pretrained_models.NAMES]
)
def test_a_pretrained_model_with_adapters(name: str, tmp_path: Path) -> None:
    model, config = adapted(name, tmp_path)
    ids_BT = torch.randint(2, pretrained_models.VOCAB, (2, 9))
    with torch.no_grad():
        expected = pretrained_models.tiny(name)(ids_BT).logits
    assert torch.equal(logits(model, ids_BT), expected)
    state = model.state_dict()
    layers = {name.partition(".lora_A.")[0] for name in state if ".lora_A." in name}
    ends = PROJECTIONS.get(name, PROJECTIONS["others"])
    assert {tuple(layer.split(".")[-3:]) for layer in layers} == {
        (str(number), *end.split(".")) for number in (0, 1) for end in ends
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in state if base_name(n) is None}
    for key, value in state.items():
        if ".lora_B." in key:
            nn.init.normal_(value, std=0.1)
    content = {
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "hyper_parameters": {"config": config},
        "tokens_seen": 5,
        "tokenizer": bytes_tokenizer().digest,
    }
    torch.save(content, tmp_path / "model.ckpt")
    bytes_tokenizer().save(tmp_path / "tokenizer.json")
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    merge_adapters(checkpoint)
    written = write_folder(checkpoint, tmp_path / "hf")
    assert written.kind == type(pretrained_models.tiny(name)).__name__
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        merged = loaded(ids_BT).logits
    assert not torch.allclose(merged, expected)
    assert_close(merged, logits(model, ids_BT), kind="grad")


def test_adapters_and_a_memory_beside_the_ffns(tmp_path: Path) -> None:
    """The trunk is adapted, the memory is not, and both start with nothing."""
    memory = ("ffn=memory_plus", "placement.mode=parallel", "placement.layers=[1]", "model.memory.n_keys=8")
    model, _ = adapted("llama", tmp_path, *memory, "model.memory.knn=4")
    ids_BT = torch.randint(2, pretrained_models.VOCAB, (2, 9))
    with torch.no_grad():
        assert torch.equal(logits(model, ids_BT), pretrained_models.tiny("llama")(ids_BT).logits)
    layers = {name.partition(".lora_A.")[0] for name in model.state_dict() if ".lora_A." in name}
    assert any("mlp.base.up_proj" in layer for layer in layers)
    assert not any("plugin" in layer for layer in layers)
