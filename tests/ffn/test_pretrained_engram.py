"""Engram with the tables of a folder: sizes, weights, and what contradicts it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ngram_folders import CONFIG, LAYERS, hash_of, rows_of, write_folder
from small import SMALL_DATA, resolved

from pkm_lightning.build.model import load_pretrained
from pkm_lightning.build.run import resolve
from pkm_lightning.checkpoints.ngram_layout import HEAD_OFFSETS, HEAD_SIZES, MULTIPLIERS, TABLE, find_ngrams
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn.engram import Engram
from pkm_lightning.ffn.engram_weights import WEIGHTS, copy_layer, engram_sizes
from pkm_lightning.huggingface import load_ngram_layer
from pkm_lightning.memory import ValueTable
from pkm_lightning.training import LanguageModule

C = CONFIG["hidden_size"]
#: All streams of both layers in a model of dim 16; the others replace parts of it.
SETTINGS = {
    "ffn": "engram_pretrained",
    "model.vocab_size": 600,
    "model.dim": 16,
    "model.n_heads": 2,
    "model.n_kv_heads": 1,
    "model.n_layers": 3,
    "placement.layers": "[0,2]",
}
ONE_STREAM = {"ffn.stream": 1, "model.dim": 8, "ffn.layers": "[4]", "placement.layers": "[1]"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen"
    write_folder(folder, files=3)
    return folder


def run(folder: Path, *, training: bool = False, **changes: Any) -> Any:
    settings = {**SETTINGS, "ffn.path": folder, **changes}
    return resolved(*SMALL_DATA, *(f"{key}={value}" for key, value in settings.items()), training=training)


def module_of(config: dict[str, Any]) -> LanguageModule:
    module = LanguageModule(config)
    module.configure_model()
    return module


def engrams(module: LanguageModule) -> list[Engram]:
    return [plugin for _, _, plugin in module.model.plugins() if isinstance(plugin, Engram)]


def stored(folder: Path, layer: int, name: str, stream: int | None) -> torch.Tensor:
    value = find_ngrams(folder).tensor(layer, name)
    whole = stream is None or name == "value_proj.weight"
    return value if whole else value[stream * C : (stream + 1) * C]


@pytest.mark.parametrize("trainable", [True, False])
def test_an_output_of_zero_leaves_the_rows_of_the_folder(qwen: Path, trainable: bool) -> None:
    module = module_of(run(qwen, **{"table.trainable": trainable}).config)
    load_pretrained(module.model, module.config)
    before = [table.weight.clone() for table in module.model.value_tables]
    for plugin in engrams(module):
        plugin.zero_output()
        assert not plugin.value.weight.any()
    assert all(torch.equal(table.weight, was) for table, was in zip(module.model.value_tables, before, strict=True))
    assert all(was.any() for was in before)


@pytest.mark.parametrize(
    ("changes", "stream", "layers"), [({}, None, LAYERS), (ONE_STREAM, 1, (4,))], ids=["all", "one"]
)
def test_a_new_model_has_the_weights_the_hash_and_the_rows(
    qwen: Path, changes: dict[str, Any], stream: int | None, layers: tuple[int, ...]
) -> None:
    config = run(qwen, **changes).config
    for layer, plugin in zip(layers, engrams(module_of(config)), strict=True):
        number, state = LAYERS.index(layer), plugin.state_dict()
        for ours, theirs in WEIGHTS.items():
            assert torch.equal(state[ours], stored(qwen, layer, theirs, stream)), ours
        expected = hash_of(CONFIG, number)
        for ours, theirs in (("multipliers", MULTIPLIERS), ("head_sizes", HEAD_SIZES), ("head_offsets", HEAD_OFFSETS)):
            assert torch.equal(state[f"addressing.{ours}"], expected[theirs])
        rows = torch.cat([find_ngrams(qwen).tensor(layer, name) for name in find_ngrams(qwen).parts(layer)])
        assert torch.equal(plugin.slots()[0].tables[0].weight, rows)
        assert plugin.addressing.end_id == CONFIG["eos_token_id"]
    # What was computed before the file's own hash was taken: a layer alone begins with its own primes and seed.
    fresh = engrams(module_of(config))[-1].addressing
    fresh.reset_parameters()
    for ours, theirs in (("multipliers", MULTIPLIERS), ("head_sizes", HEAD_SIZES)):
        assert torch.equal(getattr(fresh, ours), hash_of(CONFIG, 1)[theirs])


def test_a_frozen_table_stays_in_its_files(qwen: Path) -> None:
    module = module_of(
        run(qwen, training=True, **ONE_STREAM, **{"table.trainable": "false", "table.device": "mmap"}).config
    )
    (table,) = module.model.value_tables
    assert (table.rows, table.weight.is_meta) == (rows_of(CONFIG, 1), True)
    rows = torch.cat([find_ngrams(qwen).tensor(4, name) for name in find_ngrams(qwen).parts(4)])
    ids = torch.randint(table.rows, (50, 4))
    assert torch.equal(table.gather(ids), rows[ids])


def test_a_further_variant_is_saved_as_it_is_read_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "qwen")
    extra = "extra_ffns.engram_pretrained"
    places = {"placement.layers": "[2]", f"{extra}.placement.layers": "[0,1]", f"{extra}.ffn.path": tmp_path / "qwen"}
    settings = {**SETTINGS, "ffn": "memory_plus", "extra_ffns": "engram_pretrained", **places}
    frozen = [f"{extra}.table.trainable=false", f"{extra}.table.device=mmap"]
    config = resolved(*SMALL_DATA, *(f"{key}={value}" for key, value in settings.items()), *frozen).config
    # A tensor per layer.
    assert len(config["extra_ffns"]["engram_pretrained"]["table"]["tensor"]) == 2
    assert resolve(config).config == config
    shutil.rmtree(tmp_path / "qwen")
    with pytest.raises(CheckpointError, match=rf"^{extra}: table\.path=.*/qwen cannot be read"):
        resolve(config)


def test_a_table_of_many_parts_takes_one_open_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "qwen", parts=128)
    before = psutil.Process().num_fds()
    plugin = load_ngram_layer(tmp_path / "qwen", layer=1, mapped=True)
    plugin.slots()[0].tables[0].gather(torch.arange(256).view(-1, 4))
    assert psutil.Process().num_fds() < before + 10


def test_a_run_goes_on_without_the_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "qwen")
    config = run(tmp_path / "qwen").config
    (tmp_path / "qwen").rename(tmp_path / "gone")
    assert resolve(config).config == config
    LanguageModule(config, weights_follow=True).configure_model()
    with pytest.raises(CheckpointError, match=r"table\.path=.*cannot be read"):
        module_of(config)


def test_a_hash_that_differs_from_the_computed_one_is_taken(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "qwen")
    config = run(tmp_path / "qwen").config
    own = whole[f"layers.4.ple.{MULTIPLIERS}"].flip(0)
    rewrite(tmp_path / "qwen", f"model.layers.4.ple.{MULTIPLIERS}", own)
    assert torch.equal(engrams(module_of(config))[1].addressing.multipliers, own)
    rewrite(tmp_path / "qwen", f"model.layers.4.ple.{HEAD_SIZES}", torch.tensor([59, 61, 67, 700]))
    with pytest.raises(CheckpointError, match="ngram_heads_vocab_sizes leads beyond the 384 rows of the table"):
        module_of(config)


def rewrite(folder: Path, name: str, value: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    save_file({**load_file(folder / "model.safetensors"), name: value}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.dim": 64}, "model.dim=64 does not fit ffn.path=FOLDER (hidden_size=8, hc_count=2); set model.dim=16"),
        ({"model.dim": 8}, "set model.dim=16 for all residual streams (ffn.stream=null), or model.dim=8"),
        ({"model.dim": 8, "ffn.stream": 2}, "ffn.stream=2: ffn.path=FOLDER has 2 residual streams; allowed: 0 to 1"),
        ({"ffn.stream": -1}, "ffn.stream=-1"),
        ({"ffn.stream": 0.5}, "ffn.stream=0.5 is not a whole number"),
        ({"placement.layers": "[0]"}, "ffn.layers=null stands for 2 of the layers of ffn.path=FOLDER"),
        ({"ffn.layers": "[1,3]"}, "layer 3 of ffn.path=FOLDER has no n-gram table; 1, 4 have."),
        ({"ffn.layers": "[1,1]"}, "ffn.layers=[1, 1] stands for 1 of the layers"),
        ({"table.shared": "true"}, "table.shared=true has one table for 2 layers"),
        ({"ffn.heads": 4}, "ffn.heads=4 contradicts the 2 of ffn.path=FOLDER; leave ffn.heads out."),
        ({"ffn.orders": "[2]"}, "ffn.orders=[2] contradicts the [2, 3] of"),
        ({"ffn.end_id": 0}, "ffn.end_id=0 contradicts the 3 of"),
        ({"model.vocab_size": 700}, "model.vocab_size=700 is not the 600 of the model in ffn.path=FOLDER"),
        ({"ffn.path": "absent"}, "is no folder"),
        ({"+ffn.gate": "none"}, "ffn: PretrainedEngram got an unexpected keyword argument 'gate'"),
    ],
)
def test_what_contradicts_the_folder_is_refused(qwen: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message.replace("FOLDER", str(qwen)))) as caught:
        run(qwen, **changes)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_of_the_folder_is_offered(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    write_folder(folder)
    changes = {"model.vocab_size": 300}
    with pytest.raises(ConfigError, match=r"too small: the data's tokens need 600; set model\.vocab_size=auto"):
        run(folder, **changes)
    bytes_tokenizer().save(folder / "tokenizer.json")
    with pytest.raises(ConfigError, match=rf"need 600; set data\.tokenizer={re.escape(str(folder))}, the tokenizer of"):
        run(folder, **changes)


def test_several_layers_are_the_first_ones(tmp_path: Path) -> None:
    write_folder(tmp_path / "qwen", changes={"ple_layer_ids": [1, 2, 3]})
    run(tmp_path / "qwen", **{"ffn.layers": "[1,0]"})
    with pytest.raises(ConfigError, match=r"ffn.layers=\[0, 2\] are not the first 2 layers .* \(0, 1, 2\)"):
        run(tmp_path / "qwen", **{"ffn.layers": "[0,2]"})


def test_a_table_of_another_shape_is_refused_before_training(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "qwen", parts=1)
    name = f"layers.4.ple.{TABLE}.weight"
    rewrite(tmp_path / "qwen", f"model.{name}", whole[name][:-1].clone())
    with pytest.raises(ConfigError, match=re.escape(f"{name} has 383 x 3 values of float32")):
        run(tmp_path / "qwen", training=True, **{"table.trainable": "false", "table.device": "mmap"})


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "qwen")
    ours = bytes_tokenizer()
    (plugin, _) = engrams(module_of(run(tmp_path / "qwen").config))
    plugin.bind_tokenizer(ours)
    plugin.bind_tokenizer(None)
    file = tmp_path / "qwen" / "tokenizer.json"
    ours.save(file)
    plugin.bind_tokenizer(ours)
    file.write_text(ours.to_json().replace('"q":', '"@@":'))
    with pytest.raises(
        ConfigError, match=r"is another one than .*tokenizer.json.*'q', there '@@'; set data.tokenizer="
    ):
        plugin.bind_tokenizer(ours)
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json cannot be read"):
        plugin.bind_tokenizer(ours)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("stream", [None, 0, 1])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_a_module_for_python(qwen: Path, layer: int, stream: int | None, mapped: bool) -> None:
    plugin = load_ngram_layer(qwen, layer=layer, stream=stream, mapped=mapped)
    for ours, theirs in WEIGHTS.items():
        assert torch.equal(plugin.state_dict()[ours], stored(qwen, layer, theirs, stream)), ours
    rows = torch.cat([find_ngrams(qwen).tensor(layer, name) for name in find_ngrams(qwen).parts(layer)])
    (table,) = plugin.slots()[0].tables
    assert table.weight.is_meta is mapped
    assert torch.equal(table.gather(torch.arange(len(rows)).view(-1, 4)).flatten(0, 1), rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 0}, "layer 0 of FOLDER has no n-gram table; those that have one: 1, 4."),
        ({"layer": 1, "stream": 2}, "FOLDER has 2 residual streams; allowed: 0 to 1"),
    ],
)
def test_no_such_layer_for_python(qwen: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message.replace("FOLDER", str(qwen)))):
        load_ngram_layer(qwen, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dilation": 2}, "dilation=2 of this module contradicts the 3 of"),
        ({"orders": [2, 4]}, "orders=[2, 4] of this module contradicts the [2, 3] of"),
        ({"gate": "none"}, "gate=none of this module contradicts the sigmoid of"),
        ({"gate": "no_root"}, "gate=no_root of this module contradicts the sigmoid of"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05 of this module"),
        ({"end_id": 1}, "end_id=1 of this module contradicts the 3 of"),
        ({"kernel": 3}, "conv.weight of this module has the shape (16, 1, 3)"),
    ],
)
def test_a_module_that_computes_something_else_is_refused(qwen: Path, changes: dict[str, Any], message: str) -> None:
    """As when other files have come into the folder since the configuration was completed."""
    folder = find_ngrams(qwen)
    sizes = {**engram_sizes(folder, [1], None), "canonical": False, "gate": "sigmoid", **changes}
    spec = Engram.table_spec(dim=16, table_number=0, **sizes)
    table = ValueTable(rows=spec.rows, dim=spec.dim)
    plugin = Engram(dim=16, table_number=0, n_layers=2, vocab_size=600, table=table, **sizes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        copy_layer(plugin, folder, 1, None)
