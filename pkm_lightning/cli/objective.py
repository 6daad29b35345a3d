"""The objective of `fit`: the figure of validation that it returns to a sweeper, refused before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from pkm_lightning.build.instantiate import target_class
from pkm_lightning.callbacks.base import configured
from pkm_lightning.callbacks.evaluate import Evaluate
from pkm_lightning.callbacks.recall import Recall
from pkm_lightning.compare.metric import form_of, kind_of
from pkm_lightning.compare.objective import ALWAYS, BENCHMARKS, ObjectiveError, check_objective, direction_of
from pkm_lightning.data.base import validation_items_of
from pkm_lightning.errors import nearest


def check_objective_of(config: Mapping[str, Any], key: str = "objective") -> None:
    """Refuses an objective that no validation of the run will have, before anything is built.

    Args:
        config: a complete configuration; without an objective nothing is checked.
        key: the configuration key that the user set.

    Raises:
        ObjectiveError: a figure of the test, a misspelt one, or validations that are switched off.
    """
    objective = config.get("objective")
    if objective is None:
        return
    check_objective(key, str(objective))
    direction_of(str(objective), str(config.get("objective_mode") or "auto"))
    if config["trainer"].get("limit_val_batches") == 0:
        raise ObjectiveError(
            f"trainer.limit_val_batches=0 switches off the validations that {key}={objective} is a figure of; leave it "
            "out."
        )
    questions = any(entry.get("val_items") for entry in configured(config, Recall))
    if kind_of(objective.removeprefix("val/")):
        if not questions:
            raise ObjectiveError(
                f"{key}={objective} needs questions at validations; set callbacks.recall.val_items to 1 or more."
            )
    elif objective.startswith(BENCHMARKS):
        if not configured(config, Evaluate):
            raise ObjectiveError(f"{key}={objective} needs callbacks=[default,evaluate]; add it, with its tasks.")
    # A callback of the user's may log what it likes; its name is checked at the first validation.
    elif objective not in ALWAYS and not _has_own_callbacks(config):
        recalls = ("val/recall_FORM", "val/choice_FORM", "val/bits_FORM") if questions else ()
        raise ObjectiveError(
            f"{key}={objective} is no figure that validations of this run have: {', '.join((*ALWAYS, *recalls))}."
            f"{nearest(objective, ALWAYS)}"
        )


def check_questions(data: L.LightningDataModule, objective: str, key: str = "objective") -> None:
    """Refuses an objective that prepared `data` have no validation for, or no questions of its form.

    Raises:
        ObjectiveError: naming the forms that there are.
    """
    if not is_overridden("val_dataloader", data):
        raise ObjectiveError(f"{key}={objective} needs val_dataloader(), which {type(data).__name__} lacks; add it.")
    short = objective.removeprefix("val/")
    if not kind_of(short):
        return
    forms = sorted({item.form for item in validation_items_of(data, 1)})
    if form_of(short) not in forms:
        raise ObjectiveError(
            f"{key}={objective} is about questions of the form {form_of(short)}, which {type(data).__name__} does not "
            f"ask; it asks: {', '.join(forms) or 'none'}.{nearest(form_of(short), forms)}"
        )


def _has_own_callbacks(config: Mapping[str, Any]) -> bool:
    entries = [(name, entry) for name, entry in (config["callbacks"] or {}).items() if entry]
    classes = [target_class(entry, f"callbacks.{name}") for name, entry in entries]
    return any(not cls.__module__.startswith("pkm_lightning.") for cls in classes)
