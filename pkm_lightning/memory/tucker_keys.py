"""Tucker-decomposed query-key retrieval: the score of slot (i, j) is bilinear in the scores of row i and of column j.

Letters: Q queries per half, R Tucker rank, P values of a sub-key, C cores, M = min(K, S) rows and columns preselected,
F values of all queries, X and Y merged dimensions; 2 is the two halves (rows, columns), and S * S slots are addressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.memory.precision import ieee_scores, score_dtype
from pkm_lightning.memory.query import half_norm
from pkm_lightning.ops import MAX_SUB_KEYS, ranked_topk

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Relative noise of the initial cores, so that the cores, and the ranks of a core, differ from the start.
_CORE_NOISE = 0.02


class TuckerRead(NamedTuple):
    """The slots that `TuckerKeys` selects for every token and head."""

    #: Scores of the slots read under each core, (T, H, C, K), best sum first; no softmax. Differentiable.
    scores_THCK: Tensor
    #: Slot numbers i * n_keys + j, (T, H, K) int32.
    ids_THK: Tensor
    #: The scores that preselect rows, (H, T, S): u^T S_row. Differentiable in queries and keys, not in the cores.
    row_HTS: Tensor
    #: The scores that preselect columns, (H, T, S): t^T S_col.
    column_HTS: Tensor
    #: The rows and the columns that are preselected, (H, T, M) each, best first.
    row_HTM: Tensor
    column_HTM: Tensor
    #: For `after_step`, in training only: the singular pair.
    step_stats: dict[str, Tensor]


class TuckerKeys(nn.Module):
    """Queries, row and column keys, Tucker cores, and the two-stage selection (TDQKR) of Huang et al. 2024.

    For each head (arXiv 2411.12364, section 3.2; with one query per rank, arXiv 2508.18756):

        S_row[a, i] = K_row[a, i] . q_row,  S_col[a, j] = K_col[a, j] . q_col     (all four RMS-normalised)
        S_c[i, j]   = sum over a, b of S_row[a, i] C_c[a, b] S_col[b, j]          (one grid per core)
        read        = top-k of the sum of S_c over cores

    Scoring all S * S slots would cost as much as flat keys. Therefore C = sum_c C_c is approximated by its leading
    singular pair, C ~ lambda u t^T: the M rows of largest u^T S_row and the M columns of largest t^T S_col are
    preselected, and the M * M grid between them is scored with the full C. **The selection is therefore approximate**:

    - for a C of rank 1 it selects the best slots among those with u^T S_row > 0 and t^T S_col > 0, as product top-k
      does; the product of two negative factors is positive as well, but such slots are not considered;
    - for any other C, a slot may have a high score from singular pairs that the preselection ignores;
    - with knn = n_keys or above every slot is in the grid, and the selection is exact for every C.

    The sign of a singular pair is not determined, (u, t) or (-u, -t), but decides which sign of the factors is
    considered. The first pair has sum(u) + sum(t) >= 0, and sum(u) >= 0 where that sum is 0; a later one has the sign
    nearer to the pair of the step before, which `pair` keeps: with a fixed rule the step in which the sum changes its
    sign would exchange all slots. No gradient flows through the selection or the pair. The SVD is that of an R x R
    matrix per head and forward; on a GPU it synchronises with the host. Equal scores rank by lower sub-key in the
    preselection, then by (rank of the row, rank of the column).

    | paper | here |
    |---|---|
    | q_row, q_col | `query`, (2 halves) * heads * queries a half * key_dim, `query_norm` |
    | K_row, K_col | `keys`, (heads, 2, rank, n_keys, key_dim), `key_norm` |
    | C^(1..h) | `cores`, (heads, cores, rank, rank) |
    | r, n, h, m | `rank`, `n_keys`, `cores`, `knn` |

    Not implemented: the causal depth-wise convolution before the query (no effect in the paper), and queries that
    layers share.

    Args:
        dim: model dimension D.
        heads: number of heads H, each with its own queries, keys and cores.
        n_keys: sub-keys per half S.
        key_dim: dimension P of one query and of one sub-key.
        knn: slots read per head K, 1 to n_keys**2, of the grid of M rows and columns.
        rank: Tucker rank R, 1 to n_keys.
        cores: number of cores C; the selection uses their sum.
        query_per_rank: one query per rank (UltraMemV2) instead of one for all of them (UltraMem).

    Raises:
        ConfigError: a size out of range.
    """

    #: A core is a few numbers near a known value, like a gain: weight decay would only shrink the scores.
    parameter_roles: ClassVar[dict[str, str]] = {"cores": "norm", "keys": "key"}
    #: Buffers that checkpoints of version 0.1 lack; they then keep their initial values.
    later_buffers: ClassVar[tuple[str, ...]] = ("pair",)

    #: u and t of the last step, (H, 2, R), times the number of its forwards.
    pair: Tensor

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        n_keys: int,
        key_dim: int,
        knn: int,
        rank: int,
        cores: int,
        query_per_rank: bool,
    ) -> None:
        super().__init__()
        _check_sizes(heads=heads, n_keys=n_keys, key_dim=key_dim, knn=knn, rank=rank, cores=cores)
        self.heads, self.n_keys, self.key_dim, self.knn = heads, n_keys, key_dim, knn
        self.preselected = min(knn, n_keys)
        self.rank, self.n_cores, self.queries = rank, cores, rank if query_per_rank else 1
        self.query = nn.Linear(dim, 2 * heads * self.queries * key_dim, bias=False)
        self.query_norm, self.key_norm = nn.RMSNorm(key_dim), nn.RMSNorm(key_dim)
        self.keys = nn.Parameter(torch.empty(heads, 2, rank, n_keys, key_dim))
        self.cores = nn.Parameter(torch.empty(heads, cores, rank, rank))
        self.register_buffer("pair", torch.empty(heads, 2, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the weights so that the selected scores of each core have mean 1 for inputs of unit variance.

        | weight | initial values |
        |---|---|
        | query | N(0, 1/dim) |
        | keys | N(0, 1), later normalised; gain 1/sqrt(key_dim): the score of a random key is a standard normal |
        | query gain | sqrt(cores / E[Y]), Y the best products of `selected_moments`; 1 where n_keys = 1 |
        | cores | ones / (cores * rank), plus normal noise of 2% of that |
        | pair | ones, so that the sum decides the first sign |

        Without the noise C has the singular value 1 and u = t = ones / sqrt(rank). The paper leaves the initial values
        of the cores open.
        """
        nn.init.normal_(self.query.weight, std=self.query.in_features**-0.5)
        nn.init.normal_(self.keys)
        level = 1 / (self.n_cores * self.rank)
        nn.init.normal_(self.cores, mean=level, std=_CORE_NOISE * level)
        mean, _ = selected_moments(self.n_keys, self.knn)
        nn.init.constant_(self.query_norm.weight, (self.n_cores / mean) ** 0.5 if mean > 0 else 1.0)
        nn.init.constant_(self.key_norm.weight, self.key_dim**-0.5)
        nn.init.ones_(self.pair)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> TuckerRead:
        """Selects slots for every token of `x_TD`; scores are IEEE fp32 whatever the precision of the model."""
        q_TF = self.query(x_TD)
        with ieee_scores(q_TF):
            scores_H2TRS = self._half_scores(q_TF.to(score_dtype(q_TF)))
            cores_HCRR = self.cores.to(scores_H2TRS.dtype)
            u_HR, t_HR = leading_pair(cores_HCRR.sum(1), self.pair)
            rows_HTRS, columns_HTRS = scores_H2TRS.unbind(1)
            row_HTS = (u_HR[:, None, None] @ rows_HTRS).squeeze(-2)
            column_HTS = (t_HR[:, None, None] @ columns_HTRS).squeeze(-2)
            with torch.no_grad():
                # `ranked_topk` instead of torch.topk, whose order of equal scores differs between devices.
                row_HTM, column_HTM = (
                    ranked_topk(scores_HTS, self.preselected) for scores_HTS in (row_HTS, column_HTS)
                )
                row_HTK, column_HTK = self._select(rows_HTRS, columns_HTRS, cores_HCRR.sum(1), row_HTM, column_HTM)
            scores_HTCK = _bilinear(
                _gather_keys(rows_HTRS, row_HTK), cores_HCRR, _gather_keys(columns_HTRS, column_HTK)
            )
        # Contiguous, because torch.compile infers other strides for the result of indexing by a transposed tensor.
        ids_THK = (row_HTK * self.n_keys + column_HTK).int().transpose(0, 1).contiguous()
        stats = {"pair": torch.stack([u_HR, t_HR], dim=1)} if self.training else {}
        return TuckerRead(scores_HTCK.transpose(0, 1), ids_THK, row_HTS, column_HTS, row_HTM, column_HTM, stats)

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Keeps the direction of the step's singular pair, of which `stats` has the sum over its forwards."""
        self.pair.copy_(stats["pair"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in self.later_buffers:
            state_dict.setdefault(f"{prefix}{name}", getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def diagnostics(self, output: TuckerRead, x_TD: Tensor) -> dict[str, Tensor]:
        """Returns norms of queries and sub-keys, extremes of the scores, and their saturation.

        `query_norm`, `key_norm`: mean L2 norms as the scores use them; `score_max`, `score_min`: of the selected slots;
        `weight_top`: mean share of the largest absolute score in the sum of the absolute scores of a head.
        """
        q_TXP = half_norm(self.query_norm, self.query(x_TD).float().unflatten(-1, (-1, self.key_dim)))
        scores_THK = output.scores_THCK.sum(2)
        shares_TH = scores_THK.abs().amax(-1) / scores_THK.abs().sum(-1).clamp(min=1e-20)
        return {
            "query_norm": q_TXP.norm(dim=-1).mean(),
            "key_norm": half_norm(self.key_norm, self.keys.float()).norm(dim=-1).mean(),
            "score_max": scores_THK.amax(),
            "score_min": scores_THK.amin(),
            "weight_top": shares_TH.mean(),
        }

    def spectrum(self) -> Float[Tensor, "H R"]:
        """Computes the singular values of each head's C, largest first, differentiably."""
        with ieee_scores(self.cores):
            return torch.linalg.svdvals(_finite(self.cores.to(score_dtype(self.cores)).sum(1)))

    def flops(self) -> int:
        """Returns the forward FLOPs per token as `torch.utils.flop_counter` counts them.

        Included are the query projection, both half scores, both preselection scores, the grid, and the cores times the
        selected columns. Elementwise operations are not: norms, sums over cores, and the last sum over the rank.
        """
        per_head = (
            2 * self.rank * self.n_keys * (self.key_dim + 1)  # half scores, preselection
            + self.rank * self.preselected * (self.rank + self.preselected)  # grid
            + self.n_cores * self.rank**2 * self.knn
        )
        return 2 * (self.query.weight.numel() + self.heads * per_head)

    def _half_scores(self, q_TF: Tensor) -> Tensor:
        """Returns row and column scores, (H, 2, T, R, S): one matrix product per query over the ranks that use it."""
        shape = (self.heads, 2, self.queries)
        q_TH2QP = half_norm(self.query_norm, q_TF.view(-1, *shape, self.key_dim))
        q_XTP = q_TH2QP.permute(1, 2, 3, 0, 4).flatten(0, 2)
        keys_H2RSP = half_norm(self.key_norm, self.keys.to(q_TF.dtype))
        keys_XYP = keys_H2RSP.reshape(q_XTP.shape[0], -1, self.key_dim)
        scores_XTY = torch.bmm(q_XTP, keys_XYP.transpose(1, 2))
        scores_H2QTRS = scores_XTY.view(*shape, -1, self.rank // self.queries, self.n_keys)
        return scores_H2QTRS.transpose(2, 3).flatten(3, 4)

    def _select(
        self, rows_HTRS: Tensor, columns_HTRS: Tensor, core_HRR: Tensor, row_HTM: Tensor, column_HTM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns rows and columns of the selected slots, (H, T, K) each, from those that are preselected."""
        mixed_HTRM = core_HRR.unsqueeze(1) @ _gather_keys(columns_HTRS, column_HTM)
        grid_HTMM = _gather_keys(rows_HTRS, row_HTM).transpose(-1, -2) @ mixed_HTRM
        best_HTK = ranked_topk(grid_HTMM.flatten(-2), self.knn)
        row_HTK, column_HTK = best_HTK // self.preselected, best_HTK % self.preselected
        return row_HTM.gather(-1, row_HTK), column_HTM.gather(-1, column_HTK)


def leading_pair(
    core_HRR: Float[Tensor, "H R R"], near_H2R: Float[Tensor, "H 2 R"]
) -> tuple[Float[Tensor, "H R"], Float[Tensor, "H R"]]:
    """Returns the singular vectors u, t of the largest singular value, without gradient.

    Of the two signs, that with <u, near[0]> + <t, near[1]> >= 0, and <u, near[0]> >= 0 where that sum is 0.
    """
    with torch.no_grad():
        left_HRR, _, right_HRR = torch.linalg.svd(_finite(core_HRR))
        u_HR, t_HR = left_HRR[..., 0], right_HRR[..., 0, :]
        along_u_HR, along_t_HR = (
            v_HR * near_HR for v_HR, near_HR in zip((u_HR, t_HR), near_H2R.unbind(1), strict=True)
        )
        u_H1, sum_H1 = along_u_HR.sum(-1, keepdim=True), (along_u_HR + along_t_HR).sum(-1, keepdim=True)
        flip_H1 = (sum_H1 < 0) | ((sum_H1 == 0) & (u_H1 < 0))
        return torch.where(flip_H1, -u_HR, u_HR), torch.where(flip_H1, -t_HR, t_HR)


def sliced_ids(row_TK: Int[Tensor, "T K"], cores: int) -> Int[Tensor, "T C K"]:
    """Returns the ids of the slices of rows, which a table reads separately: slice c of row n has the id n * C + c."""
    if cores == 1:
        return row_TK.unsqueeze(1)
    core_C1 = torch.arange(cores, device=row_TK.device).unsqueeze(-1)
    # int64, because n * C + c may exceed int32 where n itself does not.
    return row_TK.unsqueeze(1).long() * cores + core_C1


def check_slices(values: int, cores: int, value_dim: int | None) -> int:
    """Returns `values` per row, the meaning of `ffn.value_dim`, if the cores divide them into equal slices.

    Raises:
        ConfigError: they do not; with a number that would do.
    """
    check_integer("ffn.cores", cores, low=1)
    if values < 1 or values % cores:
        raise ConfigError(
            f"ffn.value_dim={value_dim} gives {values} values per row, which ffn.cores={cores} does not divide "
            f"into equal slices; use ffn.value_dim={cores * max(1, round(values / cores))}."
        )
    return values


def selected_moments(n_keys: int, knn: int) -> tuple[float, float]:
    """Returns mean and relative variance of the scores that a rank-1 C of unit singular value selects initially.

    The row and column factors are then n_keys independent standard normals each. The i-th largest of n has the
    expectation Phi^-1((n - i + 1 - 0.375) / (n + 0.25)) (Blom 1958); the score Y is one of the `knn` largest products
    of the first `knn` of both, or of all. The relative variance is that of these products over the square of their
    mean: the spread within a read, not between tokens. Both are 0 for one key. Where nearly all slots are read,
    products of both signs cancel: the mean counts as half of their root mean square at least.
    """
    # On the CPU, because a model may be built on the meta device.
    rank_M = torch.arange(1, min(knn, n_keys) + 1, dtype=torch.float64, device="cpu")
    normal_M = torch.special.ndtri((n_keys - rank_M + 0.625) / (n_keys + 0.25))
    best_K = torch.outer(normal_M, normal_M).flatten().topk(knn).values
    mean = max(best_K.mean().item(), best_K.square().mean().sqrt().item() / 2)
    return mean, best_K.var(correction=0).item() / mean**2 if mean > 0 else 0.0


def _bilinear(rows_HTRK: Tensor, cores_HCRR: Tensor, columns_HTRK: Tensor) -> Tensor:
    """Returns the sum over a, b of rows[a, k] C_c[a, b] columns[b, k], (H, T, C, K)."""
    mixed_HTXK = cores_HCRR.flatten(1, 2).unsqueeze(1) @ columns_HTRK
    return (mixed_HTXK.unflatten(2, cores_HCRR.shape[1:3]) * rows_HTRK.unsqueeze(2)).sum(3)


def _gather_keys(scores_HTRS: Tensor, key_HTK: Tensor) -> Tensor:
    """Returns the scores of the selected sub-keys under every rank, (H, T, R, K)."""
    return scores_HTRS.gather(-1, key_HTK.unsqueeze(2).expand(-1, -1, scores_HTRS.shape[2], -1))


def _finite(core_HRR: Tensor) -> Tensor:
    """Returns the core with zeros for NaN: LAPACK would raise an error, but a diverged run should end by its loss."""
    return torch.nan_to_num(core_HRR, nan=0.0, posinf=0.0, neginf=0.0)


def _check_sizes(*, heads: int, n_keys: int, key_dim: int, knn: int, rank: int, cores: int) -> None:
    check_integer("ffn.heads", heads, low=1)
    check_integer("ffn.n_keys", n_keys, low=1, high=MAX_SUB_KEYS)
    check_integer("ffn.key_dim", key_dim, low=1)
    check_integer("ffn.knn", knn, low=1, high=n_keys**2)
    check_integer("ffn.cores", cores, low=1)
    check_integer("ffn.rank", rank, low=1)
    if rank > n_keys:
        raise ConfigError(
            f"ffn.rank={rank} is above the number of keys, ffn.n_keys={n_keys}, so that C has more singular pairs than "
            "there are keys; set ffn.rank to 1 to n_keys."
        )
