"""A dense model as plain Llama: the logits of transformers' own class, which knows nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface.folders import VOCAB, export, ids, logits, save
from tolerances import assert_close
from toys import config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.checkpoints import open_checkpoint, sharded
from pkm_lightning.checkpoints.export import write
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.errors import CheckpointError
from pkm_lightning.huggingface.export import write_folder
from pkm_lightning.huggingface.llama import is_llama

#: Run where this package cannot be imported.
PLAIN = """
import sys
sys.modules["pkm_lightning"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(["Who is it?", "Where"], return_tensors="pt", padding=True)
answers = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
torch.save({"type": type(model).__name__, "ids": answers, **inputs}, sys.argv[2])
"""


@pytest.mark.parametrize(
    "overrides", [(), ("model.tied=true",), ("model.n_kv_heads=4", "model.rope_theta=500")], ids=str
)
def test_logits_are_those_of_llama(overrides: tuple[str, ...], tmp_path: Path) -> None:
    model, folder = export(tmp_path, "ffn=dense", *overrides)
    llama = AutoModelForCausalLM.from_pretrained(folder)
    assert type(llama) is LlamaForCausalLM
    with torch.no_grad():
        assert_close(llama(ids()).logits, logits(model, ids()))
    saved = llama.config
    assert (saved.max_position_embeddings, saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (
        32,
        None,
        1,
        0,
    )
    assert saved.tie_word_embeddings == ("model.tied=true" in overrides)
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == saved.tie_word_embeddings


def test_precision_forms_and_places_of_the_weights(tmp_path: Path) -> None:
    """A folder of ranks and an exported file give the folder of the checkpoint, byte for byte."""
    model, folder = export(tmp_path, "ffn=dense")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    sharded.save(*flatten(content), tmp_path / "ranks.ckpt")
    write(open_checkpoint(tmp_path / "model.ckpt"), tmp_path / "file.safetensors")
    weights = (folder / "model.safetensors").read_bytes()
    for form in ("ranks.ckpt", "file.safetensors"):
        write_folder(open_checkpoint(tmp_path / form), tmp_path / "other")
        assert (tmp_path / "other" / "model.safetensors").read_bytes() == weights
    half = {name: value.bfloat16() for name, value in content["state_dict"].items()}
    torch.save({**content, "state_dict": half}, tmp_path / "model.ckpt")
    write_folder(open_checkpoint(tmp_path / "model.ckpt"), folder)
    llama = AutoModelForCausalLM.from_pretrained(folder)
    assert llama.dtype == torch.bfloat16
    with torch.no_grad():
        expected = model.bfloat16().unembed(model(ids()).hidden_BTD)
        # Llama rounds the angles of RoPE to bf16, this package does not.
        assert (llama(ids()).logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "overrides",
    [
        ("ffn=memory",),
        ("ffn=dense", "ffn.activation=gelu"),
        ("ffn=dense", "placement.layers=[1]", "ffn.hidden_dim=24"),
        ("ffn=dense", "placement.mode=parallel"),
        ("ffn=dense", "placement.mode=before"),
        ("ffn=ple",),
    ],
    ids=str,
)
def test_what_llama_does_not_compute_is_no_llama(overrides: tuple[str, ...]) -> None:
    assert not is_llama(build_meta_model(config(*overrides)))
    assert is_llama(build_meta_model(config("ffn=dense")))


def test_what_does_not_fit_is_refused_and_leaves_the_folder(tmp_path: Path) -> None:
    _, folder = export(tmp_path, "ffn=dense")
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)

    def refused(changed: dict[str, object], error: type[Exception], reason: str) -> None:
        torch.save({**content, **changed}, tmp_path / "model.ckpt")
        with pytest.raises(error, match=reason):
            write_folder(open_checkpoint(tmp_path / "model.ckpt"), folder)
        assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before

    fewer = {name: value for name, value in content["state_dict"].items() if "key" not in name}
    refused({"state_dict": fewer}, CheckpointError, "does not fit its configuration")
    refused({"tokenizer": "another"}, CheckpointError, "is not the tokenizer that model.ckpt was trained with")
    settings = content["hyper_parameters"]["config"]
    refused(
        {"hyper_parameters": {"config": {**settings, "table": 3}}}, CheckpointError, "has a configuration without table"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.ckpt", "tokenizer.json"]


def test_a_kill_leaves_the_earlier_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = export(tmp_path, "ffn=dense")
    (folder / "README.md").write_text("earlier")

    def fail(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("pkm_lightning.huggingface.export.model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        write_folder(open_checkpoint(tmp_path / "model.ckpt"), folder)
    assert (folder / "README.md").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.ckpt", "tokenizer.json"]


@pytest.mark.slow
def test_transformers_alone_loads_the_folder(tmp_path: Path) -> None:
    model, folder = export(tmp_path, "ffn=dense")
    subprocess.run([sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "out.pt")], check=True, timeout=300)
    answer = torch.load(tmp_path / "out.pt", weights_only=True)
    assert answer["type"] == "LlamaForCausalLM"
    assert answer["ids"].shape == (2, 15)
    # Greedy answers of our own model, without padding and without a cache.
    for prompt, valid, written in zip(answer["input_ids"], answer["attention_mask"].bool(), answer["ids"], strict=True):
        sequence = prompt[valid].unsqueeze(0)
        for _ in range(5):
            sequence = torch.cat([sequence, logits(model, sequence)[:, -1:].argmax(-1)], 1)
        assert torch.equal(sequence[0, -5:], written[-5:])


def test_the_card_names_model_data_figures_and_commands(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    save(tmp_path, "ffn=dense", f"run_dir={run}", "data.cache_dir=/srv/cache")
    (tmp_path / "model.ckpt").rename(run / "checkpoints" / "step-00000001.ckpt")
    (run / "config.yaml").write_text("{}")
    record = {
        "params": {"active": 4321},
        "data": "abcdef",
        "metrics": {"test/loss": 1.25, "recall": {"seen": {"n": 8}}},
    }
    (run / "run.json").write_text(json.dumps(record))
    write_folder(open_checkpoint(run / "checkpoints" / "step-00000001.ckpt"), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in (
        *("# Dense, 2 layers of 16", f"| vocabulary | {VOCAB} |", "| active per token | 4,321 |", "| 123 tokens in"),
        *("`abcdef`", "| test/loss | 1.25 |", "AutoModelForCausalLM.from_pretrained", "fit --config-path=$PWD"),
    ):
        assert text in card, text
    assert "import pkm_lightning" not in card
    assert str(tmp_path) not in card
    assert "/srv" not in card
    # The run's directory holds none; that of the bytes needs no file.
    assert (tmp_path / "hf" / "tokenizer.json").exists()
