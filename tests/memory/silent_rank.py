"""Two ranks of which one reads nothing: `python silent_rank.py RANK PORT`; prints the table after one step."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable, clip_tables

if __name__ == "__main__":
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
    torch.manual_seed(1)
    table = ValueTable(rows=4, dim=3, learning="rows").bfloat16()
    before_ND = table.weight.clone()
    dense = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = TableOptimizer(dense, {"table": table}, rows=RowOptimizer(rule="sgd"), lr=1.0)
    if rank == 0:
        table(torch.tensor([[1, 3]]), torch.ones(1, 2)).sum().backward()
    clip_tables([table], [], None)
    optimizer.step()
    print((before_ND - table.weight).float().tolist())
    dist.destroy_process_group()
