"""What Lightning's loggers leave open: TensorBoard's groups of figures, and images and tables on any logger."""

from pkm_lightning.loggers.media import show_image, show_table
from pkm_lightning.loggers.tensorboard import TensorBoardLogger

__all__ = ["TensorBoardLogger", "show_image", "show_table"]
