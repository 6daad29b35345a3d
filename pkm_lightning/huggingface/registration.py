"""Makes the Auto classes of transformers load the folders that `export format=hf` and models with plugins write."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pkm_lightning.huggingface.configuration import PkmLightningConfig
from pkm_lightning.huggingface.modeling import PkmLightningForCausalLM
from pkm_lightning.huggingface.plugged import CAUSAL_MODELS, CONFIGS, DECODERS

AutoConfig.register(PkmLightningConfig.model_type, PkmLightningConfig, exist_ok=True)
AutoModelForCausalLM.register(PkmLightningConfig, PkmLightningForCausalLM, exist_ok=True)
for _config in CONFIGS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _auto, _models in ((AutoModelForCausalLM, CAUSAL_MODELS), (AutoModel, DECODERS)):
    for _model in _models:
        _auto.register(_model.config_class, _model, exist_ok=True)
