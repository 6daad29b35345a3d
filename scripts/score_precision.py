"""What the precision of scores changes: errors against float64, and the sub-keys and slots that are chosen.

    python scripts/score_precision.py [--out FILE.csv]

Half queries and sub-keys are RMS-normalised normals, as at the start of Memory+. TF32 is emulated on the CPU
(`benchmarks/tf32.py`), so this shows the numbers, not the speed, and the order of sums is not that of a GPU. `error` is
the largest |score - exact| over the sum of |products|, `sub-keys` and `slots` are shares of those chosen that float64
does not choose.

Letters: F dimension of a half key.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.tf32 import PRECISIONS, matmul
from torch import Tensor
from torch.nn import functional

from pkm_lightning.ops import product_combine, ranked_topk

COLUMNS = ("precision", "F", "n_keys", "knn", "queries", "error", "mean_error", "sub-keys", "slots")


def exchanged(ids_TK: Tensor, exact_TK: Tensor) -> float:
    """Returns the share of ids that are not among the exact ones of their row."""
    is_exact_TK = (ids_TK.unsqueeze(-1) == exact_TK.unsqueeze(-2)).any(-1)
    return 1 - is_exact_TK.double().mean().item()


def chosen(scores_2TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the best sub-keys of both halves, (2 T, K), and the best slots, (T, K)."""
    keys_2TK = ranked_topk(scores_2TS.flatten(0, 1), k).view(2, -1, k)
    values_2TK = scores_2TS.gather(-1, keys_2TK.long())
    halves = values_2TK[0], keys_2TK[0].int(), values_2TK[1], keys_2TK[1].int()
    _, slots_TK = product_combine(*halves, scores_2TS.shape[-1], k, backend="eager")
    return keys_2TK.flatten(0, 1), slots_TK


def lines(dim: int, n_keys: int, k: int, queries: int) -> list[dict[str, object]]:
    """Compares all precisions on the same queries and sub-keys."""
    q_2TF = functional.rms_norm(torch.randn(2, queries, dim), (dim,))
    keys_2FS = functional.rms_norm(torch.randn(2, n_keys, dim), (dim,)).mT * dim**-0.5
    exact_2TS = q_2TF.double() @ keys_2FS.double()
    size_2TS = q_2TF.double().abs() @ keys_2FS.double().abs()
    exact = chosen(exact_2TS, k)
    results = []
    for precision in PRECISIONS:
        scores_2TS = matmul(q_2TF, keys_2FS, precision)
        error_2TS = (scores_2TS - exact_2TS).abs() / size_2TS
        shares = [exchanged(ids, expected) for ids, expected in zip(chosen(scores_2TS, k), exact, strict=True)]
        errors = f"{error_2TS.amax().item():.1e}", f"{error_2TS.mean().item():.1e}"
        numbers = (precision, dim, n_keys, k, queries, *errors, *(f"{share:.1e}" for share in shares))
        results.append(dict(zip(COLUMNS, numbers, strict=True)))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the comparison, or writes it to `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--queries", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    results = [
        line
        for dim, n_keys in ((64, 256), (128, 1024), (256, 1024))
        for line in lines(dim, n_keys, 32, options.queries)
    ]
    with options.out.open("w", newline="") if options.out else contextlib.nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)


if __name__ == "__main__":
    main()
