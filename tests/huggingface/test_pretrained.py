"""A pretrained model as a trunk against transformers itself: logits, documents, cache, gradients, cost, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from small import resolved
from tolerances import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.huggingface import PretrainedTransformer
from pkm_lightning.model import model_cost
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.diagnostics import probe
from pkm_lightning.training.optimizer import parameter_groups

FAMILIES = pytest.mark.parametrize("name", pretrained_models.NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {n: pretrained_models.save(n, tmp_path_factory.mktemp(n)) for n in pretrained_models.NAMES}


def trunk(folder: Path, **changes: Any) -> PretrainedTransformer:
    switches: dict[str, Any] = {"document_mask": True, "reset_positions": True, "activation_checkpointing": False}
    config = {
        "ffn": {"_target_": "pkm_lightning.huggingface.PretrainedFFN"},
        "model": {"path": str(folder), **switches, **changes},
    }
    model = PretrainedTransformer.complete(config)["model"]
    made = PretrainedTransformer(path=model["path"], architecture=model["architecture"], **{**switches, **changes})
    made.init_weights(0)
    return made.eval()


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(2, pretrained_models.VOCAB, (rows, length))


@torch.no_grad()
@FAMILIES
def test_logits_are_those_of_transformers(name: str, folders: dict[str, Path]) -> None:
    model, theirs = trunk(folders[name]), pretrained_models.tiny(name)
    for length in (1, 21):  # with windows of 8
        ids_BT = ids(2, length)
        assert torch.equal(model.unembed(model(ids_BT).hidden_BTD), theirs(ids_BT).logits)


@torch.no_grad()
@FAMILIES
def test_packed_documents_are_those_documents_alone(name: str, folders: dict[str, Path]) -> None:
    model, theirs = trunk(folders[name]), pretrained_models.tiny(name)
    lengths = [5, 12, 3]
    ids_BT, doc_ids_BT = ids(1, 20), torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model.unembed(model(ids_BT, doc_ids_BT=doc_ids_BT).hidden_BTD)
    alone = torch.cat([theirs(part).logits for part in ids_BT.split(lengths, dim=1)], dim=1)
    assert_close(packed, alone)
    # Without either switch the batch is one document.
    one = trunk(folders[name], document_mask=False, reset_positions=False)
    whole = one.unembed(one(ids_BT, doc_ids_BT=doc_ids_BT).hidden_BTD)
    assert_close(whole, theirs(ids_BT).logits)
    # Positions alone start anew: transformers would take that for a packed batch.
    restarted = trunk(folders[name], document_mask=False)
    whole = restarted.unembed(restarted(ids_BT, doc_ids_BT=doc_ids_BT).hidden_BTD)
    assert not torch.allclose(whole[:, 5:], packed[:, 5:], atol=1e-2)


@torch.no_grad()
@FAMILIES
def test_cached_forwards_equal_the_whole_forward(name: str, folders: dict[str, Path]) -> None:
    model = trunk(folders[name])
    lengths = [3, 14, 9]
    rows = [ids(1, length + 8)[0] for length in lengths]
    whole = [model.unembed(model(row[None]).hidden_BTD)[0] for row in rows]
    width = max(lengths)
    first_BT = torch.stack(
        [torch.cat([row.new_zeros(width - n), row[:n]]) for row, n in zip(rows, lengths, strict=True)]
    )
    valid_BT = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    cache = model.new_cache(3, width + 8)
    logits = model.unembed(model(first_BT, valid_BT=valid_BT, cache=cache).hidden_BTD)
    for row, n in enumerate(lengths):
        assert_close(logits[row, width - n :], whole[row][:n])
    # One token at a time, then three at once, then without the second sequence.
    for start, end in ((0, 1), (1, 2), (2, 5)):
        step_BT = torch.stack([row[n + start : n + end] for row, n in zip(rows, lengths, strict=True)])
        logits = model.unembed(model(step_BT, cache=cache).hidden_BTD)
        for row, n in enumerate(lengths):
            assert_close(logits[row], whole[row][n + start : n + end])
    cache.select(torch.tensor([2, 0]))
    step_BT = torch.stack([rows[row][lengths[row] + 5 : lengths[row] + 6] for row in (2, 0)])
    logits = model.unembed(model(step_BT, cache=cache).hidden_BTD)
    for place, row in enumerate((2, 0)):
        assert_close(logits[place, 0], whole[row][lengths[row] + 5])
    assert cache.length == width + 6


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
def test_one_sequence_is_cached_without_a_mask(name: str, folders: dict[str, Path]) -> None:
    model, ids_BT = trunk(folders[name]), ids(1, 20)
    whole = model(ids_BT).hidden_BTD
    cache = model.new_cache(1, 20)
    parts = [model(part, cache=cache).hidden_BTD for part in ids_BT.split([10, *[1] * 10], dim=1)]
    assert_close(torch.cat(parts, dim=1), whole)


@FAMILIES
def test_gradients_are_those_of_transformers_with_and_without_recomputation(
    name: str, folders: dict[str, Path]
) -> None:
    theirs, ids_BT = pretrained_models.tiny(name).train(), ids(2, 12)
    theirs(ids_BT).logits.square().mean().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    for recompute in (False, True):
        model = trunk(folders[name], activation_checkpointing=recompute).train()
        model.unembed(model(ids_BT).hidden_BTD).square().mean().backward()
        for parameter, value in model.network.named_parameters():
            assert_close(value.grad, expected[parameter], kind="grad")


@torch.no_grad()
@FAMILIES
def test_cost_equals_the_counter_and_the_parameters(name: str, folders: dict[str, Path]) -> None:
    model, length = trunk(folders[name]), 7
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hidden_BTD = model(ids(2, length)).hidden_BTD
        trunk_flops = counter.get_total_flops()
        model.unembed(hidden_BTD)
    cost = model_cost(model, length)
    assert cost.trunk_flops * 2 * length == trunk_flops
    assert cost.model_flops * 2 * length == counter.get_total_flops()
    assert cost.params_total == sum(p.numel() for p in model.parameters())
    dim, vocab = 24, pretrained_models.VOCAB
    unread = (0 if model.is_tied else (vocab - 1) * dim) + (
        (pretrained_models.CONTEXT - 1) * dim if name == "gpt2" else 0
    )
    assert cost.params_active == cost.params_total - unread
    assert cost.unknown == ()


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gpt2"])
def test_a_state_dict_holds_each_matrix_once_and_gives_it_back(name: str, folders: dict[str, Path]) -> None:
    model, ids_BT = trunk(folders[name]), ids(1, 5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(state) == {key for key, _ in model.named_parameters()}
    with torch.no_grad():
        expected = model.unembed(model(ids_BT).hidden_BTD)
        fresh = trunk(folders[name])
        for parameter in fresh.parameters():
            parameter.zero_()
        fresh.load_state_dict(state)
        assert torch.equal(fresh.unembed(fresh(ids_BT).hidden_BTD), expected)
        fresh.load_state_dict(state, assign=True)
        assert fresh.is_tied == model.is_tied
        assert torch.equal(fresh.unembed(fresh(ids_BT).hidden_BTD), expected)


@torch.no_grad()
def test_frequencies_stay_in_fp32_when_weights_are_cast(folders: dict[str, Path]) -> None:
    model, ids_BT = trunk(folders["llama"]).to(torch.bfloat16), ids(1, 40)
    theirs = type(model.network).from_pretrained(folders["llama"], dtype=torch.bfloat16).eval()
    assert torch.equal(model.unembed(model(ids_BT).hidden_BTD), theirs(ids_BT).logits)


def test_a_run_of_it_has_groups_and_figures(folders: dict[str, Path], tmp_path: Path) -> None:
    run = resolved("model=hf", f"model.path={folders['gpt2']}", "data.seq_len=32", f"run_dir={tmp_path}", training=True)
    assert run.config["model"]["n_layers"] == 2
    assert run.config["data"]["tokenizer"] == str(folders["gpt2"])
    assert run.plan.memory.activations is not None
    assert run.plan.memory.dense_weights == 4 * run.cost.params_total
    module = LanguageModule(run.config)
    module.configure_model()
    groups = {group["name"]: len(group["params"]) for group in parameter_groups(module.model, run.config["optim"])}
    # Two layers of four matrices; gains and biases of five norms, four biases of each layer, two embeddings.
    assert groups == {"matrix": 8, "gain": 5 * 2 + 2 * 4 + 2}


@torch.no_grad()
@FAMILIES
def test_the_largest_attention_logit_is_that_of_the_eager_attention(name: str, folders: dict[str, Path]) -> None:
    model, ids_BT = trunk(folders[name]), ids(1, 6)
    figures = probe(model, {"input_ids": ids_BT})
    assert set(figures) == {0, 1, None}
    eager = pretrained_models.tiny(name)
    eager.set_attn_implementation("eager")
    for layer, weights_BHTT in enumerate(eager(ids_BT, output_attentions=True).attentions):
        # Softmax leaves differences of logits: of two keys of one query, at most twice the largest.
        spread = weights_BHTT.log().masked_fill(weights_BHTT == 0, torch.nan)
        widest = (spread.nan_to_num(-torch.inf).amax(-1) - spread.nan_to_num(torch.inf).amin(-1)).amax()
        assert widest <= 2 * figures[layer]["attention_logit_max"] + 1e-4
        assert figures[layer]["attention_logit_max"] > 0
