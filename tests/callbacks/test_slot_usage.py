"""SlotUsage counts what plugins have read: against a plain recount, over accumulation, recomputation, ranks, resumes.

What it leaves behind: logs, usage.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import usage_jobs as jobs
from rank_group import Groups
from tolerances import assert_close

from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.usage.slot_metrics import effective_slots, spread

ALONE = "strategy=single"


def check(overrides: list[str], names: list[str], tmp_path: Path, steps: int = 5, **changes: Any) -> Any:
    """Checks the counters of every name against a recount; returns the callback, the logs and the traces."""
    raw, watching = jobs.Raw(), jobs.usage(tmp_path, **changes)
    _, _, seen = jobs.fit([ALONE, *overrides], steps, [watching, raw])
    counters = watching.counters
    assert counters is not None
    assert list(counters.readers) == names
    for name in names:
        layer, _, kind = name.removeprefix("layer").partition(".")
        reads, n_slots = raw.reads(int(layer), kind), counters.counts[name].n_slots
        counts, weights = jobs.histogram(reads, n_slots)
        total = counters.total(name, "ever")
        assert reads
        assert total.counts_N.tolist() == counts
        assert_close(total.weights_N.float(), torch.tensor(weights))
        window = jobs.histogram(raw.reads(int(layer), kind, range(steps - (steps - 1) % 2 - 2, steps + 1)), n_slots)
        assert counters.total(name, "window").counts_N.tolist() == window[0]
    return watching, seen, raw


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["ffn=ultramem_v2", "placement=middle"], ["layer1.slot"]),
        (["ffn=engram", "ffn.end_id=0", "ffn.rows=20"], ["layer1.before.slot"]),
        (["ffn=ultramem", "placement=middle"], ["layer1.slot", "layer1.virtual"]),
        (["ffn=moe", "placement=middle"], ["layer1.expert"]),
        (["ffn=ple", "placement.layers=[0,2]"], ["layer0.after.slot", "layer2.after.slot"]),
    ],
)  # fmt: skip
def test_counts_equal_a_recount(overrides: list[str], names: list[str], tmp_path: Path) -> None:
    check(overrides, names, tmp_path)


def test_micro_batches_add_up_and_recomputed_forwards_count_once(tmp_path: Path) -> None:
    overrides = ["ffn=pkm", "trainer.accumulate_grad_batches=2", "model.activation_checkpointing=true"]
    watching, seen, _ = check(overrides, ["layer1.slot"], tmp_path)
    assert len(seen) == 5
    assert int(watching.counters.total("layer1.slot", "ever").counts_N.sum()) == 5 * 32 * 2 * 4


@pytest.mark.slow
def test_a_compiled_model_is_counted_too(tmp_path: Path) -> None:
    check(["ffn=memory_plus", "placement=middle", "model.compile=true"], ["layer1.slot"], tmp_path, steps=2)


def test_figures_are_logged_for_layers_and_shared_tables(tmp_path: Path) -> None:
    watching, seen, raw = check(["ffn=memory_plus", "placement=all"], [f"layer{i}.slot" for i in range(3)], tmp_path)
    figures = spread(*watching.counters.total("table0", "window"), 16)
    logged = {name.removeprefix("train/usage/"): value for name, value in seen[-1].items() if "usage" in name}
    assert {name.split("/")[0] for name in logged} == {"layer0.slot", "layer1.slot", "layer2.slot", "table0"}
    for name in ("used_percent", "gini", "top50", "top90", "top99", "kl_rows", "kl_columns"):
        assert logged[f"table0/{name}"] == pytest.approx(figures[name], rel=1e-6)
    for span, first in (("window", 3), ("since_start", 1)):
        weights = [(t[0]["slot_weights"].flatten(0, 1), v.flatten()) for step, t, v in raw.seen if step >= first]
        total, reads = sum(effective_slots(*one) for one in weights)
        effective = json.loads((tmp_path / "usage.json").read_text())["layers"]["layer0.slot"][span]["effective"]
        assert effective == pytest.approx(float(total / reads), rel=1e-6)
        if span == "window":
            # A logged value is fp32, one of the report fp64.
            assert logged["layer0.slot/effective"] == pytest.approx(effective, rel=1e-6)
    assert "table0/effective" not in logged
    read = {
        layer: {step: {slot for slot, _ in raw.reads(layer, "slot", [step])} for step in (4, 5)} for layer in (0, 1, 2)
    }
    alive = set.union(*(slots for by_step in read.values() for slots in by_step.values()))
    assert logged["table0/dead"] == 256 - len(alive)
    assert logged["layer0.slot/dead"] == 256 - len(read[0][4] | read[0][5])


def test_experts_that_choose_are_no_read_of_a_token(tmp_path: Path) -> None:
    _, seen, _ = check(["ffn=moe_expert_choice", "placement=middle"], ["layer1.expert"], tmp_path)
    assert "train/usage/layer1.expert/gini" in seen[-1]
    assert "train/usage/layer1.expert/effective" not in seen[-1]


@pytest.mark.parametrize("per_head", ["halves", "full"])
def test_heads_are_counted_on_request(per_head: str, tmp_path: Path) -> None:
    watching, seen, raw = check(["ffn=pkm"], ["layer1.slot"], tmp_path, per_head=per_head)
    total = watching.counters.total_of_heads("layer1.slot", "ever")
    heads = watching.counters.heads["layer1.slot"]
    found = heads.by_sub_key(total.counts_N, torch.sum)
    assert found.shape == (2, 2, 16)
    content = json.loads((tmp_path / "usage.json").read_text())["layers"]["layer1.slot"]["heads"]
    logged = {n.rpartition("/")[2]: v for n, v in seen[-1].items() if n.startswith("train/usage/layer1.slot.head1/")}
    for head in range(2):
        ids = torch.cat([traces[1]["slot_ids"][valid][:, head].flatten() for _, traces, valid in raw.seen])
        assert found[head, 0].tolist() == torch.bincount(ids // 16, minlength=16).tolist()
        assert found[head, 1].tolist() == torch.bincount(ids % 16, minlength=16).tolist()
        if per_head == "full":
            weights = torch.cat([traces[1]["slot_weights"][valid][:, head].flatten() for _, traces, valid in raw.seen])
            counts, amounts = jobs.histogram(list(zip(ids.tolist(), weights.abs().tolist(), strict=True)), 256)
            assert heads.by_slot(total.counts_N)[head].tolist() == counts
            figures = spread(torch.tensor(counts), torch.tensor(amounts), 16)
            expected = {name: figures[name] for name in content["since_start"][head]}
            assert content["since_start"][head] == pytest.approx(expected, rel=1e-6)
            read = torch.cat([t[1]["slot_ids"][valid][:, head].flatten() for step, t, valid in raw.seen if step > 3])
            assert content["dead"][head] == 256 - len(read.unique())
    marginals, of_slots = {"kl_rows", "kl_columns"}, {"used_percent", "kl_count", "kl_weight", "dead"}
    assert logged.keys() == (marginals | of_slots if per_head == "full" else marginals)
    assert content["window"][1] == pytest.approx({n: v for n, v in logged.items() if n != "dead"}, rel=1e-6)
    assert ("dead" in content) is (per_head == "full")


def test_heads_switched_on_at_a_resume_say_where_they_begin(tmp_path: Path) -> None:
    overrides = [ALONE, "ffn=pkm"]
    _, trainer, _ = jobs.fit(overrides, 3, [jobs.usage(tmp_path, per_head="full")])
    trainer.save_checkpoint(str(tmp_path / "saved.ckpt"))
    for per_head, first_step in (("full", 1), (True, 4)):
        watching = jobs.usage(tmp_path, per_head=per_head)
        jobs.fit(overrides, 5, [watching], 3, ckpt_path=str(tmp_path / "saved.ckpt"))
        content = json.loads((tmp_path / "usage.json").read_text())
        assert (content["first_step"], content["window_steps"]) == (1, 3)
        heads = content["layers"]["layer1.slot"]["heads"]
        assert (heads["first_step"], heads["window_steps"]) == (first_step, min(3, 6 - first_step))
        reads = watching.counters.total_of_heads("layer1.slot", "ever").counts_N.sum()
        per_step = content["layers"]["layer1.slot"]["reads"] // 5
        assert int(reads) == (6 - first_step) * per_step * (1 if per_head == "full" else 2)


def test_two_ffns_side_by_side_are_told_apart(tmp_path: Path) -> None:
    watching = jobs.usage(tmp_path)
    module, _, seen = jobs.fit([ALONE, "ffn=moe", "placement=beside"], 2, [watching])
    assert list(watching.counters.readers) == [f"layer{i}.variant.expert" for i in range(3)]
    reads = int(watching.counters.total("layer0.variant.expert", "ever").counts_N.sum())
    assert reads == 2 * 32 * module.model.blocks[0].ffn.variant.top_k
    assert "train/usage/layer0.variant.expert/used_percent" in seen[-1]


def test_a_model_without_slots_is_left_alone(tmp_path: Path) -> None:
    watching = jobs.usage(tmp_path)
    module, _, seen = jobs.fit([ALONE, "ffn=dense"], 2, [watching])
    assert not module.watch.observes
    assert watching.counters is None
    assert not watching.state_dict()
    assert not [name for name in seen[-1] if "usage" in name]
    assert not (tmp_path / "usage.json").exists()


SPREAD = ["memory_plus", *(pytest.param(ffn, marks=pytest.mark.slow) for ffn in ("pkm", "moe_expert_choice"))]


@pytest.mark.parametrize("ffn", SPREAD)
def test_two_ranks_count_as_one(ranks: Groups, ffn: str, tmp_path: Path) -> None:
    """Resumes on one rank what two have saved in the middle of a window; the slow cases also the other way round."""
    still = ["optim.warmup_share=0", "optim.final_factor=1.0"]
    overrides = [f"ffn={ffn}", "placement=middle", "table.shard=dim", "trainer.precision=64-true", *still]
    if ffn == "moe_expert_choice":  # experts choose among the tokens of their rank
        overrides.append("ffn.capacity_factor=1")
    spread_over = [*overrides, "strategy=ddp"]
    two = ranks(2).run(jobs.count, spread_over, 7)
    assert two[0][:2] == two[1][:2]
    assert [written for *_, written in two] == [True, False]
    saved = str(tmp_path / "saved.ckpt")
    ranks(2).run(jobs.count, spread_over, 3, saved)
    if ffn != "moe_expert_choice":
        assert jobs.count([*overrides, ALONE], 7)[0] == two[0][0]
        assert jobs.count([*overrides, ALONE], 7, "", saved, 3)[0] == two[0][0]
    if ffn != "memory_plus":
        resumed = ranks(2).run(jobs.count, spread_over, 7, "", saved, 3)
        assert resumed[0][0] == two[0][0]
        assert resumed[0][1] == two[0][1][3:]
    if ffn == "pkm":
        by_one = str(tmp_path / "by_one.ckpt")
        jobs.count([*overrides, ALONE], 3, by_one)
        for part in ranks(2).run(jobs.count, spread_over, 7, "", by_one, 3):
            assert part[0] == two[0][0]


@pytest.mark.parametrize(
    ("strategy", "ffn"),
    [
        ("fsdp", "memory_plus"),
        pytest.param("deepspeed_2", "pkm", marks=pytest.mark.slow),
        pytest.param("deepspeed_3", "moe", marks=pytest.mark.slow),
        pytest.param("deepspeed_3", "peer", marks=pytest.mark.slow),
    ],
)
def test_every_strategy_counts(ranks: Groups, strategy: str, ffn: str) -> None:
    overrides = [f"ffn={ffn}", "placement=middle", "trainer.accumulate_grad_batches=2"]
    one = jobs.count([*overrides, ALONE], 1)
    for counted, logged, _ in ranks(2).run(jobs.count, [*overrides, f"strategy={strategy}"], 1):
        assert {name: found[0] for name, found in counted.items()} == {name: found[0] for name, found in one[0].items()}
        assert logged[0].keys() == one[1][0].keys()


def test_a_checkpoint_of_other_slots_is_refused(tmp_path: Path) -> None:
    watching = jobs.usage(tmp_path)
    jobs.fit([ALONE, "ffn=pkm"], 1, [watching])
    other = jobs.usage(tmp_path)
    other.load_state_dict(watching.state_dict())
    message = r"counts the reads of layer1.slot \(256\), but this model has layer1.slot \(64\)"
    with pytest.raises(CheckpointError, match=message):
        jobs.fit([ALONE, "ffn=pkm", "model.memory.n_keys=8"], 1, [other])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "callbacks.slot_usage.window=0 is out of range; allowed: 2 or more"),
        ({"every_n_steps": 0}, "callbacks.slot_usage.every_n_steps=0 is out of range"),
        ({"dead_after": -1}, "callbacks.slot_usage.dead_after=-1 is out of range"),
        ({"dead_after": 1.5}, "callbacks.slot_usage.dead_after=1.5 is not a whole number"),
        ({"per_head": "maybe"}, "callbacks.slot_usage.per_head='maybe' is not known; allowed: false, halves, full"),
        ({"panels_every_n_steps": 0}, "callbacks.slot_usage.panels_every_n_steps=0 is out of range"),
    ],
)
def test_wrong_numbers_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        jobs.usage(tmp_path, **change)


def test_an_interval_that_nothing_is_logged_at_is_refused(tmp_path: Path) -> None:
    overrides = [ALONE, "ffn=pkm", "trainer.log_every_n_steps=2"]
    with pytest.raises(ConfigError, match=r"every_n_steps=3 is not a multiple of trainer.log_every_n_steps=2"):
        jobs.fit(overrides, 1, [jobs.usage(tmp_path, every_n_steps=3)])


def test_figures_have_an_interval_of_their_own(tmp_path: Path) -> None:
    watching = jobs.usage(tmp_path, every_n_steps=2)
    jobs.fit([ALONE, "ffn=pkm"], 5, [watching])
    assert watching.looked == [2, 4]  # type: ignore[attr-defined]
    reads = watching.counters.effective["layer1.slot"].ever()[1]  # type: ignore[union-attr]
    assert int(reads) == 2 * 32 * 2  # steps, tokens, heads


def test_usage_json_and_the_screen_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watching, _, raw = check(["ffn=peer"], ["layer1.slot"], tmp_path, steps=6, per_head="halves")
    content = json.loads((tmp_path / "usage.json").read_text())
    reads = raw.reads(1, "slot")
    assert (content["schema"], content["step"], content["window_steps"], content["first_step"]) == (1, 6, 4, 1)
    layer = content["layers"]["layer1.slot"]
    assert (layer["slots"], layer["reads"]) == (256, len(reads))
    assert layer["since_start"]["used_percent"] == pytest.approx(100 * len({slot for slot, _ in reads}) / 256)
    effective = {span: layer[span].pop("effective") for span in ("window", "since_start")}
    assert all(1 <= value <= 4 for value in effective.values())
    assert layer["window"] == pytest.approx(spread(*watching.counters.total("layer1.slot", "window"), 16))
    assert len(layer["heads"]["window"]) == 2
    table = content["tables"]["table0"]
    assert table.pop("layers") == ["layer1.slot"]
    assert table == {name: value for name, value in layer.items() if name != "heads"}  # both from one report
    assert "layer1.slot" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))
