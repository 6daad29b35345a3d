"""`model=hf`: a pretrained model of transformers as the trunk of every verb, with the logits of transformers.

The module of transformers does the work: this one translates batches, documents and caches. Weights keep the names that
they have in transformers, after `network.`: `network.model.layers.0.mlp.up_proj.weight`.

Letters: M selected positions, W vocabulary, P keys: T, and what is cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pkm_lightning.build.hosts import LAYERS_OF
from pkm_lightning.data.files import expanded
from pkm_lightning.data.pretrained_files import default_cache
from pkm_lightning.errors import ConfigError, DataError, check_flag
from pkm_lightning.ffn import FFNContext
from pkm_lightning.huggingface.checks import check_data, check_ffn, with_sizes
from pkm_lightning.huggingface.diagnostics import add_diagnostics
from pkm_lightning.huggingface.files import PretrainedFiles, make_config, make_network, read_model
from pkm_lightning.huggingface.retrofit import ffn_dim, load_trunk, new_parameters, norm_eps, put_plugins
from pkm_lightning.memory import ValueTable, take_over_tables
from pkm_lightning.model import ModelOutput, PartCost
from pkm_lightning.model.attention import document_mask as mask_of_documents
from pkm_lightning.model.cache import all_cacheable, check_cacheable
from pkm_lightning.model.initialisation import initialise_plugins
from pkm_lightning.model.plugged_layer import PluggedLayer, decoder_call
from pkm_lightning.model.plugin_outputs import ModelReports, merged_outputs
from pkm_lightning.model.rope import document_positions

if TYPE_CHECKING:
    from pkm_lightning.huggingface.trunk_cache import PretrainedCache
    from pkm_lightning.model.cache import DecodingCache

__all__ = ["PretrainedTransformer"]


class PretrainedTransformer(nn.Module):
    """A decoder of transformers with the interface of `pkm_lightning.model.Trunk`.

    Args:
        path: of the folder or GGUF file with the pretrained weights.
        architecture: the content of its `config.json`.
        document_mask: attend within a document only, where the batch has `doc_ids`.
        reset_positions: positions start at 0 with every document, where the batch has `doc_ids`.
        activation_checkpointing: recompute each block in backward instead of keeping its activations.
        plugins: FFN plugins by the number of their layer and `placement.mode`.
        tables: the value tables that the plugins read, each once.

    Attributes:
        network: the model of transformers, `LlamaForCausalLM` for example.

    Raises:
        ConfigError: an architecture that is not supported, or transformers is not installed.
    """

    def __init__(
        self,
        *,
        path: str,
        architecture: Mapping[str, Any],
        document_mask: bool,
        reset_positions: bool,
        activation_checkpointing: bool,
        plugins: Mapping[int, Mapping[str, nn.Module]] = MappingProxyType({}),
        tables: Iterable[ValueTable] = (),
    ) -> None:
        super().__init__()
        for name, value in (("document_mask", document_mask), ("reset_positions", reset_positions)):
            check_flag(f"model.{name}", value)
        check_flag("model.activation_checkpointing", activation_checkpointing)
        self.path, self.document_mask, self.reset_positions = path, document_mask, reset_positions
        self.config = make_config(architecture, f"model.path={path}")
        self.network: Any = make_network(self.config, f"model.path={path}", torch.get_default_dtype())
        attention = "attn" if self.config.model_type == "gpt2" else "self_attn"
        add_diagnostics(block.get_submodule(attention) for block in self.blocks)
        self.tables = nn.ModuleList(tables)
        put_plugins(self.blocks, plugins, self.config)
        take_over_tables(self.network, self.tables)
        self.activation_checkpointing = activation_checkpointing
        self.register_state_dict_post_hook(_without_tied)
        self.register_load_state_dict_pre_hook(_with_tied)
        self.register_load_state_dict_post_hook(lambda module, _: module.network.tie_weights())

    @classmethod
    def around(cls, network: Any) -> PretrainedTransformer:
        """Returns the trunk of a model of transformers that is there already, whose modules it shares.

        Args:
            network: a model with its unembedding, such as one that `replace_ffn` has put plugins into.

        Raises:
            ConfigError: a decoder alone, or a wrapper around a model.
        """
        from transformers import PreTrainedModel

        if not isinstance(network, PreTrainedModel) or network.get_output_embeddings() is None:
            raise ConfigError(
                f"a {type(network).__name__} has no unembedding; give the model of transformers itself, with its head, "
                "such as a LlamaForCausalLM."
            )
        trunk = cls.__new__(cls)
        nn.Module.__init__(trunk)
        trunk.path, trunk.document_mask, trunk.reset_positions = network.name_or_path, True, True
        trunk.config, trunk.network, trunk.tables = network.config, network, nn.ModuleList()
        trunk._activation_checkpointing = network.is_activation_checkpointing
        return trunk

    @classmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Returns `config` with the architecture, sizes, vocabulary and tokenizer that the model's files hold.

        That of a saved run holds them already, and no file is read.

        Raises:
            ConfigError: an FFN or an architecture that is not offered, or a tokenizer of another model.
            DataError: files that are missing or damaged.
            CheckpointError: weights of another architecture.
        """
        check_ffn(config)
        model = config["model"]
        if "architecture" in model:
            return with_sizes(config)
        if not isinstance(model.get("path"), str):
            raise ConfigError(f"model.path={model.get('path')} is no path; give that of a folder or a .gguf file.")
        cache_dir = (config.get("data") or {}).get("cache_dir")
        files = PretrainedFiles.find(model["path"], expanded(cache_dir) if cache_dir else default_cache())
        settings = make_config(files.architecture, f"model.path={model['path']}")
        ends = files.stop_ids[0] if len(files.stop_ids) == 1 else files.stop_ids or None
        found = {
            "path": str(files.path),
            "architecture": {**files.architecture, "eos_token_id": ends},
            "dim": settings.hidden_size,
            "n_layers": settings.num_hidden_layers,
            "ffn_dim": ffn_dim(settings),
            "norm_eps": norm_eps(settings),
            "vocab_size": settings.vocab_size,
            "tokenizer_digest": None if files.tokenizer is None else files.tokenizer.digest,
        }
        check_data(config, files, settings)
        files.check_layers(settings.num_hidden_layers)
        with torch.device("meta"):
            arguments = {name: model[name] for name in ("document_mask", "reset_positions", "activation_checkpointing")}
            files.check_weights(cls(path=found["path"], architecture=files.architecture, **arguments).network)
        return with_sizes({**config, "model": {**model, **found}})

    @property
    def activation_checkpointing(self) -> bool:
        """Whether blocks are recomputed in backward."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self._activation_checkpointing = on
        if on:
            # The reentrant variant, which torch advises against, would need an input that requires a gradient.
            self.network.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.network.activation_checkpointing_disable()

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        embedding: nn.Embedding = self.network.get_input_embeddings()
        return embedding

    @property
    def is_tied(self) -> bool:
        """Whether the model unembeds with the embedding's matrix."""
        return self.network.get_output_embeddings().weight is self.embedding.weight

    @property
    def tied_unembedding(self) -> None:
        """None: transformers registers a shared matrix in both modules, and engines find it there."""
        return None

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers of transformers."""
        decoder = self.network.base_model
        blocks: nn.ModuleList = getattr(decoder, LAYERS_OF[_kind(self.config)])
        return blocks

    @property
    def value_tables(self) -> list[ValueTable]:
        """All value tables: those that the model owns and those that a plugin owns itself."""
        return [module for module in self.modules() if isinstance(module, ValueTable)]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, such as that of a turn of a conversation and that of a document."""
        named = self.config.eos_token_id
        return tuple(named) if isinstance(named, list) else () if named is None else (int(named),)

    @property
    def is_cacheable(self) -> bool:
        """Whether all FFN plugins state that they read no other token, or take earlier ones from a cache."""
        return all_cacheable(self.plugins())

    def plugins(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yields layer, name within the layer and module of each FFN plugin; FFNs that layers keep are none."""
        for layer in self._plugged_layers():
            for name, plugin in layer.named_plugins():
                yield layer.number, name, plugin

    def init_weights(self, seed: int, *, replaced: bool = False) -> None:
        """Reads the pretrained weights, and draws those of plugins and tables from `seed`.

        Raises:
            DataError: the model's files are not there any more.
            CheckpointError: they have changed.
        """
        initialise_plugins(self, seed)
        if replaced:
            return
        path = Path(self.path)
        if not path.exists():
            raise DataError(
                f"model.path={path} does not exist any more, and no checkpoint holds its weights yet; put it back, or "
                "start again with model.path=ITS_PLACE and resume=never."
            )
        embedding = self.embedding.weight
        # On the CPU whatever the surrounding device context is, and from there into the parameters that there are.
        with torch.device("cpu"):
            read = read_model(path, self.config, embedding.dtype)
        load_trunk(self.network, read.state_dict())

    def compile_blocks(self) -> None:
        """Compiles each block in place, which leaves parameter names unchanged."""
        for block in self.blocks:
            block.compile()

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        doc_ids_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        observe: bool = False,
        cache: DecodingCache | None = None,
    ) -> ModelOutput:
        """Returns hidden states for token ids; see `Transformer.forward`.

        Raises:
            ValueError: `cache` with `doc_ids_BT`, another batch, or more tokens than it has room for.
        """
        positions_BT, mask_B1TP = None, None
        if cache is not None:
            if doc_ids_BT is not None:
                raise ValueError("cache: a cached sequence is one document; do not pass doc_ids_BT.")
            positions_BT, mask_B1TP = cache.begin(input_ids_BT, valid_BT)
        elif doc_ids_BT is not None:
            # Whole masks: from positions alone transformers would guess where documents begin.
            mask_B1TP = mask_of_documents(doc_ids_BT if self.document_mask else torch.zeros_like(doc_ids_BT))
            positions_BT = document_positions(doc_ids_BT) if self.reset_positions else None
        plugged = self._plugged_layers()
        # Outside of the decoder only where plugins may ask for it: otherwise transformers embeds the ids.
        embedding_BTD = self.embedding(input_ids_BT) if plugged else None
        context = FFNContext(input_ids_BT, valid_BT, doc_ids_BT, observe, embedding_BTD=embedding_BTD)
        with decoder_call(plugged, context, None if cache is None else cache.layers) as call:
            decoded = self.network.base_model(
                **({"input_ids": input_ids_BT} if embedding_BTD is None else {"inputs_embeds": embedding_BTD}),
                attention_mask=self._masks(mask_B1TP, input_ids_BT, cache),
                position_ids=positions_BT,
                cache=None if cache is None else cache.states,  # type: ignore[attr-defined]
                use_cache=cache is not None,
            )
        if cache is not None:
            cache.advance(input_ids_BT.shape[1])
        output = ModelOutput(decoded.last_hidden_state)
        reports = ModelReports(output)
        for layer, outputs in call.outputs.items():
            reports.add(layer, merged_outputs(output.hidden_BTD, outputs))
        reports.finish()
        return output

    def unembed(self, hidden_MD: Tensor) -> Tensor:
        """Returns logits over the vocabulary for any selection of hidden states, (..., D) -> (..., W)."""
        logits: Tensor = self.network.get_output_embeddings()(hidden_MD)
        return logits

    def new_cache(self, batch: int, capacity: int) -> PretrainedCache:
        """Returns an empty cache for `batch` sequences of at most `capacity` tokens, padding included.

        Raises:
            ConfigError: more tokens than a model with learned positions has.
            ValueError: an FFN plugin may read earlier tokens in other ways than from a cache.
        """
        from pkm_lightning.huggingface.trunk_cache import PretrainedCache

        check_cacheable(self.plugins())
        limit = learned_positions(self.config)
        if limit is not None and capacity > limit:
            raise ConfigError(
                f"{capacity} tokens per sequence are more than the {limit} positions that the model has learned; leave "
                "extrapolate out, or lower max_new_tokens."
            )
        return PretrainedCache(
            n_layers=len(self.blocks), batch=batch, capacity=capacity, device=self.embedding.weight.device
        )

    def own_cost(self, context: int) -> PartCost:
        """Returns the cost of the layers and norms, with `context` tokens in attention.

        An `mlp` that a plugin stands beside is counted here, as are the norms in front of plugins. Every matrix of a
        layer multiplies every token; biases and gains count no FLOPs. Of learned positions one row is active.
        """
        settings, embedding = self.config, self.embedding.weight
        new = new_parameters(self.blocks)
        inside = [p for block in self.blocks for p in block.parameters() if p not in new]
        head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        attention = 4 * context * settings.num_attention_heads * head_dim * settings.num_hidden_layers
        decoder = sum(p.numel() for p in self.network.base_model.parameters() if p is not embedding and p not in new)
        limit = learned_positions(settings)
        return PartCost(
            active_params=decoder - (0 if limit is None else (limit - 1) * settings.hidden_size),
            flops=2 * sum(p.numel() for p in inside if p.ndim >= 2) + attention,
        )

    def _plugged_layers(self) -> list[PluggedLayer]:
        return [block for block in self.blocks if isinstance(block, PluggedLayer)]

    def _masks(
        self, mask_B1TP: Tensor | None, input_ids_BT: Tensor, cache: DecodingCache | None
    ) -> Tensor | dict[str, Tensor | None] | None:
        """Returns the mask for transformers; with windows, by kind of layer where it distinguishes them.

        None leaves a plain causal mask to transformers, which has faster kernels.
        """
        window: int | None = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        end = input_ids_BT.shape[1] + (0 if cache is None else cache.length)
        if window is None or end <= window or (kinds and "sliding_attention" not in kinds):
            return mask_B1TP
        if mask_B1TP is None and cache is None:
            return None
        columns_P = torch.arange(end, device=input_ids_BT.device)
        rows_T1 = columns_P[end - input_ids_BT.shape[1] :, None]
        if mask_B1TP is None:
            mask_B1TP = (columns_P <= rows_T1)[None, None]
        windowed_B1TP = mask_B1TP & (columns_P > rows_T1 - window)
        return {"full_attention": mask_B1TP, "sliding_attention": windowed_B1TP} if kinds else windowed_B1TP

    def _apply(self, fn: Any, recurse: bool = True) -> PretrainedTransformer:
        # Frequencies stay in fp32 when weights are cast, as transformers itself keeps them: bf16 has 8 bits for a
        # position of thousands.
        kept = {name: buffer for name, buffer in self.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)
        for name, frequencies in kept.items():
            owner, _, buffer = name.rpartition(".")
            device = self.get_buffer(name).device
            setattr(self.get_submodule(owner), buffer, frequencies.to(device))
        return self


def learned_positions(config: Any) -> int | None:
    """Returns the number of positions that a model with a table of them has, None for rotary positions."""
    return int(config.max_position_embeddings) if _kind(config) == "gpt2" else None


def _kind(config: Any) -> str:
    """Returns the `model_type` of the decoder; a model that `replace_ffn` has changed has one of its own besides."""
    return str(getattr(config, "trunk_type", config.model_type))


def _without_tied(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leaves a tied unembedding out of a state dict: its matrix is there as the embedding's."""
    assert isinstance(module, PretrainedTransformer)
    if module.is_tied:
        state.pop(f"{prefix}network.lm_head.weight", None)


def _with_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Gives it back before a state dict is loaded."""
    assert isinstance(module, PretrainedTransformer)
    if module.is_tied:
        name = next(n for n, p in module.named_parameters() if p is module.embedding.weight)
        if f"{prefix}{name}" in state:
            state.setdefault(f"{prefix}network.lm_head.weight", state[f"{prefix}{name}"])
