"""Engram layers leave in Qwen's layout as they came, bit for bit, and transformers computes the same with them."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ffn.test_engram_parity import RELATIVE
from ngram_folders import CONFIG, LAYERS, write_folder, write_sparse
from safetensors.torch import load_file
from small import SMALL_DATA, SMALL_RUN, Run, resolved
from torch import Tensor, nn

from pkm_lightning.build.model import load_pretrained, weight_dtype
from pkm_lightning.build.saving import save
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.ngram_layout import find_ngrams
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import FFNContext
from pkm_lightning.ffn.engram import Engram
from pkm_lightning.huggingface import save_ngram_layers
from pkm_lightning.huggingface.ngram_export import write_ngrams
from pkm_lightning.training import LanguageModule

MODEL = ["ffn=engram_pretrained", "model.n_layers=3", "model.n_heads=2", "model.n_kv_heads=1", "model.vocab_size=600"]
ALL_STREAMS = ["model.dim=16", "placement.layers=[0,2]"]
ONE_STREAM = ["model.dim=8", "ffn.stream=1", "placement.layers=[0,2]"]
FROZEN = ["table.trainable=false", "table.device=mmap"]
#: A step that changes nothing.
STILL = ["trainer.max_steps=1", "trainer.val_check_interval=1", "optim.lr=0", "optim.weight_decay=0"]
SILENT = ["~callbacks.recall", "~callbacks.samples"]


def module_of(*overrides: str) -> LanguageModule:
    module = LanguageModule(resolved(*MODEL, *SMALL_DATA, *overrides).config)
    with weight_dtype(module.config):
        module.configure_model()
    return module


def exported(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("streams", [ALL_STREAMS, ONE_STREAM], ids=["all", "one"])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "32-true"), (torch.bfloat16, "bf16-true")], ids=str)
def test_there_and_back(tmp_path: Path, streams: list[str], dtype: torch.dtype, precision: str) -> None:
    whole = write_folder(tmp_path / "qwen", dtype=dtype, files=2)
    module = module_of(f"ffn.path={tmp_path / 'qwen'}", f"trainer.precision={precision}", *streams)
    path = save(module, tmp_path / "saved", tokenizer=bytes_tokenizer())
    assert save_ngram_layers(module, tmp_path / "memory") == list(LAYERS)
    written = write_ngrams(open_checkpoint(path), tmp_path / "file")
    assert (written.layers, written.n_tensors, written.has_tokenizer) == (list(LAYERS), 20, True)
    for folder in (tmp_path / "memory", tmp_path / "file"):
        assert_equal(exported(folder), whole)
        assert find_ngrams(folder).sizes == find_ngrams(tmp_path / "qwen").sizes
    # Rows that no head reads pad the table, and are kept too.
    sizes = whole["layers.1.ple.ple_embedding.ngram_heads_vocab_sizes"]
    assert int(sizes.sum()) < len(whole["layers.1.ple.ple_embedding.ngram_embedding.weight"])


def test_only_the_stream_that_was_trained_changes(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "qwen")
    module = module_of(f"ffn.path={tmp_path / 'qwen'}", *ONE_STREAM)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(1)
    save_ngram_layers(module, tmp_path / "out")
    shared = ("value_proj.weight", "ngram_embedding.weight")
    for name, value in exported(tmp_path / "out").items():
        other = value[:8] if not name.endswith(shared) and value.is_floating_point() else value[:0]
        assert torch.equal(other, whole[name][: len(other)]), name
        own = value[len(other) :]
        assert torch.equal(own, whole[name][len(other) :] + value.is_floating_point()), name
    (tmp_path / "qwen").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"ffn\.path=.*is no folder"):
        save_ngram_layers(module, tmp_path / "again")


def test_commands_of_a_user_there_and_back(cli: Run, tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "qwen", files=3, dtype=torch.bfloat16)
    one = ["ffn.layers=[4]", "placement.layers=[1]", "model.dim=8", "ffn.stream=0"]
    done = cli(
        "fit", *MODEL, *SMALL_RUN, *STILL, "ffn.path=qwen", *one, *FROZEN, "trainer.precision=bf16-true", "run_dir=run"
    )
    assert done.code == 0, done.err
    done = cli("export", "run_dir=run", "format=ngram", "dir=back")
    assert (done.code, done.out.split(",")[0]) == (0, "back: layers 4"), done.err
    assert_equal(exported(tmp_path / "back"), {name: value for name, value in whole.items() if "layers.4." in name})
    # The folder is one that can be read again, by itself.
    assert find_ngrams(tmp_path / "back").sizes.rows == 59
    (tmp_path / "back" / "notes.txt").touch()
    for arguments, message in (
        (["dir=back", "overwrite=true"], "back holds notes.txt, which no export has written"),
        (["file=x.safetensors"], "file=x.safetensors is of format=safetensors; format=ngram writes a folder"),
        ([], "format=ngram needs dir=FOLDER"),
        (["dir=other", "quantize=int8"], "quantize=int8 is not for format=ngram"),
    ):
        refused = cli("export", "run_dir=run", "format=ngram", *arguments)
        assert (refused.code, message in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ffn=dense"], "the model has no layer with an n-gram table (ffn=engram)"),
        (["ffn=engram", "ffn.orders=[2,4]"], "cannot express ffn.orders=[2, 4]: Qwen's layer has orders=[2, 3, 4]"),
        (["ffn=engram", "ffn.gate=none"], "cannot express ffn.gate=none: Qwen's layer has gate=sigmoid"),
        (["ffn=engram", "ffn.dilation=2"], "cannot express ffn.dilation=2: Qwen's layer has dilation=3"),
        (["ffn=engram", "ffn.canonical=true"], "cannot express ffn.canonical=True"),
        (["ffn=engram", "ffn.rows=1"], "cannot express ffn.rows=1"),
        (["ffn=engram", "table.shared=true", "placement.layers=[0,1]"], "2 layers share a table (table.shared=true)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_qwens_layer_does_not_compute_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    module = module_of(*overrides, "model.dim=16")
    with pytest.raises(ConfigError, match=re.escape(message)):
        save_ngram_layers(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["mmap", "cpu"])
def test_rows_that_stay_in_their_files_leave_from_there(tmp_path: Path, device: str) -> None:
    whole = write_folder(tmp_path / "qwen", files=3, dtype=torch.bfloat16)
    overrides = ["table.trainable=false", f"table.device={device}", "trainer.precision=bf16-true"]
    module = module_of(f"ffn.path={tmp_path / 'qwen'}", *ALL_STREAMS, *overrides)
    assert all(table.stored is not None for table in module.model.value_tables)
    load_pretrained(module.model, module.config)
    save_ngram_layers(module, tmp_path / "out")
    assert_equal(exported(tmp_path / "out"), whole)
    for file in (tmp_path / "qwen").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="holds other rows than at first"):
        save_ngram_layers(module, tmp_path / "again")


def test_a_table_of_four_gigabytes_is_not_loaded(tmp_path: Path) -> None:
    sizes = {"ple_embed_dim": 2560, "heads_per_ngram": 8, "ngram_vocab_size_base": 800_000, "split_ngram_parts": 64}
    n_bytes = write_sparse(tmp_path / "qwen", sizes)
    assert n_bytes > 4e9
    before = psutil.Process().memory_info().rss
    module = module_of(f"ffn.path={tmp_path / 'qwen'}", "model.dim=8", "ffn.stream=0", "placement.layers=[1]", *FROZEN)
    (table,) = module.model.value_tables
    ids = torch.randint(table.rows, (2048, 16))
    for _ in range(4):
        assert not table.gather(ids).any()
    assert psutil.Process().memory_info().rss - before < 0.1 * n_bytes


def qwen_model(**changes: Any) -> nn.Module:
    """Builds a text model of transformers with random n-gram layers."""
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hc_lowrank": 2}
    linear = {
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
    }
    experts = {
        "moe_intermediate_size": 4,
        "shared_expert_intermediate_size": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    }
    known = {name: value for name, value in CONFIG.items() if name != "model_type"}
    layers = {"layer_types": ["linear_attention"] * CONFIG["num_hidden_layers"]}
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**known, **heads, **linear, **experts, **layers, **changes))
    for layer in LAYERS:
        for parameter in model.model.layers[layer].ple.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("max_shard_size", ["2KB", "1GB"])
def test_a_model_of_transformers_there_and_back(
    tmp_path: Path, max_shard_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = qwen_model()
    theirs.save_pretrained(tmp_path / "qwen", max_shard_size=max_shard_size)
    module = module_of(f"ffn.path={tmp_path / 'qwen'}", *ALL_STREAMS)
    plugins = [plugin for _, _, plugin in module.model.plugins() if isinstance(plugin, Engram)]
    ids_BT = torch.randint(600, (2, 23))
    ids_BT = torch.where(torch.rand(2, 23) < 0.2, CONFIG["eos_token_id"], ids_BT)
    x_BTD = torch.randn(2, 23, 16, dtype=torch.float64)
    with monkeypatch.context() as patch, torch.no_grad():
        # Its norms compute in fp32, whose rounding is not what is compared.
        patch.setattr(Tensor, "float", lambda x: x)
        for layer, plugin in zip(LAYERS, plugins, strict=True):
            ple = copy.deepcopy(theirs.model.layers[layer].ple).double()
            plugin.double().slots()[0].tables[0].double()
            expected_BTD = ple(x_BTD, ids_BT, None)
            y_BTD = plugin(x_BTD, FFNContext(ids_BT)).y_BTD
            assert float((y_BTD - expected_BTD).norm() / expected_BTD.norm()) < RELATIVE
            their_ids = []
            patch.setattr(ple.ple_embedding.ngram_embedding, "forward", their_ids.append)
            with contextlib.suppress(AttributeError):  # there are no rows to go on with
                ple(x_BTD, ids_BT, None)
            ((_, ids_TK),) = plugin.row_ids(FFNContext(ids_BT))
            assert torch.equal(their_ids[0].flatten(0, 1), ids_TK.long())
    save_ngram_layers(module_of(f"ffn.path={tmp_path / 'qwen'}", *ALL_STREAMS), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    state = theirs.state_dict()
    assert_equal(written, {name: state[name] for name in state if ".ple." in name})
    # A model that has everything else takes them, and one of the described part computes with them.
    other = qwen_model()
    assert other.load_state_dict(written, strict=False).unexpected_keys == []
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    described = {name: value for name, value in described.items() if name not in ("model_type", "dtype")}
    layer = qwen_model_layer(described)
    layer.load_state_dict({n.removeprefix("model.layers.4.ple."): v for n, v in written.items() if ".layers.4." in n})
    assert torch.equal(layer(x_BTD.float(), ids_BT, None), theirs.model.layers[4].ple(x_BTD.float(), ids_BT, None))


def qwen_model_layer(config: dict[str, Any]) -> nn.Module:
    """Builds the second n-gram layer that the content of a config.json describes."""
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

    types = {"num_hidden_layers": 5, "layer_types": ["linear_attention"] * 5}
    return Qwen4ExpTextPLELayer(Qwen4ExpTextConfig(**config, **types), layer_idx=4, ple_layer_index=1)
