"""The transformer around its plugins: causality, packing, padding, reports.

Letters: W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from toys import DIM, VOCAB, Constant, Reporter, dense, memory_ffns, token_ids, transformer

from pkm_lightning.errors import ConfigError
from pkm_lightning.model import Transformer

LENGTHS = [4, 7, 1, 5]


def memory_model(**changes: Any) -> Transformer:
    ffns, tables = memory_ffns()
    return transformer(ffns, tables, **changes)


def test_future_tokens_do_not_change_the_past() -> None:
    model, ids_BT = memory_model(), token_ids()
    changed_BT = ids_BT.clone()
    changed_BT[:, 5:] = (ids_BT[:, 5:] + 1) % VOCAB
    before_BTD, after_BTD = model(ids_BT).hidden_BTD, model(changed_BT).hidden_BTD
    assert_close(after_BTD[:, :5], before_BTD[:, :5])
    assert (after_BTD[:, 5:] - before_BTD[:, 5:]).abs().amax(-1).min() > 0.01


def test_the_past_changes_the_output() -> None:
    model, ids_BT = memory_model(), token_ids()
    changed_BT = ids_BT.clone()
    changed_BT[:, 0] = (ids_BT[:, 0] + 1) % VOCAB
    assert (model(changed_BT).hidden_BTD - model(ids_BT).hidden_BTD)[:, -1].abs().max() > 1e-3


def packed() -> tuple[Tensor, Tensor]:
    doc_ids_BT = torch.cat([torch.full((1, length), 10 - i) for i, length in enumerate(LENGTHS)], dim=1)
    return token_ids(1, sum(LENGTHS)), doc_ids_BT


def test_packed_documents_equal_each_alone() -> None:
    model, (ids_BT, doc_ids_BT) = memory_model(), packed()
    together_BTD = model(ids_BT, doc_ids_BT=doc_ids_BT).hidden_BTD
    alone = [model(part_BT).hidden_BTD for part_BT in ids_BT.split(LENGTHS, dim=1)]
    assert_close(together_BTD, torch.cat(alone, dim=1))


def test_document_mask_can_be_switched_off() -> None:
    ids_BT, doc_ids_BT = packed()
    model = memory_model(document_mask=False, reset_positions=False)
    assert_close(model(ids_BT, doc_ids_BT=doc_ids_BT).hidden_BTD, model(ids_BT).hidden_BTD)


@pytest.mark.parametrize("switched_off", [{"document_mask": False}, {"reset_positions": False}])
def test_both_switches_have_an_effect(switched_off: dict[str, bool]) -> None:
    ids_BT, doc_ids_BT = packed()
    # Within documents rotary scores depend on distances alone: positions only show where attention crosses documents.
    common = {"document_mask": "document_mask" in switched_off, "reset_positions": "document_mask" not in switched_off}
    with_BTD = memory_model(**common)(ids_BT, doc_ids_BT=doc_ids_BT).hidden_BTD
    without_BTD = memory_model(**{**common, **switched_off})(ids_BT, doc_ids_BT=doc_ids_BT).hidden_BTD
    assert_close(without_BTD[:, : LENGTHS[0]], with_BTD[:, : LENGTHS[0]])
    assert (with_BTD - without_BTD)[:, LENGTHS[0] :].abs().max() > 0.01


def test_right_padding_does_not_matter() -> None:
    model, ids_BT = memory_model(), token_ids(2, 6)
    padded_BT = torch.cat([ids_BT, torch.randint(VOCAB, (2, 3))], dim=1)
    doc_ids_BT = torch.tensor([[0] * 6 + [-1] * 3, [0] * 6 + [-1] * 3])
    padded_BTD = model(padded_BT, doc_ids_BT=doc_ids_BT, valid_BT=doc_ids_BT >= 0).hidden_BTD
    assert_close(padded_BTD[:, :6], model(ids_BT).hidden_BTD)
    assert padded_BTD.isfinite().all()


def test_untied_and_tied_unembedding() -> None:
    untied, tied = transformer([dense()]), transformer([dense()], tied=True)
    hidden_MD = torch.randn(3, DIM)
    assert untied.unembedding is not None
    assert_close(untied.unembed(hidden_MD), hidden_MD @ untied.unembedding.weight.T)
    assert_close(tied.unembed(hidden_MD), hidden_MD @ tied.embedding.weight.T)
    assert tied.unembedding is None
    fewer = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert fewer == VOCAB * DIM


def outputs_and_gradients(model: Transformer, ids_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits_BTW = model.unembed(model(ids_BT).hidden_BTD)
    logits_BTW.logsumexp(-1).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return logits_BTW.detach(), grads


def assert_same_training(actual: Transformer, expected: Transformer) -> None:
    ids_BT = token_ids()
    logits_BTW, grads = outputs_and_gradients(actual, ids_BT)
    expected_logits_BTW, expected_grads = outputs_and_gradients(expected, ids_BT)
    assert_close(logits_BTW, expected_logits_BTW)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], kind="grad")


def test_activation_checkpointing_changes_nothing() -> None:
    assert_same_training(memory_model(activation_checkpointing=True), memory_model())


@pytest.mark.slow
def test_compiled_blocks_change_nothing() -> None:
    compiled = memory_model()
    names = [name for name, _ in compiled.named_parameters()]
    compiled.compile_blocks()
    assert [name for name, _ in compiled.named_parameters()] == names
    assert_same_training(compiled, memory_model())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_recomputed_forward_reports_once(checkpointed: bool) -> None:
    reporter, ids_BT = Reporter(dim=DIM), token_ids(2, 9)
    output = transformer([reporter], activation_checkpointing=checkpointed)(ids_BT)
    output.hidden_BTD.sum().backward()
    assert reporter.forwards == (2 if checkpointed else 1)
    assert output.step_stats[0]["tokens"] == 18
    assert output.step_stats[0]["ids"] == ids_BT.sum()


def test_auxiliary_losses_of_one_name_are_summed_over_layers() -> None:
    model = transformer([Reporter(dim=DIM, aux_weight=weight) for weight in (1.0, 0.0, 4.0)])
    losses: list[float] = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda _, __, output: losses.append(output.aux_losses["toy"].item()))
    output = model(token_ids())
    assert output.aux_losses.keys() == {"toy"}
    assert output.aux_losses["toy"].item() == pytest.approx(sum(losses), rel=1e-6)
    assert losses[0] > 0
    assert losses[2] > 0


def test_statistics_and_traces_are_by_layer() -> None:
    model = transformer([Constant(), Reporter(dim=DIM), Constant(), Reporter(dim=DIM)])
    assert model(token_ids()).step_stats.keys() == {1, 3}
    assert model(token_ids()).traces == {}
    assert model(token_ids(), observe=True).traces.keys() == {1, 3}


def test_observing_fills_traces_with_slots_and_changes_no_output() -> None:
    model, ids_BT = memory_model(), token_ids()
    silent, observed = model(ids_BT), model(ids_BT, observe=True)
    assert silent.traces == {}
    assert torch.equal(silent.hidden_BTD, observed.hidden_BTD)
    assert observed.traces.keys() == {1, 2}
    for trace in observed.traces.values():
        assert trace["slot_ids"].shape == trace["slot_weights"].shape == (2, 9, 2, 3)
        assert int(trace["slot_ids"].min()) >= 0
        assert int(trace["slot_ids"].max()) < 49
        assert_close(trace["slot_weights"].sum(-1), torch.ones(2, 9, 2))


def test_plugins_get_the_whole_context() -> None:
    contexts: list[Any] = []
    model = transformer([Constant()])
    model.blocks[0].ffn.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[1]))
    ids_BT, doc_ids_BT = packed()
    valid_BT = doc_ids_BT > 7
    model(ids_BT, doc_ids_BT=doc_ids_BT, valid_BT=valid_BT, observe=True)
    assert contexts[0].input_ids_BT is ids_BT
    assert contexts[0].doc_ids_BT is doc_ids_BT
    assert contexts[0].valid_BT is valid_BT
    assert contexts[0].observe is True


class Bare(nn.Module):
    """A plugin that returns a bare tensor."""

    def forward(self, x_BTD: Tensor, context: object) -> Tensor:
        return x_BTD


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: transformer([Bare()])(token_ids()),
            ConfigError,
            "Bare breaks its contract: forward returned a tensor",
        ),
        (lambda: transformer([dense()], vocab_size=1), ConfigError, "model.vocab_size=1 is out of range"),
    ],
)
def test_errors_name_what_is_wrong(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_forward_reads_weights_only_within_the_forward_of_their_module() -> None:
    """Under ZeRO-3 any other access gathers the weight, on the ranks that make it only."""

    class Lookup(nn.Module):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__()
            self.hidden = (embedding,)

        def forward(self, ids_BT: Tensor) -> Tensor:
            return self.hidden[0](ids_BT)  # type: ignore[no-any-return]

    model = transformer([dense()])
    expected_BTD = model(token_ids(1, 5).fill_(3)).hidden_BTD
    model.embedding = Lookup(model.embedding)  # type: ignore[assignment]
    assert torch.equal(model(token_ids(1, 5).fill_(3)).hidden_BTD, expected_BTD)
