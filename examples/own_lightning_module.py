"""A memory layer in a LightningModule of your own: a small model of text that reads this file, byte by byte.

    python examples/own_lightning_module.py      # seconds on a laptop's CPU

Letters: B sequences, T bytes, W byte values.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pkm_lightning import MemoryPlus, TableOptimizer, ValueTable, row_learning_tables


class ByteModel(L.LightningModule):
    """A recurrent network whose states pass through a memory layer.

    Args:
        dim: width of the network.
        n_keys: sub-keys per half; the table has n_keys**2 rows.
    """

    def __init__(self, dim: int = 64, n_keys: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding, self.recurrent = nn.Embedding(256, dim), nn.GRU(dim, dim, batch_first=True)
        self.memory = MemoryPlus(dim=dim, n_keys=n_keys, table=ValueTable(rows=n_keys**2, dim=dim, learning="rows"))
        self.out = nn.Linear(dim, 256)

    def training_step(self, bytes_BT: Tensor) -> Tensor:
        """Returns the loss of each byte after the first, in nats."""
        x_BTD, _ = self.recurrent(self.embedding(bytes_BT[:, :-1]))
        logits_BTW = self.out(x_BTD + self.memory(x_BTD).y_BTD)
        loss = nn.functional.cross_entropy(logits_BTW.flatten(0, 1), bytes_BT[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> TableOptimizer:
        """Returns one optimizer: schedulers and checkpoints see the table as its last group."""
        dense = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)
        return TableOptimizer(dense, row_learning_tables(self), lr=1e-2)


def train(steps: int = 300) -> L.Trainer:
    """Trains on random pieces of this file and returns the Trainer."""
    L.seed_everything(0, verbose=False)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    pieces = text.unfold(0, 65, 1).long()
    loader = DataLoader(pieces, batch_size=16, shuffle=True)  # type: ignore[arg-type]
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(ByteModel(), loader)
    return trainer


if __name__ == "__main__":
    trainer = train()
    trainer.save_checkpoint("bytes.ckpt")  # rows and their optimizer included
    ByteModel.load_from_checkpoint("bytes.ckpt")
    print(f"loss {trainer.callback_metrics['train/loss']:.2f} nats per byte")
