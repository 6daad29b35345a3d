"""`info`: what configurations cost, from shapes alone, side by side; nothing is allocated or written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pkm_lightning.build.checks import remark_row_optimizer
from pkm_lightning.build.freezing import ParameterCounts, parameter_counts
from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.build.sizing import sized_knob
from pkm_lightning.build.variants import MAIN
from pkm_lightning.capacity import Setting, batch_remarks
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.cli.plan_rows import describe_plan, plan_rows
from pkm_lightning.cli.summary import cost_rows, variant_rows
from pkm_lightning.cli.variants import compose_variant, side_by_side
from pkm_lightning.compare.settings import read_variants
from pkm_lightning.errors import ConfigError, PkmError, check_choice
from pkm_lightning.memory import ValueTable
from pkm_lightning.training.record import start_record
from pkm_lightning.training.table_learning import optimizer_state_bytes


def run(job: Job) -> None:
    """Prints the figures as a table, one column per variant, or as JSON with `format=json` (a list for several)."""
    output = "text" if job.config.format is None else str(job.config.format)
    check_choice("format", output, ("text", "json"))
    # A variant of an experiment has its own FFN, so that one on the command line leaves none of them.
    of_experiment = {} if job.sets("ffn") else read_variants(job.comparison.get("variants"))
    columns = side_by_side(job.variants, job.strategies, of_experiment)
    if not columns:
        described = {"": describe(resolve(plain(job.config)))}
    else:
        described = {name: _describe_variant(name, own, job) for name, own in columns.items()}
    if output == "json":
        figures = [{"variant": name, **shown} if name else shown for name, shown in described.items()]
        print(json.dumps(figures if columns else figures[0], indent=2))
        return
    table = Table(title=_title(described, str(job.config.match)), show_header=bool(columns))
    table.add_column("")
    for name in described:
        table.add_column(name, justify="right" if columns else "left", overflow="fold")
    rows = [dict(_rows(figures)) for figures in described.values()]
    for label in dict.fromkeys(label for column in rows for label in column):
        table.add_row(label, *(column.get(label, "") for column in rows))
    # Nine variants side by side are wider than most terminals; a pipe keeps whole lines.
    width = None if not columns or sys.stdout.isatty() else 40 + 26 * len(described)
    Console(width=width, markup=False, emoji=False).print(table)


def _title(described: dict[str, dict[str, Any]], match: str) -> str:
    first = next(iter(described.values()))
    parts = [first["ffn"] if len(described) == 1 else f"{len(described)} variants"]
    # The variants of an experiment may differ in depth.
    if all(figures["model"] == first["model"] for figures in described.values()):
        parts.append("{n_layers} layers of {dim}".format(**first["model"]))
    return ", ".join([*parts, *([f"match={match}"] if match != "none" else [])])


def _describe_variant(name: str, own: Sequence[str], job: Job) -> dict[str, Any]:
    config = plain(compose_variant(own, job.overrides))
    try:
        return describe(resolve(config))
    except PkmError as error:
        named = own[0] if len(own) == 1 else name
        raise ConfigError(f"{named}: {error}") from None


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns label and value of everything in `figures`."""
    size = figures["table"]
    tables = f" in {size['count']} tables" if size["count"] > 1 else ""
    rows = cost_rows(figures, ParameterCounts(figures["trained"], figures["frozen"]))
    if figures["sized"]:
        rows.append(("sized by", ", ".join(f"{knob} = {value:,}" for knob, value in figures["sized"].items())))
    rows += variant_rows(figures["variants"]) or [
        ("layers with the variant", ", ".join(map(str, figures["layers"])) or "none")
    ]
    rows += [
        (
            "value table",
            f"{size['rows']:,} rows of {size['dim']:,}{tables}: {size['bytes']:,} bytes" if size["rows"] else "none",
        ),
        ("weights", f"{figures['weight_bytes']:,} bytes"),
        ("optimizer states", f"{figures['optimizer_bytes']:,} bytes"),
    ]
    rows += plan_rows(figures["plan"]) if "plan" in figures else []
    return [*rows, ("remarks", "; ".join(figures["remarks"]))] if figures["remarks"] else rows


def describe(resolved: ResolvedRun) -> dict[str, Any]:
    """Returns parameters, FLOPs and bytes per token, table size, weight and optimizer memory.

    For several devices also `plan`: what each of them holds and receives.
    """
    config, model, cost = resolved.config, resolved.model, resolved.cost
    record = start_record(config, cost, resolved.of_variants)
    shared = ("ffn", "variants", "params", "flops_per_token", "bytes_per_token", "unknown_cost")
    itemsize = next(model.parameters()).element_size()
    tables: list[ValueTable] = list(model.tables)  # type: ignore[arg-type]
    table_bytes = sum(table.bytes_of(table.size) for table in tables)
    return {
        **{key: record[key] for key in shared},
        "model": {"n_layers": config["model"]["n_layers"], "dim": config["model"]["dim"]},
        "sized": sized_knob(config),
        "layers": resolved.of_variants[MAIN]["layers"],
        **parameter_counts(model)._asdict(),
        "table": {
            "count": len(tables),
            "rows": cost.table_rows,
            "dim": cost.table_dim,
            "bytes": table_bytes,
        },
        "weight_bytes": (cost.params_total - cost.table_params) * itemsize + table_bytes,
        "optimizer_bytes": optimizer_state_bytes(model, config),
        **describe_plan(resolved),
        "remarks": [
            *batch_remarks(cost, Setting.of(config), config["data"]),
            *filter(None, [remark_row_optimizer(config)]),
        ],
    }
