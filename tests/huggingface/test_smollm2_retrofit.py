"""Plugins in the real model of docs/pretrained.md: nothing changes at first, and the trunk stays when they learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface.test_retrofit import logits, start
from huggingface.test_smollm2 import FILE
from small import resolved

from pkm_lightning.data.pretrained_files import quiet_transformers
from pkm_lightning.training.table_learning import trainer_optimizer

#: Tables by product keys, experts of one neuron, and n-grams.
PLUGINS = (
    *("ffn=memory_plus", "placement.layers=[24]", "placement.mode=parallel", "placement.write_after=0"),
    *("extra_ffns=[engram,pkm,peer]", "extra_ffns.engram.placement.layers=[25]"),
    *("extra_ffns.pkm.placement.layers=[26]", "extra_ffns.pkm.placement.mode=parallel"),
    *("extra_ffns.peer.placement.layers=[28]", "extra_ffns.peer.placement.mode=after", "model.memory.n_keys=64"),
)


def in_transformers(name: str) -> str:
    return name.removeprefix("network.").replace("mlp.base.", "mlp.")


@pytest.mark.slow
@pytest.mark.skipif(FILE is None, reason="set PKM_LIGHTNING_SMOLLM2, see test_smollm2.py")
def test_plugins_in_smollm2_start_at_zero_and_learn_while_the_trunk_stays() -> None:
    from transformers import AutoModelForCausalLM

    path = Path(str(FILE))
    run = resolved("model=hf", f"model.path={path}", "data.seq_len=64", "optim=retrofit", *PLUGINS)
    model = start(run.config)
    assert [layer for layer, _, _ in model.plugins()] == [24, 25, 26, 28]
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    ids_BT = torch.randint(2, 49152, (2, 16))
    with torch.no_grad():
        assert torch.equal(logits(model, ids_BT), theirs(ids_BT).logits)
    optimizer = trainer_optimizer(model, run.config, with_rows=True)
    trunk = dict(theirs.named_parameters())
    new = {name: value for name, value in model.named_parameters() if in_transformers(name) not in trunk}
    before = {name: value.detach().clone() for name, value in new.items()}
    assert trunk.keys() <= {in_transformers(name) for name, _ in model.named_parameters()}
    for _ in range(4):  # of what stands behind a zero, not all has a gradient in the first steps
        model.unembed(model.train()(ids_BT).hidden_BTD).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.named_parameters():
        start_value = before[name] if name in before else trunk[in_transformers(name)]
        assert torch.equal(value, start_value) == (name not in before), name
