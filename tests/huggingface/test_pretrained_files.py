"""Files of pretrained models: what is read of a folder and of a GGUF file, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file
from small import resolved
from tolerances import assert_close
from transformers import AutoModelForCausalLM, GPT2Config

import pkm_lightning
from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.cli.job import plain
from pkm_lightning.data.tokenizer import bytes_tokenizer, train_bpe
from pkm_lightning.errors import CheckpointError, ConfigError, PkmError
from pkm_lightning.huggingface.files import PretrainedFiles
from pkm_lightning.huggingface.loading import load_pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_models.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def in_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


def content(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text) and None


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../part-2.safetensors"}}))


def with_other_tokenizer(folder: Path) -> None:
    train_bpe(["one two three"] * 3, 300).save(folder / "tokenizer.json")


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (content("config.json", "{"), "config.json cannot be read"),
    (content("config.json", "[1]"), "holds no mapping"),
    (in_config(model_type="bert"), "model_type='bert'; supported: gpt2, llama, mistral, qwen2, qwen3."),
    (in_config(quantization_config={"bits": 4}), "quantised weights"),
    (in_config(hidden_size="wide"), "config.json that transformers refuses"),
    (in_config(extra={"_target_": "os.getcwd"}), "_target_"),
    (pickled, "pytorch_model.bin is a pickle, which is never opened"),
    (truncated, "model.safetensors is no whole safetensors file"),
    (content("model.safetensors", b"no header"), "model.safetensors is no whole safetensors file"),
    (weights(lambda state: state.pop("model.norm.weight")), "the weight model.norm.weight is not in its files"),
    (
        weights(lambda state: state.update({"lm_head.weight": torch.zeros(3, 24)})),
        r"lm_head.weight has the shape \(3, 24\) in its files, and config.json asks for \(260, 24\)",
    ),
    (in_config(hidden_act="os.system"), r"transformers refuses \(KeyError: 'os.system'\)"),
    (in_config(num_hidden_layers=10**9), "its files hold 2 layers, and config.json asks for 1000000000"),
    (in_config(num_hidden_layers=1), "its files hold 2 layers, and config.json asks for 1;"),
    (content("chat_template.jinja", b"\xff"), "chat_template.jinja is not UTF-8"),
    (with_index, "lacks part-2.safetensors"),
    (with_other_tokenizer, "a tokenizer of 267 tokens for an embedding of 260"),
    (content("tokenizer.json", "{}"), "tokenizer.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_folder_gets_one_sentence(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(PkmError, match=message) as refused:
        resolved("model=hf", f"model.path={folder}")
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/nowhere"], "model.path=/nowhere does not exist; give a folder with config.json"),
        (["model.path=PATH", "data.tokenizer=bpe"], "data.tokenizer=bpe is the tokenizer of another model"),
        (["model.path=PATH", "data.tokenizer=OTHER"], "other.json is the tokenizer of another model"),
        (["model.path=PATH", "data.tokenizer=nonsense"], "data.tokenizer='nonsense' is not known"),
        (["model.path=PATH", "model.document_mask=maybe"], "model.document_mask"),
        (["model.path=PATH", "+model.n_heads=3"], "n_heads"),
        (["model.path=false.gguf"], "false.gguf is no GGUF file"),
        (["model.path=cut.gguf"], "cut.gguf cannot be read as a GGUF file"),
    ],
)
def test_a_wrong_combination_gets_one_sentence(
    overrides: list[str], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("false.gguf").write_bytes(b"no magic")
    whole = pretrained_models.save_gguf("llama", tmp_path / "whole.gguf").read_bytes()
    Path("cut.gguf").write_bytes(whole[: len(whole) // 2])
    train_bpe(["one two three"] * 3, 260).save(tmp_path / "other.json")
    places = {"PATH": str(saved), "OTHER": str(tmp_path / "other.json")}
    for name, place in places.items():
        overrides = [override.replace(name, place) for override in overrides]
    with pytest.raises(PkmError, match=message) as refused:
        resolved("model=hf", *overrides)
    assert "\n" not in str(refused.value)


def test_learned_positions_and_the_ffn_of_other_models_are_refused(tmp_path: Path) -> None:
    folder = pretrained_models.save("gpt2", tmp_path)
    with pytest.raises(PkmError, match=r"data\.seq_len=65 is more than the 64 positions"):
        resolved("model=hf", f"model.path={folder}", "data.seq_len=65")
    with pytest.raises(PkmError, match="ffn=pretrained is the FFN of a pretrained model; set model=hf"):
        resolved("ffn=pretrained")


def test_a_missing_extra_names_the_command(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PkmError, match=r"needs transformers, .*pip install 'pkm_lightning\[hf\]'"):
        resolved("model=hf", f"model.path={saved}")


def loaded(path: Path) -> LoadedModel:
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        return load_pretrained(plain(compose("config", overrides=["model=hf", f"model.path={path}"])))


@torch.no_grad()
def test_a_gguf_file_is_the_model_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    model = loaded(pretrained_models.save_gguf("llama", tmp_path / "model.gguf"))
    ids_BT = torch.randint(pretrained_models.VOCAB, (1, 9))
    expected = pretrained_models.tiny("llama")(ids_BT).logits
    assert_close(model.model.unembed(model.model(ids_BT).hidden_BTD), expected)
    assert model.context == pretrained_models.CONTEXT
    assert model.chat_template == pretrained_models.TEMPLATE
    assert model.codec().eos_id == 0  # <|endoftext|> is the other candidate
    # Its metadata name it as the token that begins a text, and it is put before none.
    assert (model.codec().prefix_id, model.codec().begin_id) == (1, None)
    assert model.codec().decode(model.codec().encode("thin ice")) == "thin ice"


@pytest.mark.parametrize(
    ("named", "prefix", "shown"),
    [("<pad>", 0, "<pad>"), ({"content": "<pad>"}, 0, "<pad>"), (None, 1, ""), ("<unknown>", 1, ""), (7, 1, "")],
)
def test_a_text_begins_with_the_token_that_the_folder_names(
    named: object, prefix: int, shown: str, folder: Path
) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": named, "eos_token": "<eos>"}))
    tokenizer = PretrainedFiles.find(str(folder), folder).tokenizer
    assert tokenizer is not None
    assert (tokenizer.prefix_id, tokenizer.control_tokens["bos_token"]) == (prefix, shown)
    assert tokenizer.begin_id is None
    assert tokenizer.encode("a") == bytes_tokenizer().encode("a")


def test_the_ids_that_end_an_answer_are_those_of_the_generation_config(folder: Path) -> None:
    find = PretrainedFiles.find
    (folder / "generation_config.json").unlink()
    assert find(str(folder), folder).stop_ids == [1]
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert find(str(folder), folder).stop_ids == [5, 7]


@pytest.mark.parametrize("named", [[7, 9], 9, None])
def test_every_token_that_the_generation_config_names_ends_a_text(folder: Path, named: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    model = resolved("model=hf", f"model.path={folder}", "trainer.accelerator=cpu").model
    assert model.end_ids == (tuple(named) if isinstance(named, list) else (1,) if named is None else (named,))


def test_parts_of_a_pretrained_model_are_frozen_by_name(saved: Path) -> None:
    model = resolved(
        "model=hf", f"model.path={saved}", "optim.freeze=['*embed_tokens*']", "trainer.accelerator=cpu"
    ).model
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["network.model.embed_tokens.weight"]


def test_a_program_loads_a_pretrained_folder_and_saves_it(saved: Path, tmp_path: Path) -> None:
    short = GPT2Config(vocab_size=260, n_embd=8, n_layer=1, n_head=2, n_positions=16)  # than any default of data
    AutoModelForCausalLM.from_config(short).save_pretrained(tmp_path / "short")
    for folder in (saved, tmp_path / "short"):
        loaded = pkm_lightning.load(folder)
        theirs, ids_BT = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(2, 14)[None]
        with torch.no_grad():
            assert torch.equal(loaded.model.unembed(loaded.model(ids_BT).hidden_BTD), theirs(ids_BT).logits)
        assert loaded.context == loaded.model.config.max_position_embeddings
    loaded = pkm_lightning.load(saved, precision="bf16-true")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    again = pkm_lightning.load(pkm_lightning.save(loaded, tmp_path / "again"))
    assert again.answer("Who", max_new_tokens=4) == loaded.answer("Who", max_new_tokens=4)
    with pytest.raises(ConfigError, match="precision='half' is not known"):
        pkm_lightning.load(saved, precision="half")
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):  # as in a program of Hydra
        pkm_lightning.load(saved)
        assert compose("config").seed == 1


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        *(("llama", "model=hf model.path=.*foreign"), ("pkm_lightning_llama", "with plugins, .*: give its run")),
        *(("pkm_lightning", "AutoModelForCausalLM"), (None, "export ckpt=")),
    ],
)
def test_weights_of_transformers_given_as_a_checkpoint_say_how_to_load_them(
    kind: str | None, remedy: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "foreign")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=f"was not written by this package; .*{remedy}"):
        open_checkpoint(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        *(("llama", "model=hf model.path=.*foreign"), ("pkm_lightning_llama", "with plugins, .*: give its run")),
        ("pkm_lightning", "ckpt=.*foreign/model.safetensors"),
    ],
)
def test_a_folder_given_as_a_checkpoint_says_what_to_give(kind: str, remedy: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "foreign")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=f"is damaged or no checkpoint; .*{remedy}"):
        open_checkpoint(folder)
