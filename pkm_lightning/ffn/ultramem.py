"""UltraMem: Tucker-scored slots, projected values, one core per slice (Huang et al. 2024, arXiv 2411.12364).

Letters: C cores, which is also slices per row, A = n_keys**2 virtual slots, P projectors, so that N = A / P physical
rows, R Tucker rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import ConfigError, check_integer, check_range
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, Slots, TableRead, TableSpec
from pkm_lightning.ffn.held_tables import hold_tables
from pkm_lightning.ffn.inputs import check_input
from pkm_lightning.ffn.zero_start import zero_rows
from pkm_lightning.memory import TableReference, TuckerKeys, ValueTable, count_parameters, half_key_dim, product_slots
from pkm_lightning.memory.tucker_keys import check_slices, sliced_ids

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["UltraMem"]


class UltraMem(nn.Module):
    """A memory with Tucker-decomposed retrieval and a virtual table `expansion` times larger than the physical one.

    Section 3 of the paper, for each head h:

        I, s_c = the knn slots of `TuckerKeys` and their scores under each core c        (TDQKR, multi-core scoring)
        a      = shuffle[I], projector p(a) = a // N, row n(a) = a % N                   (implicit value expansion)
        z_p    = sum over heads and slots with p(a) = p of [s_1 V^1_n, ..., s_C V^C_n]   (V^c: the c-th slice of V)
        out    = sum over p of W_p^T z_p

    The scores are used without softmax. The virtual row is V~_p = V W_p, but W_p is applied after the sum, so that no
    virtual row is ever written. Each row is read once, whatever the number of cores and projectors.

    | paper | here |
    |---|---|
    | TDQKR: q, K, C | `keys`, a `TuckerKeys`; the selection is approximate, see there |
    | MCS: h, C^(i) | `cores`; slice i of a value is weighted by core i's own score |
    | IVE: E, W_p | `expansion`, `out.weight[:, p * V : (p + 1) * V].T` |
    | virtual memory address shuffle | `shuffle`, (A,) int32, drawn once and kept in checkpoints |
    | m, D_v | `knn`, `value_dim` |
    | tau, alpha | `spectrum_margin`, `spectrum_loss` |

    In training `aux_losses["spectrum"]` is alpha / (rank - 1) * sum over i >= 2 of max(0, lambda_i - tau)**2, a mean
    over heads, lambda the singular values of the summed core: it keeps C near rank 1, where the preselection is exact.
    The paper's skip, which reads early and adds the output layers later, is `placement.mode=parallel` with
    `placement.write_after`.

    Not implemented: the causal depth-wise convolution before the query (no effect in the paper), and queries shared by
    layers.

    Args:
        dim: model dimension D.
        n_layers: layers of the model, for the scale of the initial values.
        table: the value table, which all heads read; None makes one, and the layer owns it.
        n_keys: row keys, and column keys; n_keys**2 virtual slots.
        heads: queries per token H.
        knn: slots read per head K, 1 to n_keys**2.
        key_dim: dimension of a row and a column key together, even.
        value_dim: values per row V, divisible by `cores`; None takes dim // 2.
        rank: Tucker rank R, 1 to n_keys.
        cores: cores C.
        expansion: projectors P; divides n_keys**2.
        spectrum_loss: alpha, 0 or more; 0 disables the loss.
        spectrum_margin: tau, 0 or more.

    Raises:
        ConfigError: a size out of range, sizes that do not divide, or a table of another shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import UltraMem
        >>> UltraMem(dim=8, n_keys=16)(torch.randn(2, 5, 8)).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    position_wise = True

    shuffle: Tensor

    def __init__(
        self,
        *,
        dim: int,
        n_layers: int = 1,
        table: ValueTable | None = None,
        n_keys: int = 256,
        heads: int = 1,
        knn: int = 32,
        key_dim: int = 32,
        value_dim: int | None = None,
        rank: int = 2,
        cores: int = 2,
        expansion: int = 4,
        spectrum_loss: float = 0.001,
        spectrum_margin: float = 0.15,
    ) -> None:
        super().__init__()
        self.keys = TuckerKeys(
            dim=dim,
            heads=heads,
            n_keys=n_keys,
            key_dim=half_key_dim(key_dim),
            knn=knn,
            rank=rank,
            cores=cores,
            query_per_rank=False,
        )
        spec = self.table_spec(
            dim=dim,
            n_layers=n_layers,
            n_keys=n_keys,
            heads=heads,
            knn=knn,
            value_dim=value_dim,
            cores=cores,
            expansion=expansion,
        )
        check_range("ffn.spectrum_loss", spectrum_loss, 0)
        check_range("ffn.spectrum_margin", spectrum_margin, 0)
        named = f"ffn.n_keys={n_keys}, ffn.expansion={expansion}, ffn.cores={cores} and ffn.value_dim={value_dim}"
        (held,) = hold_tables(self, table, spec, named=named)
        self.expansion, self.spectrum_loss, self.spectrum_margin = expansion, spectrum_loss, spectrum_margin
        self.dim, self.reference = dim, TableReference(held)
        self.out = nn.Linear(expansion * spec.dim, dim, bias=False)
        # A buffer, since the learned rows mean nothing without the addresses that they were learned under.
        self.register_buffer("shuffle", torch.empty(n_keys**2, dtype=torch.int32))
        self.reset_parameters()

    @classmethod
    def table_spec(
        cls,
        *,
        dim: int,
        n_layers: int,
        n_keys: int,
        heads: int,
        knn: int,
        value_dim: int | None,
        cores: int,
        expansion: int,
        **_: object,
    ) -> TableSpec:
        """Requests n_keys**2 / expansion rows from N(0, expansion / (2 knn heads n_layers)), as in the paper.

        With W_p from N(0, 1 / (expansion value_dim)) and scores of second moment E[s**2], the output then has the
        variance E[s**2] / (2 n_layers): that of one of the 2 n_layers branches of the residual stream.
        """
        for name, value in (("heads", heads), ("knn", knn), ("cores", cores), ("expansion", expansion)):
            check_integer(f"ffn.{name}", value, low=1)
        slots = product_slots(n_keys)
        if value_dim is not None:
            check_integer("ffn.value_dim", value_dim, low=1)
        values = check_slices(dim // 2 if value_dim is None else value_dim, cores, value_dim)
        if slots % expansion:
            raise ConfigError(
                f"ffn.expansion={expansion} does not divide the {slots} slots of ffn.n_keys={n_keys}; use a divisor, "
                f"or ffn.n_keys={expansion * max(1, round(n_keys / expansion))}."
            )
        std = (expansion / (2 * knn * heads * n_layers)) ** 0.5
        return TableSpec(rows=slots // expansion, dim=values, std=std, slices=cores)

    def reset_parameters(self) -> None:
        """Draws keys and cores, W_p from N(0, 1 / (expansion value_dim)), and a new shuffle of the addresses."""
        self.keys.reset_parameters()
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)
        with torch.no_grad():
            self.shuffle.copy_(torch.randperm(len(self.shuffle), device=self.shuffle.device))

    def zero_output(self) -> None:
        """Sets the rows to zero, or where they must stay every W_p."""
        zero_rows(self, self.reference.table, self.out.weight)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Multiplies every W_p by the stream's length; queries are normalised."""
        with torch.no_grad():
            self.out.weight *= stream_length

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Looks up every token of `x_BTD`; the trace holds physical rows, virtual slots and summed scores."""
        check_input(self, x_BTD, self.dim, context)
        x_TD = x_BTD.flatten(0, -2)
        read = self.keys(x_TD)
        address_THK = self.shuffle[read.ids_THK.long()]
        # Each block of N addresses covers every physical row once, under one projector.
        n_rows = self.reference.table.rows
        row_THK, projector_THK = address_THK % n_rows, address_THK // n_rows
        z_TX = self._expanded(read.scores_THCK, row_THK, projector_THK)
        y_TD = self.out(z_TX.to(x_TD.dtype))
        trace = {}
        if context.observe:
            leading = x_BTD.shape[:-1]
            scores_BTHK = read.scores_THCK.detach().sum(2).unflatten(0, leading)
            trace = {
                "slot_ids": row_THK.unflatten(0, leading),
                "slot_weights": scores_BTHK,
                "virtual_ids": read.ids_THK.unflatten(0, leading),
                "virtual_weights": scores_BTHK,
            }
        return FFNOutput(y_TD.view_as(x_BTD), aux_losses=self._losses(), trace=trace, step_stats=read.step_stats)

    def _expanded(self, scores_THCK: Tensor, row_THK: Tensor, projector_THK: Tensor) -> Tensor:
        """Returns z_p of all projectors side by side, (T, P * V)."""
        tokens, cores = scores_THCK.shape[0], scores_THCK.shape[2]
        ids_TCK = sliced_ids(row_THK.flatten(1), cores)
        # The table sums by projector, which costs P accumulators per token instead of a virtual row per slot.
        groups_TCK = projector_THK.flatten(1).unsqueeze(1).expand_as(ids_TCK)
        z_XPV = self.reference.table(
            ids_TCK.flatten(0, 1),
            scores_THCK.transpose(1, 2).flatten(2).flatten(0, 1),
            groups_TK=groups_TCK.flatten(0, 1),
            n_groups=self.expansion,
        )
        return z_XPV.view(tokens, cores, *z_XPV.shape[1:]).transpose(1, 2).flatten(1)

    def _losses(self) -> dict[str, Tensor]:
        if not self.training or self.spectrum_loss == 0 or self.keys.rank == 1:
            return {}
        excess_HR = (self.keys.spectrum()[:, 1:] - self.spectrum_margin).clamp(min=0)
        return {"spectrum": self.spectrum_loss / (self.keys.rank - 1) * excess_HR.square().sum(-1).mean()}

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Keeps the sign of the singular pair from step to step; see `TuckerKeys`."""
        self.keys.after_step(stats)

    def slots(self) -> list[Slots]:
        """Returns the rows of the table, and the virtual slots that the keys address, `expansion` per row."""
        table, n_keys = self.reference.table, self.keys.n_keys
        rows = Slots(name="slot", count=table.rows, tables=(table,))
        return [rows, Slots(name="virtual", count=n_keys**2, n_keys=n_keys)]

    def reads(self) -> list[TableRead]:
        """Returns one read per slice, with one sum per projector."""
        table, ids = self.reference.table, self.keys.heads * self.keys.knn
        return [TableRead(table=table, ids=ids, reads=table.slices, groups=self.expansion)]

    def cost(self) -> FFNCost:
        """Counts `TuckerKeys.flops`, all P projectors, and a product and a sum per value read."""
        table = self.reference.table
        values_read = self.keys.heads * self.keys.knn * table.dim
        params = count_parameters(self)
        return FFNCost(
            params=params,
            table_params=table.size,
            active_params=params + values_read,
            flops=self.keys.flops() + 2 * (self.out.weight.numel() + values_read),
            lookup_bytes=table.bytes_of(values_read),
        )
