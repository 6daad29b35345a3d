"""Tiny models to look into, a tokenizer of letters, and reads that are left out by other means than a mask.

Letters: M lines per call, K lines per read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from ffn.plugin_contract import Case, built
from torch import Tensor, nn

from pkm_lightning.experts import SwiGLUExperts
from pkm_lightning.inspection.slot_sets import inspected_readers
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer

CASES = [
    Case("memory"),
    Case("memory_plus"),
    Case("pkm"),
    Case("peer", {"glu": True}),
    Case("ultramem", {"value_dim": 6, "cores": 2}),
    Case("ultramem_v2", {"value_dim": 6, "cores": 2}),
    Case("engram", {"row_dim": 5}),
    Case("ple", {"value_dim": 5}),
    Case("stem"),
    Case("moe"),
    Case("moe_expert_choice"),
]
#: The end token of `LetterTokenizer`.
END = 49


class LetterTokenizer:
    """49 letters, one token each, and the end of a text."""

    eos_id = END
    vocab_size = 50

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 48 for letter in text]

    def encode_answer(self, answer: str) -> list[int]:
        return self.encode(answer)  # which no space precedes: it is no letter

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(48 + token) for token in ids if token != END)

    def token(self, token: int) -> str:
        return "<end>" if token == END else self.decode([token])


def letters(count: int, seed: int = 5) -> str:
    """Returns a text of `count` tokens."""
    ids = torch.randint(END, (count,), generator=torch.Generator().manual_seed(seed))
    return LetterTokenizer().decode(ids.tolist())


def model_of(case: Case) -> Transformer:
    return copy.deepcopy(built(case)).eval()


def probabilities(model: Transformer, text: str) -> Tensor:
    """Returns p of all tokens behind each token of a text, (T, W), by one forward."""
    with torch.no_grad():
        hidden_BTD = model(torch.tensor([LetterTokenizer().encode(text)])).hidden_BTD
        return model.unembed(hidden_BTD)[0].softmax(-1)


def emptied(model: Transformer) -> Transformer:
    """Returns a copy whose tables and experts give zeros."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, ValueTable):
                module.weight.zero_()
            if isinstance(module, SwiGLUExperts):
                module.out.zero_()
    return copied


def without_read(model: Transformer, name: str, token: int, read: int, tokens: int) -> Transformer:
    """Returns a copy in which a read takes a row of zeros behind the table's rows, or drops the output of its expert.

    Args:
        model: the model.
        name: of the reader; other layers that share its tables are not touched.
        token, read: which of its reads.
        tokens: of the text, which the copy reads in one sequence.
    """
    copied = copy.deepcopy(model)
    reader = inspected_readers(copied)[name]
    running: list[bool] = []
    reader.plugin.register_forward_pre_hook(lambda *_: running.append(True))
    reader.plugin.register_forward_hook(lambda *_: running.clear())
    for table in reader.slots.tables:
        _redirect(table, running, token, read, tokens)
    if not reader.slots.tables:
        experts: Any = reader.plugin.experts
        experts.__class__, experts.place = _WithoutExpert, (token, read)
    return copied


def _redirect(table: ValueTable, running: list[bool], token: int, read: int, tokens: int) -> None:
    lines = table.n_lines
    zeros_1V = table.weight.new_zeros(1, table.weight.shape[1])
    table.weight = nn.Parameter(torch.cat([table.weight.detach(), zeros_1V]), requires_grad=False)
    table.stage = None

    def other_ids(ids_MK: Tensor) -> Tensor:
        if not running:
            return ids_MK
        per_token, ids_MK = len(ids_MK) // tokens, ids_MK.clone()
        ids_MK[token * per_token : (token + 1) * per_token, read] = lines
        return ids_MK

    start, dot, gather = table.start, table.dot, table.gather
    replaced: Any = table
    replaced.start = lambda ids, *more, **named: start(other_ids(ids), *more, **named)
    replaced.dot = lambda x, ids: dot(x, other_ids(ids))
    replaced.gather = lambda ids: gather(other_ids(ids))


class _WithoutExpert(SwiGLUExperts):
    """Experts of which one choice of one token gives nothing.

    `run_experts` sorts the choices by expert, so that the row of a choice is its rank among the ids.
    """

    place: tuple[int, int]
    ids_TK: Tensor

    def masked(self, value_TKX: Tensor, ids_TK: Tensor) -> Tensor:
        self.ids_TK = ids_TK
        return value_TKX

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        token, read = self.place
        flat = token * self.ids_TK.shape[1] + read
        row = self.ids_TK.flatten().sort(stable=True).indices.tolist().index(flat)
        y_MD = super().forward(x_MD, counts_E)
        y_MD[row] = 0
        return y_MD
