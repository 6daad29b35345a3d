"""Which parameters the patterns of `optim.freeze` name, and what is refused."""

from __future__ import annotations

import pytest
from small import resolved

from pkm_lightning.build.freezing import freeze_parameters, parameter_counts
from pkm_lightning.capacity import Setting
from pkm_lightning.capacity.dense import dense_figures
from pkm_lightning.errors import ConfigError
from pkm_lightning.training.table_learning import optimizer_state_bytes

SIZES = ["model.n_layers=2", "model.dim=16", "model.ffn_dim=16", "model.memory.n_keys=16", "placement=middle"]

PATTERNS: dict[str, tuple[list[str], set[str]]] = {
    "nothing": ([], set()),
    "a part": (["embedding*"], {"embedding.weight"}),
    "as in a checkpoint": (["model.embedding*"], {"embedding.weight"}),
    "a table": (["tables.*"], {"tables.0.weight"}),
    "two": (["norm.weight", "unembedding.*"], {"norm.weight", "unembedding.weight"}),
    "anywhere": (["*0.attention.query*"], {"blocks.0.attention.query.weight"}),
}


@pytest.mark.parametrize("mode", ["replace", "parallel", "before"])
def test_the_trunk_is_all_but_the_variants_their_norms_and_tables(mode: str) -> None:
    run = resolved(*SIZES, f"placement.mode={mode}", "optim.freeze=[trunk]")
    place = {"replace": "blocks.1.ffn.", "parallel": "blocks.1.ffn.variant.", "before": "blocks.1.before"}[mode]
    for name, parameter in run.model.named_parameters():
        if not name.startswith("tables."):  # which learns by rows
            assert parameter.requires_grad == name.startswith(place), name
    assert run.model.value_tables[0].learns
    assert not resolved(*SIZES, f"placement.mode={mode}", "optim.freeze=[trunk,tables.*]").model.value_tables[0].learns


@pytest.mark.parametrize("what", PATTERNS)
@pytest.mark.parametrize("learning", ["rows", "dense"])
def test_a_pattern_names_parameters(what: str, learning: str) -> None:
    patterns, expected = PATTERNS[what]
    run = resolved(*SIZES, f"table.learning={learning}", f"optim.freeze=[{','.join(patterns)}]", training=True)
    free = resolved(*SIZES, f"table.learning={learning}")
    before = {name: parameter.requires_grad for name, parameter in free.model.named_parameters()}
    after = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    assert after == {name: learns and name not in expected for name, learns in before.items()}
    assert [table.stage is None for table in run.model.value_tables] == [
        learning == "dense" or "tables.0.weight" in expected
    ]
    sizes = {name: parameter.numel() for name, parameter in run.model.named_parameters()}
    frozen = sum(sizes[name] for name in expected)
    assert parameter_counts(run.model) == (sum(sizes.values()) - frozen, frozen)


def test_states_and_plans_are_of_trained_parameters() -> None:
    free, frozen = resolved(*SIZES), resolved(*SIZES, "optim.freeze=[embedding*]")
    saved = 2 * 4 * free.model.embedding.weight.numel()  # two values of four bytes per parameter
    assert optimizer_state_bytes(frozen.model, frozen.config) == optimizer_state_bytes(free.model, free.config) - saved
    plans = [dense_figures(run.model, Setting.of(run.config)) for run in (free, frozen)]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].states - plans[1].states == saved
    tables = [resolved(*SIZES, *more) for more in ([], ["optim.freeze=[tables.*]"])]
    states = [optimizer_state_bytes(run.model, run.config) for run in tables]
    assert states[0] - states[1] == 2 * 4 * 16 * 16 * 16


REFUSED = {
    "a typo": (
        ["embeding*"],
        r"'embeding\*' matches no parameter; patterns are of whole names, .* Did you mean 'embedding'",
    ),
    "a number": (["h.0.*"], r"'h\.0\.\*' matches no parameter; .*\.weight, beside the word trunk\.$"),
    "the word": (["Trunk"], r"'Trunk' matches no parameter; .* beside the word trunk\. Did you mean 'trunk'\?$"),
    "no variant": (["trunk", "*"], r"^optim\.freeze=\[trunk\] leaves nothing to train, since no layer has an FFN vari"),
    "one of two": (["embedding*", "block.*"], r"'block\.\*' matches no parameter.* Did you mean 'blocks"),
    "all": (["*"], r"optim\.freeze=\[\*\] freezes all \d+ parameters, so that nothing is trained; remove a pattern"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_pattern_of_nothing_or_of_everything_is_refused(what: str) -> None:
    patterns, reason = REFUSED[what]
    with pytest.raises(ConfigError, match=reason):
        freeze_parameters(resolved(*SIZES).model, patterns)


def test_an_engine_needs_something_to_train() -> None:
    but_tables = "optim.freeze=[embedding*,unembedding*,blocks.*,norm*]"
    resolved(*SIZES, but_tables, "strategy=ddp", training=True)
    with pytest.raises(
        ConfigError, match=r"^optim\.freeze=\[trunk\] fails with ZeRO stage 3, .*set strategy=deepspeed_2"
    ):
        resolved(*SIZES, "optim.freeze=[trunk]", "strategy=deepspeed_3", training=True)
    with pytest.raises(ConfigError, match=r"DeepSpeed: its engine trains .* leaves none of them; set strategy=ddp"):
        resolved(*SIZES, but_tables, "strategy=deepspeed_1", training=True)
