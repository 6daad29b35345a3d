"""Tiny random models of every supported architecture, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pkm_lightning.data.tokenizer import bytes_tokenizer

VOCAB, CONTEXT, WINDOW = 260, 64, 8
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
#: Grouped heads, biases, norms of queries and keys, a head dimension of its own, windows in all or some layers,
#: tied and untied matrices, learned positions.
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SIZES, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**_SIZES, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.3,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=1,
        eos_token_id=1,
    ),
}
NAMES = list(CONFIGS)


def tiny(name: str) -> PreTrainedModel:
    """A model of `CONFIGS[name]` with biases and gains that are not zeros and ones."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def save(name: str, folder: Path) -> Path:
    """Saves `tiny(name)` with the byte tokenizer in `folder`."""
    tiny(name).save_pretrained(folder)
    bytes_tokenizer().save(folder / "tokenizer.json")
    return folder
