"""Train from Python: compose a configuration, fit it with Lightning, ask the model.

python examples/train_from_python.py                     # a minute or two on a laptop's CPU
python examples/train_from_python.py ffn=dense seed=2    # with Hydra overrides
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from pkm_lightning.build.run import resolve
from pkm_lightning.inference.generation import greedy
from pkm_lightning.training import LanguageModule

#: Capitals and currencies alone, which a model this small learns in few steps.
SETTING = ("data.people=0", "data.cities=0", "data.control_subjects=10", "trainer.max_steps=400")
PROMPTS = ("The capital of France is", "Latvia calls its capital")


def train(overrides: Sequence[str]) -> dict[str, str]:
    """Trains the default model on facts about countries and returns its answers to `PROMPTS`."""
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        composed: Any = OmegaConf.to_container(compose("config", overrides=[*SETTING, *overrides]), resolve=True)
    run = resolve(composed)  # fills in what follows from data and sizes, and refuses what cannot work
    unknown = f", without those of {', '.join(run.cost.unknown)}" if run.cost.unknown else ""
    print(f"{run.cost.params_total:,} parameters, {run.cost.params_active:,} of them active per token{unknown}")

    module = LanguageModule(run.config)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=run.config["trainer"]["max_steps"],
        max_epochs=-1,
        use_distributed_sampler=False,  # the data module orders its rows by seed and step
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=run.data)
    answers = greedy(module.model.eval(), run.data.tokenizer, PROMPTS, device=module.device)
    return dict(zip(PROMPTS, answers, strict=True))


if __name__ == "__main__":
    for prompt, answer in train(sys.argv[1:]).items():
        print(f"{prompt} -> {answer}")
