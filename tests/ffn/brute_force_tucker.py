"""Independent references of UltraMem and UltraMemV2, which score and expand every virtual slot.

Letters: C cores, R Tucker rank, A = S * S virtual slots, P values of a sub-key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pkm_lightning.ffn import UltraMem, UltraMemV2
from pkm_lightning.memory import TuckerKeys


class Scores(NamedTuple):
    grid_THCA: Tensor  # of every slot under every core
    row_THS: Tensor  # u^T S_row
    column_THS: Tensor


def rms_normalised(x_XP: Tensor, gain_P: Tensor) -> Tensor:
    return x_XP / x_XP.square().mean(-1, keepdim=True).sqrt() * gain_P.to(x_XP.dtype)


def leading_pair(core_RR: Tensor) -> tuple[Tensor, Tensor]:
    """Computes u from the eigenvectors of C C^T, and t = C^T u / lambda."""
    core_RR = core_RR.detach()
    values_R, vectors_RR = torch.linalg.eigh(core_RR @ core_RR.T)
    u_R = vectors_RR[:, -1]
    t_R = core_RR.T @ u_R / values_R[-1].sqrt()
    sign = -1 if u_R.sum() + t_R.sum() < 0 else 1
    return sign * u_R, sign * t_R


def all_scores(keys: TuckerKeys, x_TD: Tensor, q_TF: Tensor | None = None) -> Scores:
    """Scores all slots; `q_TF`, if given, replaces the query projection of `x_TD`."""
    wide = torch.float64
    q_TF = x_TD @ keys.query.weight.T if q_TF is None else q_TF
    q_TH2QP = q_TF.to(wide).view(len(x_TD), keys.heads, 2, keys.queries, keys.key_dim)
    q_TH2QP = rms_normalised(q_TH2QP, keys.query_norm.weight)
    keys_H2RSP = rms_normalised(keys.keys.to(wide), keys.key_norm.weight)
    grids, rows, columns = [], [], []
    for t, h in torch.cartesian_prod(torch.arange(len(x_TD)), torch.arange(keys.heads)).tolist():
        halves = []
        for half in range(2):
            of_ranks = [
                keys_H2RSP[h, half, a] @ q_TH2QP[t, h, half, a if keys.queries > 1 else 0] for a in range(keys.rank)
            ]
            halves.append(torch.stack(of_ranks))
        row_RS, column_RS = halves
        grids.append(torch.stack([(row_RS.T @ core_RR @ column_RS).flatten() for core_RR in keys.cores[h].to(wide)]))
        u_R, t_R = leading_pair(keys.cores[h].to(wide).sum(0))
        rows.append(u_R @ row_RS)
        columns.append(t_R @ column_RS)
    shape = (len(x_TD), keys.heads)
    return Scores(*(torch.stack(part).unflatten(0, shape) for part in (grids, rows, columns)))


def ranked(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def two_stage(scores: Scores, k: int) -> Tensor:
    """Selects the k best rows, the k best columns and the k best of the grid between them, (T, H, K)."""
    tokens, heads, _, _ = scores.grid_THCA.shape
    total_THA = scores.grid_THCA.detach().sum(2)
    size = scores.row_THS.shape[-1]
    read = []
    for t, h in torch.cartesian_prod(torch.arange(tokens), torch.arange(heads)).tolist():
        rows = ranked(scores.row_THS[t, h].tolist(), k)
        columns = ranked(scores.column_THS[t, h].tolist(), k)
        candidates = [i * size + j for i in rows for j in columns]
        read.append([candidates[n] for n in ranked(total_THA[t, h, candidates].tolist(), k)])
    return torch.tensor(read).view(tokens, heads, k)


def ultramem(layer: UltraMem, table_NV: Tensor, x_TD: Tensor, q_TF: Tensor | None = None) -> Tensor:
    """Writes out the virtual table V~_p = V W_p, one slice per core, and reads it slot by slot."""
    scores = all_scores(layer.keys, x_TD, q_TF)
    ids_THK = two_stage(scores, layer.keys.knn)
    n_rows, values = table_NV.shape
    cores = layer.keys.n_cores
    slices = [slice(c * values // cores, (c + 1) * values // cores) for c in range(cores)]
    projectors = layer.out.weight.T.split(values)
    outputs = []
    for t in range(len(x_TD)):
        out_D = torch.zeros(layer.out.out_features, dtype=torch.float64)
        for h in range(layer.keys.heads):
            for slot in ids_THK[t, h].tolist():
                address = int(layer.shuffle[slot])
                projector_VD, row_V = projectors[address // n_rows], table_NV[address % n_rows]
                for c, part in enumerate(slices):
                    out_D = out_D + scores.grid_THCA[t, h, c, slot] * (row_V[part] @ projector_VD[part])
        outputs.append(out_D)
    return torch.stack(outputs)


def ultramem_v2(
    layer: UltraMemV2, pre_values_AV: Tensor, values_AV: Tensor, x_TD: Tensor, q_TF: Tensor | None = None
) -> Tensor:
    """Runs each slot as an expert of one linear neuron: <P[slot], W_pre x> * (V[slot] W), slice c times score c."""
    scores = all_scores(layer.keys, x_TD, q_TF)
    pre_values_AV, values_AV = (table_LV.reshape(layer.keys.n_keys**2, -1) for table_LV in (pre_values_AV, values_AV))
    width = values_AV.shape[1] // layer.keys.n_cores
    ids_THK = two_stage(scores, layer.keys.knn)
    outputs = []
    for t in range(len(x_TD)):
        out_D = torch.zeros(layer.out.out_features, dtype=torch.float64)
        for h in range(layer.keys.heads):
            for slot in ids_THK[t, h].tolist():
                neuron = pre_values_AV[slot] @ (layer.pre.weight @ x_TD[t])
                scores_V = scores.grid_THCA[t, h, :, slot].repeat_interleave(width)
                out_D = out_D + neuron * (layer.out.weight @ (scores_V * values_AV[slot]))
        outputs.append(out_D)
    return torch.stack(outputs)


def spectrum_loss(keys: TuckerKeys, alpha: float, margin: float) -> Tensor:
    """Computes alpha / (rank - 1) * sum over i >= 2 of max(0, lambda_i - tau)**2, a mean over heads."""
    losses = []
    for cores_CRR in keys.cores:
        core_RR = cores_CRR.sum(0)
        values = torch.linalg.eigvalsh(core_RR.T @ core_RR).clamp(min=0).sqrt().flip(0)
        losses.append(sum(torch.relu(value - margin) ** 2 for value in values[1:]))
    return alpha / (keys.rank - 1) * torch.stack(losses).mean()  # type: ignore[arg-type]


def balance_loss(keys: TuckerKeys, x_TD: Tensor, valid_T: Tensor, beta: float, counts: str = "reads") -> Tensor:
    """Computes beta * S * sum over n of f_n p_n over valid tokens, a mean over heads, rows and columns."""
    scores = all_scores(keys, x_TD)
    ids_THK = two_stage(scores, keys.knn)
    losses = []
    for h in range(keys.heads):
        for half, router_THS in enumerate((scores.row_THS, scores.column_THS)):
            ids = ids_THK[valid_T, h].flatten().tolist()
            picks = [n // keys.n_keys if half == 0 else n % keys.n_keys for n in ids]
            if counts == "preselected":
                picks = router_THS[valid_T, h].topk(min(keys.knn, keys.n_keys), dim=-1).indices.flatten().tolist()
            p_S = router_THS[valid_T, h].softmax(-1).mean(0)
            losses += [sum(picks.count(n) / len(picks) * p_S[n] for n in range(keys.n_keys)) * keys.n_keys]
    return beta * torch.stack(losses).mean()  # type: ignore[arg-type]
