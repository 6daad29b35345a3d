"""Scores equal to those of the harness's own `hf` model, on a dense model that transformers loads as a Llama."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from local_tasks import NAMES, WORDS, sentence, write_tasks
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from toys import dense, transformer

from pkm_lightning.data.base import begin_ids
from pkm_lightning.data.tokenizer import Tokenizer, train_bpe
from pkm_lightning.inference.harness import HarnessModel
from pkm_lightning.inference.harness_results import run_tasks, scores_of
from pkm_lightning.inference.harness_tasks import load_tasks
from pkm_lightning.model import Transformer

#: Questions per task.
N_ITEMS = 200
#: Shorter than some prompts and most texts, so that both are cut.
CONTEXT = 24
#: Our names of the weights, and those of a Llama.
RENAMED = {
    r"^embedding\.": "model.embed_tokens.",
    r"^norm\.": "model.norm.",
    r"^unembedding\.": "lm_head.",
    r"^blocks\.": "model.layers.",
    r"\.attention\.(query|key|value|out)\.": lambda match: (
        f".self_attn.{'o' if match[1] == 'out' else match[1][0]}_proj."
    ),
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.ffn\.(gate|up|out)\.": lambda match: f".mlp.{'down' if match[1] == 'out' else match[1]}_proj.",
}


def with_begin(tokenizer: Tokenizer, *, begins: str) -> Tokenizer:
    """A tokenizer with a token that begins a text: put before each one, as that of a Llama, or named and not put."""
    if begins == "plain":
        return tokenizer
    backend = Backend.from_str(tokenizer.to_json())
    backend.add_special_tokens(["<bos>"])
    if begins == "put":
        begin = backend.token_to_id("<bos>")
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", begin)])
    return Tokenizer(backend, "the tokenizer")


def trained(tokenizer: Tokenizer) -> Transformer:
    """A model that has seen sentences like the questions, so that its answers end and some choices are its own."""
    model = transformer([dense(2), dense(2)], vocab_size=tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dice = random.Random(2)
    for _ in range(80):
        asked = [sentence(dice, 1, 6) for _ in range(160)]
        texts = "".join(f" {question} is {question.split()[-1]}." for question in asked)
        ids_BT = torch.tensor(tokenizer.encode(texts)[:640]).view(-1, 32)
        logits_BTW = model.unembed(model(ids_BT[:, :-1]).hidden_BTD)
        torch.nn.functional.cross_entropy(logits_BTW.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write_llama(folder: Path, model: Transformer, tokenizer: Tokenizer, begin_token: str | None) -> None:
    """Writes a folder that transformers loads without this package."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    llama = LlamaForCausalLM(config)
    llama.load_state_dict({_renamed(name): value for name, value in model.state_dict().items()})
    llama.save_pretrained(folder)
    tokenizer.save(folder / "ours.json")
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "ours.json"),
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token=begin_token,
    ).save_pretrained(folder)


def _renamed(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = re.sub(ours, theirs, name)
    return name


def responses(lm: Any, folder: Path) -> tuple[dict[str, list[Any]], dict[tuple[str, str], float]]:
    """Returns what `lm` answers to each request, by task, and the figures that the harness makes of it."""
    tasks = load_tasks(NAMES, tasks_dir=folder, num_fewshot=1)
    # With one example before the question, which only `options` has.
    for name in set(NAMES) - {"options"}:
        tasks["tasks"][name].set_config(key="num_fewshot", value=0)
    results = run_tasks(lm, tasks, limit=None, bootstraps=0, progress=False)
    figures = {(score.task, score.metric): score.value for score in scores_of(results)}
    assert {score.n for score in scores_of(results)} == {N_ITEMS}
    return {name: [request.resps[0] for request in task.instances] for name, task in tasks["tasks"].items()}, figures


@pytest.mark.slow
@pytest.mark.parametrize("begins", ["plain", "put", "named"])
def test_scores_are_those_of_the_harness_with_transformers(
    begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM

    folder = write_tasks(tmp_path / "tasks", N_ITEMS, longest=20)
    tokenizer = with_begin(train_bpe([" ".join(WORDS), " is . a b c d"], 300), begins=begins)
    model = trained(tokenizer)
    write_llama(tmp_path / "llama", model, tokenizer, None if begins == "plain" else "<bos>")
    tokenizer = Tokenizer.load(tmp_path / "llama/tokenizer.json")
    assert (tokenizer.begin_id is not None, tokenizer.prefix_id != tokenizer.eos_id) == (
        begins == "put",
        begins != "plain",
    )
    theirs, their_figures = responses(
        HFLM(pretrained=str(tmp_path / "llama"), dtype="float32", device="cpu", batch_size=16), folder
    )
    adapter = HarnessModel(
        model,
        tokenizer,
        context=CONTEXT,
        device=torch.device("cpu"),
        batch_size=7,
        progress=False,
        **begin_ids(tokenizer),
    )
    ours, our_figures = responses(adapter, folder)

    assert ours["answers"] == theirs["answers"]
    assert len(set(ours["answers"])) > 5
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], abs=1e-4, rel=1e-5)
    for task in ("options", "letters"):
        assert [nats for nats, _ in ours[task]] == pytest.approx([nats for nats, _ in theirs[task]], abs=1e-4)
        assert [greedy for _, greedy in ours[task]] == [greedy for _, greedy in theirs[task]]
    assert any(greedy for _, greedy in ours["letters"] + ours["options"])
    assert our_figures.keys() == their_figures.keys()
    for figure, value in our_figures.items():
        assert value == pytest.approx(their_figures[figure], rel=1e-5), figure
    assert all(0 < our_figures[figure] < 1 for figure in our_figures if figure[0] != "perplexity")
