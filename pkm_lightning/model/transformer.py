"""A decoder-only transformer (Llama's architecture) with one FFN plugin per layer.

Letters: M selected positions, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pkm_lightning.errors import check_flag, check_integer
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.memory import ValueTable, take_over_tables
from pkm_lightning.memory.norm import RMSNorm
from pkm_lightning.memory.precision import score_dtype
from pkm_lightning.model.accounting import attention_flops
from pkm_lightning.model.attention import Attention, AttentionInputs, document_mask
from pkm_lightning.model.block import Block, named_plugins
from pkm_lightning.model.cache import DecodingCache, all_cacheable, check_cacheable
from pkm_lightning.model.initialisation import initialise
from pkm_lightning.model.plugin_outputs import ModelReports
from pkm_lightning.model.rope import document_positions, rope_table
from pkm_lightning.model.trunk import ModelOutput, PartCost


class TiedUnembedding(nn.Module):
    """An unembedding with the matrix of `embedding`, which stays registered in the transformer alone."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        # In a tuple, or `nn.Module` would register the embedding a second time and checkpoints would hold it twice.
        self._embedding = (embedding,)

    @property
    def weight(self) -> Tensor:
        """The embedding's matrix, (W, D)."""
        return self._embedding[0].weight

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """Returns logits, (..., D) -> (..., W)."""
        return functional.linear(hidden_MD, self.weight)


class Transformer(nn.Module):
    """A transformer of embedding, blocks, final norm and unembedding.

    Args:
        vocab_size: vocabulary W.
        dim: model dimension D.
        n_heads: attention heads.
        n_kv_heads: key-value heads; divides `n_heads`.
        ffns: one plugin per layer.
        before, after: plugins that add to the residual stream before or after a layer, by its number.
        tables: the value tables that the model registers; tables of a plugin that are not among them stay its own.
        write_after: layers between a plugin's read and the layer after which its deferred output is added.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of the RMSNorms.
        tied: unembed with the embedding's matrix.
        document_mask: attend within a document only, where the batch has `doc_ids`.
        reset_positions: positions start at 0 with every document, where the batch has `doc_ids`.
        activation_checkpointing: recompute each block in backward instead of keeping its activations.

    Example:
        >>> import torch
        >>> from pkm_lightning import Dense, MemoryPlus, Transformer
        >>> ffns = [Dense(dim=8, n_layers=2, hidden_dim=16), MemoryPlus(dim=8, n_keys=16)]
        >>> model = Transformer(vocab_size=50, dim=8, n_heads=2, n_kv_heads=2, ffns=ffns)
        >>> model.unembed(model(torch.randint(50, (2, 5))).hidden_BTD).shape
        torch.Size([2, 5, 50])
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        ffns: Sequence[nn.Module],
        before: Mapping[int, nn.Module] = MappingProxyType({}),
        after: Mapping[int, nn.Module] = MappingProxyType({}),
        tables: Iterable[ValueTable] = (),
        write_after: int = 0,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        tied: bool = False,
        document_mask: bool = True,
        reset_positions: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_integer("model.vocab_size", vocab_size, low=2)
        check_integer("model.dim", dim, low=1)
        check_integer("model.n_heads", n_heads, low=1)
        for name, value in (
            ("tied", tied),
            ("document_mask", document_mask),
            ("reset_positions", reset_positions),
            ("activation_checkpointing", activation_checkpointing),
        ):
            check_flag(f"model.{name}", value)
        self.head_dim, self.rope_theta, self.write_after = dim // n_heads, rope_theta, write_after
        self.document_mask, self.reset_positions = document_mask, reset_positions
        self.activation_checkpointing = activation_checkpointing
        self.tables = nn.ModuleList(tables)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            Block(
                attention=Attention(dim=dim, n_heads=n_heads, n_kv_heads=n_kv_heads),
                ffn=ffn,
                dim=dim,
                norm_eps=norm_eps,
                before=before.get(layer),
                after=after.get(layer),
            )
            for layer, ffn in enumerate(ffns)
        )
        take_over_tables(self.blocks, self.tables)
        self.norm: nn.RMSNorm = RMSNorm(dim, eps=norm_eps)
        self.unembedding = None if tied else nn.Linear(dim, vocab_size, bias=False)
        self.tied_unembedding = TiedUnembedding(self.embedding) if tied else None

    @property
    def value_tables(self) -> list[ValueTable]:
        """All value tables: those that the model owns and those that a plugin owns itself."""
        return [module for module in self.modules() if isinstance(module, ValueTable)]

    @property
    def is_tied(self) -> bool:
        """Whether the model unembeds with the embedding's matrix."""
        return self.unembedding is None

    def plugins(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yields layer, name within the layer and module of each FFN plugin."""
        for layer, block in enumerate(self.blocks):
            for name, plugin in named_plugins(block):  # type: ignore[arg-type]
                yield layer, name, plugin

    def init_weights(self, seed: int, *, replaced: bool = False) -> None:
        """Draws every weight from `seed`; see `pkm_lightning.model.initialisation`.

        Also where they are `replaced` by a checkpoint, which need not hold buffers of later versions.
        """
        initialise(self, seed)

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
        """Returns hidden states for token ids; with `observe` also the traces of the plugins.

        With `cache` the ids continue the sequences that it holds, and are added to it.

        Raises:
            ValueError: `cache` with `doc_ids_BT`, another batch, or more tokens than it has room for.
        """
        output = ModelOutput(self.embedding(input_ids_BT))
        dtype = score_dtype(output.hidden_BTD)
        if cache is None:
            shared = self._attention_inputs(input_ids_BT, doc_ids_BT, dtype)
        elif doc_ids_BT is None:
            positions_BT, mask_B1TP = cache.begin(input_ids_BT, valid_BT)
            shared = AttentionInputs(*rope_table(positions_BT, self.head_dim, self.rope_theta, dtype), mask_B1TP)
        else:
            raise ValueError("cache: a cached sequence is one document; do not pass doc_ids_BT.")
        context = FFNContext(input_ids_BT, valid_BT, doc_ids_BT, observe, embedding_BTD=output.hidden_BTD)
        deferred: dict[int, Tensor] = {}
        reports = ModelReports(output)
        for layer, block in enumerate(self.blocks):
            if cache is None:
                result = self._run_block(block, output.hidden_BTD, shared, context)
            else:
                result = block(output.hidden_BTD, shared, context, cache.layers[layer])
            output.hidden_BTD = result.y_BTD
            if result.deferred_BTD is not None:
                deferred[layer + self.write_after] = result.deferred_BTD
            # A plugin defers to this very layer with write_after=0, hence after the entry above.
            if layer in deferred:
                output.hidden_BTD = output.hidden_BTD + deferred.pop(layer)
            reports.add(layer, result)
        if cache is not None:
            cache.advance(input_ids_BT.shape[1])
        reports.finish()
        output.hidden_BTD = self.norm(output.hidden_BTD)
        return output

    @property
    def end_ids(self) -> tuple[int, ...]:
        """None: a text ends with the end token of its tokenizer."""
        return ()

    @property
    def is_cacheable(self) -> bool:
        """Whether all FFN plugins state that they read no other token, or take earlier ones from a cache."""
        return all_cacheable(self.plugins())

    def new_cache(self, batch: int, capacity: int) -> DecodingCache:
        """Returns an empty cache for `batch` sequences of at most `capacity` tokens, padding included.

        Raises:
            ValueError: an FFN plugin may read earlier tokens in other ways than from a cache.
        """
        check_cacheable(self.plugins())
        device = self.embedding.weight.device
        return DecodingCache(n_layers=len(self.blocks), batch=batch, capacity=capacity, device=device)

    def unembed(self, hidden_MD: Tensor) -> Tensor:
        """Returns logits over the vocabulary for any selection of hidden states, (..., D) -> (..., W)."""
        # Both are modules, because engines that shard parameters gather them around the forward of their module.
        unembed = self.tied_unembedding if self.unembedding is None else self.unembedding
        assert unembed is not None
        logits: Tensor = unembed(hidden_MD)
        return logits

    def own_cost(self, context: int) -> PartCost:
        """Returns the cost of attention and norms, with `context` tokens in attention."""
        blocks: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        modules = [m for b in blocks for m in (b.attention, *b.norms())] + [self.norm]
        return PartCost(
            active_params=sum(p.numel() for m in modules for p in m.parameters()),
            flops=sum(attention_flops(block, context) for block in blocks),
        )

    def _attention_inputs(self, input_ids_BT: Tensor, doc_ids_BT: Tensor | None, dtype: torch.dtype) -> AttentionInputs:
        if doc_ids_BT is not None and self.reset_positions:
            positions_BT = document_positions(doc_ids_BT)
        else:
            positions_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).unsqueeze(0)
        mask_B1TP = document_mask(doc_ids_BT) if doc_ids_BT is not None and self.document_mask else None
        return AttentionInputs(*rope_table(positions_BT, self.head_dim, self.rope_theta, dtype), mask_B1TP)

    def _run_block(self, block: nn.Module, x_BTD: Tensor, shared: AttentionInputs, context: FFNContext) -> FFNOutput:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # The reentrant variant, which torch advises against, would need an input that requires a gradient.
            result: FFNOutput = checkpoint(block, x_BTD, shared, context, use_reentrant=False)
            return result
        result = block(x_BTD, shared, context)
        return result
