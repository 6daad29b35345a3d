"""The exported tokenizer: equal ids in transformers, for every text and whatever its file would add around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface.folders import export
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.data.chat_template import ChatTemplate
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe
from pkm_lightning.huggingface.export import write_folder
from pkm_lightning.huggingface.tokenizer import write_tokenizer

TEXTS = ["The capital of France is", " two  spaces ", "<eos> and <pad>", "naïve 東京 \u2028\n\t", ""]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"


def bracketing(folder: Path) -> Path:
    """Writes a tokenizer that puts control tokens around a text where nobody prevents it."""
    bytes_tokenizer().save(folder / "source.json")
    backend = Backend.from_file(str(folder / "source.json"))
    backend.post_processor = TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", 1)])
    backend.save(str(folder / "source.json"))
    return folder / "source.json"


@pytest.mark.parametrize("kind", ["bytes", "bpe", "bracketing"])
def test_ids_and_texts_are_equal(kind: str, tmp_path: Path) -> None:
    if kind == "bracketing":
        ours = Tokenizer.load(bracketing(tmp_path))
        write_tokenizer(ours.without_additions(), tmp_path, 32, None)
    else:
        ours = bytes_tokenizer() if kind == "bytes" else train_bpe(["the capital of the city " * 9], 270)
        write_tokenizer(ours, tmp_path, 32, None)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.padding_side) == (ours.eos_id, ours.pad_id, "left")
    assert theirs.model_max_length == 32
    assert set(theirs(TEXTS[0])) == {"input_ids", "attention_mask"}


def test_a_chat_template_is_carried_and_its_control_tokens_count(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    _, folder = export(tmp_path, "ffn=dense")
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
    assert ids == [*bytes_tokenizer().encode("user: hi"), 1]
    turns = [{"role": "user", "content": "hi <pad>"}, {"role": "assistant", "content": " you"}]
    ours = ChatTemplate(TEMPLATE, bytes_tokenizer(), tmp_path)
    assert ours.encode(turns) == theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ours.end_ids() == [1]


def test_a_folder_without_a_tokenizer_names_no_tokens(tmp_path: Path) -> None:
    _, folder = export(tmp_path, "ffn=dense")
    (tmp_path / "tokenizer.json").unlink()
    content = open_checkpoint(tmp_path / "model.ckpt")
    content.skeleton["tokenizer"] = "that of other words"
    written = write_folder(content, folder)
    assert not written.has_tokenizer
    assert not (folder / "tokenizer.json").exists()
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        assert content["eos_token_id"] is None
        assert content["pad_token_id"] is None


def test_an_end_token_that_is_also_the_padding_keeps_learning(tmp_path: Path) -> None:
    """Llama takes the embedding of `pad_token_id` of config.json from training."""
    export(tmp_path, "ffn=dense")
    alone = json.loads((tmp_path / "tokenizer.json").read_text().replace("<pad>", "<unused>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(alone))
    content = open_checkpoint(tmp_path / "model.ckpt")
    content.skeleton["tokenizer"] = None
    write_folder(content, tmp_path / "hf")
    ids = [
        json.loads((tmp_path / "hf" / name).read_text())["pad_token_id"]
        for name in ("config.json", "generation_config.json")
    ]
    assert ids == [None, 1]
