"""What quantised value tables cost in quality: a model of facts and one of text, tested before and after.

    python scripts/quantize_models.py --text wiki.txt [--folder runs/quantized] [--out]

Trains both with Memory+ (about five minutes on two cores; a run that is finished in FOLDER is used again), exports each
with its table as trained and in 8, 4 and 2 bits, and runs `test` on every file. `bf16` is a checkpoint whose table was
rounded to bfloat16. The error is the root mean square of what quantising changes, relative to that of the values. The
public figures are those of a project that quantises a table of its own to the same widths.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.report import conditions

from pkm_lightning.checkpoints import latest_checkpoint
from pkm_lightning.ops.quantized_rows import WIDTHS, dequantize_rows, quantize_rows

_QUIET = ("logger=none", "~callbacks.progress_bar", "~callbacks.samples")
_TABLE = "model.tables.0.weight"
#: Change of perplexity in per cent that a public project reports.
PUBLIC = {"int8": -0.01, "int4": 0.12, "int2": 2.2}
#: Share of facts that the model completes, and the bits of knowledge per fact that its probabilities hold.
RECALL = ("recall_seen", "recall_paraphrase", "recall_question", "bits_paraphrase")
FIELDS = (
    *("model", "table", "table_bytes", "file_bytes", "error", "perplexity", "change_percent", "public_percent"),
    *RECALL,
)


def settings(text: Path) -> dict[str, list[str]]:
    """Returns the overrides of `fit` by the name of the model."""
    reads = ["model.memory.heads=2", "model.memory.knn=8", "optim.table_lr_factor=4"]
    facts = ["data.people=3600", "data.cities=1000", "data.global_batch_size=48", "trainer.max_steps=2100"]
    text_model = ["model.n_layers=3", "model.memory.n_keys=128", "placement.layers=all", "optim.lr=6e-3"]
    steps = ["trainer.max_steps=600", "trainer.val_check_interval=200"]
    data = ["data=text", f"data.path={text.absolute()}", "data.document_separator=1", "data.vocab_size=2048"]
    return {"facts": [*facts, *reads], "text": [*data, *text_model, *reads, *steps]}


def command(*arguments: object) -> str:
    """Runs a command of the package and returns what it prints."""
    line = [sys.executable, "-m", "pkm_lightning", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stdout}{done.stderr}")
    return done.stdout


def trained(run: Path, overrides: Sequence[str]) -> Path:
    """Trains, unless `run` is there, and returns its last checkpoint."""
    if not run.exists():
        command("fit", f"run_dir={run}", *overrides, *_QUIET)
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def forms(checkpoint: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the forms of a model with their file, sizes and error."""
    content = torch.load(checkpoint, weights_only=True)
    table_NV = content["state_dict"][_TABLE]

    def form(name: str, file: Path, table_bytes: int, written_NV: torch.Tensor) -> dict[str, Any]:
        error = float((written_NV - table_NV).norm() / table_NV.norm())
        return {
            "table": name, "file": file, "table_bytes": table_bytes, "file_bytes": file.stat().st_size,
            "error": f"{error:.4f}",
        }  # fmt: skip

    plain = folder / "float32.safetensors"
    command("export", f"ckpt={checkpoint}", f"file={plain}", "overwrite=true")
    yield form("float32", plain, table_NV.nbytes, table_NV)
    rounded_NV = table_NV.bfloat16()
    content["state_dict"][_TABLE] = rounded_NV.float()
    torch.save(content, folder / "bf16.ckpt")
    # Its values are stored as float32, so that the size of the file is no figure.
    yield {**form("bf16", folder / "bf16.ckpt", rounded_NV.nbytes, rounded_NV.float()), "file_bytes": ""}
    for width, bits in WIDTHS.items():
        file = folder / f"{width}.safetensors"
        command("export", f"ckpt={checkpoint}", f"file={file}", f"quantize={width}", "overwrite=true")
        rows = quantize_rows(table_NV, bits)
        yield form(width, file, rows.codes_NC.nbytes + rows.scales_NQ.nbytes, dequantize_rows(rows))


def tested(file: Path) -> dict[str, float]:
    """Returns the metrics that `test` prints for a file, by the end of their names."""
    printed = command("test", f"ckpt={file}", "~callbacks.progress_bar")
    return {
        name.rpartition("/")[2]: float(value) for name, value in re.findall(r"(test/\S+)\s+\S?\s*(-?[\d.]+)", printed)
    }


def measure(name: str, checkpoint: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields a line per form of the model `name`."""
    base = None
    for form in forms(checkpoint, folder):
        metrics = tested(form.pop("file"))
        perplexity = metrics["perplexity"]
        base = base or perplexity
        recall = {key: f"{metrics[key]:.3f}" for key in RECALL if key in metrics}
        change = {"change_percent": f"{100 * (perplexity / base - 1):+.2f}"}
        public = {"public_percent": f"{PUBLIC[form['table']]:+.2f}"} if form["table"] in PUBLIC else {}
        yield {"model": name, **form, "perplexity": f"{perplexity:.4f}", **change, **public, **recall}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, measures, prints and, with `--out`, writes scripts/results/DATE-quantized-models.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a text file, documents separated by empty lines")
    parser.add_argument("--folder", type=Path, default=Path("runs/quantized"), help="for runs and files")
    parser.add_argument("--out", type=Path, nargs="?", const=Path("scripts/results"))
    parsed = parser.parse_args(arguments)
    facts, lines = conditions(torch.device("cpu")), []
    for name, overrides in settings(parsed.text).items():
        checkpoint = trained(parsed.folder / name, overrides)
        files = parsed.folder / f"{name}-files"
        files.mkdir(parents=True, exist_ok=True)
        for line in measure(name, checkpoint, files):
            print("  ".join(f"{key} {value}" for key, value in line.items() if value != ""), flush=True)
            lines.append(line)
    if parsed.out:
        path = parsed.out if parsed.out.suffix == ".csv" else parsed.out / f"{facts['date']}-quantized-models.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*facts, *FIELDS])
            writer.writeheader()
            writer.writerows({**facts, **line} for line in lines)


if __name__ == "__main__":
    main()
