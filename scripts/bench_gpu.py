"""R1 to R8 on a GPU, the most important row first, in at most eight minutes.

    python scripts/bench_gpu.py [--seconds 450] [--only R5] [--out]

The rows are those of `bench_ops.py`, `bench_train.py`, `bench_decode.py` and `bench_token_tables.py`, which check every
way before they time it: first one size of each, then the next sizes. Every row is printed as soon as it is measured.
After `--seconds` nothing more begins, and what was not run is named. A row that fails is printed, and the others go on;
a row that ends its process, or leaves the GPU in an error, does not end the benchmark: another process goes on after
it. The exit code is 1 if a row, or a way of this package, has failed. Needs torch and triton only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.supervision import supervise

#: Beside these the last row that has begun may take some seconds; after 8 minutes at the latest it is stopped.
SECONDS, GRACE = 450.0, 25.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures in another process; returns the exit code."""
    # The options of all benchmarks are parsed there, since this process does not import torch.
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0], add_help=False)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if options.records is not None or {"-h", "--help"} & set(rest):
        from benchmarks.important_rows import measure_rows

        return measure_rows(__doc__, options.records, options.seconds, rest)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *rest]
        return supervise(command, Path(folder) / "records.jsonl", options.seconds, GRACE)


if __name__ == "__main__":
    sys.exit(main())
