"""Wrong command lines: each gets one sentence that names its key, before anything is constructed or written."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from toys import VOCAB

from pkm_lightning.build.keys import RunKeys, check_keys
from pkm_lightning.build.run import resolve
from pkm_lightning.cli.command_keys import TOP_KEYS
from pkm_lightning.cli.job import plain
from pkm_lightning.errors import ConfigError

SMALL = (
    "model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.n_kv_heads=2", "model.ffn_dim=32", "run_dir=run",
    "model.memory.n_keys=16", "trainer.accelerator=cpu", "trainer.max_steps=4", f"model.vocab_size={VOCAB * 50}",
)  # fmt: skip
DEFAULT = ("callbacks=[default,slot_revival]",)
JSONL = ("data=jsonl", "data.path=x.jsonl")
TEXT = ("data=text", "data.path=x.txt")
DDP = ("strategy=ddp", "devices=2")
DEEPSPEED = ("strategy=deepspeed_2", "devices=2")

#: By composition: overrides that are wrong one at a time, and the key that the sentence must name where it is another.
WRONG: dict[tuple[str, ...], list[str]] = {
    DEFAULT: [
        *("data.people=1.5", "data.people=-1", "data.people=null", "data.people=true", "data.people=[1]"),
        *("data.people=x", "data.people=99999999999999999999", "data.cities=1e3", "data.countries={a:1}"),
        *("data.exposures=1.5", "data.exposures=0", "data.exposures=nan", "data.exposures=null"),
        *("data.max_exposures=2.5", "data.zipf_exponent=4", "data.zipf_exponent=inf", "data.loss=3", "data.loss=some"),
        *("data.people_relations=birth_date", "data.people_relations=null", "data.people_relations=[1]"),
        *("data.people_relations=[born]", "data.country_relations=[]", "data.question_share=1.1", "data.packing=null"),
        *("data.seq_len=64.0", "data.seq_len=1", "data.seq_len=10000000000", "data.seq_len=null"),
        *("data.global_batch_size=0", "data.global_batch_size=10000000000000", "data.global_batch_size=1.5"),
        *("data.vocab_size=1e3", "data.vocab_size=10", "data.tokenizer=3", "data.tokenizer=null", "data.tokenizer=bep"),
        *("data.num_workers=1.5", "data.num_workers=-1", "data.num_workers=100000", "data.order_seed=-1"),
        *("data.seed=1.5", "data.cache_dir=null", "data.cache_dir=3", "data.prompts=x", "data.prompts=[1e3,007,null]"),
        *("data.prompts=[[a]]", "data.prompts_file=3", "+data.foo=1", "~data.people", "~data.seq_len", "~data"),
        *("optim.lr=null", "optim.lr=[1]", "optim.lr=x", "optim.lr=-1", "optim.lr=nan", "optim.lr=inf", "~optim.lr"),
        *("optim.weight_decay=-1", "optim.table_lr_factor=x", "optim.table_weight_decay=true", "~optim"),
        "+optim.foo=1",
        *("optim.clip_norm=-1", "optim.clip_norm=x", "optim.table_clip_norm=nan", "optim.schedule=3"),
        *("optim.schedule=null", "optim.warmup_share=2", "optim.final_factor=null", "optim.decay_share=-1"),
        *("optim.optimizer=null", "optim.optimizer=3", "optim.optimizer.betas=0.9", "optim.optimizer.betas=[0.9]"),
        *("optim.optimizer.betas=[0.9,1.5]", "optim.optimizer.betas=[a,b]", "optim.optimizer.betas=null"),
        *("optim.optimizer.eps=-1", "optim.optimizer.eps=null", "optim.optimizer.eps=nan", "optim.optimizer.fused=3"),
        *("+optim.optimizer.foo=1", "+optim.optimizer.amsgrad=x", "optim.optimizer._target_=torch.optim.Nope"),
        *("model.n_layers=1e9", "model.n_layers=1000000000", "model.n_layers=0", "model.n_layers=null", "~model.dim"),
        *("model.dim=32.0", "model.dim=99999999999", "model.dim=null", "model.dim=[32]", "model.dim=33", "~model"),
        *("model.n_heads=7", "model.n_heads=0", "model.n_kv_heads=0", "model.n_kv_heads=3", "model.n_heads=x"),
        *("model.vocab_size=1.5", "model.vocab_size=true", "model.vocab_size=x", "model.vocab_size=1", "+model.foo=1"),
        *("model.rope_theta=nan", "model.rope_theta=0", "model.rope_theta=inf", "model.rope_theta=null"),
        *("model.norm_eps=-1", "model.norm_eps=x", "model.tied=3", "model.tied=null", "model.document_mask=maybe"),
        *("model.compile=3", "model.compile=null", "model.activation_checkpointing=1", "model.reset_positions=x"),
        *("model.base_ffn=null", "model.base_ffn=3", "model.base_ffn.hidden_dim=1.5"),
        *("+model.base_ffn.foo=1", "+model.base_ffn.activation=3", "model.base_ffn._target_=null"),
        *("model.memory=3", "model.memory.n_keys=1.5", "model.memory.heads=null", "model.memory.knn=0"),
        *("ffn.n_keys=1.5", "ffn.n_keys=46341", "ffn.n_keys=9999999999999999999999", "ffn.n_keys=null", "~ffn.n_keys"),
        *("ffn.heads=0", "ffn.knn=257", "ffn.knn=null", "ffn.key_dim=31", "ffn.value_dim=0", "ffn.value_dim=x", "~ffn"),
        *("ffn.gate=3", "ffn.gate=siwlu", "ffn.activation=null", "ffn.temperature=3", "ffn.qk_norm=null"),
        *("ffn.cures=3", "ffn.cures=[1]", "ffn.cures.simvq=3", "ffn.cures.gumbel_noise=x", "ffn.cures.balance_loss=-1"),
        *("+ffn.cures.foo=1", "+ffn.foo=1", "ffn._target_=3", "ffn._target_=nowhere.X", "ffn._target_=null", "ffn=3"),
        *("placement.layers=null", "placement.layers=3", "placement.layers=[0.5]", "placement.layers=[x]"),
        *("placement.layers=[7]", "placement.count=1.5", "placement.count=-1", "placement.stride=x", "~placement"),
        *("placement.mode=3", "placement.write_after=x", "placement.write_after=-1", "~placement.mode"),
        *("table.shared=3", "table.shared=null", "table.device=3", "table.device=gpu", "table.learning=3", "~table"),
        *("table.learning=row", "table.shard=3", "table.group=1.5", "table.optimizer=null", "table.optimizer=3"),
        *("table.optimizer.rule=3", "table.optimizer.rule=adam", "table.optimizer.betas=[0.9]", "+table.foo=1"),
        *("table.optimizer.betas=[1,2]", "table.optimizer.eps=x", "+table.optimizer.foo=1", "~table.shared"),
        *("trainer.max_steps=-1", "trainer.max_steps=1e3", "trainer.max_steps=null", "trainer.max_steps=0", "~trainer"),
        *("trainer.max_epochs=x", "trainer.max_epochs=0", "trainer.max_epochs=1.5", "trainer.num_nodes=0"),
        *("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=1.5", "trainer.log_every_n_steps=0"),
        *("trainer.val_check_interval=0", "trainer.val_check_interval=1.5", "trainer.val_check_interval=null"),
        *("trainer.check_val_every_n_epoch=0", "trainer.num_sanity_val_steps=x", "trainer.enable_model_summary=x"),
        *("trainer.precision=3", "trainer.precision=[1]", "trainer.precision=half", "trainer.accelerator=3"),
        *("trainer.devices=0", "trainer.devices=-2", "trainer.devices=1e11", "trainer.devices=100000000000"),
        *("trainer.devices=true", "trainer.devices=null", "trainer.devices=[x]", "trainer.num_nodes=99999"),
        *("+trainer.foo=1", "+trainer.overfit_batches=2", "+trainer.overfit_batches=0.5", "+trainer.max_time=5"),
        *("+trainer.deterministic=maybe", "+trainer.detect_anomaly=3", "+trainer.limit_val_batches=x"),
        *("+trainer.gradient_clip_val=x", "+trainer.gradient_clip_val=-1", "+trainer.gradient_clip_algorithm=value"),
        *("+trainer.plugins=3", "+trainer.callbacks=3", "+trainer.benchmark=2", "+trainer.min_steps=1.5"),
        *("+trainer.min_steps=-1", "+trainer.min_epochs=-1", "trainer.precision=null"),
        *("seed=1.5", "seed=-1", "seed=null", "seed=4294967296", "match=3", "match=flop", "match=null", "~seed"),
        *("match_budget=x", "match_budget=0", "device_memory=x", "device_memory=-1", "run_dir=null", "run_dir=3"),
        *("resume=maybe", "resume=true", "trust_config=3", "format=xml", "ckpt=3", "out=3"),
        *("strategy=3", "~strategy", "logger=3", "~logger", "logger.tensorboard=3", "logger.tensorboard.save_dir=null"),
        *("logger.tensorboard.name=3", "callbacks=3", "~callbacks", "callbacks.recall=3", "callbacks.recall.path=3"),
        *("callbacks.recall.val_items=-1", "callbacks.recall.val_items=1.5", "callbacks.recall.test_items=x"),
        *("callbacks.samples.prompts=x", "callbacks.samples.prompts=[1]", "callbacks.samples.items=1.5"),
        *("callbacks.samples.max_new_tokens=0", "callbacks.diagnostics.rows=0", "callbacks.diagnostics.rows=null"),
        *("callbacks.instability.policies=3", "callbacks.instability.policies.limit=3", "callbacks.instability.path=3"),
        *("callbacks.instability.policies.limit=stpo", "callbacks.instability.threshold=x"),
        *("callbacks.instability.limits=3", "callbacks.instability.limits.output_logit_max=x"),
        *("callbacks.instability.window=1.5", "callbacks.instability.restore=3", "callbacks.instability.lr_factor=0"),
        *("callbacks.instability._target_=pkm_lightning.callbacks.Nope", "+callbacks.instability.foo=1"),
        *("callbacks.step_checkpoint.dirpath=null", "callbacks.step_checkpoint.dirpath=3"),
        "~callbacks.recall._target_",
        *("callbacks.step_checkpoint.every_n_steps=0", "callbacks.step_checkpoint.asynchronous=3"),
        *("callbacks.progress_bar.refresh_rate=1.5", "callbacks.throughput.window=0", "callbacks.throughput.window=x"),
        *("callbacks.slot_usage.per_head=3", "callbacks.slot_usage.per_head=some", "callbacks.slot_usage.window=1"),
        *("callbacks.slot_usage.every_n_steps=1.5", "callbacks.slot_usage.max_slots=x", "callbacks.metrics_csv.path=3"),
        *("callbacks.slot_revival.max_share=2", "callbacks.slot_revival.source=3", "callbacks.slot_revival.noise=-1"),
    ],
    JSONL: [
        *("data.path=null", "data.path=3", "data.path=[1,2]", "data.path=[null]", "data.path={a:1}", "data.path=true"),
        *("data.text_field=3", "data.prompt_field=null", "data.answer_field=[a]", "data.packing=3", "~data.path"),
        *("data.val_fraction=0", "data.val_fraction=x", "data.val_fraction=0.6", "data.seq_len=128.0", "data.seed=-1"),
    ],
    TEXT: [
        *("data.path=null", "data.path=3", "data.document_separator=1.5", "data.document_separator=x"),
        *("data.val_fraction=null", "data.vocab_size=null", "+data.text_field=text"),
    ],
    ("ffn=moe",): [
        *("ffn.n_experts=0", "ffn.n_experts=1.5", "ffn.top_k=65", "ffn.top_k=1.5", "ffn.shared_experts=-1"),
        *("ffn.routed_scale=nan", "ffn.routed_scale=-1", "ffn.score=3", "ffn.select=x", "ffn.renormalise=3"),
        *("ffn.balancing=3", "ffn.balance_loss=x", "ffn.z_loss=-1", "ffn.bias_rate=null", "ffn.hidden_dim=0.5"),
    ],
    ("ffn=moe_expert_choice",): ["ffn.capacity_factor=0", "ffn.capacity_factor=x", "ffn.eval_top_k=17"],
    ("ffn=peer",): ["ffn.glu=3", "ffn.query_norm=3", "ffn.query_norm=x", "ffn.router=null", "ffn.n_keys=46341"],
    ("ffn=pkm",): ["ffn.query_norm=x", "ffn.key_dim=1.5", "ffn.cures=x"],
    ("ffn=memory",): ["ffn.qk_norm=3", "ffn.heads=1.5", "ffn.knn=0"],
    ("ffn=dense",): ["ffn.hidden_dim=0", "ffn.hidden_dim=172.0", "ffn.activation=3", "ffn.activation=silu"],
    ("ffn=ultramem",): [
        *("ffn.rank=100000", "ffn.rank=1.5", "ffn.cores=100000000000", "ffn.expansion=3", "ffn.expansion=x"),
        *("ffn.spectrum_loss=-1", "ffn.spectrum_margin=x", "ffn.value_dim=1.5"),
    ],
    ("ffn=ple",): [
        *("ffn.value_dim=0", "ffn.value_dim=1.5", "ffn.context=3", "ffn.activation=relu", "ffn.norm_eps=-1"),
        *("ffn.norm_eps=x", "+ffn.vocab_size=9", "+ffn.table_reader=0"),
    ],
    ("ffn=stem",): ["ffn.hidden_dim=0", "ffn.hidden_dim=172.0", "ffn.hidden_dim=null", "+ffn.activation=gelu"],
    ("ffn=ultramem_v2",): ["ffn.rank=0", "ffn.balance_loss=-1", "ffn.value_dim=0", "ffn.knn=257"],
    DDP: [
        *("strategy.broadcast_buffers=3", "strategy.gradient_as_bucket_view=null", "+strategy.timeout=5"),
        *("+strategy.find_unused_parameters=x", "+strategy.process_group_backend=3", "table.group=3"),
    ],
    DEEPSPEED: ["strategy.stage=4", "strategy.stage=1.5", "strategy.stage=null", "+strategy.offload_optimizer=3"],
    ("table/optimizer=catch_up_adam",): ["table.optimizer.betas=[0.5,0.9]", "optim.table_weight_decay=0.1"],
    ("table/optimizer=factored_adam",): [
        *("table.optimizer.betas=[0.9,0.95]", "table.optimizer.betas=[0,0.999]", "table.optimizer.betas=[0,x]"),
        "+table.optimizer.bias_correction=row",
    ],
    ("table/optimizer=lazy_adam",): [
        *("table.optimizer.bias_correction=rows", "table.optimizer.bias_correction=1"),
        "table.optimizer.bias_correction=null",
    ],
}  # fmt: skip
CASES = [(composition, override) for composition, overrides in WRONG.items() for override in overrides]


@functools.cache
def composed(composition: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        return plain(compose("config", overrides=[*SMALL, *composition]))


def changed(config: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy of `config` with another value at `path`; without it if the value is `...`."""
    config = dict(config)
    head, *rest = path
    if rest:
        config[head] = changed(config[head], rest, value)
    elif value is ...:
        del config[head]
    else:
        config[head] = value
    return config


@pytest.mark.parametrize(("composition", "override"), CASES, ids=[f"{' '.join(c)} {o}" for c, o in CASES])
def test_a_wrong_key_gets_one_sentence_that_names_it(composition: tuple[str, ...], override: str) -> None:
    parsed = OverridesParser.create().parse_override(override)
    key = parsed.key_or_group
    wrong = changed(composed(composition), key.split("."), ... if parsed.is_delete() else parsed.value())
    with pytest.raises(ConfigError) as refused:
        resolve(wrong, training=True)
    message = str(refused.value)
    assert key.split(".")[-1] in message
    assert key.split(".")[0] in message or "placement" in message
    assert "\n" not in message
    assert len(message) < 800


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"_target_": "torch.optim.Adafactor", "eps": [None, 0.001]}, None),
        ({"_target_": "torch.optim.SGD", "momentum": 0.9}, None),
        ({"_target_": f"{__name__}.OfMatrices"}, None),
        ({"_target_": "torch.optim.AdamW", "fused": True, "foreach": True}, r"`fused` and `foreach` cannot be `True`"),
        ({"_target_": "torch.optim.Adafactor", "eps": [None, -1]}, r"optim\.optimizer\.eps\[1\]=-1 is out of range"),
        ({"_target_": "torch.optim.AdamW", "eps": [0.1, 0.1]}, r"optim\.optimizer\.eps=\[0\.1, 0\.1\] is not a number"),
        ({"_target_": "torch.optim.LBFGS"}, r"optim\.optimizer: LBFGS doesn't support per-parameter options"),
        (
            {"_target_": "torch.optim.SparseAdam"},
            r"torch\.optim\.SparseAdam takes sparse gradients only, .*; set another",
        ),
        ({"_target_": f"{__name__}.LineSearch"}, r"LineSearch evaluates the loss several times per step"),
        (
            {"_target_": "collections.Counter"},
            r"_target_=collections\.Counter is not a torch\.optim\.optimizer\.Optimizer",
        ),
    ],
)
def test_optimizers_that_train_and_those_that_cannot(described: dict[str, Any], message: str | None) -> None:
    config = changed(composed(DEFAULT), ["optim", "optimizer"], described)
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        resolve(config, training=True)


class OfMatrices(torch.optim.SGD):
    """It looks at the groups as a model has them."""

    def __init__(self, params: list[dict[str, Any]]) -> None:
        super().__init__(params)
        by_name = {group["name"]: group for group in self.param_groups}
        assert by_name["matrix"]["params"][0].ndim == 2
        assert all(group["lr"] > 0 for group in self.param_groups)


class LineSearch(torch.optim.SGD):
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize(
    ("path", "value", "advice"),
    [
        ("optim.foo", 1, "remove it."),
        ("optim.warmup", 1, "Did you mean 'warmup_steps'?"),
        ("model.n_layers", 1e9, "not a whole number of at most 4096."),
        ("model.n_layers", 6.0, "not a whole number; write 6."),
        ("trainer.devices", 1e11, "of at most 65536; if it is meant as text"),
        ("trainer.precision", 7, "32, 16, bf16, 64."),
        ("callbacks", ..., "callbacks is missing; write callbacks=none for none, or do not delete it with ~."),
        ("strategy", ..., "write strategy=single for none"),
        ("trainer.max_steps", ..., "nothing works without it"),
    ],
)
def test_advice_is_of_use(path: str, value: Any, advice: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_keys(changed(composed(DEFAULT), path.split("."), value), training=True)
    assert advice in str(refused.value)
    assert (str(refused.value).endswith(advice) or "if it is meant as text" in advice) or value is ...


def test_the_compositions_are_right_without_the_wrong_key() -> None:
    for composition in WRONG:
        check_keys(composed(composition), training=True)


VALUES = (None, True, 1.5, -1, "x", [1], {"a": 1}, math.nan, 10**30)


def paths(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    for name, value in node.items() if isinstance(node, dict) else ():
        yield from paths(value, (*path, name))


@pytest.mark.parametrize(
    ("composition", "group"),
    [(DEFAULT, ""), (JSONL, "data"), (("ffn=moe",), "ffn"), (("ffn=ultramem",), "ffn"), (DEEPSPEED, "strategy")],
)
def test_no_value_of_any_key_ends_in_another_error(composition: tuple[str, ...], group: str) -> None:
    """Of every key, values of every kind: accepted, or refused with the name of the key."""
    config, refused = composed(composition), 0
    tried = [path for path in paths(config) if path[0].startswith(group)]
    for path in tried:
        for value in VALUES:
            with contextlib.suppress(ConfigError):
                check_keys(changed(config, list(path), value), training=True)
                refused -= 1
            refused += 1
    assert refused > 3 * len(tried)


def test_the_top_keys_of_the_command_line_are_those_of_a_configuration() -> None:
    assert sorted(TOP_KEYS) == sorted(RunKeys.__annotations__)
