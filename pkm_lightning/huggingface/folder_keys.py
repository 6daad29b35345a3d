"""Names that the writer of a folder, which needs no transformers, and the class that reads it share."""

from __future__ import annotations

CLASS = "PkmLightningForCausalLM"
#: Groups of a resolved configuration that decide the model.
GROUPS = ("model", "ffn", "placement", "table")
#: One that a model without further variants lacks.
OPTIONAL_GROUP = "extra_ffns"
#: In front of the class of a model of transformers that has plugins.
PLUGGED_CLASS = "Plugged"
