"""The screen at the end of a run: its figures in a table, and a few questions with the answers beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pkm_lightning.adaptation.sparse_callback import SparseRows
from pkm_lightning.build.freezing import ParameterCounts
from pkm_lightning.callbacks.recall import Recall
from pkm_lightning.callbacks.retention import Retention
from pkm_lightning.errors import counted
from pkm_lightning.inference.recall import ItemScore

#: Form, and its label.
_FORMS = (
    ("seen", "recall, statements as seen in training"),
    ("paraphrase", "recall, paraphrases held out for the fact"),
    ("question", "recall, questions about subjects never asked about"),
    ("unseen_template", "recall, wordings that no fact was seen in"),
    ("control", "recall, subjects never trained (chance)"),
    ("validation", "recall, validation prompts"),
)
#: As many questions place a share within 5 points (95% interval).
_MANY = 400
_WITHOUT_TABLE = "  the same, value tables read as zeros"


def print_summary(record: dict[str, Any], callbacks: Sequence[L.Callback], counts: ParameterCounts) -> None:
    """Prints the table of `record` with the parameters of its model and, if questions were asked, six of them."""
    console = Console(markup=False, emoji=False)  # data and paths may hold brackets
    console.print(_figures(record, counts, callbacks))
    for callback in callbacks:
        if isinstance(callback, Recall) and callback.scores:
            console.print(_answers(callback.scores))
        if isinstance(callback, Retention) and (rows := retention_rows(callback.before, callback.after)):
            console.print(_retained(rows))


def _figures(record: dict[str, Any], counts: ParameterCounts, callbacks: Sequence[L.Callback]) -> Table:
    table = Table(title=f"{record['ffn']}, seed {record['seed']}", show_header=False)
    metrics, recall = record["metrics"], record["metrics"].get("recall", {})
    for form, label in _FORMS:
        if form in recall:
            table.add_row(label, _recall(recall[form]["recall"], recall[form].get("choice"), recall[form].get("n")))
        without_table = metrics.get(f"test/recall_{form}_without_table")
        if without_table is not None and form in ("paraphrase", "validation"):
            table.add_row(_WITHOUT_TABLE, _recall(without_table, metrics.get(f"test/choice_{form}_without_table")))
    perplexities = [(key, metrics[key]) for key in ("test/perplexity", "val/perplexity") if key in metrics]
    for key, perplexity in perplexities:
        # Where the data have no test part, it is the same figure twice.
        if (key, perplexity) == perplexities[0] or perplexity != perplexities[0][1]:
            of = "validations" if key != perplexities[0][0] else "held-out text"
            table.add_row(f"perplexity of {of}", f"{perplexity:.3f}")
    if "test/perplexity_without_table" in metrics:
        table.add_row(_WITHOUT_TABLE, f"{metrics['test/perplexity_without_table']:.3f}")
    for label, value in stored_rows(metrics):
        table.add_row(label, value)
    if record.get("tokens_per_second"):
        table.add_row("training tokens/s", f"{record['tokens_per_second']:,.0f}")
    changed = [row for callback in callbacks if isinstance(callback, SparseRows) for row in changed_rows(callback)]
    for label, value in [*cost_rows(record, counts), *changed, *variant_rows(record.get("variants") or {})]:
        table.add_row(label, value)
    return table


def stored_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns label and value of the bits stored, which runs on data of known entropy have; see `StoredBits`."""
    figures = {name.removeprefix("test/"): value for name, value in metrics.items() if name.startswith("test/")}
    if "stored_bits" not in figures:
        return []
    ratios = [f"{figures[f'bits_per_{what}']:.3f}" for what in ("parameter", "active_parameter", "byte")]
    rows = [
        ("bits stored, of all there are", f"{figures['stored_bits']:,.0f}, {figures['stored_share']:.1%}"),
        ("  per parameter / active parameter / byte", " / ".join(ratios)),
    ]
    begin = "bits_per_byte_"
    for width in (name.removeprefix(begin) for name in figures if name.startswith(begin)):
        what = f"all matrices {width.removesuffix('_all')}" if width.endswith("_all") else f"tables {width}"
        per_parameter, per_byte = figures[f"bits_per_parameter_{width}"], figures[begin + width]
        rows.append((f"  {what}: per parameter / byte", f"{per_parameter:.3f} / {per_byte:.3f}"))
    return rows


def _recall(recall: float, choice: float | None, n: int | None = None) -> str:
    # A share of few questions is uncertain.
    asked = f" ({counted(n, 'question')})" if n is not None and n < _MANY else ""
    return f"{recall:.1%}" + ("" if choice is None else f", {choice:.1%} of four options") + asked


def cost_rows(record: dict[str, Any], counts: ParameterCounts) -> list[tuple[str, str]]:
    """Returns label and value of the cost figures, with the parameters that learn where others are frozen."""
    params, flops, moved = record["params"], record["flops_per_token"], record["bytes_per_token"]
    # Data without a length count as one token.
    context = f"{flops['context']:,} tokens (data.seq_len)" if flops["context"] > 1 else "1 token: no seq_len"
    rows = [
        ("parameters total / active", f"{params['total']:,} / {params['active']:,}"),
        ("FLOPs per token, training / decoding", f"{flops['train']:,} / {flops['decode']:,}"),
        ("  of which trunk", f"{flops['trunk']['train']:,} / {flops['trunk']['decode']:,}"),
        ("  at a context of", context),
        ("bytes per token, training / decoding", f"{moved['train']:,} / {moved['decode']:,}"),
    ]
    if record["unknown_cost"]:
        rows.append(("without the cost of", ", ".join(record["unknown_cost"])))
    if counts.frozen:
        rows.append(("parameters that may learn / frozen", f"{counts.trained:,} / {counts.frozen:,}"))
        if "trained_bytes" in record:
            rows.append(("bytes of those that may learn", f"{record['trained_bytes']:,}"))
    return rows


def changed_rows(callback: SparseRows) -> list[tuple[str, str]]:
    """Returns label and value of the rows that sparse finetuning has changed, by set of tables."""
    return [(f"  of which changed in {name}", changed) for name, changed in callback.changed_rows().items()]


def variant_rows(of_variants: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Returns label and value of what each variant is and costs; nothing of a single one.

    Figures are total / active parameters and FLOPs per token in training / decoding, as in `cost_rows`.
    """
    if len(of_variants) < 2:
        return []
    rows = []
    for name, figures in of_variants.items():
        numbers = [str(layer) for layer in figures["layers"]]
        layers = f"layer{'s' if len(numbers) != 1 else ''} {', '.join(numbers) or 'none'}"
        tables = ", ".join(f"tables.{number}" for number in figures["tables"]) or "no table"
        rows += [
            (name, f"{figures['class']}, {figures['mode']}, {layers}, {tables}"),
            (f"  {name}: parameters", _pair(figures["params"], "total", "active")),
            (f"  {name}: FLOPs", _pair(figures["flops_per_token"], "train", "decode")),
        ]
    return rows


def retention_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns label and value of what was learned and what of the known is left, each before and after training.

    Args:
        before, after: figures of the callback `retention`; a run of an earlier version may lack some of those before.
    """
    rows = []
    for label, prefix in (("learned", "learned_"), ("known before", "known_")):
        figures = {name.removeprefix(prefix): name for name in after if name.startswith(prefix)}
        parts = [
            f"{form} {_before(before.get(name), '.1%')}{after[name]:.1%}"
            for form, name in figures.items()
            if form not in ("loss", "kl") and not form.endswith("_change")
        ]
        if "loss" in figures:
            parts.append(f"loss {_before(before.get('known_loss'), '.3f')}{after['known_loss']:.3f}")
        if parts:
            rows.append((label, ", ".join(parts)))
    return rows


def _before(figure: float | None, form: str) -> str:
    return "" if figure is None else f"{figure:{form}} -> "


def _retained(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title="before -> after training, by the callback retention", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _pair(figures: Mapping[str, int | None], one: str, other: str) -> str:
    return " / ".join("unknown" if figures[key] is None else f"{figures[key]:,}" for key in (one, other))


def _answers(scores: Sequence[ItemScore]) -> Table:
    table = Table(title="some of the questions, chosen by position")
    for column in ("prompt", "answer", "truth"):
        table.add_column(column)
    shown = [s for form in ("paraphrase", "question", "validation") for s in _spread(scores, form)]
    for score in shown:
        table.add_row(score.prompt, Text(score.answer, style="green" if score.exact else "red"), score.truth)
    return table


def _spread(scores: Sequence[ItemScore], form: str) -> list[ItemScore]:
    """Returns three scores of a form, of different relations if possible, by position and not by success."""
    by_relation: dict[str, ItemScore] = {}
    for score in scores:
        if score.form == form:
            by_relation.setdefault(score.relation, score)
    return list(by_relation.values())[:3]
