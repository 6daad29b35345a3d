"""Tiny random models of every supported architecture, saved as transformers saves them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pkm_lightning.data.bpe_process import alphabet
from pkm_lightning.data.tokenizer import bytes_tokenizer

#: Neither the first nor the usual name of an end token.
END = "<|im_end|>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
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
    """Returns a model of `CONFIGS[name]` with biases and gains that are not zeros and ones."""
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


def save_gguf(name: str, file: Path, further_tokens: Sequence[str] = ()) -> Path:
    """Writes the weights of `tiny(name)`, a Llama, and a tokenizer of bytes as a GGUF file."""
    from gguf import GGUFWriter, TokenType

    model, config = tiny(name), CONFIGS[name]
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB)
    tokens = [END, "<|endoftext|>", *sorted(alphabet()), "th", "in", *further_tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["t h", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for parameter, value in model.named_parameters():
        named = names.get(parameter) or _gguf_name(parameter)
        if named.endswith("attn_q.weight"):
            value = _interleaved(value, config.num_attention_heads)
        if named.endswith("attn_k.weight"):
            value = _interleaved(value, config.num_key_value_heads)
        writer.add_tensor(named, value.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_name(parameter: str) -> str:
    layer, part = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", parameter).groups()  # type: ignore[union-attr]
    part = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }[part]
    return f"blk.{layer}.{part}.weight"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Puts the two halves of each head that rotate together side by side, as GGUF files of Llamas have them."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
