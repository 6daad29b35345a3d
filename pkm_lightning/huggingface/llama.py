"""A dense model as plain Llama: the same mathematics under other names, since both rotate pairs (f, f + C/2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkm_lightning.build.instantiate import check_trusted
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.ffn import Dense
from pkm_lightning.huggingface.folder_keys import GROUPS
from pkm_lightning.model import Transformer

_DENSE = "pkm_lightning.ffn.Dense"
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


def as_llama(config: Mapping[str, Any], source: str) -> Transformer | None:
    """Returns the model of `config` without memory if Llama computes the same, else None.

    Llama has SwiGLU of one width in every layer, and nothing else.

    Raises:
        ConfigError: a dense model whose configuration, read from `source`, names code that it may not run.
    """
    # By name first: classes of others are neither imported nor constructed.
    if not all(group.get("_target_") == _DENSE for group in (config["ffn"], config["model"]["base_ffn"])):
        return None
    check_trusted({group: config[group] for group in GROUPS}, source)
    model = build_meta_model(config)
    ffns = [block.ffn for block in model.blocks]
    widths = {ffn.out.in_features if isinstance(ffn, Dense) and ffn.gate is not None else None for ffn in ffns}
    return model if len(widths) == 1 and None not in widths else None


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
