"""Makes `AutoConfig` and `AutoModelForCausalLM` of transformers load the folders that `export format=hf` writes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from pkm_lightning.huggingface.configuration import PkmLightningConfig
from pkm_lightning.huggingface.modeling import PkmLightningForCausalLM

AutoConfig.register(PkmLightningConfig.model_type, PkmLightningConfig, exist_ok=True)
AutoModelForCausalLM.register(PkmLightningConfig, PkmLightningForCausalLM, exist_ok=True)
