"""From configuration to model: presets of their nominal size, plugins in their layers, tables shared or not."""

from __future__ import annotations

import pytest
from torch import nn
from toys import Constant, Reporter, config

from pkm_lightning.build.keys import check_keys
from pkm_lightning.build.model import attention_context, build_meta_model, build_model
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import PLE, Dense, MemoryPlus
from pkm_lightning.model import Transformer
from pkm_lightning.model.plugin_outputs import ParallelFFN


class Tableless(nn.Module):
    """Asks for a table without saying which."""

    def __init__(self, *, dim: int, table: nn.Module) -> None:
        super().__init__()


def kinds(model: Transformer) -> list[type]:
    return [type(block.ffn) for block in model.blocks]


@pytest.mark.parametrize("preset", ["134m", "373m", "720m", "1.3b", "8b"])
def test_presets_take_memory_plus_of_the_papers_size(preset: str) -> None:
    settings = config(f"model={preset}", "ffn=memory_plus", "placement.layers=[4,8,11]")
    model = build_meta_model(settings)
    dim = settings["model"]["dim"]
    assert [tuple(table.weight.shape) for table in model.tables] == [(1024**2, dim)]
    assert settings["model"]["memory"]["key_dim"] == dim / 2


def test_placed_layers_share_one_table() -> None:
    model = build_model(config("model.n_layers=6", "placement.layers=[1,4]"))
    assert kinds(model) == [Dense, MemoryPlus, Dense, Dense, MemoryPlus, Dense]
    assert len(model.tables) == 1
    assert {id(model.blocks[i].ffn.values.table) for i in (1, 4)} == {id(model.tables[0])}


def test_unshared_tables_are_one_a_placed_layer() -> None:
    model = build_model(config("model.n_layers=6", "placement.layers=[4,1]", "table.shared=false"))
    assert [model.blocks[i].ffn.values.table for i in (1, 4)] == list(model.tables)
    assert model.tables[0] is not model.tables[1]


@pytest.mark.parametrize("shared", [True, False])
def test_layers_read_slices_of_one_table_or_tables_of_their_own(shared: bool) -> None:
    model = build_model(config("ffn=ple", "model.n_layers=6", "placement.layers=[4,1]", f"table.shared={shared}"))
    readers: list[PLE] = [model.blocks[i].after for i in (1, 4)]  # type: ignore[misc]
    assert [isinstance(block.after, PLE) for block in model.blocks] == [i in (1, 4) for i in range(6)]
    assert [(table.rows, table.slices) for table in model.tables] == ([(50, 2)] if shared else [(50, 1)] * 2)
    assert [id(plugin.table) for plugin in readers] == [id(model.tables[0]), id(model.tables[-1])]
    assert [plugin.reader for plugin in readers] == ([0, 1] if shared else [0, 0])


def test_parallel_and_write_after() -> None:
    model = build_model(config("placement.layers=[0]", "placement.mode=parallel", "placement.write_after=2"))
    assert kinds(model) == [ParallelFFN, Dense, Dense]
    assert model.write_after == 2
    assert [type(part) for part in (model.blocks[0].ffn.base, model.blocks[0].ffn.variant)] == [Dense, MemoryPlus]


def test_no_placed_layer_needs_no_table() -> None:
    model = build_model(config("placement.layers=[]"))
    assert kinds(model) == [Dense] * 3
    assert not model.tables


@pytest.mark.parametrize("cls", [Reporter, Constant])
def test_a_users_own_class(cls: type) -> None:
    model = build_model(config("ffn=custom", f"ffn._target_=toys.{cls.__name__}", "placement.layers=all"))
    assert kinds(model) == [cls] * 3
    assert not model.tables


def test_refuses_a_table_without_a_specification() -> None:
    settings = config("ffn=custom")
    settings["ffn"]["_target_"] = f"{__name__}.Tableless"
    with pytest.raises(ConfigError, match="takes a table, but has no class method table_spec"):
        build_model(settings)


@pytest.mark.parametrize("key", ["ffns", "tables", "write_after", "dims"])
def test_refuses_a_key_that_the_model_does_not_have(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model.{key} is not a key of model; remove it"):
        build_model(config(f"+model.{key}=1"))


def test_refuses_a_vocabulary_that_is_not_known_yet() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size=auto needs a data module with a vocab_size"):
        build_model(config("model.vocab_size=auto"))


def test_attention_costs_are_for_the_tokens_of_a_sequence() -> None:
    assert attention_context({"data": {"seq_len": 7}}) == 7
    assert attention_context({"data": {"seq_len": None}}) == attention_context({"data": {}}) == 1


def test_another_class_over_the_keys_of_the_default_base_is_refused_with_a_way_out() -> None:
    message = r"keys of ffn@model\.base_ffn=dense that Constant does not take \(activation, hidden_dim\); set ffn@model"
    with pytest.raises(ConfigError, match=message):
        check_keys(config("model.base_ffn._target_=toys.Constant"), training=True)
    check_keys(config("ffn@model.base_ffn=custom", "model.base_ffn._target_=toys.Constant"), training=True)
