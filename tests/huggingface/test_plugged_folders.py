"""Folders of pretrained models with plugins: written by transformers or by `export`, and read by the Auto classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from huggingface.folders import ids, logits
from small import resolved
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from tree import ROOT

import pkm_lightning
from pkm_lightning import STEM, CheckpointError, ConfigError, Engram, MemoryPlus, MoE, UltraMemV2, replace_ffn
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.export import write
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.huggingface.export import write_folder
from pkm_lightning.training import LanguageModule

KEYS = {"n_keys": 9, "knn": 3}
#: An entry of config.json.
PLACED = {"layers": [1], "mode": "parallel", "ffn": {"_target_": "pkm_lightning.ffn.MemoryPlus", **KEYS}}


def draw(model: nn.Module) -> None:
    """Draws the weights that start at zero."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)


def outputs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(ids()).logits
    return out


@pytest.mark.parametrize("name", pretrained_models.NAMES)
def test_a_model_is_saved_and_loaded_with_its_plugins(name: str, tmp_path: Path) -> None:
    model = pretrained_models.tiny(name)
    shared = model.config
    replace_ffn(model, layers=[0], ffn=STEM, hidden_dim=8)
    replace_ffn(model, layers=[0, 1], ffn=UltraMemV2, mode="parallel", shared=False, n_keys=9, knn=3)
    replace_ffn(model, layers=[1], ffn=Engram, mode="before", rows=30)
    draw(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert isinstance(loaded, type(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"pkm_lightning_{shared.model_type}"
    assert config["architectures"] == [type(loaded).__name__] == [f"Plugged{type(model).__name__}"]
    assert [p["layers"] for p in config["pkm_lightning"]["placements"]] == [[0], [0, 1], [1]]
    # Another model of the same configuration knows of no plugins.
    assert not hasattr(shared, "pkm_lightning")
    decoder = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(decoder(ids()).last_hidden_state, model.base_model(ids()).last_hidden_state)
    # Also after further training, from a model that was loaded.
    replace_ffn(loaded, layers=[0], ffn=MemoryPlus, mode="after", **KEYS)
    draw(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), outputs(loaded))


def test_the_folder_of_a_decoder_alone_and_another_dtype(tmp_path: Path) -> None:
    pretrained_models.save("llama", tmp_path / "plain")
    model = AutoModel.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    replace_ffn(model, layers=[1], ffn=MemoryPlus, mode="parallel", **KEYS)
    draw(model)
    model.save_pretrained(tmp_path / "plugged")
    loaded = AutoModel.from_pretrained(tmp_path / "plugged")
    assert loaded.dtype is loaded.value_tables[0].weight.dtype is torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(ids()).last_hidden_state, model(ids()).last_hidden_state)
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert type(whole) is type(pretrained_models.tiny("llama"))
    assert not info["missing_keys"]


class OfTheUser(nn.Module):
    def __init__(self, dim: int, scale: Any = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(x_BTD * self.weight)


def saved(folder: Path, ffn: type[nn.Module], **options: Any) -> PreTrainedModel:
    model = pretrained_models.tiny("llama")
    replace_ffn(model, layers=[1], ffn=ffn, **options)
    model.save_pretrained(folder)
    return model


def test_classes_of_others_are_loaded_where_they_are_trusted(tmp_path: Path) -> None:
    model = saved(tmp_path / "own", OfTheUser)
    message = r"own/config.json names placements\[0\].ffn._target_=\S+OfTheUser, code that a saved .* trust_config=True"
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_config=True)
    assert torch.equal(outputs(loaded), outputs(model))
    saved(tmp_path / "value", OfTheUser, scale=torch.ones(2))
    with pytest.raises(
        CheckpointError, match=r"value/config.json cannot describe its plugins: an argument of OfTheUser"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "value", trust_config=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placements": []}, "config.json names no plugins"),
        ({"placements": [{"layers": [1]}]}, "config.json has a placement without ffn and layers"),
        ({"placements": [{"layers": [7], "ffn": {"_target_": "pkm_lightning.ffn.MoE"}}]}, "layers=7 is out of range"),
        ({"placements": [{"layers": [0], "ffn": {"_target_": "subprocess.Popen"}}]}, "subprocess.Popen, code that"),
        (
            {"placements": [{"layers": [0], "ffn": {"_target_": "pkm_lightning.ffn.MoE", "n": 1}}]},
            "MoE has no argument",
        ),
        ({"placements": [{"layers": [0], "ffn": {"_target_": "pkm_lightning.ffn.Nothing"}}]}, "Nothing"),
        *(({"placements": value}, r"config.json names no plugins") for value in ("text", {"a": 1}, [3])),
        ({"placements": [PLACED | {"bits": 3}]}, r"config\.json: table\.bits=3"),
        ({"placements": [PLACED, PLACED]}, r"config\.json: layer 1 has a MemoryPlus with mode=parallel already"),
    ],
)
def test_a_damaged_description_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, MoE, dense_hidden_dim=8, n_experts=4, top_k=2)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pkm_lightning": change}))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_that_lack_are_named(tmp_path: Path) -> None:
    model = pretrained_models.tiny("llama")
    replace_ffn(model, layers=[1], ffn=MemoryPlus, mode="parallel", **KEYS)
    state = {name: value for name, value in model.state_dict().items() if "value_tables" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks \(value_tables.0.weight\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def run_with(source: Path, folder: Path, *overrides: str) -> LanguageModule:
    """Writes `model.ckpt` of a run that put plugins into the model at `source`, with weights as if trained."""
    data = ("data=text", f"data.path={ROOT / 'README.md'}", "data.seq_len=32")
    settings = resolved("model=hf", f"model.path={source}", *data, *overrides).config
    module = LanguageModule(settings)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.1)
    draw(module.model)
    state = {f"model.{key}": value for key, value in module.model.state_dict().items()}
    content = {"state_dict": state, "tokens_seen": 5, "hyper_parameters": {"config": settings}}
    torch.save(content, folder / "model.ckpt")
    bytes_tokenizer().save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(pretrained_models.TEMPLATE)
    module.model.eval()
    return module


MEMORY = ("ffn.n_keys=9", "ffn.knn=3", "ffn.key_dim=8")
EXTRA = ("extra_ffns=memory_plus", *(f"extra_ffns.memory_plus.{key}" for key in MEMORY))
RUNS = {
    "llama_tied": ("ffn=memory_plus", *MEMORY, "placement.layers=[1]", "placement.mode=parallel"),
    # The table of the memory, which replaces an FFN, becomes the first in the folder.
    "gpt2": (
        *("ffn=engram", "ffn.rows=30", "placement.layers=[0,1]", "placement.mode=parallel", *EXTRA),
        *("extra_ffns.memory_plus.placement.layers=[1]", "extra_ffns.memory_plus.placement.mode=replace"),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_as_a_folder_with_its_plugins(name: str, tmp_path: Path) -> None:
    module = run_with(pretrained_models.save(name, tmp_path / "source"), tmp_path, *RUNS[name])
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    written = write_folder(checkpoint, tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(outputs(loaded), logits(module.model, ids()))
    assert written.kind == type(loaded).__name__ == f"Plugged{type(pretrained_models.tiny(name)).__name__}"
    assert "import pkm_lightning.huggingface" in (tmp_path / "hf" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("Text").input_ids == bytes_tokenizer().encode("Text")
    assert tokenizer.chat_template == pretrained_models.TEMPLATE
    assert loaded.generation_config.eos_token_id == 1

    write_folder(open_checkpoint(tmp_path / "model.ckpt"), tmp_path / "small", "int8")
    write(QuantizedCheckpoint(open_checkpoint(tmp_path / "model.ckpt"), "int8"), tmp_path / "small.safetensors")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(small), logits(pkm_lightning.load(tmp_path / "small.safetensors").model, ids()))
    small.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), outputs(small))


def test_a_run_does_not_start_from_such_a_folder(tmp_path: Path) -> None:
    saved(tmp_path, MemoryPlus, mode="parallel", **KEYS)
    with pytest.raises(ConfigError, match=r"is a pretrained model with plugins \(model_type='pkm_lightning_llama'\)"):
        pkm_lightning.load(tmp_path)


@pytest.mark.slow
def test_transformers_alone_refuse_the_folder(tmp_path: Path) -> None:
    saved(tmp_path, MemoryPlus, mode="parallel", **KEYS)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "pkm_lightning_llama"
    program = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    assert "model type `pkm_lightning_llama`" in process.stderr.strip().splitlines()[-3]
