"""TensorBoard's groups, its columns of hyperparameters, and tables whose cells stay cells."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from pkm_lightning.loggers import TensorBoardLogger
from pkm_lightning.loggers.media import as_markdown
from pkm_lightning.loggers.tensorboard import tag_of

TAGS = {
    "train/loss": "Overview/loss_train",
    "val/loss": "Overview/loss_validation",
    "train/lr": "Overview/rate",
    "train/throughput/tokens_per_sec": "Overview/tokens_per_sec",
    "val/recall_paraphrase": "Overview/recall_paraphrase",
    "val/recall_control": "val/recall_control",
    "val/bits_paraphrase": "val/bits_paraphrase",
    "val/perplexity": "val/perplexity",
    "test/recall_paraphrase": "test/recall_paraphrase",
    "train/grad_norm_dense": "train/grad_norm_dense",
    "train/throughput/mfu": "throughput/mfu",
    "train/usage/layer0.slot/gini": "usage/layer0.slot/gini",
    "train/vitals/query_norm": "vitals/query_norm",
    "vitals/layer0.query_norm": "vitals/layer0.query_norm",
    "eval/piqa_acc": "eval/piqa_acc",
}


@pytest.mark.parametrize(("metric", "tag"), TAGS.items())
def test_figures_are_grouped_by_what_they_measure(metric: str, tag: str) -> None:
    assert tag_of(metric) == tag


def test_the_overview_comes_first_and_no_two_figures_share_a_name() -> None:
    assert min({tag.partition("/")[0] for tag in TAGS.values()}) == "Overview"
    assert len(set(TAGS.values())) == len(TAGS)


def test_hyperparameters_stand_beside_the_figures_of_the_test(tmp_path: Path) -> None:
    logger = TensorBoardLogger(save_dir=str(tmp_path), name="", version="board")
    logger.log_hyperparams({"ffn": "PKM", "lr": 0.1, "seed": 1})
    logger.log_metrics({"train/loss": 2.0}, 50)
    logger.log_metrics({"test/loss": 1.0, "test/recall_paraphrase": 0.5, "test/perplexity": 3.0}, 50)
    logger.finalize("success")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(board.Tags()["scalars"]) == {
        "Overview/loss_train",
        "test/loss",
        "test/recall_paraphrase",
        "test/perplexity",
    }
    described = plugin_data_pb2.HParamsPluginData.FromString(
        board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    )
    assert {info.name for info in described.experiment.hparam_infos} == {"ffn", "lr", "seed"}
    names = [info.name.tag for info in described.experiment.metric_infos]
    assert names[:2] == ["test/loss", "test/recall_paraphrase"]
    assert "test/perplexity" not in names
    begun = plugin_data_pb2.HParamsPluginData.FromString(
        board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    assert begun.session_start_info.hparams["lr"].number_value == 0.1


def test_cells_of_a_table_stay_cells() -> None:
    shown = as_markdown(("prompt", "answer"), [("a|b\nc", " d ")])
    assert shown == "| prompt | answer |\n| --- | --- |\n| a\\|b c | d |"
