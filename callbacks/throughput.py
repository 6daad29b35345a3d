"""Training speed: tokens, FLOPs and bytes of table rows per second, and the share of the device's peak they are.

Figures cover all ranks, from log step to log step, without the time of validations and checkpoints.

| metric | meaning |
|---|---|
| train/throughput/tokens_per_sec | real input tokens |
| train/throughput/samples_per_sec | sequences; every rank is assumed to have as many as this one |
| train/throughput/steps_per_sec | optimizer steps |
| train/throughput/flops_per_sec | tokens times the analytic training FLOPs per token (`ModelCost.train_flops`) |
| train/throughput/mfu | the same as a share of the devices' peak; absent for unknown devices |
| train/throughput/row_bytes_per_sec | tokens times the bytes of embedding and table rows that each token moves |
| train/throughput/mbu | the same as a share of the devices' memory bandwidth; absent for unknown devices. A lower |
| | bound: weights, activations and optimizer states are moved too |

Plugins that state no cost (`unknown_cost` in run.json) are missing from FLOPs and bytes.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import Throughput as Rates
from lightning.fabric.utilities.throughput import _plugin_to_compute_dtype
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage

from pkm_lightning.callbacks.stopwatch import TimedCallback
from pkm_lightning.errors import check_integer
from pkm_lightning.training import LanguageModule

__all__ = ["Throughput"]

#: Bytes per second of a device's memory, from NVIDIA's data sheets, by the name that CUDA gives.
BANDWIDTH = {
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA H200": 4.8e12,
}
#: Dense FLOPs per second, from NVIDIA's data sheet, of devices whose CUDA name Lightning 2.6 does not know.
PEAK_FLOPS: dict[str, dict[torch.dtype | str, int]] = {
    "NVIDIA H200": {
        torch.float64: 33_500_000_000_000,
        torch.float32: 66_900_000_000_000,
        "tfloat32": 494_700_000_000_000,
        torch.bfloat16: 989_400_000_000_000,
        torch.float16: 989_400_000_000_000,
    },
}


class Throughput(TimedCallback, ThroughputMonitor):
    """Lightning's ThroughputMonitor, fed with this package's counts.

    The hooks of Lightning 2.6 wait for the device in every batch, measure evaluation too, ignore padding, and write to
    loggers only. Its table of peaks and its window of rates are used.

    Args:
        window: log steps over which a figure is averaged, 1 or more; the first figures come after that many.

    Attributes:
        figures: the latest figures, without their prefix; empty at first.

    Raises:
        ConfigError: a window below 1.
    """

    def __init__(self, *, window: int) -> None:
        check_integer("callbacks.throughput.window", window, 1)
        super().__init__(batch_size_fn=_sequences, window_size=window + 1)
        self.figures: dict[str, float] = {}
        self._tokens = self._steps = self._sequences = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks up the peak of the device."""
        super().setup(trainer, pl_module, stage)
        if self.available_flops is None:
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self.available_flops = peak_flops(trainer.strategy.root_device, dtype)
        # Tokens are counted over all ranks, so the peak is that of all devices together.
        peak = None if self.available_flops is None else self.available_flops * trainer.world_size
        self._throughputs = {RunningStage.TRAINING: Rates(available_flops=peak, **self.kwargs)}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count, in a resumed run too."""
        assert isinstance(pl_module, LanguageModule)
        self.figures, self._steps, self._sequences = {}, 0, 0
        self._throughputs[RunningStage.TRAINING].reset()
        super().on_train_start(trainer, pl_module)
        # The window begins here: tokens of the run that is resumed do not belong to it.
        self._update_rates(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Starts the clock again after a checkpoint; the time of loading this batch is lost then."""
        self._start_stopwatches()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Counts sequences and steps, which the host knows; reads the tokens and logs when a log is due."""
        assert isinstance(pl_module, LanguageModule)
        if batch is not None:  # the module refuses None, after the callbacks
            self._sequences += self.batch_size_fn(batch) * trainer.world_size
        if not trainer.fit_loop._should_accumulate():
            self._steps += 1
        if pl_module.log_is_due():
            self._update_rates(pl_module)
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self._pause(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stops the clock until the next batch."""
        self._pause(pl_module)

    def _pause(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        # The device may be behind the host; reading a value waits until its share of the training is done.
        int(pl_module.tokens_seen)
        self._stop_stopwatches()

    def _update_rates(self, pl_module: LanguageModule) -> None:
        # Before the clock is read, because this waits for the device.
        tokens = int(pl_module.tokens_seen)
        # Not as `lengths`, which Lightning requires to exceed the samples: sequences of padding alone are allowed here.
        self._throughputs[RunningStage.TRAINING].update(
            time=self.stopwatch.seconds,
            batches=self._steps,
            samples=self._sequences,
            flops=(tokens - self._tokens) * pl_module.cost.train_flops,
        )
        self._tokens = tokens

    def _log(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        rates = self._throughputs[RunningStage.TRAINING].compute()
        # The window is not full yet.
        if "device/flops_per_sec" not in rates:
            return
        cost = pl_module.cost
        tokens = rates["device/flops_per_sec"] / cost.train_flops
        self.figures = {
            "tokens_per_sec": tokens,
            "samples_per_sec": rates["device/samples_per_sec"],
            "steps_per_sec": rates["device/batches_per_sec"],
            "flops_per_sec": rates["device/flops_per_sec"],
            "row_bytes_per_sec": tokens * cost.train_bytes,
        }
        if "device/mfu" in rates:
            self.figures["mfu"] = rates["device/mfu"]
        bandwidth = memory_bandwidth(trainer.strategy.root_device)
        if bandwidth is not None:
            self.figures["mbu"] = tokens * cost.train_bytes / (bandwidth * trainer.world_size)
        pl_module.log_dict({f"train/throughput/{name}": value for name, value in self.figures.items()})

    def _skip(self, *_: Any, **__: Any) -> None:
        """Skips a hook of evaluation, which is not measured."""

    on_validation_batch_end = _skip
    on_test_start = on_test_batch_end = on_predict_start = on_predict_batch_end = _skip


def memory_bandwidth(device: torch.device) -> float | None:
    """Returns the bytes per second of the memory of `device`, or None if it is not in the table."""
    return BANDWIDTH.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> int | None:
    """Returns the peak FLOPs per second of `device` in products of `dtype`, or None if it is not in the table."""
    peaks = PEAK_FLOPS.get(torch.cuda.get_device_name(device), {}) if device.type == "cuda" else {}
    tensor_cores = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return peaks.get("tfloat32" if tensor_cores else dtype)


def _sequences(batch: dict[str, torch.Tensor]) -> int:
    return len(batch["input_ids"])
