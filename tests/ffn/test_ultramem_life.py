"""UltraMem in a model: initialisation, the meta device, deferred outputs, the configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from toys import DIM, config, dense, token_ids, transformer

from pkm_lightning.build.model import build_meta_model, build_model
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, FFNOutput, UltraMem
from pkm_lightning.memory import ValueTable
from pkm_lightning.model.placement import Placement
from pkm_lightning.model.plugin_outputs import ParallelFFN

SIZES: dict[str, Any] = {
    "dim": DIM,
    "n_layers": 2,
    "n_keys": 8,
    "heads": 2,
    "knn": 3,
    "key_dim": 12,
    "value_dim": 10,
    "rank": 2,
    "cores": 2,
    "expansion": 4,
    "spectrum_loss": 0.001,
    "spectrum_margin": 0.15,
}


def build(**changes: Any) -> tuple[UltraMem, ValueTable]:
    arguments = {**SIZES, **changes}
    spec = UltraMem.table_spec(**arguments)
    table = ValueTable(rows=spec.rows, dim=spec.dim, std=spec.std, slices=spec.slices)
    return UltraMem(table=table, **arguments), table


def context(x_BTD: Tensor) -> FFNContext:
    return FFNContext(torch.empty(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device))


def parallel_to_dense() -> tuple[list[nn.Module], list[ValueTable]]:
    """Returns a dense layer in parallel with a deferred UltraMem, then a dense layer, and the table."""
    layer, table = build()
    return [ParallelFFN(dense(2), layer, defer=True), dense(2)], [table]


@pytest.mark.parametrize(
    "changes",
    [
        {"n_keys": 64, "knn": 8},
        {"n_keys": 64, "knn": 16, "heads": 1, "rank": 1, "cores": 1, "expansion": 1, "n_layers": 5, "value_dim": 41},
        {"n_keys": 90, "knn": 32, "heads": 4, "rank": 3, "cores": 3, "expansion": 2, "value_dim": 30},
    ],
)
def test_the_variance_of_a_fresh_output(changes: dict[str, Any]) -> None:
    """Compares with E[s**2] / (2 n_layers) with the measured moment, within 30% of the paper's 1 / (2 n_layers)."""
    layer, _ = build(dim=64, key_dim=64, **changes)
    x_BTD = torch.randn(4, 200, 64)
    n_layers = {**SIZES, **changes}["n_layers"]
    variance = 2 * n_layers * layer(x_BTD, context(x_BTD)).y_BTD.var().item()
    second_moment = layer.keys(x_BTD.flatten(0, 1)).scores_THCK.square().mean().item()
    assert variance == pytest.approx(second_moment, rel=0.1)
    assert variance == pytest.approx(1, rel=0.3)
    assert layer.out.weight.std().item() == pytest.approx(layer.out.in_features**-0.5, rel=0.05)


def test_a_model_built_on_meta_is_complete_after_materialisation() -> None:
    with torch.device("meta"):
        model = transformer(*parallel_to_dense(), write_after=1)
        x_BTD = torch.empty(2, 3, DIM)
        output = build()[0](x_BTD, context(x_BTD))
    assert output.y_BTD.shape == (2, 3, DIM)
    assert output.aux_losses["spectrum"].shape == ()
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(-1)
    model.init_weights(0)
    built = transformer(*parallel_to_dense(), write_after=1)
    for name, value in built.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.blocks[0].ffn.variant.shuffle.dtype is torch.int32


def test_its_output_is_written_where_the_placement_says() -> None:
    model = transformer(*parallel_to_dense(), write_after=1)
    outputs: dict[str, FFNOutput] = {}
    parallel = model.blocks[0].ffn
    parts = {"first": model.blocks[0], "second": model.blocks[1], "base": parallel.base, "variant": parallel.variant}
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: FFNOutput) -> None:
            inputs[name], outputs[name] = arguments[0], output

        parts[name].register_forward_hook(hook)

    for name in parts:
        keep(name)
    result = model(token_ids())
    deferred_BTD = outputs["variant"].y_BTD
    assert deferred_BTD.any()
    # The first block writes the base alone; the second reads that, and the memory is added after it.
    attended_BTD = outputs["first"].y_BTD - outputs["base"].y_BTD
    assert_close(model.blocks[0].ffn_norm(attended_BTD), inputs["base"])
    assert torch.equal(inputs["second"], outputs["first"].y_BTD)
    assert_close(result.hidden_BTD, model.norm(outputs["second"].y_BTD + deferred_BTD))
    assert set(result.aux_losses) == {"spectrum"}


def test_the_configuration_composes_with_its_placement_and_steps() -> None:
    composed = config("ffn=ultramem", "model.n_layers=5", "ffn.cores=4", "ffn.expansion=16")
    assert composed["placement"]["layers"] == "spread"
    assert composed["placement"]["mode"] == "parallel"
    assert composed["ffn"]["_step_"] == {"n_keys": 16}
    model = build_model(composed)
    assert [type(block.ffn).__name__ for block in model.blocks] == [*["ParallelFFN"], *["Dense"] * 4]
    assert (model.write_after, len(model.tables)) == (4, 1)
    assert (model.tables[0].rows, model.tables[0].dim) == (256**2 // 16, 32)
    # The spread of the rows is that of the whole model's depth.
    assert model.tables[0].weight.std().item() == pytest.approx((16 / (2 * 32 * 1 * 5)) ** 0.5, rel=0.02)
    assert build_meta_model(composed).blocks[0].ffn.variant.cost().table_params == 256**2 // 16 * 32


def test_layers_share_a_table_but_not_the_shuffle() -> None:
    composed = config(
        "ffn=ultramem", "table=default", "placement.layers=[0,1]", "placement.write_after=0", "model.memory.n_keys=16"
    )
    model = build_model(composed)
    first, second = (model.blocks[i].ffn.variant for i in (0, 1))
    assert first.reference.table is second.reference.table
    assert not torch.equal(first.shuffle, second.shuffle)


def test_replacing_the_ffn_is_a_matter_of_placement() -> None:
    with pytest.raises(ConfigError, match=r"placement.write_after=null leaves the reading layer without any FFN"):
        Placement(layers="spread", count=None, stride=None, mode="replace", write_after=None)
    model = build_model(config("ffn=ultramem", "placement=centred", "placement.layers=[1]"))
    assert isinstance(model.blocks[1].ffn, UltraMem)
