"""A table of codes: read as the table of the values that they stand for, wherever it lies; never cast, never trained.

Letters: N rows, V values per row, T reads, K rows per read.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.memory import QuantizedTable, ValueTable
from pkm_lightning.ops import QuantizedRows, dequantize_rows, quantize_rows

N, V, T, K = 50, 70, 7, 3


def rows(bits: int, lines: int = N, width: int = V) -> QuantizedRows:
    return quantize_rows(torch.randn(lines, width) / width**0.5, bits)


def filled(quantized: QuantizedRows, **options: object) -> QuantizedTable:
    table = QuantizedTable(rows=N, dim=V, bits=quantized.bits, **options)
    table.load_state_dict({"codes": quantized.codes_NC, "scales": quantized.scales_NQ})
    return table


def expanded(quantized: QuantizedRows, **options: object) -> ValueTable:
    table = ValueTable(rows=N, dim=V, trainable=False, **options)
    table.load_state_dict({"weight": dequantize_rows(quantized)})
    return table


def in_file(tensor: Tensor, path: Path) -> Tensor:
    path.write_bytes(tensor.view(torch.uint8).numpy().tobytes())
    path.chmod(0o400)
    return MappedFile(path).tensor(0, tensor.dtype, tensor.shape)


def assert_same_reads(table: ValueTable, expected: ValueTable) -> None:
    ids_TK, weights_TK = torch.randint(0, table.n_lines, (T, K)), torch.randn(T, K) / K
    groups_TK, x_TV = torch.randint(0, 2, (T, K)), torch.randn(T, V // table.slices)
    assert_close(table(ids_TK, weights_TK), expected(ids_TK, weights_TK))
    assert_close(table.start(ids_TK, weights_TK, groups_TK, 2)(), expected(ids_TK, weights_TK, groups_TK, 2))
    assert_close(table.dot(x_TV, ids_TK), expected.dot(x_TV, ids_TK))
    assert torch.equal(table.gather(ids_TK), expected.gather(ids_TK).float())
    assert table(ids_TK, weights_TK.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("device", ["auto", "cpu", "mmap"])
def test_reads_are_those_of_the_values_wherever_the_codes_lie(bits: int, device: str, tmp_path: Path) -> None:
    quantized = rows(bits)
    stored = quantized
    if device == "mmap":
        codes, scales = (
            in_file(quantized.codes_NC, tmp_path / "codes"),
            in_file(quantized.scales_NQ, tmp_path / "scales"),
        )
        stored = quantized._replace(codes_NC=codes, scales_NQ=scales)
        assert QuantizedTable(rows=N, dim=V, bits=bits, device=device).codes.is_meta
    table = filled(stored, device=device)
    nn.Sequential(table).to("cpu").to(torch.bfloat16).double().eval()
    assert (table.codes.dtype, table.scales.dtype) == (torch.uint8, torch.bfloat16)
    if device == "mmap":
        assert table.codes.data_ptr() == stored.codes_NC.data_ptr()
        assert table.scales.data_ptr() == stored.scales_NQ.data_ptr()
    assert_same_reads(table, expanded(quantized))


def test_slices_are_lines_with_scales_of_their_own() -> None:
    quantized = rows(4, 2 * N, V // 2)
    table = filled(quantized, slices=2)
    assert table.codes.shape == (2 * N, 18)
    assert_same_reads(table, expanded(quantized, slices=2))


def test_it_moves_with_the_model_unless_it_stays_in_host_memory() -> None:
    for device, expected in (("auto", "meta"), ("cpu", "cpu")):
        table = nn.Sequential(filled(rows(4), device=device)).to("meta")[0]
        assert {part.device.type for part in table.state_dict().values()} == {expected}
    with torch.device("meta"):
        shapes = nn.Sequential(QuantizedTable(rows=N, dim=V, bits=4)).double()
    assert [part.dtype for part in shapes.state_dict().values()] == [torch.uint8, torch.bfloat16]


def test_it_has_nothing_to_train_and_states_its_size() -> None:
    table = filled(rows(2))
    assert not list(table.parameters())
    assert list(table.state_dict()) == ["codes", "scales"]
    assert not table.learns
    assert table.stage is None
    table.reset_parameters()
    assert table.codes.any()
    assert table.bytes_of(table.size) == table.codes.nbytes + table.scales.nbytes == N * (18 + 6)
    assert repr(table) == f"QuantizedTable(rows={N}, dim={V}, bits=2)"
    for weight in (ValueTable(rows=N, dim=V), ValueTable(rows=N, dim=V, learning="rows")):
        assert weight.learns
        assert weight.bytes_of(weight.size) == weight.weight.nbytes


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"table\.bits=3; allowed: 8, 4, 2\."):
        QuantizedTable(rows=N, dim=V, bits=3)
    with pytest.raises(ConfigError, match="slices=3 does not divide the 70 values of a row"):
        QuantizedTable(rows=N, dim=V, bits=4, slices=3)
    quantized = rows(4)
    with pytest.raises(
        CheckpointError, match=r"codes is torch\.float32, but must be torch\.uint8; export the run again"
    ):
        filled(quantized._replace(codes_NC=quantized.codes_NC.float()))
