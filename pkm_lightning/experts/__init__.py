"""Parts shared by the mixture-of-experts plugins: router, expert networks, dispatch of tokens, balancing."""

from pkm_lightning.experts.dispatch import run_experts
from pkm_lightning.experts.router import Router
from pkm_lightning.experts.swiglu import SwiGLUExperts

__all__ = ["Router", "SwiGLUExperts", "run_experts"]
