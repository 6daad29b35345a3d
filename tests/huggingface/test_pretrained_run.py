"""A pretrained model under every verb: trained, continued, validated, exported and asked, also without its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning as L
import pretrained_models
import pytest
import torch
from safetensors.torch import load_file
from small import Outcome, Run
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

import pkm_lightning
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.data.tokenizer import bytes_tokenizer

TEXT = "The lock keeper of Sainte-Maxime counted the boats, and wrote them down in the evening. "
TRAINING = [
    "model=hf",
    "model.path=model",
    "data=text",
    "data.path=text.txt",
    "data.seq_len=32",
    "data.global_batch_size=4",
    "data.val_fraction=0.1",
    "optim.lr=0.001",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "callbacks.step_checkpoint.every_n_steps=2",
    "callbacks.samples.max_new_tokens=2",
    "~callbacks.progress_bar",
    "logger=none",
]


class StopInTheThirdStep(L.Callback):
    """An interruption by the user, not repeated when the run goes on with its callbacks."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 3 and not Path("stopped").exists():
            Path("stopped").touch()
            raise KeyboardInterrupt


def accepted(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


@pytest.mark.slow
def test_a_run_needs_its_folder_no_longer(cli: Run, tmp_path: Path) -> None:
    Path("text.txt").write_text("".join(f"{TEXT}{number}. " for number in range(60)))
    pretrained_models.save("llama_tied", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(pretrained_models.TEMPLATE)
    before = accepted(cli("validate", *TRAINING[:7], "trainer.accelerator=cpu"))
    accepted(cli("fit", *TRAINING, "run_dir=whole"))
    stop = f"+callbacks.stop._target_={__name__}.StopInTheThirdStep"
    assert cli("fit", *TRAINING, "run_dir=run", stop).code == 130
    assert accepted(cli("info", *TRAINING[:2]))
    asked = ("max_new_tokens=6", "prompt=The lock keeper")
    generated = accepted(cli("generate", "model=hf", "model.path=model", *asked))
    predicted = accepted(cli("predict", "model=hf", "model.path=model", *asked))
    assert generated.split("\n")[0].strip() in predicted
    # The weights have moved from those of the folder.
    start = open_checkpoint(Path("run/checkpoints/step-00000002.ckpt")).map()["state_dict"]
    end = open_checkpoint(Path("whole/checkpoints/step-00000004.ckpt")).map()["state_dict"]
    theirs = pretrained_models.tiny("llama_tied").state_dict()
    name = "model.embed_tokens.weight"
    assert not torch.equal(start[f"model.network.{name}"], theirs[name])
    assert not torch.equal(start[f"model.network.{name}"], end[f"model.network.{name}"])
    assert "model.network.lm_head.weight" not in end

    shutil.rmtree(tmp_path / "model")
    accepted(cli("fit", "run_dir=run", "trust_config=true"))
    again = open_checkpoint(Path("run/checkpoints/step-00000004.ckpt")).map()["state_dict"]
    assert all(torch.equal(again[key], value) for key, value in end.items())
    # What follows runs no code of this file, so the run that needs no trust.
    Path("text.txt").unlink()
    after = accepted(cli("validate", "run_dir=whole"))
    assert loss(after) < loss(before)
    Path("out").mkdir()
    accepted(cli("export", "run_dir=whole", "file=out/model.safetensors"))
    shutil.move("out", "elsewhere")
    loaded = pkm_lightning.load("elsewhere")
    assert loaded.context == pretrained_models.CONTEXT
    assert loaded.chat_template == pretrained_models.TEMPLATE
    assert all(torch.equal(value, again[f"model.{key}"]) for key, value in loaded.model.state_dict().items())
    assert loaded.answer("The lock keeper", max_new_tokens=6) in accepted(cli("generate", "run_dir=whole", *asked))


def loss(printed: str) -> float:
    return float(next(line for line in printed.split("\n") if "val/loss" in line).strip("│ ").split()[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "model=hf"], "model.path is not set"),
        (["generate", "model=hf", "prompt=a"], "model.path is not set"),
        (["validate", "model=hf"], "model.path is not set"),
        (["generate", "model=hf", "model.path=nowhere", "prompt=a"], "nowhere does not exist"),
        (["generate", "model=hf", "model.path=a", "optim.lr=1", "prompt=a"], "does not read optim.lr"),
    ],
)
def test_a_wrong_command_gets_one_line(arguments: list[str], message: str, cli: Run) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_token_that_the_tokenizer_puts_before_texts_stands_before_prompts(cli: Run, tmp_path: Path) -> None:
    """As in transformers, whose answer is the reference."""
    folder = pretrained_models.save("llama", tmp_path / "model")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    asked = ("model=hf", "model.path=model", 'prompt=["ab","The lock"]', "max_new_tokens=8", "trainer.accelerator=cpu")
    accepted(cli("generate", *asked, "out=generated.jsonl"))
    accepted(cli("predict", *asked, "out=predicted.jsonl"))
    codec = bytes_tokenizer()
    for file in ("generated.jsonl", "predicted.jsonl"):
        for line in map(json.loads, (tmp_path / file).read_text().splitlines()):
            ids_BT = torch.tensor([[0, *codec.encode(line["prompt"])]])
            # Without a mask it would take token 0 for padding.
            settings = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 8, "do_sample": False}
            written = pretrained_models.tiny("llama").generate(ids_BT, **settings)
            assert line["answer"].strip() == codec.decode(written[0, ids_BT.shape[1] :].tolist()).strip()


def test_a_pretrained_model_is_exported_as_it_is(cli: Run, tmp_path: Path) -> None:
    model = pretrained_models.save("llama_tied", tmp_path / "model")
    Path("out").mkdir()
    accepted(cli("export", "model=hf", "model.path=model", "format=hf", "dir=folder"))
    accepted(cli("export", "model=hf", "model.path=model", "file=out/model.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model", "out"]
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "folder" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert "Data" not in (tmp_path / "folder" / "README.md").read_text()  # it has seen none here
    asked = ("prompt=Who", "max_new_tokens=4")
    answers = [
        accepted(cli("generate", *named, *asked)) for named in (("model=hf", "model.path=folder"), ("ckpt=out",))
    ]
    assert answers[0] == answers[1]
