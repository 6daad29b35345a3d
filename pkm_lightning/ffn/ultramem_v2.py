"""UltraMemV2: one-neuron experts found by Tucker keys, in every block (Huang et al. 2025, arXiv 2508.18756)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import check_choice, check_integer, check_range
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, Slots, TableRead, TableSpec
from pkm_lightning.ffn.held_tables import hold_tables
from pkm_lightning.ffn.inputs import check_input
from pkm_lightning.ffn.zero_start import zero_rows
from pkm_lightning.memory import TableReference, TuckerKeys, ValueTable, count_parameters, half_key_dim, product_slots
from pkm_lightning.memory.cures import balance_loss, mean_probabilities
from pkm_lightning.memory.tucker_keys import TuckerRead, check_slices, selected_moments, sliced_ids

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["UltraMemV2"]

# Output variance of the paper's FFN at initialisation, times the number of layers (appendix A).
_FFN_VARIANCE = 0.2


class UltraMemV2(nn.Module):
    """A memory with Tucker-decomposed retrieval, one query per rank, pre-values and one projector, without softmax.

    For each head, over the knn slots k that `TuckerKeys` selects, of score s_k:

        c_k = s_k <P[k], W_pre x>            (pre-values: the slot is a linear expert of one neuron, as in PEER)
        out = W^T sum over heads and slots of c_k V[k]

    As in the paper, values are not expanded and the spectrum loss of UltraMem is dropped. The paper's text has one core
    and a balance over the slots that are read, the defaults here. Its authors' own default is reported to differ in
    both: two cores as in UltraMem, where slice i of a value is weighted by core i's own score, and a balance over all
    preselected rows and columns. `cores=2 balance_counts=preselected` is that variant; its balance loss is larger.

    | paper | here |
    |---|---|
    | TDQKR, one query per rank | `keys`, a `TuckerKeys`; the selection is approximate, see there |
    | pre-values, values | the model's two tables, of one shape: D_p = D_v = `value_dim` |
    | P x | `pre`, dim to value_dim |
    | W | `out`, value_dim to dim |
    | top-m, D_k | `knn`, `key_dim` |
    | balance loss, beta | `balance_loss`, `balance_counts` |

    The open models have D_p = D_v = 192, D_k = 192, top 32 and one head. The paper also has D_p : D_v = 1 : 3, which
    is not implemented: both tables have one shape.

    In training `aux_losses["balance"]` is beta * S * sum over n of f_n p_n, a mean over heads, rows and columns: p the
    mean softmax of the preselecting scores over tokens, f the share of reads (or of preselections) of row (column) n,
    both over the real tokens of the micro-batch of all ranks; beta where either is uniform.

    Not implemented: the causal depth-wise convolution before the query, rings of tables shared by blocks of layers
    (`table.shared` shares one pair between all layers or none).

    Args:
        dim: model dimension D.
        n_layers: layers of the model, for the scale of the initial values.
        table: pre-values and values; None makes both, and the layer owns them.
        n_keys: row keys, and column keys; n_keys**2 slots.
        heads: queries per token H; their outputs are added.
        knn: slots read per head K, 1 to n_keys**2.
        key_dim: dimension of a row and a column key together, even.
        value_dim: values per row V of both tables; None takes dim // 4.
        rank: Tucker rank, 1 to n_keys.
        balance_loss: beta, 0 or more; 0 disables the loss.
        cores: Tucker cores C, one per slice of a row; divides `value_dim`.
        balance_counts: what f counts, `reads` or `preselected`.

    Letters: C cores, which is also slices per row.

    Raises:
        ConfigError: a size out of range, an unknown choice, or tables of another number or shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import UltraMemV2
        >>> UltraMemV2(dim=8, n_keys=16)(torch.randn(2, 5, 8)).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    position_wise = True

    def __init__(
        self,
        *,
        dim: int,
        n_layers: int = 1,
        table: list[ValueTable] | None = None,
        n_keys: int = 256,
        heads: int = 1,
        knn: int = 32,
        key_dim: int = 32,
        value_dim: int | None = None,
        rank: int = 2,
        balance_loss: float = 0.0,
        cores: int = 1,
        balance_counts: str = "reads",
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
            query_per_rank=True,
        )
        spec = self.table_spec(
            dim=dim, n_layers=n_layers, n_keys=n_keys, heads=heads, knn=knn, value_dim=value_dim, cores=cores
        )
        check_range("ffn.balance_loss", balance_loss, 0)
        check_choice("ffn.balance_counts", balance_counts, ("reads", "preselected"))
        named = f"ffn.n_keys={n_keys}, ffn.cores={cores} and ffn.value_dim={value_dim}"
        held = hold_tables(self, table, spec, named=named)
        assert spec.std is not None
        self.balance_loss, self.balance_counts, self.table_std = balance_loss, balance_counts, spec.std
        self.pre_values, self.values = map(TableReference, held)
        self.pre = nn.Linear(dim, spec.dim, bias=False)
        self.out = nn.Linear(spec.dim, dim, bias=False)
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
        cores: int = 1,
        **_: object,
    ) -> TableSpec:
        """Requests two tables of n_keys**2 rows from N(0, sigma**2).

        sigma**2 = 0.2 / (n_layers knn heads (1 + sigma_s**2))

        With <P[k], W_pre x> of variance 1, scores of mean 1 and variance sigma_s**2 (`selected_moments`) and W from
        N(0, 1/value_dim), the output has the variance 0.2 / n_layers: the paper's aim (appendix A, the variance of an
        FFN's output). Its sigma**2 has further factors k_inner h / (d_pre d_v) for its own scales of W_pre, P and W.
        """
        # Called before the constructor, which would check these sizes too late for the formulas below.
        slots = product_slots(n_keys)
        check_integer("ffn.heads", heads, low=1)
        check_integer("ffn.knn", knn, low=1, high=n_keys**2)
        if value_dim is not None:
            check_integer("ffn.value_dim", value_dim, low=1)
        values = check_slices(max(1, dim // 4) if value_dim is None else value_dim, cores, value_dim)
        spread = selected_moments(n_keys, knn)[1]
        std = (_FFN_VARIANCE / (n_layers * knn * heads * (1 + spread))) ** 0.5
        return TableSpec(rows=slots, dim=values, count=2, std=std, slices=cores)

    def reset_parameters(self) -> None:
        """Draws keys and cores, W from N(0, 1/value_dim), and W_pre so that <P[k], W_pre x> has variance 1.

        Both tables are drawn with one sigma, so W_pre corrects for it: N(0, 1 / (dim value_dim sigma**2)).
        """
        self.keys.reset_parameters()
        dim, values = self.out.weight.shape
        nn.init.normal_(self.out.weight, std=values**-0.5)
        nn.init.normal_(self.pre.weight, std=(dim * values) ** -0.5 / self.table_std)

    def zero_output(self) -> None:
        """Sets the values to zero, or where they must stay W; pre-values keep theirs."""
        zero_rows(self, self.values.table, self.out.weight)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Divides W_pre by the input's RMS, and multiplies W by the stream's length; queries are normalised."""
        with torch.no_grad():
            self.pre.weight /= input_rms
            self.out.weight *= stream_length

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Looks up every token of `x_BTD`; the trace holds the slots and their scores."""
        check_input(self, x_BTD, self.pre.in_features, context)
        x_TD = x_BTD.flatten(0, -2)
        read = self.keys(x_TD)
        ids_TCK = sliced_ids(read.ids_THK.flatten(1), self.keys.n_cores)
        # A slot is a neuron: its input weight is a row of the pre-values, its output weight a row of the values.
        pre_XV = self.pre(x_TD).unflatten(-1, (self.keys.n_cores, -1)).flatten(0, 1)
        dots_TCK = self.pre_values.table.dot(pre_XV, ids_TCK.flatten(0, 1)).view(ids_TCK.shape)
        weights_TCK = read.scores_THCK.transpose(1, 2).flatten(2) * dots_TCK.sum(1, keepdim=True)
        y_XV = self.values.table(ids_TCK.flatten(0, 1), weights_TCK.flatten(0, 1))
        y_TD = self.out(y_XV.reshape(len(x_TD), -1).to(x_TD.dtype))
        trace = {}
        if context.observe:
            leading = x_BTD.shape[:-1]
            trace = {
                "slot_ids": read.ids_THK.unflatten(0, leading),
                "slot_weights": read.scores_THCK.detach().sum(2).unflatten(0, leading),
            }
        losses = self._losses(read, context.valid_BT)
        return FFNOutput(y_TD.view_as(x_BTD), aux_losses=losses, trace=trace, step_stats=read.step_stats)

    def _losses(self, read: TuckerRead, valid_BT: Tensor | None) -> dict[str, Tensor]:
        if not self.training or self.balance_loss == 0:
            return {}
        # Slot i * S + j has row key i and column key j, which are balanced separately.
        valid_T = None if valid_BT is None else valid_BT.flatten()
        row_HTK, column_HTK = read.row_HTM, read.column_HTM
        if self.balance_counts == "reads":
            ids_HTK = read.ids_THK.transpose(0, 1)
            row_HTK, column_HTK = ids_HTK // self.keys.n_keys, ids_HTK % self.keys.n_keys
        rows = balance_loss(mean_probabilities(read.row_HTS, valid_T), row_HTK, valid_T)
        columns = balance_loss(mean_probabilities(read.column_HTS, valid_T), column_HTK, valid_T)
        return {"balance": self.balance_loss * (rows + columns) / 2}

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Keeps the sign of the singular pair from step to step; see `TuckerKeys`."""
        self.keys.after_step(stats)

    def slots(self) -> list[Slots]:
        """Returns the slots; slot n is row n of both tables."""
        tables = (self.pre_values.table, self.values.table)
        return [Slots(name="slot", count=tables[0].rows, tables=tables, n_keys=self.keys.n_keys)]

    def reads(self) -> list[TableRead]:
        """Returns the inner products with the pre-values and the weighted sum over the values, one read per slice."""
        ids, cores = self.keys.heads * self.keys.knn, self.keys.n_cores
        pre = TableRead(table=self.pre_values.table, ids=ids, reads=cores, dot=True)
        return [pre, TableRead(table=self.values.table, ids=ids, reads=cores)]

    def cost(self) -> FFNCost:
        """Counts `TuckerKeys.flops`, W_pre and W, and a product and a sum per value read of both tables."""
        table = self.values.table
        values_read = 2 * self.keys.heads * self.keys.knn * table.dim
        params = count_parameters(self)
        return FFNCost(
            params=params,
            table_params=2 * table.size,
            active_params=params + values_read,
            flops=self.keys.flops() + 2 * (self.pre.weight.numel() + self.out.weight.numel() + values_read),
            lookup_bytes=table.bytes_of(values_read),
        )
