"""What a model that learns something new has lost: questions about what it knew, its loss and its distance on text.

The distance is KL(start || model), the mean over positions of sum_w p(w) ln(p(w) / q(w)), p of the starting model and q
of the model. For it the starting model's whole log-probabilities are stored, of a fixed sample of positions.

Letters: M positions with a target, W vocabulary, R rows of a parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from pkm_lightning.data.base import NO_TARGET, Batch, TextCodec
from pkm_lightning.data.held_out import held_out_batches
from pkm_lightning.errors import RunDirectoryError

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pkm_lightning.data.tokenizer import Tokenizer
    from pkm_lightning.model import Transformer

#: Values of a parameter that are hashed at a time.
_VALUES_AT_ONCE = 1 << 22
#: Of which the factors of a hash are drawn; any constant does.
_HASH_SEED = 2412_09764


class Drift(NamedTuple):
    """How a model differs from another one on a sample.

    Args:
        loss: mean negative log-likelihood of the targets, in nats.
        kl: mean KL divergence from the other model, in nats; 0 of a model from itself.
    """

    loss: float
    kl: float


@rank_zero_only
def report_unmeasured(key: str, learned: Sequence[Any], known: Sequence[Any], sample: Sequence[Any]) -> None:
    """Logs what is not measured for want of questions or text, and the keys below `key` that name some."""
    missing = [
        text
        for text, content in (
            (f"what is learned (set {key}.facts=FACTS.jsonl)", learned),
            (f"answers to what was known (set {key}.known=RUN or FACTS.jsonl)", known),
            (f"loss and KL on other text (set {key}.text=FILE)", sample),
        )
        if not content
    ]
    if missing:
        _log.warning("%s does not measure %s", key, ", ".join(missing))


def parameters_in_memory(model: Transformer) -> dict[str, Tensor]:
    """Returns the parameters by name, without tables that stay in their file."""
    mapped = {id(table.weight) for table in model.value_tables if table.is_mapped}
    return {name: p.detach() for name, p in model.named_parameters() if id(p) not in mapped}


def sample_of_text(tokenizer: TextCodec, text: str, *, positions: int, seq_len: int) -> list[Batch]:
    """Returns the first `positions` next-token targets of `text` (fewer if it is short), a sequence per batch.

    Args:
        tokenizer: of the model.
        text: of which about four characters per position are read.
        positions: targets altogether.
        seq_len: tokens per sequence, 1 or more.
    """
    # More characters per token than any vocabulary has on average, so that a corpus need not be tokenised whole.
    ids = tokenizer.encode(text[: 16 * positions])[: positions + 1]
    batches = []
    for start in range(0, len(ids) - 1, seq_len):
        window = torch.tensor([ids[start : start + seq_len + 1]])
        batches.append({"input_ids": window[:, :-1], "labels": window[:, 1:]})
    return batches


def sample_of_run(tokenizer: Tokenizer, folder: Path, positions: int) -> list[Batch]:
    """Returns the first held-out sequences of a run with `positions` targets altogether (fewer if it has fewer).

    Args:
        tokenizer: of the run.
        folder: its held-out data.
        positions: targets altogether.

    Raises:
        DataError: the folder is damaged.
    """
    sample: list[Batch] = []
    remaining = positions
    for batch in held_out_batches(folder, tokenizer.pad_id, tokenizer.vocab_size):
        targets = torch.nonzero(batch["labels"] != NO_TARGET)
        labels_BT = batch["labels"].clone()
        labels_BT[tuple(targets[remaining:].T)] = NO_TARGET
        remaining -= len(targets)
        sample.append({**batch, "labels": labels_BT})
        if remaining <= 0:
            break
    return sample


# Uncompiled: batches have many lengths.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def log_probabilities(model: Transformer, batch: Batch, *, device: torch.device) -> Tensor:
    """Returns the log-probabilities of all tokens at the positions with a target, (M, W) in fp32 on the host."""
    inputs = {name: value.to(device) for name, value in batch.items()}
    hidden_BTD = model(inputs["input_ids"], doc_ids_BT=inputs.get("doc_ids"), valid_BT=inputs.get("valid")).hidden_BTD
    logits_MW = model.unembed(hidden_BTD[inputs["labels"] != NO_TARGET])
    return functional.log_softmax(logits_MW.float(), -1).cpu()


def start_log_probabilities(model: Transformer, sample: Sequence[Batch], *, device: torch.device) -> Tensor:
    """Returns the log-probabilities of a whole sample, (M, W), 4 * W bytes per position."""
    return torch.cat([log_probabilities(model, batch, device=device) for batch in sample])


def drift(model: Transformer, sample: Sequence[Batch], start_MW: Tensor, *, device: torch.device) -> Drift:
    """Returns how `model`, in evaluation mode, differs on `sample` from the model whose log-probabilities these are."""
    nats, divergence, first = 0.0, 0.0, 0
    for batch in sample:
        now_MW = log_probabilities(model, batch, device=device)
        before_MW = start_MW[first : first + len(now_MW)]
        first += len(now_MW)
        targets_M = batch["labels"][batch["labels"] != NO_TARGET].cpu()
        nats += float(functional.nll_loss(now_MW, targets_M, reduction="sum"))
        # In fp64: terms of both signs cancel, down to a sum that is small against each of them.
        divergence += float((before_MW.double().exp() * (before_MW.double() - now_MW.double())).sum())
    return Drift(nats / first, divergence / first)


def row_digests(tensor: Tensor) -> Tensor:
    """Returns a hash of 64 bits of each row of `tensor`, (R, ...) to (R,); of a vector, of each number."""
    rows = tensor.detach().reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.detach().reshape(-1, 1)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits_RC = rows.contiguous().view(kinds[rows.element_size()])
    # Odd factors: then no single number can change without the sum, which wraps around, doing so.
    dice = torch.Generator().manual_seed(_HASH_SEED)
    factors_C = torch.randint(-(2**62), 2**62, (bits_RC.shape[1],), generator=dice).to(bits_RC.device) * 2 + 1
    block = max(1, _VALUES_AT_ONCE // max(1, bits_RC.shape[1]))
    return torch.cat([(part.long() * factors_C).sum(-1) for part in bits_RC.split(block)]).cpu()


def parameter_digests(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the hashes of the rows of each parameter by its name."""
    return {name: row_digests(parameter) for name, parameter in parameters.items()}


def bytes_changed(parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> int:
    """Returns the bytes of all rows whose hash is not the one `before`: what a patch of the model would hold."""
    changed = 0
    for name, parameter in parameters.items():
        now_R = row_digests(parameter)
        rows = int((now_R != before[name]).sum()) if name in before else len(now_R)
        changed += rows * parameter.numel() // max(1, len(now_R)) * parameter.element_size()
    return changed


def read_start(path: Path) -> dict[str, Tensor]:
    """Returns the distributions and hashes of a starting model from the file of a run that began with it.

    Raises:
        RunDirectoryError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"{path} of the starting model is missing or damaged ({error}); restore it.") from None
