"""Several variants in one model: what `extra_ffns` composes, builds, costs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from small import resolved
from toys import config, token_ids
from tree import ROOT

from pkm_lightning.build.keys import check_keys
from pkm_lightning.build.loading import with_table_device
from pkm_lightning.build.model import build_meta_model, build_model
from pkm_lightning.build.sizing import solve_size
from pkm_lightning.build.variant_figures import variant_figures
from pkm_lightning.build.variants import variants
from pkm_lightning.capacity import make_plan
from pkm_lightning.errors import ConfigError
from pkm_lightning.huggingface.llama import is_llama
from pkm_lightning.model import model_cost
from pkm_lightning.usage.slot_readers import find_readers, find_tables

#: Options that are nothing without a class or files of the user.
NEEDS = ("custom", "engram_pretrained")
NAMES = sorted(path.stem for path in (ROOT / "configs" / "extra_ffns").glob("*.yaml") if path.stem not in NEEDS)
MIXTURE = (
    *("model.n_layers=5", "model.memory.n_keys=16", "ffn=memory_plus", "placement.layers=[2]"),
    *("extra_ffns=[pkm,engram]", "extra_ffns.engram.placement.layers=[1,4]", "extra_ffns.engram.ffn.rows=50"),
    *("extra_ffns.pkm.placement.layers=[0,4]", "ffn@model.base_ffn=moe", "model.base_ffn.n_experts=4"),
    "model.base_ffn.top_k=2",
)  # fmt: skip


def without_extras(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "extra_ffns"}


def test_every_variant_runs_in_its_layers_with_tables_of_its_own() -> None:
    model = build_meta_model(config(*MIXTURE))
    places = {(layer, name): type(plugin).__name__ for layer, name, plugin in model.plugins()}
    parallel = {
        (layer, f"ffn.{part}"): kind for layer in (0, 4) for part, kind in (("base", "MoE"), ("variant", "PKM"))
    }
    rest = {(1, "ffn"): "MoE", (2, "ffn"): "MemoryPlus", (3, "ffn"): "MoE"}
    assert places == {(1, "before"): "Engram", (4, "before"): "Engram", **parallel, **rest}
    by_place = {(layer, name): plugin for layer, name, plugin in model.plugins()}
    assert by_place[1, "before"].addressing is not by_place[4, "before"].addressing
    figures = variant_figures(model, config(*MIXTURE))
    assert {name: (of["class"], of["mode"], of["layers"], of["tables"]) for name, of in figures.items()} == {
        "ffn": ("MemoryPlus", "replace", [2], [0]),
        "engram": ("Engram", "before", [1, 4], [1, 2]),
        "pkm": ("PKM", "parallel", [0, 4], [3]),
    }


def test_tables_keep_their_numbers_in_whatever_order_variants_are_named() -> None:
    settings = config(*MIXTURE)
    turned = {**settings, "extra_ffns": dict(reversed(settings["extra_ffns"].items()))}
    shapes = [[tuple(t.weight.shape) for t in build_meta_model(given).tables] for given in (settings, turned)]
    assert shapes[0] == shapes[1]
    assert len(set(shapes[0])) > 2


@pytest.mark.parametrize("ffn", ["memory_plus", "ultramem"])
def test_extras_and_the_base_ffn_leave_the_placement_and_the_table_of_ffn(ffn: str) -> None:
    more = (f"extra_ffns=[{','.join(NAMES)}]", "ffn@model.base_ffn=moe")
    alone, among = (config(f"ffn={ffn}", "run_dir=run", *overrides) for overrides in ((), more))
    assert sorted(among.pop("extra_ffns")) == NAMES
    assert among["model"].pop("base_ffn")["_target_"] != alone["model"].pop("base_ffn")["_target_"]
    assert among == alone


def test_each_extra_is_the_ffn_of_its_name_with_tables_as_its_paper_and_works_alone() -> None:
    settings = config(f"extra_ffns=[{','.join(NAMES)}]", "model.memory.n_keys=16")
    for name, extra in settings["extra_ffns"].items():
        written = yaml.safe_load((ROOT / "configs" / "ffn" / f"{name}.yaml").read_text())
        defaults = written.pop("defaults", [])
        assert extra["ffn"].keys() == written.keys(), name
        assert extra["ffn"]["_target_"] == written["_target_"]
        of_option = yaml.safe_load((ROOT / "configs" / "extra_ffns" / f"{name}.yaml").read_text())[name]
        # No other value of the FFN; a dense one beside another has a size of its own.
        assert of_option.keys() <= {"placement", "table"} | ({"ffn"} if name == "dense" else set())
        has_own = {"override /table@_global_.table": "own"} in defaults
        assert extra.get("table", {}).get("shared", True) is not has_own or name == "stem"
        assert extra["placement"].get("write_after", 0) == 0
        build_meta_model({**settings, "extra_ffns": {name: extra}})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pkm", 3, r"extra_ffns\.pkm=3 is not a mapping"),
        ("pkm", {"ffn": {}}, r"extra_ffns\.pkm\.placement is missing"),
        ("pkm.foo", 1, r"extra_ffns\.pkm\.foo is not a key of an extra variant, which has ffn, placement, table"),
        ("pkm.plcement", {}, r"extra_ffns\.pkm\.plcement .*Did you mean 'placement'"),
        ("pkm.ffn.foo", 1, r"extra_ffns\.pkm\.ffn: PKM got an unexpected keyword argument 'foo'"),
        ("pkm.ffn.knn", 1.5, r"extra_ffns\.pkm\.ffn\.knn=1\.5 is not a whole number"),
        ("pkm.ffn._target_", "nothing.Here", r"extra_ffns\.pkm\.ffn\._target_=nothing\.Here cannot be imported"),
        ("pkm.placement.mode", 3, r"extra_ffns\.pkm\.placement\.mode=3"),
        ("pkm.placement.lyers", "all", r"extra_ffns\.pkm\.placement: Placement got an unexpected .*'lyers'"),
        (
            "pkm.table.learning",
            "rows",
            r"extra_ffns\.pkm\.table\.learning is not set per variant, only shared, .* tensor",
        ),
        ("pkm.table.shard", "row", r"extra_ffns\.pkm\.table\.shard is not set per variant.*table\.shard holds for all"),
        ("pkm.table.shred", True, r"Did you mean 'shared'"),
        ("pkm.table.shared", 3, r"extra_ffns\.pkm\.table\.shared=3"),
        ("pkm.table.trainable", "no", r"extra_ffns\.pkm\.table\.trainable='no'"),
        ("pkm.table.path", 3, r"extra_ffns\.pkm\.table\.path=3"),
        ("pkm.table", [], r"extra_ffns\.pkm\.table=\[\]"),
        ("ffn", {"ffn": {}, "placement": {}}, r"extra_ffns\.ffn: the name .* is not ffn; rename it"),
        ("a.b-c", None, r"extra_ffns\.a\.ffn is missing"),
        *(
            (name, {"ffn": {}, "placement": {}}, "the name of a variant begins with")
            for name in ("2nd", "größe", "_a_")
        ),
    ],
)
def test_a_wrong_key_of_an_extra_is_named(path: str, value: Any, message: str) -> None:
    settings = config("extra_ffns=pkm")
    *parents, leaf = path.split(".")
    node = settings["extra_ffns"]
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    with pytest.raises(ConfigError, match=message) as refused:
        check_keys(settings, training=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("extra_ffns=pkm", "extra_ffns.pkm.placement.mode=replace"),
            r"^ffn and extra_ffns\.pkm are both placed in layer 1 with placement\.mode=replace; set placement\.layers "
            r"or extra_ffns\.pkm\.placement\.layers to other layers",
        ),
        (("extra_ffns=[pkm,peer]",), r"^extra_ffns\.peer and extra_ffns\.pkm are both placed in layer 1 .*=parallel"),
        (("extra_ffns=pkm", "extra_ffns.pkm.placement.layers=[7]"), r"^extra_ffns\.pkm: placement puts a layer at 7"),
        (("extra_ffns=pkm", "extra_ffns.pkm.placement.write_after=1"), r"^extra_ffns\.pkm: .*write_after=1 is for"),
        (("extra_ffns=ultramem", "extra_ffns.ultramem.placement.write_after=null"), r"write_after=null is for"),
        (("extra_ffns=pkm", "extra_ffns.pkm.ffn.knn=999"), r"^extra_ffns\.pkm: .*knn=999"),
        (("extra_ffns=pkm", "extra_ffns.pkm.table.device=disk"), r"^extra_ffns\.pkm: table\.device='disk' is not"),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_the_variant(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_meta_model(config("model.memory.n_keys=16", *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("extra_ffns.pkm.ffn.n_keys=46341",), r"n_keys=46341"),
        (("extra_ffns.pkm.ffn.n_keys=46340", "ffn.n_keys=8"), None),
        (("model.memory.n_keys=3", "model.memory.knn=2", "extra_ffns.pkm.ffn.n_keys=4", "strategy=ddp", "devices=8",
          "table.shard=row"), r"^MemoryPlus of layer 0, .*: table\.shard=row in equal shares leaves some of 8 ranks"),
    ],
)  # fmt: skip
def test_sizes_that_ranks_cannot_divide_name_their_readers(overrides: tuple[str, ...], message: str | None) -> None:
    given = ("extra_ffns=pkm", "data.global_batch_size=8", *overrides)
    if message is None:
        assert resolved(*given).of_variants["pkm"]["params"]["table"] == 46340**2 * 64
        return
    with pytest.raises(ConfigError, match=message):
        resolved(*given)


def test_only_the_output_of_ffn_is_added_later() -> None:
    settings = config(
        "model.n_layers=6", "ffn=ultramem", "model.memory.n_keys=16", "placement.layers=[0]", "placement.write_after=2",
        "extra_ffns=pkm", "extra_ffns.pkm.placement.layers=[5]",
    )  # fmt: skip
    model = build_meta_model(settings)
    assert [model.blocks[layer].ffn.defer for layer in (0, 5)] == [True, False]
    assert model.write_after == 2


def test_an_extra_takes_the_table_of_ffn_but_for_what_is_said_about_its_rows() -> None:
    settings = config("extra_ffns=[pkm,memory]", "table.learning=dense", "table.device=cpu")
    settings["table"] |= {"trainable": False, "path": "rows.safetensors", "tensor": "rows"}
    settings["extra_ffns"]["pkm"]["table"] = {"shared": False, "device": "auto"}
    tables = {variant.name: variant.table for variant in variants(settings)}
    assert tables["ffn"] == settings["table"]
    assert [tables["pkm"][key] for key in ("shared", "device", "learning")] == [False, "auto", "dense"]
    assert [tables["memory"][key] for key in ("shared", "device", "learning")] == [True, "cpu", "dense"]
    assert not {"path", "tensor", "trainable"} & tables["pkm"].keys()
    assert [tables["memory"][key] for key in ("path", "tensor", "trainable")] == [None, None, True]


def test_a_loaded_model_has_all_tables_where_they_are_wanted() -> None:
    settings = config("extra_ffns=[pkm,memory]")
    settings["extra_ffns"]["pkm"]["table"]["device"] = "cpu"
    settings["extra_ffns"]["memory"]["table"] |= {"device": "mmap", "path": "rows", "trainable": False}
    moved = {variant.name: variant.table["device"] for variant in variants(with_table_device(settings, "auto"))}
    assert moved == {"ffn": "auto", "pkm": "auto", "memory": "mmap"}
    assert settings["extra_ffns"]["pkm"]["table"]["device"] == "cpu"


def test_no_more_parameters_are_active_than_a_variant_has() -> None:
    settings = config("ffn=memory_plus", "model.memory.n_keys=4", "model.memory.knn=16", "placement=all")
    params = variant_figures(build_meta_model(settings), settings)["ffn"]["params"]
    assert params["active"] == params["total"]


def test_costs_add_up_to_those_of_the_model() -> None:
    settings = config(*MIXTURE)
    model = build_meta_model(settings)
    figures = variant_figures(model, settings).values()
    cost, bare = model_cost(model, 7), config(*MIXTURE, "placement.layers=[]")
    for extra in bare["extra_ffns"].values():
        extra["placement"]["layers"] = []
    # In layer 2 the variant stands in the place of a base FFN.
    base = model.blocks[3].ffn.cost()
    others = model_cost(build_meta_model(bare), 7)
    assert sum(f["params"]["table"] for f in figures) == cost.table_params
    assert sum(f["flops_per_token"]["decode"] for f in figures) == cost.trunk_flops - others.trunk_flops + base.flops
    train = sum(f["flops_per_token"]["train"] for f in figures)
    train_base = base.flops if base.train_flops is None else base.train_flops
    assert train == 3 * (cost.trunk_train_flops - others.trunk_train_flops + train_base)
    moved = sum(f["bytes_per_token"]["train"] for f in figures)
    assert moved == cost.train_bytes - others.train_bytes + 3 * base.lookup_bytes


@pytest.mark.parametrize("match", ["flops", "params"])
def test_the_ffn_is_sized_so_that_the_whole_mixture_meets_the_budget_of_the_plain_model(match: str) -> None:
    given = ["model.memory.n_keys=16", "model.ffn_dim=400", f"match={match}"]
    mixture = solve_size(config("ffn=dense", "extra_ffns=pkm", *given))
    assert mixture["ffn"]["hidden_dim"] < 400
    plain = {**mixture, "ffn": mixture["model"]["base_ffn"], "extra_ffns": {}}
    costs = [model_cost(build_meta_model(settings), 64) for settings in (mixture, plain)]
    basis = "trunk_train_flops" if match == "flops" else "params_total"
    assert getattr(costs[0], basis) == pytest.approx(getattr(costs[1], basis), rel=0.02)


def test_readers_of_slots_have_a_name_each() -> None:
    model = build_meta_model(config(*MIXTURE))
    readers = find_readers(model)
    assert set(readers) == {
        *("layer0.base.expert", "layer0.variant.slot", "layer1.before.slot", "layer1.expert", "layer2.slot"),
        *("layer3.expert", "layer4.before.slot", "layer4.base.expert", "layer4.variant.slot"),
    }
    shared = [table.readers for table in find_tables(readers).values() if len(table.readers) > 1]
    assert shared == [("layer0.variant.slot", "layer4.variant.slot")]


def test_a_plan_has_each_table_where_it_lies() -> None:
    settings = config("extra_ffns=pkm", "model.memory.n_keys=16", "trainer.accelerator=gpu", "table.device=cpu")
    model_bytes = [
        variant_figures(build_meta_model(settings), settings)[name]["params"]["table"] * 4 for name in ("ffn", "pkm")
    ]
    for own, on_device, on_host in ((None, 0, sum(model_bytes)), ("auto", model_bytes[1], model_bytes[0])):
        if own:
            settings["extra_ffns"]["pkm"]["table"]["device"] = own
        plan = make_plan(build_meta_model(settings), settings)
        assert (plan.memory.table_part, plan.host.table_part) == (on_device, on_host)


def test_a_mixture_of_dense_ffns_is_no_llama() -> None:
    plain = config("ffn=dense")
    assert is_llama(build_meta_model(plain))
    extra = {"ffn": plain["ffn"], "placement": {**plain["placement"], "mode": "after", "layers": [1]}}
    assert not is_llama(build_meta_model({**plain, "extra_ffns": {"second": extra}}))


def test_a_table_in_a_file_that_would_learn_names_the_variant() -> None:
    with pytest.raises(ConfigError, match=r"^extra_ffns\.pkm: table\.device=mmap: a table that stays in a file"):
        resolved("extra_ffns=pkm", "extra_ffns.pkm.table.device=mmap", "model.memory.n_keys=16", training=True)


def test_the_outputs_of_a_mixture_are_those_of_its_parts() -> None:
    """Each variant alone moves the output, and rows of each table get a gradient."""
    torch.manual_seed(0)
    settings = config(*MIXTURE, "table.learning=dense", "model.dim=16", "model.ffn_dim=12")
    model = build_model(settings)
    model.init_weights(1)
    hidden_BTD = model(token_ids(2, 9)).hidden_BTD
    hidden_BTD.square().mean().backward()
    for number, table in enumerate(model.tables):
        assert table.weight.grad is not None, number
        assert table.weight.grad.abs().sum() > 0 or number in (1, 2)  # Engram's output starts at zero
    assert torch.isfinite(hidden_BTD).all()
