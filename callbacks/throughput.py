"""How fast a run trains: tokens, FLOPs and bytes of table rows a second, and which share of the device that is.

Figures are over all ranks, from log step to log step; validations and checkpoints take no part in the time.

| metric | meaning |
|---|---|
| train/throughput/tokens_per_sec | real input tokens |
| train/throughput/samples_per_sec | rows of the batches; every rank is taken to have as many as this one |
| train/throughput/steps_per_sec | optimizer steps |
| train/throughput/flops_per_sec | tokens times the model's analytic training FLOPs a token (`ModelCost.train_flops`) |
| train/throughput/mfu | the same, as a share of the devices' peak; absent where the device is not known |
| train/throughput/row_bytes_per_sec | tokens times the bytes of embedding and table rows that each moves for itself |
| train/throughput/mbu | the same, as a share of the devices' memory bandwidth; absent where that is unknown. A lower |
| | bound: weights, activations and optimizer states move too |

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

from pkm_lightning.callbacks.stopwatch import TimedCallback, step_logs
from pkm_lightning.errors import check_integer
from pkm_lightning.training import LanguageModule

#: Bytes a second of a device's memory, from NVIDIA's data sheets, by the name that CUDA gives.
BANDWIDTH = {
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA H200": 4.8e12,
}


#: FLOPs a second, dense, of devices that Lightning does not know by the name that CUDA gives; NVIDIA's data sheet.
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
    """Lightning's ThroughputMonitor on this package's counts.

    Lightning's own hooks wait for the device in every batch, measure evaluation too, know no padding, and write to
    loggers only; what is kept of it is the knowledge of devices' peaks and the window of rates.

    Args:
        window: log steps that a figure is the mean of, 1 or more; the first figures come after as many.

    Attributes:
        figures: the latest, without their prefix; empty before the first.

    Raises:
        ConfigError: a window below 1.
    """

    def __init__(self, *, window: int) -> None:
        check_integer("callbacks.throughput.window", window, 1)
        super().__init__(batch_size_fn=_rows, window_size=window + 1)
        self.figures: dict[str, float] = {}
        self._tokens = self._steps = self._counted_rows = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks the devices up."""
        super().setup(trainer, pl_module, stage)
        if self.available_flops is None:
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self.available_flops = peak_flops(trainer.strategy.root_device, dtype)
        # Tokens are counted over all ranks, so these are rates of one device that is as strong as all together.
        peak = None if self.available_flops is None else self.available_flops * trainer.world_size
        self._throughputs = {RunningStage.TRAINING: Rates(available_flops=peak, **self.kwargs)}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts from here on, also in a resumed run."""
        assert isinstance(pl_module, LanguageModule)
        self.figures, self._steps, self._counted_rows = {}, 0, 0
        self._throughputs[RunningStage.TRAINING].reset()
        super().on_train_start(trainer, pl_module)
        self._update_rates(pl_module)  # where the window begins: what was counted until here is no part of it

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Training time goes on after a checkpoint; the reading of one batch is lost with it."""
        self.stopwatch.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Counts what the host knows; at log steps the rest, and logs."""
        self._counted_rows += self.batch_size_fn(batch) * trainer.world_size
        if not trainer.fit_loop._should_accumulate():
            self._steps += 1
        if step_logs(trainer):
            assert isinstance(pl_module, LanguageModule)
            self._update_rates(pl_module)
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training time stands still."""
        self._pause(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Likewise until the next batch."""
        self._pause(pl_module)

    def _pause(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        # What the device has yet to do of the steps so far is training; reading from it waits for that.
        int(pl_module.tokens_seen)
        self.stopwatch.stop()

    def _update_rates(self, pl_module: LanguageModule) -> None:
        tokens = int(pl_module.tokens_seen)  # before the clock is read, because it waits for the device
        # Tokens enter as FLOPs, not as `lengths`, which must exceed the rows: rows of nothing but padding are allowed.
        self._throughputs[RunningStage.TRAINING].update(
            time=self.stopwatch.seconds,
            batches=self._steps,
            samples=self._counted_rows,
            flops=(tokens - self._tokens) * pl_module.cost.train_flops,
        )
        self._tokens = tokens

    def _log(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        rates = self._throughputs[RunningStage.TRAINING].compute()
        if "device/flops_per_sec" not in rates:
            return  # the window is not full yet
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

    def _leave_out(self, *_: Any, **__: Any) -> None:
        """Evaluation is not measured."""

    on_validation_batch_end = _leave_out
    on_test_start = on_test_batch_end = on_predict_start = on_predict_batch_end = _leave_out


def memory_bandwidth(device: torch.device) -> float | None:
    """Bytes a second of the memory of `device`, or None where it is not in the table."""
    return BANDWIDTH.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> int | None:
    """FLOPs a second that `device` reaches at best in products of `dtype`, or None where it is not in the table."""
    peaks = PEAK_FLOPS.get(torch.cuda.get_device_name(device), {}) if device.type == "cuda" else {}
    tensor_cores = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return peaks.get("tfloat32" if tensor_cores else dtype)


def _rows(batch: dict[str, torch.Tensor]) -> int:
    return len(batch["input_ids"])
