"""The real model of docs/pretrained.md: log-likelihoods of transformers, its chat template and its end token."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from tree import ROOT

from pkm_lightning.cli.job import plain
from pkm_lightning.data.chat_template import ChatTemplate
from pkm_lightning.data.pretrained_files import quiet_transformers
from pkm_lightning.huggingface.loading import load_pretrained

FILE = os.environ.get("PKM_LIGHTNING_SMOLLM2")
#: Nats per token.
PARITY = 1e-4


@pytest.mark.slow
@pytest.mark.skipif(
    FILE is None,
    reason="set PKM_LIGHTNING_SMOLLM2 to the file SmolLM2-135M-Instruct.Q4_1.gguf (docs/pretrained.md says where from)",
)
@torch.no_grad()
def test_smollm2_is_the_model_that_transformers_reads_and_answers_a_question() -> None:
    from transformers import AutoModelForCausalLM

    path = Path(str(FILE))
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        loaded = load_pretrained(plain(compose("config", overrides=["model=hf", f"model.path={path}"])))
    model, codec = loaded.model, loaded.codec()
    assert (loaded.context, codec.eos_id) == (8192, 2)
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    ids_BT = torch.tensor([codec.encode((ROOT / "LICENSE").read_text())[:128]])
    expected = theirs(ids_BT).logits.log_softmax(-1)
    cache = model.new_cache(1, 128)
    parts = [model.unembed(model(part, cache=cache).hidden_BTD) for part in ids_BT.split([64, *[1] * 64], dim=1)]
    for logits in (model.unembed(model(ids_BT).hidden_BTD), torch.cat(parts, dim=1)):
        differences = (logits.log_softmax(-1) - expected)[:, :-1].gather(-1, ids_BT[:, 1:, None])
        assert differences.abs().max() < PARITY
    template = ChatTemplate(str(loaded.chat_template), codec, path)
    asked = template.render([{"role": "user", "content": "What is the capital of France?"}])
    assert asked.endswith("<|im_start|>assistant\n")
    ids = torch.tensor([codec.encode_rendered(asked)])  # type: ignore[attr-defined]
    first = model.unembed(model(ids).hidden_BTD[:, -1]).argmax(-1)
    assert codec.decode(first.tolist()) == "The"
