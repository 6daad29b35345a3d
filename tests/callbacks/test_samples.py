"""Samples shows what it asks and what comes back, and training does not notice it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Letters, config

from pkm_lightning.callbacks import Recall, Samples, samples
from pkm_lightning.data import RecallItem
from pkm_lightning.errors import ConfigError, DataError
from pkm_lightning.inference.generation import greedy
from pkm_lightning.training import LanguageModule

Arguments = dict[str, Any]
USUAL: Arguments = {"prompts": None, "items": 1, "max_new_tokens": 3}


def loader(seed: int) -> Any:
    dice = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(20):
        ids_BT = torch.randint(50, (3, 8), generator=dice)
        batches.append({"input_ids": ids_BT, "labels": ids_BT.roll(-1, 1)})
    return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Data(L.LightningDataModule):
    """Random letters; knows no question."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Letters()

    def train_dataloader(self) -> Any:
        return loader(1)

    def val_dataloader(self) -> Any:
        return loader(2)


class Asking(Data):
    """Has two questions of each of two forms."""

    def recall_items(self, limit: int | None = None) -> list[RecallItem]:
        return [
            RecallItem(f"{form} {i} is", f"truth {i}", (), "r", form, 1, 0, 0.0, False)
            for form in ("seen", "control")
            for i in range(2)[:limit]
        ]


class AskingOthers(Asking):
    """Asks other questions at validations than in the test."""

    def validation_items(self, limit: int | None = None) -> list[RecallItem]:
        return [RecallItem(f"other {i} is", "yes", (), "r", "seen", 1, 0, 0.0, False) for i in range(2)[:limit]]


class Trace(L.Callback):
    """The losses of all steps, and the state of chance after each validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.states: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert pl_module.training
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, *_: Any) -> None:
        self.states.append(torch.get_rng_state())


def fit(data: L.LightningDataModule, watching: list[L.Callback], **changes: Any) -> LanguageModule:
    settings = config("model.dim=16", "model.ffn_dim=12", "model.memory.n_keys=8", "trainer.max_steps=100")
    settings["ffn"] = {"_target_": "toys.Reporter", "dropout": 0.3}
    trainer = L.Trainer(**{
        "accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 4, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "val_check_interval": 2, "limit_val_batches": 1, "callbacks": watching, **changes,
    })  # fmt: skip
    torch.manual_seed(0)  # the toy takes its weights from it
    module = LanguageModule(settings)
    trainer.fit(module, datamodule=data)
    return module


def shown(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the logged texts, one per validation."""
    return [record.getMessage() for record in caplog.records if record.name == samples.__name__]


def test_training_is_the_same_bit_for_bit() -> None:
    without, beside = Trace(), Trace()
    plain, watched = fit(Asking(), [without]), fit(Asking(), [Samples(**USUAL), beside])
    assert without.losses == beside.losses
    assert all(torch.equal(a, b) for a, b in zip(without.states, beside.states, strict=True))
    for (name, ours), theirs in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(set(beside.losses)) == 4


def test_questions_of_the_data_are_shown_with_the_right_answers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        module = fit(Asking(), [Samples(**USUAL)])
    assert [text.splitlines()[0] for text in shown(caplog)] == ["samples at step 2", "samples at step 4"]
    module.eval()
    prompts = ["seen 0 is", "control 0 is"]
    answers = greedy(module.model, Letters(), prompts, device=torch.device("cpu"), max_new_tokens=3)
    assert shown(caplog)[-1].splitlines()[1:] == [
        f"  {prompt} -> {answer} (right: truth 0)" for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_no_question_of_the_test_is_shown_where_validations_have_others(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(AskingOthers(), [Samples(**USUAL)])
    assert [line.split(" -> ")[0] for line in shown(caplog)[0].splitlines()[1:]] == ["  other 0 is"]


def test_given_prompts_are_asked_instead(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Asking(), [Samples(**{**USUAL, "prompts": ["where is b", "and a"]})])
    lines = shown(caplog)[0].splitlines()[1:]
    assert [line.split(" -> ")[0] for line in lines] == ["  where is b", "  and a"]
    assert "right" not in shown(caplog)[0]


def test_without_questions_nothing_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Data(), [Samples(**USUAL)])
        fit(Asking(), [Samples(**{**USUAL, "items": 0}), Samples(**{**USUAL, "prompts": []})])
    assert shown(caplog) == []


def test_questions_are_asked_in_the_precision_of_training() -> None:
    callers = ("pkm_lightning.callbacks.samples", "pkm_lightning.callbacks.recall")
    seen: dict[str, bool] = {}

    class Look(L.Callback):
        def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            def note(*_: Any) -> None:
                frame: Any = sys._getframe()
                while frame is not None and frame.f_globals["__name__"] not in callers:
                    frame = frame.f_back
                if frame is not None:
                    seen[frame.f_globals["__name__"]] = torch.is_autocast_enabled("cpu")

            self.hook = pl_module.model.register_forward_hook(note)

        def on_validation_end(self, *_: Any) -> None:
            self.hook.remove()

    asking = [Samples(**USUAL), Recall(val_items=1, test_items=1)]
    fit(Asking(), [Look(), *asking], precision="bf16-mixed")
    assert seen == dict.fromkeys(callers, True)


def test_tensorboard_gets_a_table(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="board")
    fit(Asking(), [Samples(**USUAL)], logger=logger)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    events = board.Tensors("samples/text_summary")
    assert [event.step for event in events] == [2, 4]
    (text,) = events[-1].tensor_proto.string_val
    assert text.decode().startswith("| prompt | answer | right |\n| --- | --- | --- |\n| seen 0 is | ")


@pytest.mark.parametrize(
    "changes",
    [{"prompts": "one"}, {"prompts": 3}, {"prompts": ["a", 1]}, {"prompts": {"a": "b"}}, {"items": -1}, {"items": 0.5},
     {"max_new_tokens": 0}, {"max_new_tokens": -4}],
    ids=str,
)  # fmt: skip
def test_bad_values_are_named(changes: Arguments) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError) as refused:
        Samples(**{**USUAL, **changes})
    assert f"callbacks.samples.{name}={value!r}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_prompts_need_a_tokenizer() -> None:
    class Silent(Data):
        def __init__(self) -> None:
            super().__init__()
            del self.tokenizer

    with pytest.raises(ConfigError, match=r"callbacks\.samples\.prompts needs a tokenizer, and Silent has none"):
        fit(Silent(), [Samples(**{**USUAL, "prompts": ["a"]})])
    fit(Silent(), [Samples(**USUAL)])


def test_half_a_character_is_refused_before_training() -> None:
    with pytest.raises(DataError, match=r"callbacks\.samples\.prompts: 'a\\ud800' holds .* half of a character"):
        Samples(**{**USUAL, "prompts": ["a\ud800"]})
