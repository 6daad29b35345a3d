"""Plugins in the layers of a pretrained model: put there, and distinguished from its pretrained parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pkm_lightning.build.adapters import base_name
from pkm_lightning.model.plugged_layer import PluggedLayer, PluginMLP, plug

#: A replacement first: what stands in parallel then stands beside it.
_MODES = ("replace", "parallel", "before", "after")

#: In the names of what a model did not have before.
_NEW = re.compile(r"\.(mlp\.(base\.)?plugin|before|after|before_norm|after_norm)\.")


def put_plugins(blocks: nn.ModuleList, plugins: Mapping[int, Mapping[str, nn.Module]], settings: Any) -> None:
    """Puts plugins into decoder layers of transformers.

    Args:
        blocks: the layers.
        plugins: by the layer's number and `placement.mode`.
        settings: the configuration of the model in transformers.
    """
    for number, by_mode in plugins.items():
        for mode in sorted(by_mode, key=_MODES.index):
            plug(
                blocks[number], number, by_mode[mode], mode=mode, dim=settings.hidden_size, norm_eps=norm_eps(settings)
            )


def norm_eps(settings: Any) -> float:
    """Returns the epsilon of the norms of a model, given its configuration in transformers."""
    return float(settings.layer_norm_epsilon if settings.model_type == "gpt2" else settings.rms_norm_eps)


def ffn_dim(settings: Any) -> int:
    """Returns the hidden dimension of the FFNs of a model, given its configuration in transformers."""
    if settings.model_type == "gpt2":
        return int(settings.n_inner or 4 * settings.hidden_size)
    return int(settings.intermediate_size)


def load_trunk(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads weights of the model without plugins and adapters into `network`, which may have some.

    Those of an `mlp` that a plugin replaces are left out.
    """
    placed = _with_places(network, state)
    names = {name: base_name(name) for name in network.state_dict()}
    assert placed.keys() <= set(names.values())
    trained = {name: placed[base] for name, base in names.items() if base in placed}
    misfits = network.load_state_dict(trained, strict=False)
    assert all(names[name] is None or _NEW.search(name) for name in misfits.missing_keys)


def _with_places(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    places = {
        f"{name}.mlp.": isinstance(layer.mlp.base, PluginMLP) or layer.mlp.base is None
        for name, layer in network.named_modules()
        if isinstance(layer, PluggedLayer) and isinstance(layer.mlp, PluginMLP)
    }
    renamed = {}
    for name, weight in state.items():
        place = next((prefix for prefix in places if name.startswith(prefix)), None)
        if place is None:
            renamed[name] = weight
        elif not places[place]:
            renamed[f"{place}base.{name.removeprefix(place)}"] = weight
    return renamed


def new_parameters(layers: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Returns the parameters of the plugins in `layers`, without those of the norms in front of them."""
    plugged = [layer for layer in layers if isinstance(layer, PluggedLayer)]
    return {p for layer in plugged for _, plugin in layer.named_plugins() for p in plugin.parameters()}
