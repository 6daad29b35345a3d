"""Folders of other kinds: quantised tables, pretrained models after training, strangers' configurations."""

from __future__ import annotations

from pathlib import Path

import pretrained_models
import pytest
import torch
from huggingface.folders import export, ids, logits, save
from small import resolved
from transformers import AutoModelForCausalLM
from tree import ROOT

import pkm_lightning
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.export import write
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError
from pkm_lightning.huggingface.export import write_folder
from pkm_lightning.training import LanguageModule


@pytest.mark.parametrize("width", ["int8", "int2"])
def test_a_quantised_table_is_read_by_its_codes(width: str, tmp_path: Path) -> None:
    """Also from an exported file, whose scales are bf16."""
    save(tmp_path, "ffn=memory_plus")
    source = tmp_path / "model.ckpt"
    write_folder(open_checkpoint(source), tmp_path / "hf", width)
    write(QuantizedCheckpoint(open_checkpoint(source), width), tmp_path / "small.safetensors")
    write_folder(open_checkpoint(tmp_path / "small.safetensors"), tmp_path / "second")
    expected = logits(pkm_lightning.load(tmp_path / "small.safetensors").model, ids())
    for name in ("hf", "second"):
        small = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert small.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(small(ids()).logits, expected)
    assert small.state_dict()["transformer.tables.0.codes"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_a_pretrained_model_goes_back_to_its_own_class(name: str, tmp_path: Path) -> None:
    source = pretrained_models.save(name, tmp_path / "source")
    settings = resolved(
        "model=hf", f"model.path={source}", "data=text", f"data.path={ROOT / 'README.md'}", "data.seq_len=32"
    ).config
    module = LanguageModule(settings)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.1)  # as if trained
    state = {f"model.{key}": value for key, value in module.model.state_dict().items()}
    content = {"state_dict": state, "tokens_seen": 5, "hyper_parameters": {"config": settings}}
    torch.save(content, tmp_path / "model.ckpt")
    bytes_tokenizer().save(tmp_path / "tokenizer.json")
    written = write_folder(open_checkpoint(tmp_path / "model.ckpt"), tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(again) is type(pretrained_models.tiny(name))
    assert written.kind == type(again).__name__
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, module.model.eval().unembed(module.model(ids()).hidden_BTD))
    assert again.generation_config.eos_token_id == 1
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"# {written.kind}, 2 layers of 24" in card
    assert "import pkm_lightning" not in card


def test_a_planted_class_is_written_but_never_constructed(tmp_path: Path) -> None:
    _, folder = export(tmp_path, "ffn=dense")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    content["hyper_parameters"]["config"]["table"] = {"_target_": "subprocess.Popen", "args": ["true"]}
    torch.save(content, tmp_path / "model.ckpt")
    write_folder(open_checkpoint(tmp_path / "model.ckpt"), folder)
    with pytest.raises(ConfigError, match=r"config.json names table._target_=subprocess.Popen"):
        AutoModelForCausalLM.from_pretrained(folder)
