"""The LightningModule in real fits: statistics once a step, clipping by group, counters, held-out loss, answers.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import VOCAB, Letters, Reporter
from training.fits import Batch, fit, loader, rows, settings, split, trainer

from pkm_lightning.errors import DataError
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.inference.generation import greedy
from pkm_lightning.model.loss import token_nll
from pkm_lightning.training import LanguageModule

REPORTER = ("ffn=custom", "ffn._target_=toys.Reporter", "placement.layers=[0,2]")


class Silent(nn.Module):
    """Wants to act after each step although it has nothing to report."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Tensor]] = []

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(torch.zeros_like(x_BTD))

    def after_step(self, stats: dict[str, Tensor]) -> None:
        self.steps.append(stats)


def reported(batches: list[Batch]) -> list[dict[str, int]]:
    return [{"tokens": b["input_ids"].numel(), "ids": int(b["input_ids"].sum())} for b in batches]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_after_step_gets_the_sum_over_micro_batches_once_a_step(checkpointing: str) -> None:
    steps = [rows(6), rows(6)]
    micro_batches = [part for step in steps for part in split(step, [1, 3, 2])]
    given = settings(*REPORTER, f"model.activation_checkpointing={checkpointing}")
    module = fit(given, micro_batches, accumulate_grad_batches=3)
    for layer in (0, 2):
        assert module.model.blocks[layer].ffn.steps == reported(steps)
        assert module.model.blocks[layer].ffn.forwards == 6 * (2 if checkpointing == "true" else 1)


def test_after_step_gives_each_of_two_parallel_plugins_its_own() -> None:
    given, batches = settings(*REPORTER, "placement.mode=parallel"), [rows(2), rows(3)]
    given["model"]["base_ffn"] = {"_target_": "toys.Reporter"}
    block = fit(given, batches).model.blocks[0].ffn
    assert block.base.steps == block.variant.steps == reported(batches)


def test_after_step_is_called_without_statistics_too() -> None:
    given = settings("ffn=custom", "placement.layers=[1]")
    given["ffn"]["_target_"] = f"{__name__}.Silent"
    assert fit(given, [rows(2), rows(2)]).model.blocks[1].ffn.steps == [{}, {}]


@pytest.mark.parametrize(("dense_limit", "table_limit"), [(0.01, 0.002), (None, 0.002), (0.01, 0)])
def test_tables_and_the_rest_are_clipped_apart(dense_limit: float | None, table_limit: float | None) -> None:
    batch = rows(4)

    def step_norms(**limits: float | None) -> tuple[float, float]:
        """How far one step of rate 1 moves the table, and everything else: the norms of the clipped gradients."""
        given = settings(lr=1.0)
        given["optim"].update(limits)
        start = LanguageModule(given)
        start.configure_model()
        with torch.no_grad():
            moved = fit(given, [batch], precision="32-true")
            change = {name: p - start.model.get_parameter(name) for name, p in moved.model.named_parameters()}
        table = change.pop("tables.0.weight")
        return table.norm().item(), torch.cat([c.flatten() for c in change.values()]).norm().item()

    free_table, free_rest = step_norms()
    assert free_table > 0.002
    assert free_rest > 0.01
    table, rest = step_norms(clip_norm=dense_limit, table_clip_norm=table_limit)
    assert table == pytest.approx(table_limit or free_table, rel=1e-3)
    assert rest == pytest.approx(dense_limit or free_rest, rel=1e-3)


def test_random_draws_are_a_function_of_seed_step_and_micro_batch() -> None:
    given, batches = settings(*REPORTER, "+ffn.dropout=0.5"), [rows(2), rows(2)]

    def weights(noise: int) -> Tensor:
        torch.manual_seed(1)  # the toy plugin draws its own weights
        module = LanguageModule(given)
        module.configure_model()
        torch.manual_seed(noise)
        trainer().fit(module, loader(batches))
        return module.model.embedding.weight.detach()

    assert torch.equal(weights(11), weights(12))


def test_tokens_seen_counts_real_tokens_and_survives_a_checkpoint() -> None:
    batches = [rows(2, 8), rows(3, 8)]
    batches[1]["valid"] = torch.ones(3, 8, dtype=torch.bool)
    batches[1]["valid"][:, 5:] = False
    module = fit(settings("ffn=dense"), batches)
    assert int(module.tokens_seen) == 16 + 15
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    fresh = LanguageModule(settings("ffn=dense"))
    fresh.on_load_checkpoint(checkpoint)
    assert int(fresh.tokens_seen) == 31


def test_weights_follow_the_seed_and_are_built_once() -> None:
    module, again = LanguageModule(settings()), LanguageModule(settings())
    other = LanguageModule({**settings(), "seed": 2})
    for each in (module, again, other):
        each.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model
    assert torch.equal(model.tables[0].weight, again.model.tables[0].weight)
    assert not torch.equal(model.tables[0].weight, other.model.tables[0].weight)
    assert module.cost.params_total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("verb", "precision"), [("validate", "32-true"), ("test", "bf16-true"), ("validate", "64-true")]
)
def test_heldout_loss_is_a_mean_over_all_tokens(verb: str, precision: str) -> None:
    batches = [rows(1), rows(5), rows(2)]
    module = LanguageModule(settings())
    run = trainer(precision=precision)
    getattr(run, verb)(module, loader(batches), verbose=False)
    with torch.no_grad():
        nll = [token_nll(module.model, module(batch).hidden_BTD, batch["labels"]) for batch in batches]
    name = {"validate": "val", "test": "test"}[verb]
    assert_close(run.callback_metrics[f"{name}/loss"], torch.cat(nll).mean())
    assert_close(run.callback_metrics[f"{name}/perplexity"].log(), torch.cat(nll).mean())


class Prompts(L.LightningDataModule):
    tokenizer = Letters()

    def predict_dataloader(self) -> DataLoader[Any]:
        return loader([{"index": [4, 9], "prompt": ["ab", "what is it?"]}])


def test_predictions_are_records_of_greedy_answers() -> None:
    module = LanguageModule(settings())
    predicted = trainer().predict(module, datamodule=Prompts())
    answers = greedy(module.model, Letters(), ["ab", "what is it?"], device=torch.device("cpu"))
    assert predicted == [
        [
            {"index": 4, "prompt": "ab", "answer": answers[0]},
            {"index": 9, "prompt": "what is it?", "answer": answers[1]},
        ]
    ]


def test_the_first_batch_is_checked() -> None:
    batch = rows(2)
    batch["input_ids"][0, 0] = VOCAB
    with pytest.raises(DataError, match=r"token ids run from \d+ to 50, but model.vocab_size=50"):
        fit(settings("ffn=dense"), [batch])


def test_training_learns_a_sequence_by_heart() -> None:
    ids_BT = torch.arange(9).repeat(4, 1) * 5 % VOCAB
    batch = {"input_ids": ids_BT[:, :-1], "labels": ids_BT[:, 1:]}
    module = fit(settings(lr=0.5), [batch] * 60, precision="32-true")
    assert module.trainer.callback_metrics["train/loss"] < 0.1


def test_reporter_is_what_the_configuration_named() -> None:
    module = fit(settings(*REPORTER), [rows(2)])
    assert isinstance(module.model.blocks[0].ffn, Reporter)
    assert module.cost.unknown == ("Reporter",)


def test_auxiliary_losses_are_logged_summed_and_metrics_averaged_over_layers() -> None:
    module = fit(settings(*REPORTER, "+ffn.aux_weight=2.0"), [rows(2)])
    logged = module.trainer.callback_metrics
    output = module.model(rows(2)["input_ids"])
    assert output.aux_losses.keys() == {"toy"}
    assert logged["train/aux_toy"] > 0
    first, second = (block.ffn.means[0] for block in module.model.blocks if isinstance(block.ffn, Reporter))
    assert logged["train/toy_mean"] == pytest.approx((first + second) / 2, rel=1e-6)
