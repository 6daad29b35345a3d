"""A memory beside the FFN of a transformers model: taught alone, saved as a folder, loaded, asked (extra `hf`).

    python examples/transformers_ffn.py          # seconds on a laptop's CPU

Letters: B sequences, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pkm_lightning.huggingface  # noqa: F401 - the Auto classes then know models with plugins
from pkm_lightning import MemoryPlus, TableOptimizer, ffn_reports, replace_ffn, row_learning_tables

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    bos_token_id=0, eos_token_id=None, pad_token_id=None, initializer_range=0.2,
)  # fmt: skip


def make() -> LlamaForCausalLM:
    """Returns a small random Llama, as if pretrained, with a memory beside the FFN of its middle layer.

    The memory starts with an output of zero, and everything else keeps its values.
    """
    model = LlamaForCausalLM(CONFIG)
    replace_ffn(
        model, layers=[1], ffn=MemoryPlus, mode="parallel", freeze_trunk=True, n_keys=32, knn=4, learning="rows"
    )
    return model


def train(steps: int = 200) -> tuple[LlamaForCausalLM, Tensor, float]:
    """Trains on 32 random sequences; returns the model, the sequences and the last loss."""
    torch.manual_seed(0)
    model, ids_BT = make(), torch.randint(64, (32, 12))
    dense = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    optimizer = TableOptimizer(dense, row_learning_tables(model), lr=3e-2)
    for _ in range(steps):
        with ffn_reports(model) as reports:  # losses and statistics of plugins that have some, such as MoE
            loss = model(input_ids=ids_BT, labels=ids_BT).loss + reports.aux_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.after_step()
    return model.eval(), ids_BT, loss.item()


if __name__ == "__main__":
    model, ids_BT, loss = train()
    model.save_pretrained("llama_with_memory")
    loaded = AutoModelForCausalLM.from_pretrained("llama_with_memory")
    prompts_BT = ids_BT[:, :4]
    written_BT = loaded.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), max_new_tokens=8)
    right = (written_BT == ids_BT)[:, 4:].float().mean()
    print(f"loss {loss:.2f}; {right:.1%} of the tokens after four are those of the sequence")
