"""A step over a table of 1 GiB holds the table, the rows' states and little else: no temporary of the table's size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tree import ROOT

ROWS, DIM, READS, PER_READ = 2**20, 256, 1024, 128
MIB = 2**20

STEP = """
import json, resource, sys
import torch
from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable, clip_tables
rule, rows, dim, reads, per_read = sys.argv[1], *map(int, sys.argv[2:])

def step(table, optimizer):
    ids = torch.randint(len(table.weight), (reads, per_read))
    weights = torch.rand(reads, per_read, requires_grad=True)
    optimizer.zero_grad()
    for _ in range(2):
        table(ids, weights).square().sum().backward()
    clip_tables([table], [], 1.0)
    optimizer.step()

def made(n):
    with torch.device("meta"):
        table = ValueTable(rows=n, dim=dim, learning="rows")
    table.to_empty(device="cpu").weight.data.fill_(0.01)
    dense = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return table, TableOptimizer(dense, {"table": table}, rows=RowOptimizer(rule=rule), lr=0.1)

step(*made(1000))  # libraries and kernels are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table, optimizer = made(rows)
for _ in range(3):
    step(table, optimizer)
states = sum(v.nbytes for v in optimizer.state[table.weight].values() if torch.is_tensor(v))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"beyond": (peak - before) * 1024 - table.weight.nbytes, "states": states}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["row_adagrad", "lazy_adam", "sgd"])
def test_a_step_stays_under_table_and_states_and_300_mib(rule: str) -> None:
    sizes = [str(size) for size in (ROWS, DIM, READS, PER_READ)]
    done = subprocess.run(
        [sys.executable, "-c", STEP, rule, *sizes], capture_output=True, text=True, cwd=ROOT, check=True, timeout=300
    )
    found = json.loads(done.stdout)
    assert found["beyond"] < found["states"] + 300 * MIB
