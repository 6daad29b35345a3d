"""Panels of slot usage on TensorBoard and Weights & Biases: `usage/NAME/...`, NAME as in `slot_usage`.

- `heat_map`: reads of every slot since the start, as a square. Where a slot is a pair of sub-keys, they are its row and
  column; other slots follow each other line by line. The colour is the logarithm of the reads; black is a slot that was
  never read.
- `rank_frequency`: the slots by falling number of reads, both axes logarithmic. Zipf's law is a straight line, even use
  a flat one.
- `most_read`: the most-read slots of the window, and the tokens of the last micro-batch that read them most.

Letters: N slots, G side of the square, X and Y pixels, K reads per token over all heads, C cells of an image's side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from pkm_lightning.data.base import data_of, tokenizer_of
from pkm_lightning.loggers import show_image, show_table
from pkm_lightning.model import Traces
from pkm_lightning.usage.counters import UsageCounters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_LARGEST_SIDE = 1024
_DPI = 100
_SHOWN_SLOTS, _SHOWN_TOKENS = 16, 6
_COLUMNS = ("slot", "reads", "share", "tokens of this micro-batch")


def draw_panels(
    trainer: L.Trainer, counters: UsageCounters, traces: Traces, batch: dict[str, Tensor], step: int
) -> None:
    """Draws the panels on the loggers of `trainer`. Collective: call on all ranks.

    Args:
        trainer: whose data module's tokenizer, if it has one, gives the tokens of `most_read`.
        counters: the reads so far.
        traces, batch: the last micro-batch.
        step: the step number of the panels.
    """
    if trainer.loggers:
        tokenizer = tokenizer_of(data_of(trainer))
        draw_on(trainer.loggers if trainer.is_global_zero else [], counters, traces, batch, tokenizer, step)


def draw_on(
    loggers: Sequence[Logger],
    counters: UsageCounters,
    traces: Traces,
    batch: dict[str, Tensor],
    tokenizer: Any,
    step: int,
) -> None:
    """Draws the panels on `loggers`, of which only the first rank has any. Collective: call on all ranks."""
    for name in (*counters.readers, *(name for name, table in counters.tables.items() if len(table.readers) > 1)):
        ever_N, window_N = (counters.total(name, span).counts_N.cpu() for span in ("ever", "window"))
        if not loggers:
            continue
        title = f"{name}, {len(ever_N):,} slots, step {step:,}"
        images = {
            "heat_map": pixels(heat_map(ever_N, title, counters.n_keys(name))),
            "rank_frequency": pixels(rank_frequency(ever_N, title)),
        }
        for logger in loggers:
            for panel, image_YXC in images.items():
                show_image(logger, f"usage/{name}/{panel}", image_YXC, step)
            if name in counters.readers:
                ids_TK, tokens_T = _last_reads(counters, name, traces, batch)
                rows = most_read(window_N, ids_TK, tokens_T, tokenizer)
                show_table(logger, f"usage/{name}/most_read", _COLUMNS, rows, step)


def _last_reads(counters: UsageCounters, name: str, traces: Traces, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the slots that a reader has read for each token of the micro-batch, and the tokens, without padding."""
    reads = counters.readers[name].reads(traces, batch)
    if reads is None:  # not traced in this micro-batch
        return torch.empty(0, 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    ids_TK, tokens_T = reads.ids_THK.flatten(1).cpu(), batch["input_ids"].flatten().cpu()
    is_token_T = slice(None) if reads.valid_T is None else reads.valid_T.cpu()
    return ids_TK[is_token_T], tokens_T[is_token_T]


def square(counts_N: Tensor) -> Tensor:
    """Returns the reads as a square of at most 1024 x 1024 cells, of which each is the sum of a block of slots."""
    side = math.isqrt(len(counts_N) - 1) + 1
    block = -(-side // _LARGEST_SIDE)
    cells = -(-side // block)
    square_GG = torch.zeros(cells * block, cells * block, dtype=torch.float64)
    padded = torch.zeros(side * side, dtype=torch.float64)
    padded[: len(counts_N)] = counts_N
    square_GG[:side, :side] = padded.view(side, side)
    return square_GG.view(cells, block, cells, block).sum((1, 3))


def heat_map(counts_N: Tensor, title: str, n_keys: int | None) -> Figure:
    """Returns the figure of the square of slots; `n_keys` sub-keys per half, if a slot is a pair of them."""
    # matplotlib takes a second to import, which a command without panels does not pay for.
    from matplotlib.colors import LogNorm

    reads_CC = square(counts_N).numpy()
    side = math.isqrt(len(counts_N) - 1) + 1
    # One pixel per cell or more.
    inches = max(4.6, len(reads_CC) / _DPI)
    figure = _figure(inches + 2.0, inches + 1.0)
    axes = _axes(figure, 0.8, 0.6, inches, inches)
    norm = LogNorm(1, max(float(reads_CC.max()), 2.0))
    never_black = np.ma.masked_equal(reads_CC, 0)
    axes.set_facecolor("black")
    image = axes.imshow(never_black, "viridis", norm=norm, interpolation="nearest", extent=(0, side, side, 0))
    axes.set_title(f"Reads since the start: {title}", fontsize=10)
    pair = n_keys is not None
    axes.set_xlabel("sub-key of the second half" if pair else f"slot, modulo {side:,}")
    axes.set_ylabel("sub-key of the first half" if pair else f"slot, divided by {side:,}")
    per = "slot" if len(reads_CC) == side else "block of slots"
    scale = _axes(figure, inches + 0.95, 0.6, 0.2, inches)
    figure.colorbar(image, cax=scale, label=f"reads per {per} (black: never read)")
    return figure


def rank_frequency(counts_N: Tensor, title: str) -> Figure:
    """Returns the figure of reads over the rank of a slot; slots that were never read have no point."""
    falling_N = counts_N.sort(descending=True).values
    # Ranks are spaced logarithmically, so that a large table has no more points than a small one.
    ranks = np.unique(np.geomspace(1, len(falling_N), 600).round().astype(np.int64))
    reads = falling_N.numpy()[ranks - 1]
    figure = _figure(6.0, 4.2)
    axes = _axes(figure, 0.8, 0.6, 5.0, 3.2)
    axes.loglog(ranks[reads > 0], reads[reads > 0], drawstyle="steps-post", color="tab:blue")
    axes.set_xlim(1, max(len(falling_N), 2))
    axes.set_ylim(bottom=0.8)
    axes.grid(alpha=0.4)
    axes.set_title(f"Slots by reads: {title}", fontsize=10)
    axes.set_xlabel("rank of the slot")
    axes.set_ylabel("reads since the start")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # Not of pyplot, which would keep the figure and might open a window.
    return Figure((width, height), dpi=_DPI)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Returns axes at a place in inches: a layout that matplotlib finds takes longer than all that is drawn."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Returns the RGB image (Y, X, 3) of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def most_read(counts_N: Tensor, ids_TK: Tensor, tokens_T: Tensor, tokenizer: Any) -> list[tuple[str, str, str, str]]:
    """Returns rows of slot, its reads and share of all reads in the window, and the tokens that read it most."""
    counts, slots = counts_N.topk(min(_SHOWN_SLOTS, len(counts_N)))
    total = max(int(counts_N.sum()), 1)
    rows = []
    for count, slot in zip(counts.tolist(), slots.tolist(), strict=True):
        if count:
            readers_T = (ids_TK == slot).sum(1)
            reads = Counter[int]()
            for token, times in zip(tokens_T[readers_T > 0].tolist(), readers_T[readers_T > 0].tolist(), strict=True):
                reads[token] += times
            tokens = [f"{_word(token, tokenizer)} ({times})" for token, times in reads.most_common(_SHOWN_TOKENS)]
            rows.append((str(slot), f"{count:,}", f"{count / total:.2%}", ", ".join(tokens)))
    return rows


def _word(token: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return str(token)
    try:
        text = tokenizer.decode([token])
    # A model may have more tokens than its tokenizer, and a tokenizer may raise anything.
    except Exception:
        return str(token)
    text = text.replace("`", "'").replace("\n", "⏎")
    return f"`{text}`" if text.strip() else f"`{text}` {token}"
