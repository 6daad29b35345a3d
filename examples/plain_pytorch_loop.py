"""A memory layer in a plain PyTorch loop: 4,096 arbitrary facts, of which each step updates the rows that it reads.

    python examples/plain_pytorch_loop.py        # seconds on a laptop's CPU

Letters: N facts of a batch, D model dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pkm_lightning import MemoryPlus, TableOptimizer, ValueTable, row_learning_tables

SUBJECTS, RELATIONS, ANSWERS, DIM, KEYS = 512, 8, 64, 32, 64


class Facts(nn.Module):
    """Answers a question about a subject: the sum of two embeddings, a memory layer, a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.subject, self.relation = nn.Embedding(SUBJECTS, DIM), nn.Embedding(RELATIONS, DIM)
        # Given, and not made by the layer, since a layer's own table learns densely.
        table = ValueTable(rows=KEYS**2, dim=DIM, learning="rows")
        self.memory = MemoryPlus(dim=DIM, n_keys=KEYS, heads=2, knn=8, table=table)
        self.out = nn.Linear(DIM, ANSWERS)

    def forward(self, facts_N: Tensor) -> Tensor:
        """Returns logits, (N, ANSWERS)."""
        x_ND = self.subject(facts_N // RELATIONS) + self.relation(facts_N % RELATIONS)
        logits: Tensor = self.out(x_ND + self.memory(x_ND).y_BTD)
        return logits


def train(steps: int = 500) -> tuple[Facts, float]:
    """Trains on random answers; returns the model and the share of the facts that it knows."""
    torch.manual_seed(0)
    answers_N = torch.randint(ANSWERS, (SUBJECTS * RELATIONS,))
    model = Facts()
    # The table requires no gradient: its rows learn by the other optimizer.
    dense = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    optimizer = TableOptimizer(dense, row_learning_tables(model), rows="lazy_adam", lr=1e-2)
    for _ in range(steps):
        facts_N = torch.randint(len(answers_N), (512,))
        nn.functional.cross_entropy(model(facts_N), answers_N[facts_N]).backward()
        optimizer.step()
        optimizer.zero_grad()  # of this optimizer: the model's own would keep the staged reads
    with torch.no_grad():
        known = model(torch.arange(len(answers_N))).argmax(-1) == answers_N
    return model, known.float().mean().item()


if __name__ == "__main__":
    model, known = train()
    torch.save(model.state_dict(), "facts.pt")  # rows included: memory.values.reference.table.weight
    print(f"{known:.1%} of the facts are known")
