"""`replace_ffn` in a model of this package: the table is the model's, sizes are found, mistakes are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import nn
from toys import DIM, VOCAB, dense, token_ids, transformer

from pkm_lightning import PEER, ConfigError, Dense, Engram, MemoryPlus, TableOptimizer, replace_ffn, row_learning_tables
from pkm_lightning.build.hosts import LAYERS_OF
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.huggingface.files import SUPPORTED
from pkm_lightning.model import Transformer


def model() -> Transformer:
    return transformer([dense(3), dense(3), dense(3)])


@pytest.mark.parametrize(("shared", "tables"), [(True, 1), (False, 2)])
def test_the_model_owns_tables_that_learn(shared: bool, tables: int) -> None:
    host = model()
    plugins = replace_ffn(host, layers=[2, 0], ffn=MemoryPlus, n_keys=7, knn=3, shared=shared, learning="rows")
    assert [host.blocks[layer].ffn for layer in (0, 2)] == plugins
    assert [name for name in host.state_dict() if "table" in name] == [f"tables.{n}.weight" for n in range(tables)]
    optimizer = TableOptimizer(
        torch.optim.SGD([p for p in host.parameters() if p.requires_grad], lr=0.1), row_learning_tables(host), lr=1.0
    )
    before = [table.weight.detach().clone() for table in host.tables]
    host.unembed(host(token_ids()).hidden_BTD).square().mean().backward()
    optimizer.step()
    for table, rows in zip(host.tables, before, strict=True):
        assert not torch.equal(table.weight, rows)
    other = model()
    replace_ffn(other, layers=[0, 2], ffn=MemoryPlus, n_keys=7, knn=3, shared=shared, learning="rows")
    other.load_state_dict(host.state_dict())
    ids_BT = token_ids()
    assert torch.equal(other(ids_BT).hidden_BTD, host(ids_BT).hidden_BTD)


def test_plugins_of_several_tables_and_of_token_ids() -> None:
    host = model().double()
    (peer,) = replace_ffn(host, layers=[1], ffn=PEER, n_keys=5, knn=2, glu=True)
    (engram,) = replace_ffn(host, layers=[2], ffn=Engram, rows=20)
    assert len(host.tables) == 4
    assert isinstance(engram, Engram)
    assert len(engram.addressing.canonical_ids) == VOCAB
    # As the layers were, without being told.
    assert {p.dtype for plugin in (peer, engram) for p in plugin.parameters()} == {torch.float64}
    assert host(token_ids()).hidden_BTD.dtype is torch.float64


def test_a_table_goes_with_the_last_plugin_that_reads_it() -> None:
    host = model()
    replace_ffn(host, layers=[0, 1], ffn=MemoryPlus, n_keys=7, knn=3, learning="rows")
    (shared,) = host.tables
    replace_ffn(host, layers=[1], ffn=MemoryPlus, n_keys=5, knn=3, learning="rows")
    assert next(iter(host.tables)) is shared
    assert len(host.tables) == 2
    replace_ffn(host, layers=[0, 1], ffn=Dense, hidden_dim=8)
    assert not host.tables
    assert not any("table" in name for name in host.state_dict())


def test_quantised_weights_do_not_decide_the_dtype() -> None:
    host = model().bfloat16()
    for parameter in host.blocks[1].ffn.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False).data = parameter.data.to(torch.int8)
    (memory,) = replace_ffn(host, layers=[1], ffn=MemoryPlus, n_keys=7, knn=3)
    assert {parameter.dtype for parameter in memory.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", ["parallel", "before", "after"])
@pytest.mark.parametrize(("ffn", "options"), [(MemoryPlus, {"n_keys": 7, "knn": 3}), (Engram, {"rows": 20})])
def test_a_plugin_beside_an_ffn_starts_at_zero_and_learns_alone(
    mode: Any, ffn: type[nn.Module], options: dict[str, Any]
) -> None:
    host, ids_BT = model().train(), token_ids()
    before = {name: value.clone() for name, value in host.state_dict().items()}
    expected_BTD = host(ids_BT).hidden_BTD
    keywords: dict[str, Any] = {"layers": [0, 2], "ffn": ffn, "mode": mode, **options}
    plugins = replace_ffn(host, freeze_trunk=True, learning="rows", **keywords)
    assert torch.equal(host(ids_BT).hidden_BTD, expected_BTD)
    assert {id(plugin) for _, _, plugin in host.plugins()} >= {id(plugin) for plugin in plugins}
    dense_part = torch.optim.SGD([p for p in host.parameters() if p.requires_grad], lr=1.0)
    optimizer = TableOptimizer(dense_part, row_learning_tables(host), lr=0.1)
    for _ in range(2):
        (host(ids_BT).hidden_BTD * torch.randn(host.embedding.embedding_dim)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(host(ids_BT).hidden_BTD, expected_BTD)
    after = host.state_dict()
    for name, value in before.items():
        name = name.replace(".ffn.", ".ffn.base.") if mode == "parallel" and name not in after else name
        assert torch.equal(after[name], value), name
    with pytest.raises(ConfigError, match=rf"^layer 2 has a {ffn.__name__} with mode={mode} already; choose another"):
        replace_ffn(host, **{**keywords, "layers": [1, 2]})
    cache = host.eval().new_cache(len(ids_BT), ids_BT.shape[1])
    parts = [host(part_BT, cache=cache).hidden_BTD for part_BT in (ids_BT[:, :2], ids_BT[:, 2:])]
    assert_close(torch.cat(parts, 1), host(ids_BT).hidden_BTD)


class OfTheUser(nn.Module):
    def __init__(self, dim: int, scale: float = 2.0) -> None:
        super().__init__()
        self.dim, self.scale = dim, scale

    def forward(self, x_BTD: torch.Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(x_BTD * self.scale)


def test_a_class_of_the_user_without_tables() -> None:
    host = model().eval()
    (plugin,) = replace_ffn(host, layers=[1], ffn=OfTheUser, scale=3.0)
    assert (plugin.dim, plugin.scale, plugin.training) == (DIM, 3.0, False)
    host(token_ids())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [3]}, r"^layers=3 is out of range; allowed: 0 to 2\.$"),
        ({"layers": [-1]}, r"^layers=-1 is out of range"),
        ({"layers": [1, 1]}, r"^layers=\[1, 1\] names a layer twice"),
        ({"layers": []}, r"^layers=\[\] names no layer"),
        ({"layers": 1}, r"^layers=1 is no list of layers; give their numbers, as in layers=\[1\]\.$"),
        ({"layers": [0, "1"]}, r"^layers='1' is not a number"),
        ({"shared": "no"}, r"^shared='no' is neither true nor false"),
        ({"dim": 7}, r"^dim is no option of replace_ffn, which takes it from the model; leave it out\.$"),
        ({"table": None}, r"^table is no option of replace_ffn, .*; set learning and shared for its tables\.$"),
        ({"n_key": 7}, r"^MemoryPlus has no argument 'n_key'\. Did you mean 'n_keys'\?$"),
        ({"ffn": MemoryPlus(dim=DIM, n_keys=4, knn=2)}, r"^ffn=an instance of MemoryPlus is no class of FFNs; give"),
        ({"ffn": "memory_plus"}, r"^ffn='memory_plus' is no class of FFNs"),
        ({"knn": 50}, r"^ffn.knn=50 is out of range; allowed: 1 to 49\.$"),
        ({"mode": "beside"}, r"^mode='beside' is not known; allowed: replace, parallel, before, after"),
        ({"zero_start": True}, r"^zero_start=True under mode='replace' leaves the layers without an FFN"),
        ({"learning": "row"}, r"^table.learning='row' is not known; allowed: dense, rows"),
        ({"model": nn.Linear(3, 3)}, r"^replace_ffn knows no layers of a Linear; allowed: Transformer .* gpt2, llama"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(changes: dict[str, Any], message: str) -> None:
    host = model()
    before = list(host.state_dict())
    with pytest.raises(ConfigError, match=message):
        replace_ffn(**{"model": host, "layers": [1], "ffn": MemoryPlus, "n_keys": 7, "knn": 3, **changes})
    assert list(host.state_dict()) == before


def test_it_knows_the_models_that_the_trunk_drives() -> None:
    assert tuple(LAYERS_OF) == SUPPORTED
