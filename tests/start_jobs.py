"""A job that every rank of a group runs: it starts from the weights of a checkpoint, and saves them."""

from __future__ import annotations

from distributed_jobs import fit, settings

from pkm_lightning.cli.initial_weights import InitialWeights


def start_and_save(overrides: list[str], source: str, path: str) -> None:
    """Makes one step with the rate 0 from the weights of `source`."""
    still = ["optim.lr=0", "optim.warmup_share=0", "seed=5"]
    _, trainer, _ = fit(settings(*overrides, *still, steps=1), 1, watching=[InitialWeights(source, trust=False)])
    trainer.save_checkpoint(path)
