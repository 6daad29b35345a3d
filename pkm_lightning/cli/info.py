"""`info`: what configurations cost, from shapes alone, side by side; nothing is allocated or written."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from pkm_lightning.build.model import placed_layers
from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.build.sizing import sized_knob
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.cli.plan_rows import describe_plan, plan_rows
from pkm_lightning.cli.summary import cost_rows
from pkm_lightning.cli.variants import compose_variant
from pkm_lightning.errors import ConfigError, PkmError, check_choice
from pkm_lightning.training.record import start_record
from pkm_lightning.training.table_learning import optimizer_state_bytes


def run(job: Job) -> None:
    """Prints the figures as a table, one column per variant, or as JSON with `format=json` (a list for several)."""
    check_choice("format", str(job.config.format), ("text", "json"))
    if not job.variants:
        described = {"": describe(resolve(plain(job.config)))}
    else:
        described = {name: _describe_variant(name, job) for name in job.variants}
    if job.config.format == "json":
        figures = [{"variant": name, **shown} if name else shown for name, shown in described.items()]
        print(json.dumps(figures if job.variants else figures[0], indent=2))
        return
    model = job.config.model
    match = f", match={job.config.match}" if job.config.match != "none" else ""
    title = next(iter(described.values()))["ffn"] if not job.variants else f"{len(described)} variants"
    table = Table(title=f"{title}, {model.n_layers} layers of {model.dim}{match}", show_header=bool(job.variants))
    table.add_column("")
    for name in described:
        table.add_column(name, justify="right" if job.variants else "left", overflow="fold")
    columns = [dict(_rows(figures)) for figures in described.values()]
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "") for column in columns))
    # Nine variants side by side are wider than most terminals; a pipe keeps whole lines.
    width = None if not job.variants or sys.stdout.isatty() else 40 + 26 * len(described)
    Console(width=width, markup=False, emoji=False).print(table)


def _describe_variant(name: str, job: Job) -> dict[str, Any]:
    config = plain(compose_variant(name, job.overrides))
    try:
        return describe(resolve(config))
    except PkmError as error:
        raise ConfigError(f"ffn={name}: {error}") from None


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns label and value of everything in `figures`."""
    size = figures["table"]
    rows = cost_rows(figures)
    if figures["sized"]:
        rows.append(("sized by", ", ".join(f"{knob} = {value:,}" for knob, value in figures["sized"].items())))
    rows += [
        ("layers with the variant", ", ".join(map(str, figures["layers"])) or "none"),
        (
            "value table",
            f"{size['rows']:,} rows of {size['dim']:,}: {size['bytes']:,} bytes" if size["rows"] else "none",
        ),
        ("weights", f"{figures['weight_bytes']:,} bytes"),
        ("optimizer states", f"{figures['optimizer_bytes']:,} bytes"),
    ]
    return rows + plan_rows(figures["plan"]) if "plan" in figures else rows


def describe(resolved: ResolvedRun) -> dict[str, Any]:
    """Returns parameters, FLOPs and bytes per token, table size, weight and optimizer memory.

    For several devices also `plan`: what each of them holds and receives.
    """
    config, model, cost = resolved.config, resolved.model, resolved.cost
    record = start_record(config, cost)
    shared = ("ffn", "params", "flops_per_token", "bytes_per_token", "unknown_cost")
    itemsize = next(model.parameters()).element_size()
    return {
        **{key: record[key] for key in shared},
        "sized": sized_knob(config),
        "layers": placed_layers(config),
        "table": {"rows": cost.table_rows, "dim": cost.table_dim, "bytes": cost.table_params * itemsize},
        "weight_bytes": cost.params_total * itemsize,
        "optimizer_bytes": optimizer_state_bytes(model, config),
        **describe_plan(resolved),
    }
