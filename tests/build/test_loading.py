"""`pkm_lightning.load` and `save`: a model and its tokenizer for programs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from small import SMALL_RUN, resolved

import pkm_lightning
from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.training import LanguageModule


@pytest.fixture(scope="module")
def module() -> LanguageModule:
    made = LanguageModule(resolved(*SMALL_RUN, "data.tokenizer=bytes", "ffn=memory_plus").config)
    made.configure_model()
    return made.eval()


def saved(module: LanguageModule, folder: Path, tokenizer: Tokenizer | None = None) -> LoadedModel:
    pkm_lightning.save(module, folder, tokenizer=tokenizer or bytes_tokenizer())
    loaded: LoadedModel = pkm_lightning.load(folder)
    return loaded


def test_a_saved_model_comes_back_bit_for_bit_and_answers(module: LanguageModule, tmp_path: Path) -> None:
    loaded = saved(module, tmp_path / "model")
    state = module.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.context == module.config["data"]["seq_len"]
    assert not loaded.model.training
    again = pkm_lightning.load(pkm_lightning.save(loaded, tmp_path / "again"))
    assert again.generate(["Who", "Where is"], max_new_tokens=3) == loaded.generate(
        ["Who", "Where is"], max_new_tokens=3
    )
    assert isinstance(again.answer("Who", max_new_tokens=2), str)


@pytest.mark.parametrize("device", ["cpu", "mmap"])
def test_the_table_may_lie_elsewhere(module: LanguageModule, tmp_path: Path, device: str) -> None:
    loaded = saved(module, tmp_path)
    other = pkm_lightning.load(tmp_path, table_device=device)
    assert other.generate(["Who"], max_new_tokens=4) == loaded.generate(["Who"], max_new_tokens=4)


def test_weights_are_cast_on_request(module: LanguageModule, tmp_path: Path) -> None:
    saved(module, tmp_path)
    loaded = pkm_lightning.load(tmp_path, precision="bf16-true")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="precision='half' is not known"):
        pkm_lightning.load(tmp_path, precision="half")


def test_a_model_beside_the_tokenizer_of_another_is_refused(module: LanguageModule, tmp_path: Path) -> None:
    saved(module, tmp_path)
    train_bpe(["one two three"], 260).save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the tokenizer that model\.safetensors was"):
        pkm_lightning.load(tmp_path)


def test_without_a_tokenizer_the_model_loads_and_says_what_is_missing(tmp_path: Path) -> None:
    wide = LanguageModule(resolved(*SMALL_RUN, "data.tokenizer=bytes", "model.vocab_size=300").config)
    wide.configure_model()
    saved(wide, tmp_path, train_bpe(["one two one two"], 259))
    (tmp_path / "tokenizer.json").unlink()
    loaded = pkm_lightning.load(tmp_path)
    assert loaded.tokenizer is None
    with pytest.raises(CheckpointError, match=rf"has no tokenizer\.json beside it.* at {tmp_path}/tokenizer\.json"):
        loaded.answer("Who")
    with pytest.raises(ConfigError, match="save needs a tokenizer"):
        pkm_lightning.save(loaded, tmp_path / "again")


def test_the_tokenizer_of_bytes_needs_no_file(module: LanguageModule, tmp_path: Path) -> None:
    before = saved(module, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert pkm_lightning.load(tmp_path).answer("Who", max_new_tokens=3) == before.answer("Who", max_new_tokens=3)


@pytest.mark.parametrize(
    ("file", "reason"),
    [("config.yaml", "holds config.yaml of a run"), ("other.safetensors", "holds other.safetensors, whose tokenizer")],
)
def test_the_tokenizer_of_other_weights_is_not_replaced(
    module: LanguageModule, tmp_path: Path, file: str, reason: str
) -> None:
    (tmp_path / file).write_text("")
    with pytest.raises(CheckpointError, match=reason):
        saved(module, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_nothing_of_an_earlier_model_stays(module: LanguageModule, tmp_path: Path) -> None:
    loaded = saved(module, tmp_path)
    pkm_lightning.save(dataclasses.replace(loaded, chat_template="{{ messages }}"), tmp_path)
    assert pkm_lightning.load(tmp_path).chat_template == "{{ messages }}"
    pkm_lightning.save(loaded, tmp_path)
    assert pkm_lightning.load(tmp_path).chat_template is None


def test_wrong_arguments_are_refused_by_name(module: LanguageModule, tmp_path: Path) -> None:
    loaded = saved(module, tmp_path)
    for prompts in ("Who", [3]):
        with pytest.raises(ConfigError, match=r"prompts=.* is no list of texts"):
            loaded.generate(prompts)
    with pytest.raises(ConfigError, match="device='nope' is not at hand"):
        pkm_lightning.load(tmp_path, device="nope")
    with pytest.raises(ConfigError, match="the tokenizer has 259 ids and the model 258"):
        pkm_lightning.save(loaded, tmp_path / "again", tokenizer=train_bpe(["one two one two"], 259))
    with pytest.raises(ConfigError, match="a LanguageModule after configure_model, and not LanguageModule"):
        pkm_lightning.save(LanguageModule(module.config), tmp_path / "again")


def test_a_folder_must_hold_one_model(module: LanguageModule, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no run directory and holds no \.safetensors file"):
        pkm_lightning.load(tmp_path)
    saved(module, tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, other\.safetensors"):
        pkm_lightning.load(tmp_path)


@pytest.mark.parametrize("place", ["ffn", "extra_ffns.mine.ffn"])
def test_classes_of_others_are_built_only_when_trusted(module: LanguageModule, tmp_path: Path, place: str) -> None:
    config = json.loads(json.dumps(module.config))
    *parents, leaf = place.split(".")
    node = config
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = {**node.get(leaf, {}), "_target_": "subprocess.Popen"}
    holder = LoadedModel(module.model, bytes_tokenizer(), config, tmp_path, torch.device("cpu"))
    pkm_lightning.save(holder, tmp_path)
    with pytest.raises(ConfigError, match=rf"names {re.escape(place)}\._target_=subprocess\.Popen"):
        pkm_lightning.load(tmp_path)
