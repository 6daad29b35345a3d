"""LoRA on several ranks: the losses of one process, under every strategy, and a checkpoint that one process uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.test_finetuning import LORA, SOURCE
from processes import finish, last_checkpoint, start
from small import Run, rows
from tolerances import RANKS

from pkm_lightning.build.adapters import base_name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_2", "deepspeed_3"])
def test_ranks_train_adapters_as_one_process_does(strategy: str, cli: Run, tmp_path: Path) -> None:
    for name in "ab":
        Path(f"{name}.txt").write_text((name + " cat sat on the mat and saw a dog run by . ") * 60)
    assert cli("fit", *SOURCE, "run_dir=source").code == 0
    assert cli(*LORA, "run_dir=one").code == 0
    finish(start(*LORA, f"strategy={strategy}", "devices=2", "run_dir=two", cwd=tmp_path))
    for one, two in zip(rows(Path("one")), rows(Path("two")), strict=True):
        assert float(two["train/loss"]) == pytest.approx(float(one["train/loss"]), rel=RANKS["loss"])
    before, after = (last_checkpoint(Path(name))["state_dict"] for name in ("source", "two"))
    kept = {name: base for name in after if (base := base_name(name)) is not None}
    assert all(after[name].equal(before[base]) for name, base in kept.items())
    Path("merged").mkdir()
    assert cli("export", "run_dir=two", "file=merged/model.safetensors").code == 0
    shown = cli("validate", "run_dir=two", "strategy=single", "devices=1")
    assert shown.code == 0, shown.err
