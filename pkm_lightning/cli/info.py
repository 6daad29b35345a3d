"""`info`: what a configuration costs, from shapes alone; nothing is allocated, built or written."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from pkm_lightning.cli.assembly import complete
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.cli.summary import cost_rows
from pkm_lightning.errors import check_choice
from pkm_lightning.model import model_cost
from pkm_lightning.model.accounting import optimizer_bytes
from pkm_lightning.training.build import attention_context, build_meta_model
from pkm_lightning.training.run_record import start_record


def run(job: Job) -> None:
    """Prints the figures as a table, or as JSON with `format=json`."""
    check_choice("format", str(job.config.format), ("text", "json"))
    config, _ = complete(plain(job.config))
    figures = describe(config)
    if config["format"] == "json":
        print(json.dumps(figures, indent=2))
        return
    table = Table(
        title=f"{figures['ffn']}, {config['model']['n_layers']} layers of {config['model']['dim']}", show_header=False
    )
    for label, value in cost_rows(figures):
        table.add_row(label, value)
    size = figures["table"]
    table.add_row("value table", f"{size['rows']:,} rows of {size['dim']:,}: {size['bytes']:,} bytes")
    table.add_row("weights", f"{figures['weight_bytes']:,} bytes")
    table.add_row("optimizer states", f"{figures['optimizer_bytes']:,} bytes")
    Console().print(table)


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters, FLOPs and bytes a token, table size, weight and optimizer memory of a completed configuration."""
    model = build_meta_model(config)
    cost = model_cost(model, attention_context(config))
    record = start_record(config, cost)
    shared = ("ffn", "params", "flops_per_token", "bytes_per_token", "unknown_cost")
    itemsize = next(model.parameters()).element_size()
    return {
        **{key: record[key] for key in shared},
        "table": {"rows": cost.table_rows, "dim": cost.table_dim, "bytes": cost.table_params * itemsize},
        "weight_bytes": cost.params_total * itemsize,
        "optimizer_bytes": optimizer_bytes(model),
    }
