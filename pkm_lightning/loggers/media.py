"""Images and tables on the loggers that show them: TensorBoard and Weights & Biases. Others ignore them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray


@singledispatch
def show_image(logger: Logger, name: str, image_YXC: NDArray[Any], step: int) -> None:
    """Shows an RGB image of bytes under `name`; call on the first rank."""


@show_image.register
def _(logger: TensorBoardLogger, name: str, image_YXC: NDArray[Any], step: int) -> None:
    logger.experiment.add_image(name, image_YXC, step, dataformats="HWC")


@show_image.register
def _(logger: WandbLogger, name: str, image_YXC: NDArray[Any], step: int) -> None:
    logger.log_image(name, [image_YXC], step=step)


@singledispatch
def show_table(logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
    """Shows a table of Markdown texts under `name`; call on the first rank."""


@show_table.register
def _(logger: TensorBoardLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
    logger.experiment.add_text(name, as_markdown(columns, rows), step)


@show_table.register
def _(logger: WandbLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
    logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown; a cell is one line and may hold any character."""
    lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
