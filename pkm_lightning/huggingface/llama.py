"""A dense model as plain Llama: the same mathematics under other names, since both rotate pairs (f, f + C/2)."""

from __future__ import annotations

from typing import Any

from pkm_lightning.ffn import Dense
from pkm_lightning.model import Transformer

#: Names within a block.
_BLOCK = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.out": "mlp.down_proj",
}


def is_llama(model: Transformer) -> bool:
    """Returns whether Llama computes what `model` does: SwiGLU of one width in every layer, and nothing else."""
    widths = {_width(block.ffn) for block in model.blocks}
    is_ffn_alone = all(name == "ffn" for _, name, _ in model.plugins())
    return is_ffn_alone and len(widths) == 1 and None not in widths


def _width(ffn: object) -> int | None:
    """Returns the hidden dimension of Llama's FFN; None of any other FFN, a class derived from it included."""
    if not isinstance(ffn, Dense) or type(ffn) is not Dense or ffn.gate is None:
        return None
    return ffn.out.in_features


def llama_names(model: Transformer) -> dict[str, str]:
    """Returns Llama's name of each weight."""
    outer = {"embedding": "model.embed_tokens", "norm": "model.norm", "unembedding": "lm_head"}
    names = {}
    for name in model.state_dict():
        module = name.removesuffix(".weight")
        if module.startswith("blocks."):
            _, layer, part = module.split(".", 2)
            names[name] = f"model.layers.{layer}.{_BLOCK[part]}.weight"
        else:
            names[name] = f"{outer[module]}.weight"
    return names


def llama_config(model: Transformer) -> dict[str, Any]:
    """Returns the content of config.json that describes the architecture."""
    block: Any = model.blocks[0]
    dim, head_dim = model.embedding.embedding_dim, model.head_dim
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": model.embedding.num_embeddings,
        "hidden_size": dim,
        "intermediate_size": block.ffn.out.in_features,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attention.query.out_features // head_dim,
        "num_key_value_heads": block.attention.key.out_features // head_dim,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        # The second is the name in releases before 5.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "initializer_range": dim**-0.5,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.unembedding is None,
    }
