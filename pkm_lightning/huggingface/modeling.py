"""Our transformer as a model of transformers: `from_pretrained`, `generate`, `save_pretrained`, a loss for labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from pkm_lightning.build.instantiate import check_trusted
from pkm_lightning.build.model import build_model
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import HasRowIds, UsesTokenizer
from pkm_lightning.huggingface.configuration import PkmLightningConfig
from pkm_lightning.huggingface.foreign_cache import ForeignCache
from pkm_lightning.model import Transformer
from pkm_lightning.model.transformer import TiedUnembedding

__all__ = ["PkmLightningForCausalLM"]

_log = logging.getLogger(__name__)


class PkmLightningForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer` with any FFN plugin, and its unembedding.

    Args:
        config: as `export format=hf` writes it.
        trust_config: whether it may name classes outside of pkm_lightning, lightning and torch, such as a plugin of
            your own; `from_pretrained(folder, trust_config=True)` passes it on.

    Raises:
        ConfigError: a class that may not be named or cannot be imported, or sizes that do not fit.
    """

    config_class = PkmLightningConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    # Layers share tables and the rotary angles, so that a model is never divided between devices.
    _no_split_modules = ["Transformer"]  # noqa: RUF012  transformers declares it so

    def __init__(self, config: PkmLightningConfig, *, trust_config: bool = False) -> None:
        super().__init__(config)
        groups = config.transformer
        if groups is None:
            raise CheckpointError(f"{_place(config)}: transformer is missing; write the folder with: export format=hf.")
        if not trust_config:
            check_trusted(groups, _place(config), "load it with from_pretrained(folder, trust_config=True)")
        self.transformer: Transformer = build_model(groups)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Returns the model of a folder, as any `from_pretrained` does.

        Raises:
            CheckpointError: the folder lacks weights, which would otherwise start at random.
        """
        wanted = options.pop("output_loading_info", False)
        options.setdefault("use_safetensors", True)  # the other format is a pickle
        loaded: Any = super().from_pretrained(*arguments, output_loading_info=True, **options)
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{_place(model.config)} describes weights that the folder lacks ({missing[0]}); write it again with: "
                "export format=hf."
            )
        return (model, info) if wanted else model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *arguments: Any, **options: Any) -> Any:
        """Changes the number of tokens, as of any model of transformers.

        Raises:
            ValueError: tokens address the rows of tables, which another number would leave without rows or addresses.
        """
        is_new = new_num_tokens not in (None, self.config.vocab_size)
        if is_new and any(isinstance(plugin, HasRowIds) for _, _, plugin in self.transformer.plugins()):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}): tokens address the tables of this model, which was made "
                f"for {self.config.vocab_size}; train one with a larger model.vocab_size."
            )
        return super().resize_token_embeddings(new_num_tokens, *arguments, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Returns logits (B, T, W), and the loss where there are labels.

        Args:
            input_ids: (B, T).
            attention_mask: 0 at padding, (B, P) for the P - T cached tokens and the T new ones; None: no padding.
            cache: of transformers, to which the tokens are added.
            labels: (B, T), -100 where there is no target; moved by one position here. In training mode the auxiliary
                losses of the plugins are added to the loss.
            use_cache: whether to make and return a cache.
            logits_to_keep: positions from the end whose logits are computed, or their indices; 0: all.

        Raises:
            ValueError: an attention mask that is not (B, P), or a cache that this model cannot use.
        """
        if use_cache and cache is None and self.transformer.is_cacheable:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            self._check_cache(cache)
        output = self._run(input_ids, attention_mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTW = self.transformer.unembed(output.hidden_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTW, labels=labels, vocab_size=logits_BTW.shape[-1])
            if self.training:
                loss = loss + sum(output.aux_losses.values())
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTW, cache=cache)

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Any:
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions; give one number per token, (B, T).")
        if cache is None and (attention_mask is None or bool(attention_mask.all())):
            return self.transformer(input_ids)
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is None:
            valid_BP = input_ids.new_ones(input_ids.shape[0], past + input_ids.shape[1], dtype=torch.bool)
        else:
            valid_BP = attention_mask.bool()
        view = ForeignCache(cache, valid_BP, len(self.transformer.blocks))
        valid_BT = valid_BP[:, past:] if view.is_padded else None
        return self.transformer(input_ids, valid_BT=valid_BT, cache=view)

    def _check_cache(self, cache: Cache) -> None:
        if not self.transformer.is_cacheable:
            raise ValueError(
                "cache: an FFN plugin of the model is neither position_wise nor uses_past; pass use_cache=False."
            )
        if cache.is_compileable:
            raise ValueError(
                "cache: one of fixed size, as cache_implementation='static' makes it, does not serve; leave that out."
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the arguments of the next forward: the whole sequence where a plugin may read earlier tokens."""
        if not self.transformer.is_cacheable:
            next_sequence_length = cache = None
            kwargs["use_cache"] = False
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, cache=cache, **kwargs
        )
        # Positions follow from the attention mask.
        inputs.pop("position_ids", None)
        return inputs

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding."""
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding, and with it the matrix of a tied unembedding."""
        assert isinstance(value, nn.Embedding)
        self.transformer.embedding = value
        if self.transformer.tied_unembedding is not None:
            self.transformer.tied_unembedding = TiedUnembedding(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the unembedding; None where it is the embedding's matrix."""
        return self.transformer.unembedding

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the unembedding."""
        self.transformer.unembedding = new_embeddings

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws all weights, when a model is made from a configuration alone."""
        if not any(getattr(parameter, "_is_hf_initialized", False) for parameter in self.parameters()):
            self.transformer.init_weights(int(torch.randint(2**31, ())))
            self._bind_end_token()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves a module as it is; transformers (5.24) would not call this for one without parameters of its own."""

    def _bind_end_token(self) -> None:
        """Gives plugins the end token of the configuration, as `fit` gives them the tokenizer of its data."""
        if self.config.eos_token_id is None:
            return
        for _, _, plugin in self.transformer.plugins():
            if isinstance(plugin, UsesTokenizer):
                try:
                    plugin.bind_tokenizer(_EndToken(self.config.eos_token_id))
                # Folded tokens need texts, which no configuration has. The end token was taken before.
                except ConfigError as error:
                    _log.warning("a new model from a configuration alone: %s", error)


@dataclass(frozen=True)
class _EndToken:
    """A tokenizer of which no more is known."""

    eos_id: int


def _place(config: PkmLightningConfig) -> str:
    return f"{config.name_or_path}/config.json" if config.name_or_path else "the configuration"
