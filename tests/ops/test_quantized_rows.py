"""Every backend that reads quantised rows against the definition, and the codes against the best that there are.

Letters: C bytes of codes per row, Q scales per row, G groups per token, X = T * G, L = T * K reads.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import assert_close
from torch import Tensor, library
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ops import QuantizedRows, dequantize_rows, quantize_rows, quantized_dot, quantized_gather

# Rows, values per row, tokens, reads per token, groups (None: no groups): odd sizes, rows shorter than a scale and than
# a byte, several blocks of columns, one group, more groups than reads per token.
SIZES = [(8, 257, 3, 9, None), (31, 100, 2, 6, 3), (5, 33, 4, 5, None), (9, 1, 1, 1, 1), (5, 600, 2, 3, 4)]
Sizes = tuple[int, int, int, int, int | None]
# Every backend takes two sizes in all widths, and each of the other sizes in one width.
CASES = [
    *itertools.product(SIZES[:2], (8, 4, 2), BACKENDS),
    *((sizes, (2, 4, 8)[i], backend) for i, sizes in enumerate(SIZES[2:]) for backend in BACKENDS),
]


def value(rows: QuantizedRows, n: int, v: int) -> float:
    """Reads one value by the definition of the format."""
    plane, byte = divmod(v, rows.codes_NC.shape[1])
    code = (int(rows.codes_NC[n, byte]) >> (rows.bits * plane)) % 2**rows.bits
    return float(rows.scales_NQ[n, v // 32]) * (code - (2**rows.bits - 1) / 2)


def table(n: int, dim: int, bits: int, device: str = "cpu") -> QuantizedRows:
    """Quantises rows of about the norm 1, with an outlier in each."""
    rows_NV = torch.randn(n, dim) / dim**0.5
    rows_NV[:, dim // 2] *= 5
    codes_NC, scales_NQ, *rest = quantize_rows(rows_NV, bits)
    return QuantizedRows(codes_NC.to(device), scales_NQ.to(device), *rest)


def on_cpu(rows: QuantizedRows) -> Tensor:
    return dequantize_rows(rows._replace(codes_NC=rows.codes_NC.cpu(), scales_NQ=rows.scales_NQ.cpu())).double()


@pytest.mark.parametrize(("sizes", "bits", "backend"), CASES)
def test_reads_equal_the_definition(sizes: Sizes, bits: int, backend: str) -> None:
    n, dim, t, k, g = sizes
    device = device_of(backend)
    rows, ids_TK = table(n, dim, bits, device), torch.randint(n, (t, k), dtype=torch.int32)
    weights_TK, x_TV = torch.randn(t, k) / k, torch.randn(t, dim)
    groups_TK = None if g is None else torch.randint(g, (t, k), dtype=torch.int32)
    values_TKV = on_cpu(rows)[ids_TK.long()]
    token_TK = torch.arange(t).unsqueeze(-1).expand(t, k)
    x_TK = token_TK if groups_TK is None else token_TK * (g or 1) + groups_TK
    belongs_XL = torch.arange(t * (g or 1)).unsqueeze(-1) == x_TK.flatten()
    expected_XV = belongs_XL.double() @ (values_TKV * weights_TK.double().unsqueeze(-1)).flatten(0, 1)
    for dtype in (torch.float32, torch.bfloat16):
        grouping = {} if groups_TK is None else {"groups_TK": groups_TK.to(device), "n_groups": g}
        weights = weights_TK.to(device, dtype)
        y_X = quantized_gather(rows, ids_TK.to(device), weights, **grouping, backend=backend)
        assert y_X.dtype is dtype
        assert_close(y_X.cpu(), expected_XV.view(y_X.shape) if g is None else expected_XV.view(t, g, dim))
        a_TK = quantized_dot(rows, x_TV.to(device, dtype), ids_TK.to(device), backend=backend)
        assert a_TK.dtype is dtype
        assert_close(a_TK.cpu(), (values_TKV * x_TV.to(dtype).double().unsqueeze(1)).sum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_int64_ids_strided_inputs_and_a_second_run_give_the_same_bits(backend: str) -> None:
    device = device_of(backend)
    rows, ids_TK, weights_TK, x_TV = (
        table(11, 70, 4, device),
        torch.randint(11, (5, 3)),
        torch.rand(5, 3),
        torch.rand(5, 70),
    )
    ids_TK, weights_TK, x_TV = (part.to(device) for part in (ids_TK.int(), weights_TK, x_TV))
    strided = [part.T.contiguous().T for part in (ids_TK.long(), weights_TK, x_TV)]
    transposed = rows._replace(codes_NC=rows.codes_NC.T.contiguous().T, scales_NQ=rows.scales_NQ.T.contiguous().T)
    y_TV, a_TK = (
        quantized_gather(rows, ids_TK, weights_TK, backend=backend),
        quantized_dot(rows, x_TV, ids_TK, backend=backend),
    )
    assert torch.equal(y_TV, quantized_gather(transposed, *strided[:2], backend=backend))
    assert torch.equal(a_TK, quantized_dot(transposed, strided[2], strided[0], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_reads_give_no_rows(backend: str) -> None:
    rows = table(4, 5, 4, device_of(backend))
    ids_TK, weights_TK = (part.to(device_of(backend)) for part in (torch.zeros(0, 2).int(), torch.zeros(0, 2)))
    assert quantized_gather(rows, ids_TK, weights_TK, groups_TK=ids_TK, n_groups=3, backend=backend).shape == (0, 3, 5)
    assert quantized_dot(rows, weights_TK.new_zeros(0, 5), ids_TK, backend=backend).shape == (0, 2)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_values_follow_the_format(bits: int) -> None:
    rows = table(3, 71, bits)
    assert rows.codes_NC.shape == (3, -(-71 * bits // 8))
    assert rows.scales_NQ.shape == (3, 3)
    values_NV = torch.tensor([[value(rows, n, v) for v in range(71)] for n in range(3)])
    assert torch.equal(dequantize_rows(rows), values_NV)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.006), (4, 0.088), (2, 0.35)])
def test_errors_are_small_and_codes_the_nearest(bits: int, bound: float) -> None:
    rows_NV = torch.randn(200, 144)
    rows = quantize_rows(rows_NV, bits)
    assert float((dequantize_rows(rows) - rows_NV).norm() / rows_NV.norm()) < bound
    scales_NV = rows.scales_NQ.float().repeat_interleave(32, 1)[:, :144]
    levels = torch.arange(2**bits) - (2**bits - 1) / 2
    nearest_NV = ((levels * scales_NV.unsqueeze(-1)) - rows_NV.unsqueeze(-1)).abs().amin(-1)
    assert_close((dequantize_rows(rows) - rows_NV).abs(), nearest_NV)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_scale_of_one_value_meets_it(bits: int) -> None:
    rows_NV = torch.randn(20, 33)
    assert_close(dequantize_rows(quantize_rows(rows_NV, bits))[:, 32].bfloat16(), rows_NV[:, 32].bfloat16())


def test_an_outlier_spoils_the_values_of_its_scale_only() -> None:
    rows_NV = torch.randn(1, 96)
    spoilt_NV = rows_NV.clone()
    spoilt_NV[0, 40] = 1e3
    clean, spoilt = (dequantize_rows(quantize_rows(rows, 2)) for rows in (rows_NV, spoilt_NV))
    assert torch.equal(clean[:, :32], spoilt[:, :32])
    assert torch.equal(clean[:, 64:], spoilt[:, 64:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_extremes_are_exact_enough_in_every_dtype(dtype: torch.dtype) -> None:
    rows_NV = torch.zeros(4, 40, dtype=dtype)
    rows_NV[1, 3], rows_NV[2] = torch.finfo(dtype).tiny, 60000
    restored_NV = dequantize_rows(quantize_rows(rows_NV, 4))
    assert not restored_NV[0].any()
    assert not restored_NV[3].any()
    assert restored_NV.isfinite().all()
    assert_close(restored_NV[2].bfloat16(), rows_NV[2].bfloat16())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_the_same_at_every_magnitude(bits: int) -> None:
    rows_NV = torch.randn(20, 40).clamp(-3, 3)
    codes_NC = quantize_rows(rows_NV, bits).codes_NC
    for exponent in (-110, -70, 66, 126):  # squares of float32 vanish below -75 and overflow above 64
        assert torch.equal(quantize_rows(rows_NV * 2.0**exponent, bits).codes_NC, codes_NC)
    largest_NV = torch.full((1, 40), torch.finfo(torch.float32).max)
    assert (dequantize_rows(quantize_rows(largest_NV, bits)) / largest_NV - 1).abs().max() < 0.01


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_NV = torch.randn(11, 40)
    whole = quantize_rows(rows_NV, 2)
    monkeypatch.setattr("pkm_lightning.ops.quantized_rows.format._CHUNK_VALUES", 100)
    parts = quantize_rows(rows_NV, 2)
    assert torch.equal(whole.codes_NC, parts.codes_NC)
    assert torch.equal(whole.scales_NQ, parts.scales_NQ)
    assert quantize_rows(rows_NV[:0], 2).codes_NC.shape == (0, 10)


def test_eager_reads_in_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ids_TK, weights_TK, x_TV = table(9, 40, 4), torch.randint(9, (7, 3)), torch.rand(7, 3), torch.rand(7, 40)
    whole = (
        quantized_gather(rows, ids_TK, weights_TK, backend="eager"),
        quantized_dot(rows, x_TV, ids_TK, backend="eager"),
    )
    monkeypatch.setattr("pkm_lightning.ops.quantized_rows.eager._CHUNK_VALUES", 2 * 3 * 40)
    assert_close(quantized_gather(rows, ids_TK, weights_TK, backend="eager"), whole[0])
    assert_close(quantized_dot(rows, x_TV, ids_TK, backend="eager"), whole[1])


def test_the_operators_are_registered_count_flops_and_run_on_meta() -> None:
    rows, ids_TK, weights_TK, x_TV = table(9, 40, 4), torch.randint(9, (7, 3)), torch.rand(7, 3), torch.rand(7, 40)
    for test in ("test_schema", "test_faketensor"):
        library.opcheck(
            torch.ops.pkm_lightning.quantized_gather.default,
            (*rows, ids_TK, weights_TK, ids_TK, 9, "eager"),
            test_utils=test,
        )
        library.opcheck(torch.ops.pkm_lightning.quantized_dot.default, (*rows, x_TV, ids_TK, "eager"), test_utils=test)
    with FlopCounterMode(display=False) as counter:
        quantized_gather(rows, ids_TK, weights_TK)
        quantized_dot(rows, x_TV, ids_TK)
    assert counter.get_total_flops() == 2 * 2 * 7 * 3 * 40
    meta = rows._replace(codes_NC=rows.codes_NC.to("meta"), scales_NQ=rows.scales_NQ.to("meta"))
    assert quantized_gather(meta, ids_TK.to("meta"), weights_TK.to("meta")).shape == (7, 40)


def test_a_gradient_is_refused() -> None:
    rows, ids_TK, weights_TK = table(9, 40, 4), torch.randint(9, (7, 3)), torch.rand(7, 3, requires_grad=True)
    y_TV = quantized_gather(rows, ids_TK, weights_TK)
    with pytest.raises(
        RuntimeError, match="quantised rows are read only and pass no gradient on; train with the table"
    ):
        y_TV.sum().backward()


def test_refuses_what_does_not_fit() -> None:
    rows, ids_TK, weights_TK = table(4, 40, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"quantize_rows: bits=3; allowed: 8, 4, 2\."):
        quantize_rows(torch.zeros(2, 3), 3)
    with pytest.raises(ValueError, match="quantize_rows: a value is not finite"):
        quantize_rows(torch.tensor([[1.0, torch.nan]]), 8)
    with pytest.raises(ValueError, match=r"quantized_gather: bits=5; allowed: 8, 4, 2\."):
        quantized_gather(rows._replace(bits=5), ids_TK, weights_TK)
    with pytest.raises(
        ValueError, match=r"rows of 41 values of 4 bits have codes and scales of \(4, 21\) and \(4, 2\)"
    ):
        quantized_gather(rows._replace(dim=41), ids_TK, weights_TK)
    with pytest.raises(ValueError, match=r"quantized_gather: needs ids \(T, K\) and weights of \(2, 3\), got"):
        quantized_gather(rows, ids_TK, weights_TK.T)
    with pytest.raises(ValueError, match=r"quantized_dot: needs ids \(T, K\) and x of \(2, 40\), got"):
        quantized_dot(rows, torch.zeros(2, 41), ids_TK)
    with pytest.raises(ValueError, match=r"scales of torch.bfloat16, .* got torch.uint8, torch.float32"):
        quantized_gather(rows._replace(scales_NQ=rows.scales_NQ.float()), ids_TK, weights_TK)
    with pytest.raises(ValueError, match="codes are on cpu, scales on cpu, ids on meta, weights on cpu"):
        quantized_gather(rows, ids_TK.to("meta"), weights_TK)
    with pytest.raises(ValueError, match=r"needs integer groups of the shape \(2, 3\) of ids together with n_groups"):
        quantized_gather(rows, ids_TK, weights_TK, n_groups=2)
    with pytest.raises(ValueError, match=r"quantized_gather: ids has 4; allowed: 0 to 3\."):
        quantized_gather(rows, ids_TK + 4, weights_TK)
    with pytest.raises(ValueError, match=r"quantized_gather: groups has 2; allowed: 0 to 1\."):
        quantized_gather(rows, ids_TK, weights_TK, groups_TK=ids_TK + 2, n_groups=2)
    with pytest.raises(ValueError, match=r"quantized_dot: ids has -1; allowed: 0 to 3\."):
        quantized_dot(rows, torch.zeros(2, 40), ids_TK - 1)
