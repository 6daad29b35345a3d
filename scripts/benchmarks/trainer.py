"""Time per token of a whole model in Lightning's Trainer, with and without memory layers, on the default data.

Needs Lightning and Hydra; without them the case is skipped.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import time
from typing import Any

import torch

from benchmarks.case import Case, Run, Skipped, Way

ONE_LAYER = ["placement=middle", "match=flops"]
# Beside the FFN of one layer, which becomes narrower where FLOPs are matched.
ENGRAM = ["ffn=engram", "placement.layers=[1]"]


def trainer_case(dim: int | None, smoke: bool, device: torch.device, cpu_time: bool) -> Case | Skipped:
    """Builds the case.

    Args:
        dim: model dimension of a model of 4 layers with a memory in one of them, at the FLOPs of the dense model; None
            for the default model of `fit`, with a memory in one and in all layers.
        smoke: tiny sizes.
        device: where it trains.
        cpu_time: measure CPU time instead of the time that passes.
    """
    try:
        import hydra  # noqa: F401
        import lightning  # noqa: F401
    except ImportError as error:
        return Skipped(f"needs lightning and hydra: {error}")
    steps = 4 if smoke else 30 if dim is None else 5
    if dim is None:
        ways = {"dense": ["ffn=dense"], "memory_plus, 1 layer": ["placement=middle"], "memory_plus, all layers": []}
        ways |= {"engram, 1 layer": ENGRAM, "engram, 1 layer, equal FLOPs": [*ENGRAM, "match=flops"]}
    else:
        wide = [f"model.dim={dim}", "model.n_layers=4", "model.n_heads=8", "model.n_kv_heads=8"]
        wide += [f"model.ffn_dim={8 * dim // 3 // 8 * 8}", "model.memory.key_dim=64"]
        ways = {"dense": [*wide, "ffn=dense"], "memory_plus, 1 layer, equal FLOPs": [*wide, *ONE_LAYER]}
        ways["engram, 1 layer, equal FLOPs"] = [*wide, *ENGRAM, "match=flops"]
    if smoke:
        small = ["data.people=40", "data.cities=20", "data.countries=10", "data.global_batch_size=2", "model.dim=16"]
        ways = {name: [*overrides, *small, "model.memory.n_keys=8"] for name, overrides in ways.items()}
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    common = [f"trainer.max_steps={steps}", f"trainer.accelerator={accelerator}"]
    configs = {name: _configuration([*overrides, *common]) for name, overrides in ways.items()}
    data = configs["dense"]["data"]
    return Case(
        sizes=f"{'default model' if dim is None else f'D={dim}'}, facts, {data['global_batch_size']} rows of "
        f"{data['seq_len']} tokens, {steps} steps",
        ways=[Way(name, functools.partial(_fit, config, cpu_time)) for name, config in configs.items()],
        error=lambda run: 0.0 if run() > 0 else float("inf"),  # tests check what the models compute
        tolerance=0.0,
        baselines=["dense"],
        tokens=data["global_batch_size"] * data["seq_len"],
        clock=lambda run: run(),
        memory=False,
    )


def _configuration(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        config = compose("config", overrides=[*overrides, "+trainer.limit_val_batches=0", "run_dir=unused"])
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return {**plain, "callbacks": {}, "logger": {}}


def _fit(config: dict[str, Any], cpu_time: bool) -> Run:
    """Returns a function that trains and returns seconds per step, from the end of the second step to the last."""
    import lightning as L

    from pkm_lightning.build.run import resolve
    from pkm_lightning.cli.assembly import make_trainer
    from pkm_lightning.training import LanguageModule

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *_: object) -> None:
            # Kernels are asynchronous: without this the clock would stop before the step has ended.
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.process_time() if cpu_time else time.perf_counter())

    resolved = resolve(config)
    resolved.data.prepare_data()
    resolved.data.setup("fit")

    def run() -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as run_dir:
            trainer = make_trainer({**resolved.config, "run_dir": run_dir}, callbacks=[clock], loggers=[])
            trainer.fit(LanguageModule(resolved.config), datamodule=resolved.data)
        return (clock.ends[-1] - clock.ends[1]) / (len(clock.ends) - 2)

    return run
