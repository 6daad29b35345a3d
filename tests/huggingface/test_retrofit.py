"""Plugins in a pretrained model by configuration: nothing changes at first, and what is frozen stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from ffn.drawn_weights import draw
from small import resolved
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.build.model import bind_tokenizer, build_model, load_pretrained, weight_dtype
from pkm_lightning.build.run import ResolvedRun
from pkm_lightning.build.variants import OWN_FFN
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer, model_cost
from pkm_lightning.training.table_learning import trainer_optimizer

#: A memory beside an `mlp`, one that counts in batches behind a layer, n-grams in front of both.
MIXTURE = (
    *("ffn=memory_plus", "placement.layers=[1]", "placement.mode=parallel", "extra_ffns=[engram,pkm]"),
    *("extra_ffns.engram.placement.layers=[0,1]", "extra_ffns.engram.ffn.rows=200"),
    *("extra_ffns.pkm.placement.layers=[0]", "extra_ffns.pkm.placement.mode=after"),
)
SIZES = ("model.memory={n_keys: 8, heads: 2, knn: 3, key_dim: 8}", "data.seq_len=32", "placement.write_after=0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {n: pretrained_models.save(n, tmp_path_factory.mktemp(n)) for n in pretrained_models.NAMES}


def retrofit(folder: Path, *overrides: str) -> ResolvedRun:
    return resolved("model=hf", f"model.path={folder}", *SIZES, *overrides)


def start(config: dict[str, Any]) -> Transformer:
    """Returns the model of a new run as a fit makes it."""
    with weight_dtype(config):
        model = build_model(config)
    model.init_weights(int(config["seed"]))
    load_pretrained(model, config)
    bind_tokenizer(model, bytes_tokenizer(), config)
    return model.eval()


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(2, pretrained_models.VOCAB, (rows, length))


def logits(model: Transformer, ids_BT: Tensor, **keywords: Any) -> Tensor:
    return model.unembed(model(ids_BT, **keywords).hidden_BTD)


def in_parts(model: Transformer, ids_BT: Tensor, sizes: Sequence[int]) -> Tensor:
    cache = model.new_cache(*ids_BT.shape)
    return torch.cat([logits(model, part, cache=cache) for part in ids_BT.split(list(sizes), dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((n, "32-true") for n in pretrained_models.NAMES),
        *(pytest.param(n, "bf16-true", marks=pytest.mark.slow) for n in ("llama", "gpt2")),
    ],
)
def test_logits_are_at_first_those_of_the_pretrained_model(name: str, precision: str, folders: dict[str, Path]) -> None:
    run = retrofit(folders[name], *MIXTURE, f"trainer.precision={precision}")
    with_plugins, plain = start(run.config), start({**run.config, "ffn": {"_target_": OWN_FFN}, "extra_ffns": {}})
    assert list(plain.plugins()) == []
    assert [place[:2] for place in with_plugins.plugins()] == [
        *((0, "before"), (0, "after"), (1, "before"), (1, "ffn.variant"))
    ]
    ids_BT = ids(2, 21)
    doc_ids_BT = (torch.arange(21) >= 9).long().expand(2, -1)
    assert torch.equal(logits(with_plugins, ids_BT), logits(plain, ids_BT))
    packed = [logits(model, ids_BT, doc_ids_BT=doc_ids_BT) for model in (with_plugins, plain)]
    assert torch.equal(*packed)
    sizes = [10, *[1] * 11]
    assert torch.equal(in_parts(with_plugins, ids_BT, sizes), in_parts(plain, ids_BT, sizes))


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["dense", "moe", "peer", "ple", "stem", "ultramem"])
def test_every_plugin_starts_at_zero_beside_an_mlp_and_replaces_one(ffn: str, folders: dict[str, Path]) -> None:
    ids_BT, theirs = ids(2, 7), pretrained_models.tiny("llama")
    options = ("ffn.value_dim=6",) if ffn.startswith("ultramem") else ()
    run = retrofit(folders["llama"], f"ffn={ffn}", "placement.layers=[1]", "placement.mode=parallel", *options)
    model = start(run.config)
    assert torch.equal(logits(model, ids_BT), theirs(ids_BT).logits)
    assert run.cost.params_total == sum(p.numel() for p in model.parameters())
    drawn = start({**run.config, "placement": {**run.config["placement"], "zero_start": False}})
    assert not torch.equal(logits(drawn, ids_BT), theirs(ids_BT).logits)
    alone = start({**run.config, "placement": {**run.config["placement"], "mode": "replace"}})
    assert [place[:2] for place in alone.plugins()] == [(1, "ffn")]
    assert not any("layers.1.mlp.up_proj" in key or "mlp.base" in key for key in alone.state_dict())
    assert logits(alone, ids_BT).isfinite().all()


def test_names_in_a_state_dict_are_those_of_transformers_around_the_plugins(folders: dict[str, Path]) -> None:
    model = start(retrofit(folders["llama"], *MIXTURE).config)
    theirs = {name for name, _ in pretrained_models.tiny("llama").named_parameters()}
    moved = {name.replace("layers.1.mlp.", "layers.1.mlp.base.") for name in theirs}
    names = {name.removeprefix("network.") for name, _ in model.named_parameters()}
    assert moved <= names
    new = ("model.layers.1.mlp.plugin.", "model.layers.0.after.", "model.layers.0.after_norm.", "model.layers.0.before")
    assert all(name.startswith((*new, "model.layers.1.before.", "tables.")) for name in names - moved)
    # One table of the memory, one of PKM, and one of Engram per layer.
    assert {f"tables.{number}.weight" for number in range(4)} == {name for name in names if name.startswith("tables")}


def test_a_replacement_may_have_a_plugin_beside_it(folders: dict[str, Path]) -> None:
    run = retrofit(
        *(folders["llama"], "ffn=moe", "placement.layers=[1]", "extra_ffns=engram"),
        *("extra_ffns.engram.placement.mode=parallel", "extra_ffns.engram.ffn.rows=200"),
    )
    assert run.config["ffn"]["dense_hidden_dim"] == 40  # that of the pretrained FFN
    model = start(run.config)
    draw(model)
    assert [place[:2] for place in model.plugins()] == [(1, "ffn.base"), (1, "ffn.variant")]
    ids_BT = ids(1, 12)
    assert {"balance", "router_z"} <= model.train()(ids_BT).aux_losses.keys()
    output = model.eval()(ids_BT, observe=True)
    assert {name.split(".")[0] for name in output.traces[1]} == {"base", "variant"}
    assert_close(in_parts(model, ids_BT, [4, 1, 1, 6]), model.unembed(output.hidden_BTD))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_cached_forwards_and_padding_equal_whole_forwards(name: str, folders: dict[str, Path]) -> None:
    """With weights that are not zero, and n-grams that reach into the cache."""
    model = start(retrofit(folders[name], *MIXTURE).config)
    draw(model)
    lengths = [3, 12]
    rows = [ids(1, length + 3)[0] for length in lengths]
    whole = [logits(model, row[None])[0] for row in rows]
    width = max(lengths)
    first_BT = torch.stack(
        [torch.cat([row.new_zeros(width - n), row[:n]]) for row, n in zip(rows, lengths, strict=True)]
    )
    cache = model.new_cache(2, width + 3)
    got = logits(model, first_BT, valid_BT=torch.arange(width) >= width - torch.tensor(lengths)[:, None], cache=cache)
    for row, n in enumerate(lengths):
        assert_close(got[row, width - n :], whole[row][:n])
    for start_, end in ((0, 1), (1, 3)):
        step_BT = torch.stack([row[n + start_ : n + end] for row, n in zip(rows, lengths, strict=True)])
        got = logits(model, step_BT, cache=cache)
        for row, n in enumerate(lengths):
            assert_close(got[row], whole[row][n + start_ : n + end])


@torch.no_grad()
def test_costs_are_those_of_the_counter(folders: dict[str, Path]) -> None:
    model, length = (
        start(retrofit(folders["gpt2"], "ffn=dense", "placement.layers=[0]", "placement.mode=parallel").config),
        7,
    )
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids(2, length))
    assert model_cost(model, length).trunk_flops * 2 * length == counter.get_total_flops()


def gradients(model: Transformer, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of two forwards and one backward, of which a recomputation has to tell the tokens apart."""
    model.zero_grad()
    torch.manual_seed(0)
    outputs = [model(ids_BT) for ids_BT in batches]
    losses = [model.unembed(output.hidden_BTD).square().mean() for output in outputs]
    losses += [loss for output in outputs for loss in output.aux_losses.values()]
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_recomputed_and_compiled(folders: dict[str, Path]) -> None:
    model = start(retrofit(folders["gpt2"], *MIXTURE, "table.learning=dense").config).train()
    draw(model)
    batches = [ids(2, 9), ids(2, 9)]
    plain = gradients(model, batches)
    assert plain.keys() == {name for name, _ in model.named_parameters()}
    model.activation_checkpointing = True
    recomputed = gradients(model, batches)
    assert all(torch.equal(recomputed[key], value) for key, value in plain.items())
    model.activation_checkpointing = False
    for block in model.blocks:
        block.compile(backend="eager")
    for key, value in gradients(model, batches).items():
        assert_close(value, plain[key], kind="grad")


@pytest.mark.parametrize("learning", ["rows", "dense"])
def test_with_a_frozen_trunk_nothing_else_moves_and_everything_new_learns(
    learning: str, folders: dict[str, Path]
) -> None:
    run = retrofit(folders["llama_tied"], *MIXTURE, "optim=retrofit", f"table.learning={learning}")
    model = start(run.config).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = trainer_optimizer(model, run.config, with_rows=True)
    # Below the first plugin there is nothing to differentiate.
    needs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: needs.append(inputs[0].requires_grad))
    for _ in range(4):
        output = model(ids(4, 20))
        model.unembed(output.hidden_BTD).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert needs[:2] == [False, True]
    theirs = {f"network.{name}" for name, _ in pretrained_models.tiny("llama_tied").named_parameters()}
    of_trunk = {name for name in before if name.replace("mlp.base.", "mlp.") in theirs}
    assert len(of_trunk) == len(theirs)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (name in of_trunk), name
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for name, p in model.named_parameters() if name in of_trunk}


def test_the_rows_alone_can_be_taught_from_the_start(folders: dict[str, Path]) -> None:
    only_rows = "optim.freeze=[network.*]"
    run = retrofit(folders["llama"], "ffn=memory_plus", "placement.layers=[1]", "placement.mode=parallel", only_rows)
    model = start(run.config).train()
    table = model.tables[0]
    assert isinstance(table, ValueTable)
    optimizer = trainer_optimizer(model, run.config, with_rows=True)
    model.unembed(model(ids(2, 9)).hidden_BTD).square().mean().backward()
    optimizer.step()
    assert table.weight.any()


class Reader(nn.Module):
    """A plugin of a user: reads earlier tokens in a way of its own, and has no zero start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        assert context.embedding_BTD is not None
        return FFNOutput(self.map(x_BTD + context.embedding_BTD).cumsum(1))


def test_a_plugin_without_a_cache_or_a_zero_start_is_a_case_of_its_own(folders: dict[str, Path]) -> None:
    custom = ("ffn=custom", f"ffn._target_={__name__}.Reader", "placement.layers=[1]", "placement.mode=after")
    with pytest.raises(ConfigError, match=r"Reader has no zero_output\(\), .*set placement\.zero_start=false"):
        retrofit(folders["llama"], *custom)
    model = start(retrofit(folders["llama"], *custom, "placement.zero_start=false").config)
    assert not model.is_cacheable
    with pytest.raises(ValueError, match="neither position_wise nor uses_past"):
        model.new_cache(1, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ffn=memory_plus", "placement.layers=[2]"], r"^placement puts a layer at 2; allowed: 0 to 1 \("),
        (["ffn=memory_plus", "match=params"], r"^match=params sizes an FFN by that of the package's own model"),
        (["ffn=ultramem", "placement.write_after=null"], r"^placement\.write_after=null is not offered"),
        (
            ["ffn=memory_plus", "placement.mode=parallel", "placement.write_after=1"],
            r"^placement\.write_after=1 is not offered in a pretrained",
        ),
        (["ffn=memory_plus", "placement.zero_start=true"], r"^placement\.zero_start=true under placement\.mode"),
        (["ffn=memory_plus", "placement.zero_start=yes"], r"^placement\.zero_start='yes'"),
        (["ffn@model.base_ffn=moe"], r"^model\.base_ffn=MoE cannot be put into a pretrained model"),
        (["ffn=memory_plus", "extra_ffns=peer", "extra_ffns.peer.placement.layers=[9]"], r"^extra_ffns\.peer: place"),
        (["extra_ffns=[memory_plus,peer]"], r"are both placed in layer 1 with placement\.mode=parallel"),
        (
            [*("ffn=peer", "placement.layers=[1]", "placement.mode=parallel", "table.trainable=false")],
            r"^PEER cannot start with an output of zero",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides: list[str], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        retrofit(folders["llama"], *overrides)


def test_quantised_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = pretrained_models.save("llama", tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "awq"},', 1))
    with pytest.raises(ConfigError, match="has quantised weights, which cannot be trained"):
        retrofit(folder, "ffn=memory_plus", "placement.layers=[1]")
