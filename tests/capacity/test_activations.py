"""Planned activations and logits against what real forwards and backwards on the CPU keep and allocate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import COUNTED_MEMORY
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from toys import config

from pkm_lightning.build.model import build_meta_model, build_model
from pkm_lightning.capacity import make_plan
from pkm_lightning.capacity.figures import Memory
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.model import Transformer
from pkm_lightning.model.loss import token_nll

ROWS, LENGTH, VOCABULARY = 4, 64, 500
SIZES = (
    "model.memory.n_keys=16",
    f"model.vocab_size={VOCABULARY}",
    f"data.global_batch_size={ROWS}",
    f"data.seq_len={LENGTH}",
)


class NeedsValues(nn.Module):
    """A plugin that cannot run on the meta device, where tensors have no values."""

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(x_BTD * float(x_BTD.sum()))


def planned(settings: dict[str, Any]) -> Memory:
    return make_plan(build_meta_model(settings), settings).memory


def real(settings: dict[str, Any]) -> tuple[Transformer, Callable[[], Tensor], Callable[[], Tensor]]:
    """Returns a model on the CPU, a function that returns its hidden states, and one that returns its loss."""
    precision = settings["trainer"]["precision"]
    model = build_model(settings).train()
    model.init_weights(1)
    if precision == "bf16-true":
        model.bfloat16()
    ids_BT = torch.randint(VOCABULARY, (ROWS, LENGTH))
    mixed = precision == "bf16-mixed"

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            output = model(ids_BT, doc_ids_BT=torch.zeros_like(ids_BT), valid_BT=ids_BT >= 0)
            return output.hidden_BTD

    return model, forward, lambda: token_nll(model, forward(), ids_BT).sum()


def kept(model: Transformer, forward: Callable[[], Any]) -> int:
    """Returns the bytes of the storages that autograd saves in `forward`, without weights."""
    storages: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage()._cdata] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        _ = forward()
    for weight in (*model.parameters(), *model.buffers()):
        storages.pop(weight.untyped_storage()._cdata, None)
    return sum(saved.untyped_storage().nbytes() for saved in storages.values())


def peak(run: Callable[[], Any]) -> int:
    """Returns the most bytes that `run` holds at a time of those that it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("ffn", "precision"),
    [
        ("dense", "32-true"),
        ("moe", "32-true"),
        ("pkm", "32-true"),
        ("memory_plus", "32-true"),
        ("peer", "32-true"),
        ("ultramem", "32-true"),
        ("ple", "32-true"),
        ("stem", "32-true"),
        ("memory_plus", "bf16-true"),
        ("dense", "bf16-mixed"),
        ("memory_plus", "bf16-mixed"),
    ],
)
def test_layers_keep_as_much_as_planned(ffn: str, precision: str) -> None:
    settings = config(f"ffn={ffn}", f"trainer.precision={precision}", *SIZES)
    model, forward, _ = real(settings)
    assert planned(settings).activations == pytest.approx(kept(model, forward), rel=COUNTED_MEMORY)


def test_a_block_of_a_dense_model_keeps_what_the_formula_says() -> None:
    """The formula of `pkm_lightning.capacity`; embedding, rotations and the last norm are the remainder."""
    sizes = ("ffn=dense", "model.dim=48", "model.n_heads=6", "model.n_kv_heads=3", "model.ffn_dim=80", *SIZES)
    two, three = (planned(config(*sizes, f"model.n_layers={n}")).activations for n in (2, 3))
    assert two is not None
    assert three is not None
    per_token = 6 * 48 + 2 * (3 * 8) + 6 + LENGTH + 4 * 80 + 2
    assert three - two == ROWS * LENGTH * per_token * 4
    recomputed = planned(config(*sizes, "model.n_layers=3", "model.activation_checkpointing=true")).activations
    assert recomputed == three - 3 * (three - two) + 3 * ROWS * LENGTH * 48 * 4 + (three - two)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_allocates_as_much_as_planned(checkpointing: bool) -> None:
    settings = config("ffn=dense", *SIZES, f"model.activation_checkpointing={checkpointing}", "model.n_layers=6")
    model, _, loss = real(settings)
    memory = planned(settings)
    assert memory.activations is not None
    assert memory.logits is not None
    loss().backward()  # imports and caches
    model.zero_grad()
    measured = peak(lambda: loss().backward())
    if checkpointing:  # the largest block is run again when the logits are gone
        assert max(memory.logits, memory.activations) < measured < memory.activations + memory.logits
    else:
        # On CPUs the loss writes its gradient once.
        assert memory.activations + memory.logits * 2 / 3 == pytest.approx(measured, rel=COUNTED_MEMORY)


def test_what_does_not_run_on_meta_is_unknown() -> None:
    settings = config("ffn=dense", *SIZES)
    model = build_meta_model(settings)
    model.blocks[1].ffn = NeedsValues()  # type: ignore[union-attr]
    memory = make_plan(model, settings).memory
    assert (memory.activations, memory.logits) == (None, 12 * ROWS * LENGTH * VOCABULARY)
    del settings["data"]["seq_len"]
    assert make_plan(model, settings).memory.logits is None
