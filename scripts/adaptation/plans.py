"""What is compared on which model: sizes, lengths and tries, for the comparison and for a smoke run of a minute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """A starting model, the facts that it is taught, and how long.

    Args:
        name: of the folder of its runs and in the report.
        pretrained: path of a pretrained model; None for one that `start` trains.
        start: overrides of `fit` that train the starting model.
        task: `ballplayers`, real ones that the starting model has not seen, or `invented` facts.
        dim, n_layers: of the model.
        n_facts: facts that are taught.
        edited_facts: the first of them, which `edit` writes.
        steps: optimizer steps of each run.
        evaluations: during them.
        data: overrides of what a step reads.
        questions: per form at each evaluation.
        positions: of other text, for loss and KL.
        tries: settings of each method, of which one is chosen on other facts.
        rate_factor: of the rates of all methods that are tried, but those of SGD: small models take larger steps.
        layers: where memories and Engrams are added.
        rows: that learn per step in sparse finetuning, many and few.
        methods: by name; `edit` is one.
        replayed: those that run with old data as well.
        edit: further overrides of `edit`.
    """

    name: str
    pretrained: str | None
    start: tuple[str, ...]
    task: str
    dim: int
    n_layers: int
    n_facts: int
    edited_facts: int
    steps: int
    evaluations: int
    data: tuple[str, ...]
    questions: int
    positions: int
    tries: int
    rate_factor: float
    layers: str
    rows: tuple[int, int]
    methods: tuple[str, ...]
    replayed: tuple[str, ...]
    edit: tuple[str, ...]


_ROWS = ("sparse-tfidf", "sparse-kl", "sparse-random")
#: People of the starting model of facts with its controls.
SEEN_PEOPLE = 3600 + 250
FACTS = Plan(
    name="facts",
    pretrained=None,
    # The run that was the default when the comparison was made.
    start=(
        *("data.people=3600", "data.cities=1000", "data.global_batch_size=48", "trainer.max_steps=2100"),
        *("model.memory.heads=2", "model.memory.knn=8", "optim.table_lr_factor=4"),
    ),
    task="ballplayers",
    dim=64,
    n_layers=2,
    n_facts=2000,
    edited_facts=100,
    steps=400,
    evaluations=10,
    data=("data.seq_len=64", "data.global_batch_size=48"),
    questions=200,
    positions=1000,
    tries=6,
    rate_factor=3,
    layers="[1]",
    rows=(8000, 1000),
    methods=("lora", "full", "dense", "memory", *_ROWS, "engram", "edit"),
    replayed=("lora", "full", "memory", "sparse-tfidf"),
    # One thread: the default limit is meant for two.
    edit=("max_seconds=180",),
)
SMOLLM2 = Plan(
    name="smollm2",
    pretrained="",
    start=(),
    task="invented",
    dim=576,
    n_layers=30,
    n_facts=100,
    edited_facts=100,
    steps=80,
    evaluations=5,
    data=("data.seq_len=128", "data.global_batch_size=4"),
    questions=50,
    positions=512,
    tries=3,
    rate_factor=1,
    layers="[20]",
    rows=(2000, 200),
    methods=("lora", "full", "dense", "memory", "sparse-tfidf", "engram", "edit"),
    replayed=(),
    edit=("drift_tokens=8192", "max_seconds=240"),
)


def plans(names: list[str], model: Path | None) -> list[Plan]:
    """Returns the plans of these names; `model` is the pretrained one of `smollm2`."""
    chosen = []
    for name in names:
        if name == "smollm2":
            if model is None:
                raise SystemExit("--models smollm2 needs --model FILE, the .gguf file or folder of SmolLM2-135M.")
            chosen.append(replace(SMOLLM2, pretrained=str(model)))
        else:
            chosen.append(FACTS)
    return chosen


def smoke(plan: Plan) -> Plan:
    """Returns the same comparison of a tiny model, a few steps per run: a test of the machinery, without meaning."""
    small = replace(
        plan,
        n_facts=12,
        edited_facts=4,
        steps=4,
        evaluations=2,
        questions=4,
        positions=20,
        tries=1,
        rows=(16, 8),
        edit=("drift_tokens=64", "max_steps=4"),
    )
    if plan.pretrained is not None:
        return replace(small, dim=24, n_layers=2, layers="[0]", data=("data.seq_len=160", "data.global_batch_size=2"))
    start = (
        *("data.people=60", "data.countries=10", "data.cities=20", "data.control_subjects=5", "data.eval_facts=20"),
        *("data.vocab_size=600", "data.seq_len=96", "data.global_batch_size=12", "model.memory.n_keys=16"),
        *("trainer.max_steps=12", "trainer.val_check_interval=12", "callbacks.recall.test_items=8"),
    )
    return replace(small, start=start, data=("data.seq_len=96", "data.global_batch_size=4"))
