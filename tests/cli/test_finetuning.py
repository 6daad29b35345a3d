"""`fit finetune=`: LoRA, new variants and full finetuning of a run, as every verb sees them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from processes import assert_continues_bit_for_bit, last_checkpoint
from small import Run, record, rows
from tolerances import assert_close

import pkm_lightning
from pkm_lightning.build.adapters import base_name

COMMON = [
    "data=text", "data.seq_len=16", "data.global_batch_size=4", "callbacks=[metrics_csv,step_checkpoint]",
    "logger=none", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
]  # fmt: skip
SOURCE = [
    *COMMON, "data.path=a.txt", "data.tokenizer=bytes", "model.n_layers=2", "model.dim=16", "model.ffn_dim=16",
    "model.n_heads=2", "model.n_kv_heads=2", "ffn=pkm", "model.memory.n_keys=16", "placement.layers=[1]",
    "table.learning=rows", "trainer.max_steps=3",
]  # fmt: skip
NEW = ["fit", *COMMON, "data.path=b.txt", "init_from=source", "trainer.max_steps=2"]
LORA = [*NEW, "finetune=lora", "finetune.rank=2"]


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture
def run(cli: Run, of_module: Path, tmp_path: Path) -> Run:
    """Texts and a run in `source`, made once and copied for each test."""
    if not (of_module / "made").exists():
        for name in "ab":
            Path(f"{name}.txt").write_text((name + " cat sat on the mat and saw a dog run by . ") * 60)
        assert cli("fit", *SOURCE, "run_dir=source").code == 0
        shutil.copytree(tmp_path, of_module / "made")
    shutil.copytree(of_module / "made", tmp_path, dirs_exist_ok=True)
    return cli


def test_an_adapted_run_under_every_verb(run: Run, tmp_path: Path) -> None:
    replayed = ("finetune.replay_share=0.5", "finetune.replay_path=source")
    fitted = run(*LORA, *replayed, "optim.lr=0.01", "run_dir=lora")
    assert fitted.code == 0, fitted.err
    assert f"finetune.replay_path={tmp_path / 'source'}: 50% of the training sequences" in fitted.out
    before, after = (last_checkpoint(Path(name))["state_dict"] for name in ("source", "lora"))
    bases = {name: base for name in after if (base := base_name(name)) is not None}
    assert set(bases.values()) == before.keys()
    assert all(torch.equal(after[name], before[base]) for name, base in bases.items()), "only adapters learn"
    adapters = {name: value for name, value in after.items() if name not in bases}
    assert all(value.any() for value in adapters.values())
    changed = sum(value.numel() * value.element_size() for value in adapters.values())
    assert record(Path("lora"))["trained_bytes"] == changed
    assert f"{changed:,}" in fitted.out.partition("bytes of those that may learn")[2].partition("\n")[0]
    shown = run("validate", "run_dir=lora")
    assert shown.code == 0, shown.err
    asked = ("prompt=a cat", "max_new_tokens=6")
    answers = [run("generate", "run_dir=lora", *asked)]
    assert run("export", "run_dir=lora", "file=merged/model.safetensors").code == 2, "the folder does not exist"
    Path("merged").mkdir()
    assert run("export", "run_dir=lora", "file=merged/model.safetensors").code == 0
    answers.append(run("generate", "ckpt=merged/model.safetensors", *asked))
    assert answers[0].code == answers[1].code == 0
    assert answers[0].out == answers[1].out
    ids_BT = torch.randint(2, 258, (2, 9))
    with torch.no_grad():
        models = [pkm_lightning.load(path).model for path in ("lora", "merged")]
        logits = [model.unembed(model(ids_BT).hidden_BTD) for model in models]
    assert_close(logits[1], logits[0])
    # Trained on, it is the merged model.
    again = run(*NEW, "init_from=lora", "finetune=full", "optim.lr=0", "run_dir=again")
    assert again.code == 0, again.err
    start = last_checkpoint(Path("again"))["state_dict"]
    merged = pkm_lightning.load("merged").model.named_parameters()
    assert all(torch.equal(start[f"model.{name}"], value) for name, value in merged)


def test_a_dense_adapter_starts_at_zero_and_learns_alone(run: Run) -> None:
    fitted = run(*NEW, "finetune=adapter", "extra_ffns=dense", "extra_ffns.dense.ffn.hidden_dim=4", "run_dir=new")
    assert fitted.code == 0, fitted.err
    before, after = (last_checkpoint(Path(name))["state_dict"] for name in ("source", "new"))
    old = {name: name.replace("ffn.base.", "ffn.") for name in after if ".variant." not in name}
    assert set(old.values()) == before.keys()
    assert all(torch.equal(after[name], before[base]) for name, base in old.items())
    new = {name: value for name, value in after.items() if name not in old}
    assert record(Path("new"))["trained_bytes"] == sum(value.numel() * 4 for value in new.values())
    plain = run(*NEW, "run_dir=plain")
    assert plain.code == 0, plain.err
    assert rows(Path("new"))[0]["train/loss"] == rows(Path("plain"))[0]["train/loss"]
    assert run("validate", "run_dir=new").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "adapter"])
def test_an_interrupted_run_ends_like_an_untouched_one(run: Run, tmp_path: Path, method: str) -> None:
    variant = ["extra_ffns=dense"] if method == "adapter" else []
    options = ["finetune.replay_share=0.25", "finetune.replay_path=a.txt", "trainer.max_steps=9", *variant]
    dropout = ["finetune.dropout=0.3"] if method == "lora" else []
    assert_continues_bit_for_bit(run, tmp_path, *NEW, f"finetune={method}", *options, *dropout)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune=lora"], "finetune=lora changes a trained model, and the weights"),
        (["finetune=full"], "set init_from=RUN, or model=hf"),
        (["init_from=source", "finetune=lora", "finetune.rank=0"], "finetune.rank=0 is out of range"),
        (
            ["init_from=source", "finetune=lora", "finetune.targets=query"],
            "finetune.targets='query' is not a list or null; write finetune.targets=[query].",
        ),
        (["init_from=source", "finetune=lora", "finetune.rank=17"], "finetune.rank=17 is higher than the rank of any"),
        (["init_from=source", "finetune=lora", "finetune.targets=[qury]"], "Did you mean 'query'?"),
        (["init_from=source", "finetune=lora", "finetune.dropout=1"], "finetune.dropout=1 is out of range"),
        (["init_from=source", "finetune=adapter"], "the model has no plugin beside an FFN"),
        (["init_from=source", "finetune=adapter", "finetune.learn=[nothing]"], "finetune.learn: 'nothing' matches no"),
        (["init_from=source", "finetune=full", "finetune.replay_share=1"], "finetune.replay_share=1 is out of range"),
    ],
)
def test_a_wrong_command_gets_one_line(overrides: list[str], message: str, run: Run) -> None:
    outcome = run("fit", *COMMON, "data.path=b.txt", "trainer.max_steps=1", "run_dir=new", *overrides)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not Path("new").exists()
