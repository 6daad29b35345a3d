"""The drift is the formula written out, for tables whose reads are summed and gathered, and the model stays frozen."""

from __future__ import annotations

import pytest
import torch
from toys import DIM, VOCAB, dense, memory_plus, transformer

from pkm_lightning.adaptation import drift as drift_module
from pkm_lightning.adaptation.drift import Penalty, TableDrift, measure_drift
from pkm_lightning.adaptation.other_text import OtherText
from pkm_lightning.ffn import Engram
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.read_recorder import ReadUnits
from pkm_lightning.model import Transformer

CPU = torch.device("cpu")
LINES_U = torch.tensor([1, 2, 5, 6])


def reads() -> tuple[TableDrift, list[ReadUnits]]:
    generator = torch.Generator().manual_seed(0)
    drift, batches = TableDrift(ValueTable(rows=8, dim=3)), []
    for first in (0, 2):  # of six lines that the batch reads
        ids_XK = first + torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(5)])
        weights_XK, gradients_XV = torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)
        batches.append(ReadUnits(ids_XK, weights_XK, gradients_XV))
        # Two readers of one table: both are of the same batch.
        readers = [ReadUnits(*(part[place] for part in batches[-1])) for place in (slice(2), slice(2, None))]
        drift.add(readers, n_targets=7)
    return drift, batches


def brute_force(batches: list[ReadUnits], values_NV: torch.Tensor) -> torch.Tensor:
    """Returns the drift: half the mean squared change of a read along its gradients, per target.

    For a line that one batch does not read, the other stands for further text.
    """
    units = [unit for batch in batches for unit in zip(*batch, strict=True)]
    strength = sum(float(gradient_V.square().sum()) for _, _, gradient_V in units) / len(units)
    total = sum(((weights_K.unsqueeze(1) * values_NV[ids_K]).sum(0)).square().sum() for ids_K, weights_K, _ in units)
    use = [
        [float(b.weights_XK[b.ids_XK == line].double().square().sum()) for line in LINES_U.tolist()] for b in batches
    ]
    unread = [there for here, there in [*zip(*use, strict=True), *zip(*use[::-1], strict=True)] if here == 0]
    assert unread
    total = total + 2 * sum(unread) / len(unread) * values_NV[LINES_U].square().sum()
    return strength * total / (2 * 14 * 3)


@pytest.mark.parametrize("most_lines", [8, 3])
def test_gram_diagonal_and_gradient_are_those_of_the_formula(most_lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_module, "_MOST_LINES", most_lines)
    drift, batches = reads()
    values_NV = torch.zeros(8, 3)
    values_NV[LINES_U] = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    diagonal_U = torch.stack([brute_force(batches, torch.eye(8)[:, [line] * 3]) / 3 for line in LINES_U.tolist()])
    torch.testing.assert_close(drift.diagonal(LINES_U), diagonal_U)
    penalty = Penalty(drift, LINES_U, device=CPU)
    mean = diagonal_U.mean()
    torch.testing.assert_close(penalty.steps_U1.squeeze(1), (mean / (mean + diagonal_U)).sqrt())
    values_NV.requires_grad_(True)
    expected = brute_force(batches, values_NV)
    if most_lines == 3:
        # More lines than their matrix may have: each line by itself.
        expected = (diagonal_U.unsqueeze(1) * values_NV[LINES_U].square()).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    assert values_NV.grad is not None
    torch.testing.assert_close(penalty.gradient(values_NV[LINES_U].detach()), values_NV.grad[LINES_U])


def memory_model() -> Transformer:
    table = ValueTable(rows=49, dim=10, learning="rows")
    # The dense layer comes first, so that each read decides one target.
    return transformer([dense(2), memory_plus(table)], [table]).eval()


@pytest.mark.parametrize("kind", ["memory_plus", "engram"])
def test_small_deltas_diverge_as_much_as_the_drift_estimates(kind: str) -> None:
    torch.manual_seed(0)
    model = (
        memory_model() if kind == "memory_plus" else transformer([dense(2), Engram(dim=DIM, vocab_size=VOCAB, rows=64)])
    )
    model.requires_grad_(False)
    ids = torch.randint(VOCAB, (64, 17), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}
    batch["labels"][0] = -100
    batches = [{name: part[first : first + 16] for name, part in batch.items()} for first in range(0, 64, 16)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (table,) = model.value_tables
    drift = measure_drift(model, [table], batches, device=CPU)[table]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert table.deltas is None
    other_text = OtherText(model, [batch], device=CPU)
    deltas_NV = 0.02 * torch.randn(table.weight.shape)
    gram_NN = drift.gram(torch.arange(table.n_lines))
    table.weight.data += deltas_NV
    estimate = float((deltas_NV * (gram_NN @ deltas_NV)).sum())
    assert other_text.mean_divergence() == pytest.approx(estimate, rel=0.3)
