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


@pytest.mark.slow
@pytest.mark.skipif(FILE is None, reason="set PKM_LIGHTNING_SMOLLM2, as test_smollm2.py says")
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
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    for _ in range(4):  # of what stands behind a zero, not all has a gradient in the first steps
        model.unembed(model.train()(ids_BT).hidden_BTD).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    unmoved = [name for name, value in model.named_parameters() if name in before and torch.equal(value, before[name])]
    assert unmoved == []
    trunk = dict(theirs.named_parameters())
    names = {name.removeprefix("network.").replace("mlp.base.", "mlp.") for name, _ in model.named_parameters()}
    assert trunk.keys() <= names
    for name, value in model.named_parameters():
        pretrained = trunk.get(name.removeprefix("network.").replace("mlp.base.", "mlp."))
        assert (pretrained is None) == (name in before), name
        assert pretrained is None or torch.equal(value, pretrained), name
