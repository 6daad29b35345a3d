"""TensorBoard's panels of slot usage, drawn as plain tensors: `usage/NAME/...`, NAME as in `slot_usage`.

- `heat_map`: reads of every slot since the start, as a square. Where a slot is a pair of sub-keys, they are its row and
  column; other slots follow each other line by line. The colour, from dark blue over green to yellow, is the logarithm
  of the reads; black is a slot that was never read.
- `rank_frequency`: the slots by falling number of reads, both axes logarithmic: rank to the right from 1 to N, reads
  upwards from 1 to the largest number, with lines at powers of ten. Zipf's law is a straight line, even use a flat one.
- `most_read`: the most-read slots of the window, and the tokens of the last micro-batch that read them most.

Letters: N slots, G side of the square, X and Y pixels, K reads per token over all heads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from pkm_lightning.data.base import data_of, tokenizer_of
from pkm_lightning.model import Traces
from pkm_lightning.usage.counters import UsageCounters

_LARGEST_SIDE = 1024
_CURVE = (240, 360)
_SHOWN_SLOTS, _SHOWN_TOKENS = 16, 6
_DARK_TO_BRIGHT = torch.tensor([[0.27, 0.0, 0.33], [0.23, 0.32, 0.55], [0.13, 0.57, 0.55], [0.99, 0.91, 0.14]])


def draw_panels(
    trainer: L.Trainer, counters: UsageCounters, traces: Traces, batch: dict[str, Tensor], step: int
) -> None:
    """Draws the panels on the TensorBoard loggers of `trainer`. Collective: call on all ranks.

    Args:
        trainer: whose data module's tokenizer, if it has one, gives the tokens of `most_read`.
        counters: the reads so far.
        traces, batch: the last micro-batch.
        step: the step number of the panels.
    """
    boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if boards:
        tokenizer = tokenizer_of(data_of(trainer))
        draw_on(boards if trainer.is_global_zero else [], counters, traces, batch, tokenizer, step)


def draw_on(
    boards: Sequence[Any],
    counters: UsageCounters,
    traces: Traces,
    batch: dict[str, Tensor],
    tokenizer: Any,
    step: int,
) -> None:
    """Draws the panels on `boards`, of which only the first rank has any. Collective: call on all ranks."""
    for name in (*counters.readers, *(name for name, table in counters.tables.items() if len(table.readers) > 1)):
        ever_N, window_N = (counters.total(name, span).counts_N.cpu() for span in ("ever", "window"))
        for board in boards:
            board.add_image(f"usage/{name}/heat_map", heat_map(ever_N), step)
            board.add_image(f"usage/{name}/rank_frequency", rank_frequency(ever_N), step)
            if name in counters.readers:
                reads = counters.readers[name].reads(traces, batch)
                # A slot that is not traced in this micro-batch has no tokens to show.
                ids_TK = torch.empty(0, 1, dtype=torch.int64) if reads is None else reads.ids_THK.flatten(1).cpu()
                tokens_T = batch["input_ids"].flatten().cpu() if reads is not None else ids_TK[:, 0]
                if reads is not None and reads.valid_T is not None:
                    ids_TK, tokens_T = ids_TK[reads.valid_T.cpu()], tokens_T[reads.valid_T.cpu()]
                board.add_text(f"usage/{name}/most_read", most_read(window_N, ids_TK, tokens_T, tokenizer), step)


def heat_map(counts_N: Tensor) -> Tensor:
    """Returns the image (3, Y, X) of values in 0 to 1; above 1024 x 1024 a pixel is the sum of a block of slots."""
    side = math.isqrt(len(counts_N) - 1) + 1
    block = -(-side // _LARGEST_SIDE)
    pixels = -(-side // block)
    square_GG = torch.zeros(pixels * block, pixels * block, dtype=torch.float64)
    padded = torch.zeros(side * side, dtype=torch.float64)
    padded[: len(counts_N)] = counts_N
    square_GG[:side, :side] = padded.view(side, side)
    reads_YX = square_GG.view(pixels, block, pixels, block).sum((1, 3))
    level_YX = reads_YX.log1p() / reads_YX.max().clamp(min=1).log1p()
    return _coloured(level_YX.float()) * (reads_YX > 0)


def _coloured(level_YX: Tensor) -> Tensor:
    # Linear between neighbouring colours of the scale.
    position_YX = level_YX * (len(_DARK_TO_BRIGHT) - 1)
    low_YX = position_YX.long().clamp(max=len(_DARK_TO_BRIGHT) - 2)
    share_YX1 = (position_YX - low_YX)[..., None]
    return (_DARK_TO_BRIGHT[low_YX] * (1 - share_YX1) + _DARK_TO_BRIGHT[low_YX + 1] * share_YX1).permute(2, 0, 1)


def rank_frequency(counts_N: Tensor) -> Tensor:
    """Returns the image (3, Y, X) of values in 0 to 1: grey lines at powers of ten, the curve in blue."""
    height, width = _CURVE
    image = torch.ones(3, height, width)
    falling_N = counts_N.sort(descending=True).values.double()
    most, n_slots = float(falling_N[0]), len(falling_N)
    for power in range(int(math.log10(n_slots)) + 1):
        image[:, :, round(power / max(math.log10(n_slots), 1e-9) * (width - 1)) if n_slots > 1 else 0] = 0.85
    for power in range(int(math.log10(max(most, 1))) + 1):
        image[:, _height(10.0**power, most), :] = 0.85
    # Each column shows the slot of one rank; ranks are spaced logarithmically.
    ranks_X = (n_slots ** (torch.arange(width) / (width - 1)) - 1).round().long().clamp(max=n_slots - 1)
    above = None
    for x, reads in enumerate(falling_N[ranks_X].tolist()):
        if reads > 0:
            # From the height of the column before, so that the curve has no gaps.
            y = _height(reads, most)
            start = y if above is None else min(above, y)
            image[:, start : y + 2, x] = torch.tensor([0.1, 0.3, 0.8])[:, None]
            above = y
    return image


def _height(reads: float, most: float) -> int:
    """Returns the line of the image, counted from the top."""
    return round((1 - math.log10(reads) / max(math.log10(max(most, 1)), 1e-9)) * (_CURVE[0] - 2)) if most > 1 else 0


def most_read(counts_N: Tensor, ids_TK: Tensor, tokens_T: Tensor, tokenizer: Any) -> str:
    """Returns a Markdown table: slot, its reads and share of all reads in the window, the tokens that read it most."""
    counts, slots = counts_N.topk(min(_SHOWN_SLOTS, len(counts_N)))
    total = max(int(counts_N.sum()), 1)
    lines = ["| slot | reads | share | tokens of this micro-batch |", "|---|---|---|---|"]
    for count, slot in zip(counts.tolist(), slots.tolist(), strict=True):
        if count:
            readers_T = (ids_TK == slot).sum(1)
            reads = Counter[int]()
            for token, times in zip(tokens_T[readers_T > 0].tolist(), readers_T[readers_T > 0].tolist(), strict=True):
                reads[token] += times
            tokens = [f"{_word(token, tokenizer)} ({times})" for token, times in reads.most_common(_SHOWN_TOKENS)]
            lines.append(f"| {slot} | {count:,} | {count / total:.2%} | {', '.join(tokens)} |")
    return "\n".join(lines)


def _word(token: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return str(token)
    try:
        text = tokenizer.decode([token])
    # A model may have more tokens than its tokenizer, and a tokenizer may raise anything.
    except Exception:
        return str(token)
    text = text.replace("|", "\\|").replace("`", "'").replace("\n", "⏎")
    return f"`{text}`" if text.strip() else f"`{text}` {token}"
