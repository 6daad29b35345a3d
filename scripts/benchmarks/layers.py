"""Whole layers of other packages, next to the same layers with this package's operations: equal weights, one step.

Letters: 2 halves, F dimension of a half key, C reads per token over all heads.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.case import Case, Run, Skipped, Way, relative_error
from benchmarks.ways import search
from pkm_lightning.ops import gathered_dot, weighted_gather

# A near tie that float64 decides otherwise moves a whole row of a gradient.
TOLERANCE = 1e-2


def pkm_layer(smoke: bool, device: torch.device) -> Case | Skipped:
    """Compares product-key-memory 0.3.0 (MIT), forward and backward, with `search` and `weighted_gather`."""
    try:
        from product_key_memory import PKM
    except ImportError as error:
        return Skipped(f"product-key-memory does not import: {error}")
    tokens, dim, n_keys = _sizes(smoke, device, tokens=4096, n_keys=512)
    layer = PKM(dim, heads=4, num_keys=n_keys, topk=_k(smoke), dim_head=64).to(device)

    def ours(x_TD: Tensor, backend: str) -> Tensor:
        # The package orders halves before heads.
        q_T2HF = layer.norm(layer.to_queries(x_TD).view(tokens, 2, 4, 64))
        scores_HTK, ids_HTK = _search(q_T2HF, layer.keys, layer.topk, backend)
        ids_TC, weights_TC = (part.transpose(0, 1).flatten(1) for part in (ids_HTK, scores_HTK.softmax(-1)))
        return weighted_gather(layer.values.weight, ids_TC, weights_TC, backend=backend)

    return _case(layer, "product-key-memory", ours, tokens, dim, f"S={n_keys}", device)


def peer_layer(smoke: bool, device: torch.device) -> Case | Skipped:
    """Compares PEER-pytorch 0.2.2 (MIT), forward and backward, with `gathered_dot` and `weighted_gather`."""
    try:
        from PEER_pytorch import PEER
    except ImportError as error:
        return Skipped(f"PEER-pytorch does not import: {error}")
    tokens, dim, n_keys = _sizes(smoke, device, tokens=1024, n_keys=256)
    options = {"heads": 4, "num_experts_per_head": _k(smoke), "dim_key": 64, "non_competing_scores": False}
    layer = PEER(dim, num_experts=n_keys**2, **options).to(device)

    def ours(x_TD: Tensor, backend: str) -> Tensor:
        q_T2HF = layer.to_queries[0](x_TD).view(tokens, 2, 4, 64)
        scores_HTK, ids_HTK = _search(q_T2HF, layer.keys, options["num_experts_per_head"], backend)
        ids_TC, weights_TC = (part.transpose(0, 1).flatten(1) for part in (ids_HTK, scores_HTK.softmax(-1)))
        hidden_TC = functional.gelu(gathered_dot(layer.weight_down_embed.weight, x_TD, ids_TC, backend=backend))
        return weighted_gather(layer.weight_up_embed.weight, ids_TC, weights_TC * hidden_TC, backend=backend)

    return _case(layer, "PEER-pytorch", ours, tokens, dim, f"S={n_keys}", device)


def _sizes(smoke: bool, device: torch.device, *, tokens: int, n_keys: int) -> tuple[int, int, int]:
    if smoke:
        return 16, 16, 16
    return (4 * tokens, 1024, n_keys) if device.type == "cuda" else (tokens, 256, n_keys)


def _k(smoke: bool) -> int:
    return 4 if smoke else 32


def _search(q_T2HF: Tensor, keys_HS2F: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    return search(q_T2HF.permute(1, 2, 0, 3), keys_HS2F.permute(2, 0, 1, 3), k, backend)


def _case(
    layer: nn.Module, name: str, ours: Callable[..., Tensor], tokens: int, dim: int, sizes: str, device: torch.device
) -> Case:
    """Builds the case: forward and backward to all weights and the input."""
    x_TD, upstream_TD = (torch.randn(tokens, dim, device=device) for _ in range(2))
    x_TD.requires_grad_()
    # Gradients go to all weights: a layer that skipped some would look faster.
    inputs = [x_TD, *(p for p in layer.parameters() if p.requires_grad)]

    def theirs(x_TD: Tensor) -> Tensor:
        y_BTD: Tensor = layer(x_TD.unsqueeze(0))
        return y_BTD.squeeze(0)

    def way(name: str, forward: Callable[[Tensor], Tensor]) -> Way:
        def run() -> tuple[Tensor, ...]:
            y_TD = forward(x_TD)
            return y_TD.detach(), *_gradients(y_TD, inputs, upstream_TD)

        return Way(name, lambda: run)

    @functools.cache
    def expected() -> list[Tensor]:
        wide: Any = copy.deepcopy(layer).double()
        x = x_TD.detach().double().requires_grad_()
        y_TD = wide(x.unsqueeze(0)).squeeze(0)
        return [y_TD.detach(), *_gradients(y_TD, [x, *wide.parameters()], upstream_TD.double())]

    def error(run: Run) -> float:
        return relative_error(run(), expected())

    return Case(
        sizes=f"forward + backward, T={tokens} D={dim} H=4 {sizes} float32",
        ways=[
            way(name, theirs),
            way("the same with auto", functools.partial(ours, backend="auto")),
            way("the same with eager", functools.partial(ours, backend="eager")),
        ],
        error=error,
        tolerance=TOLERANCE,
        baselines=[name],
        peers=[name],
    )


def _gradients(y_TD: Tensor, inputs: list[Tensor], upstream_TD: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y_TD, inputs, upstream_TD)
