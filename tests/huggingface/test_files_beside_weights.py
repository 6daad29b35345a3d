"""What lies beside the weights of a pretrained model without belonging to them changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pretrained_models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from pkm_lightning.data.cache import CacheKey, open_cache
from pkm_lightning.data.pretrained_files import pretrained_folder
from pkm_lightning.data.tokenizer import train_bpe
from pkm_lightning.errors import DataError
from pkm_lightning.huggingface.files import PretrainedFiles, make_config, read_model

FOREIGN = {
    "config.json": json.dumps({"model_type": "gpt2", "vocab_size": 7}),
    "generation_config.json": json.dumps({"eos_token_id": 5}),
    "tokenizer_config.json": json.dumps({"eos_token": "<foreign>", "chat_template": "FOREIGN"}),
    "special_tokens_map.json": json.dumps({"eos_token": "<foreign>"}),
    "added_tokens.json": json.dumps({"<foreign>": 4000}),
    "chat_template.jinja": "FOREIGN",
    "tokenizer.model": "FOREIGN",
    "adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def weights_of(path: Path, cache: Path) -> dict[str, torch.Tensor]:
    config = make_config(PretrainedFiles.find(str(path), cache).architecture, "a test")
    return read_model(path, config, torch.float32).state_dict()


def same(weights: dict[str, torch.Tensor], model: PreTrainedModel) -> bool:
    expected = model.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


# transformers would take a file of the second name for a SentencePiece model, and know no ending in capitals.
@pytest.mark.parametrize("name", ["model.gguf", "tokenizer.model.GGUF"])
def test_a_gguf_file_is_read_as_if_it_lay_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    gguf = pretrained_models.save_gguf("llama", tmp_path / "models" / name)
    alone = contents(pretrained_folder(gguf, tmp_path / "cache", "model.path="))
    train_bpe(["one two three"] * 3, 200).save(gguf.parent / "tokenizer.json")
    for file, content in FOREIGN.items():
        (gguf.parent / file).write_text(content)
    assert contents(pretrained_folder(gguf, tmp_path / "other", "model.path=")) == alone
    assert "th" in json.loads(alone["tokenizer.json"])["model"]["vocab"]
    assert json.loads(alone["config.json"])["_name_or_path"] == str(gguf.parent)
    assert same(weights_of(gguf, tmp_path / "cache"), pretrained_models.tiny("llama"))


def test_an_adapter_beside_the_weights_of_a_folder_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretrained_models.save("llama", tmp_path)
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    get_peft_model(pretrained_models.tiny("llama"), config).save_pretrained(tmp_path)
    assert same(weights_of(tmp_path, tmp_path), pretrained_models.tiny("llama"))
    assert "holds an adapter (adapter_config.json), which is not read" in caplog.text


def test_a_conversion_of_an_earlier_version_is_made_anew(tmp_path: Path) -> None:
    gguf = pretrained_models.save_gguf("llama", tmp_path / "model.gguf")
    converted = pretrained_folder(gguf, tmp_path, "model.path=")
    arguments = json.loads((converted / "manifest.json").read_text())["arguments"]
    del arguments["version"]
    earlier = open_cache(tmp_path, CacheKey("gguf", arguments), lambda folder: [])
    assert pretrained_folder(gguf, tmp_path, "model.path=") == converted != earlier


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(tmp_path: Path) -> None:
    gguf = pretrained_models.save_gguf("llama", tmp_path / "model.gguf", further_tokens=["one", "two"])
    with pytest.raises(DataError, match="a tokenizer of 262 tokens for an embedding of 260 rows"):
        pretrained_folder(gguf, tmp_path, "model.path=")
