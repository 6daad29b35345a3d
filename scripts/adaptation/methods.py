"""The methods: what each lets learn, and the settings of which one is chosen on other facts, as many for each method.

A setting is a list of overrides. Sizes of what is added (`SIZED`) follow from LoRA's chosen rank, so that a dense
adapter, a memory and an Engram have as many parameters as LoRA trains.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plans import Plan

#: Share of old data in the replayed variants.
REPLAY = 0.05
Setting = tuple[str, ...]
#: Dimension of all queries of a memory of a pretrained model: 4 heads of 256.
_QUERIES = 4 * 256


@dataclass(frozen=True)
class Method:
    """A way to teach facts.

    Args:
        name: of its runs.
        label: in the report.
        learns: what learns, in words.
        overrides: of `fit`, by the name of the plan; without an entry the method is none for that plan.
        settings: in the order in which they are tried.
        own_settings: in their place, by the name of the plan.
    """

    name: str
    label: str
    learns: str
    overrides: Mapping[str, Sequence[str]]
    settings: Sequence[Setting]
    own_settings: Mapping[str, Sequence[Setting]] = field(default_factory=dict)


def _rates(*rates: float) -> tuple[Setting, ...]:
    return tuple((f"optim.lr={rate:g}",) for rate in rates)


def _row_rates() -> tuple[Setting, ...]:
    """Returns rates of rows: of lazy Adam, and of SGD, which the paper of sparse finetuning recommends."""
    adam = [("table/optimizer=lazy_adam", f"optim.lr={rate:g}") for rate in (3e-3, 1e-2, 3e-2)]
    # A row that a few tokens read has a small gradient in a mean over all: at 0.5 nothing is learned.
    sgd = [("table/optimizer=sgd", f"optim.lr={rate:g}") for rate in (30.0, 100.0, 10.0)]
    return tuple(itertools.chain.from_iterable(zip(adam, sgd, strict=True)))


def _sparse_settings() -> tuple[Setting, ...]:
    """Returns rates and numbers of rows, of which `settings` fills in those of the model."""
    adam, sgd = "table/optimizer=lazy_adam", "table/optimizer=sgd"
    tried = (
        *(("many", adam, 3e-3), ("few", sgd, 30), ("many", adam, 1e-3)),
        *(("few", adam, 1e-2), ("many", sgd, 30), ("few", sgd, 100)),
    )
    return tuple((f"finetune.rows={rows}", optimizer, f"optim.lr={rate:g}") for rows, optimizer, rate in tried)


_LORA = tuple(
    (f"finetune.rank={rank}", f"optim.lr={rate:g}")
    for rank, rate in ((16, 1e-3), (16, 3e-3), (64, 1e-3), (64, 3e-3), (4, 3e-3), (16, 1e-2))
)
# Above these rates it forgets more than full finetuning.
_LORA_LOW = tuple(
    (f"finetune.rank={rank}", f"optim.lr={rate:g}") for rank, rate in ((16, 1e-3), (16, 3e-4), (64, 3e-4))
)
_SPARSE = ("finetune=sparse",)
# Of the rates below.
_FACTOR = ("optim.table_lr_factor=4",)
# The memory that a pretrained model gets beside an FFN.
_MEMORY = ("extra_ffns=memory_plus", "extra_ffns.memory_plus.placement.layers={layers}")
_MEMORY_SIZE = ("extra_ffns.memory_plus.placement.mode=parallel", "extra_ffns.memory_plus.ffn.n_keys={n_keys}")
_DENSE = ("extra_ffns=dense", "finetune=adapter", "extra_ffns.dense.ffn.hidden_dim={hidden}")
_ENGRAM = ("extra_ffns=engram", "extra_ffns.engram.placement.layers={layers}", "extra_ffns.engram.ffn.rows={rows}")
# Rows in a low layer of a pretrained model can be read by attention above it, in whatever words stand between.
_LOW_ENGRAM = (_ENGRAM[0], "extra_ffns.engram.placement.layers=[4]", _ENGRAM[2])
# Rows that no other text reads exist only where few n-grams share one.
_FEW_COLLISIONS = ("extra_ffns.engram.ffn.rows=65536",)
_ENGRAM_ROWS = ("finetune=adapter", "finetune.learn=[{engram_table}]")
# Counted anew in every run, at the price of a forward of a pretrained model.
_BACKGROUND = ("finetune.background_path={background}", "finetune.background_batches=100")
_ADDED = (*_MEMORY, *_MEMORY_SIZE)


def _sparse(score: str, name: str, label: str) -> Method:
    """Returns sparse finetuning of the model's memory; of a pretrained model, of the rows of a new Engram."""
    chosen = (f"finetune.score={score}",)
    overrides = {
        "facts": (*_SPARSE, *chosen, *_FACTOR),
        "smollm2": (*_LOW_ENGRAM[:2], *_FEW_COLLISIONS, *_SPARSE, *chosen, *_FACTOR, *_BACKGROUND),
    }
    own = {
        "smollm2": [
            (f"finetune.rows={rows}", "table/optimizer=lazy_adam", f"optim.lr={rate:g}")
            for rows, rate in ((500, 1e-1), (1000, 1e-1), (1000, 3e-2))
        ]
    }
    return Method(name, label, f"rows that the facts read, chosen by {score}", overrides, _sparse_settings(), own)


METHODS: tuple[Method, ...] = (
    Method(
        "lora",
        "LoRA",
        "matrices of low rank beside attention and FFNs",
        {"facts": ("finetune=lora",), "smollm2": ("finetune=lora",)},
        _LORA,
        {"smollm2": _LORA_LOW},
    ),
    Method(
        "full",
        "full",
        "every parameter",
        {"facts": ("finetune=full",), "smollm2": ("finetune=full",)},
        _rates(1e-4, 3e-4, 3e-5, 1e-3, 3e-3, 1e-5),
    ),
    Method(
        "dense",
        "dense adapter",
        "new dense FFNs in parallel to those of all layers",
        {"facts": _DENSE, "smollm2": _DENSE},
        _rates(1e-3, 3e-3, 3e-4, 1e-2, 1e-4, 3e-2),
    ),
    Method(
        "memory",
        "memory",
        "all of a new memory, of a trained one every row that is read",
        {"facts": (*_SPARSE, *_FACTOR, "finetune.rows=null"), "smollm2": (*_ADDED, "finetune=adapter")},
        _rates(1e-3, 3e-3, 3e-4, 1e-2, 1e-4, 3e-2),
    ),
    _sparse("tfidf", "sparse-tfidf", "sparse rows, TF-IDF"),
    _sparse("kl", "sparse-kl", "sparse rows, KL"),
    _sparse("random", "sparse-random", "sparse rows, random"),
    Method(
        "engram",
        "Engram rows",
        "rows of new n-gram tables alone",
        {"facts": (*_ENGRAM, *_ENGRAM_ROWS), "smollm2": (*_LOW_ENGRAM, *_ENGRAM_ROWS)},
        _row_rates(),
        {"smollm2": [("table/optimizer=lazy_adam", f"optim.lr={rate:g}") for rate in (1e-2, 3e-2, 1e-1)]},
    ),
)


def settings(method: Method, plan: Plan) -> list[Setting]:
    """Returns the settings of a method that are tried on a model, with the rates and rows of the model."""
    rows = {f"finetune.rows={name}": f"finetune.rows={n}" for name, n in zip(("many", "few"), plan.rows, strict=True)}
    tried = method.own_settings.get(plan.name, method.settings)
    named = (tuple(rows.get(text, text) for text in setting) for setting in tried[: plan.tries])
    return [_scaled(setting, plan.rate_factor) for setting in named]


def _scaled(setting: Setting, factor: float) -> Setting:
    if "table/optimizer=sgd" in setting:
        return setting
    rates = (text.partition("optim.lr=")[2] for text in setting)
    return tuple(f"optim.lr={float(r) * factor:g}" if r else text for text, r in zip(setting, rates, strict=True))


def sizes(plan: Plan, lora_parameters: int, background: str) -> dict[str, str]:
    """Returns the values that overrides refer to, of as many parameters as LoRA trains.

    Args:
        plan: the model.
        lora_parameters: of the chosen rank.
        background: file of other text.
    """
    rows = max(4, lora_parameters // plan.dim)
    return {
        "layers": plan.layers,
        "hidden": str(max(1, round(lora_parameters / (3 * plan.dim * plan.n_layers)))),
        # Queries and gate of a memory take their share; a head of a pretrained model's memory reads 32 rows.
        "n_keys": str(max(32, round(max(0, rows - _QUERIES - plan.dim) ** 0.5))),
        # Four reads per token, each of a quarter of the values.
        "rows": str(rows),
        "background": background,
        # The facts model has a table of its own memory before it.
        "engram_table": "tables.0.weight" if plan.pretrained is not None else "tables.1.weight",
    }


def overrides(method: Method, plan: Plan, setting: Setting, values: Mapping[str, str]) -> list[str]:
    """Returns the overrides of a run, sizes filled in."""
    return [text.format(**values) for text in (*method.overrides[plan.name], *setting)]


def replay(plan: Plan, start: str, background: str) -> list[str]:
    """Returns the overrides that mix in old data: those of the starting run, or other text."""
    old = start if plan.pretrained is None else background
    return [f"finetune.replay_share={REPLAY}", f"finetune.replay_path={old}"]
