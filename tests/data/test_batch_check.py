"""The check of batches: every kind of wrong batch gets one sentence, and values are compared where that is cheap."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.data.batch_check import check_batch, check_prompt_batch
from pkm_lightning.errors import DataError

VOCAB = 50
IDS = torch.arange(20).view(2, 10)


def batch(**changes: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "labels": IDS + 1, **changes}


@pytest.mark.parametrize(
    "content",
    [
        batch(),
        batch(labels=torch.full_like(IDS, NO_TARGET), doc_ids=torch.zeros_like(IDS), valid=IDS > 3),
        batch(doc_ids=IDS.int(), extra="anything"),
        batch(labels=torch.where(IDS > 3, IDS + 1, NO_TARGET)),
        batch(labels=torch.full_like(IDS, 7)),
    ],
)
def test_a_good_batch_passes(content: object) -> None:
    check_batch(content, VOCAB)


WRONG: list[tuple[object, str]] = [
    (None, r"must be a dict with input_ids and labels .* got NoneType\."),
    ([1, 2], r"got list\."),
    ({"input_ids": IDS}, r"got \['input_ids'\]\."),
    ({"input_ids": IDS, 3: IDS}, r"got \['3', 'input_ids'\]\."),
    (batch(labels=None), r"batch\['labels'\] is a NoneType; it must be a tensor of int64\."),
    (batch(input_ids=IDS.numpy()), r"batch\['input_ids'\] is a ndarray; it must be a tensor of int64\."),
    (batch(labels=(IDS + 1).int()), r"batch\['labels'\] is torch\.int32; it must be a tensor of int64\."),
    (batch(input_ids=IDS.float()), r"batch\['input_ids'\] is torch\.float32; it must be a tensor of int64\."),
    (batch(doc_ids=IDS.float()), r"batch\['doc_ids'\] is torch\.float32; it must be a tensor of int64\."),
    (batch(valid=torch.ones(2, 10)), r"batch\['valid'\] is torch\.float32; it must be a tensor of bool\."),
    (batch(valid=torch.ones_like(IDS)), r"batch\['valid'\] is torch\.int64; it must be a tensor of bool\."),
    (batch(labels=IDS[:, 1:]), r"\['labels'\] has shape \(2, 9\), input_ids \(2, 10\)"),
    (batch(valid=torch.ones(2, 1, dtype=torch.bool)), r"batch\['valid'\] has shape \(2, 1\)"),
    ({"input_ids": IDS[0], "labels": IDS[0]}, r"has shape \(10,\); it must be \(sequences, tokens\), not empty"),
    ({"input_ids": IDS[:0], "labels": IDS[:0]}, r"has shape \(0, 10\); it must be"),
]
WRONG_VALUES: list[tuple[object, str]] = [
    (
        batch(input_ids=torch.full((2, 10), 50)),
        r"from 50 to 50, .* allows 0 to 49: correct the vocab_size of the data module, .*size=51",
    ),
    (batch(labels=torch.full((2, 10), 77)), r"run from 0 to 77"),
    (batch(input_ids=IDS - 1), r"run from -1 to "),
    (batch(labels=torch.where(IDS == 3, -1, IDS)), r"labels hold -1; allowed: token ids, and -100"),
    (batch(labels=torch.where(IDS == 3, -101, NO_TARGET)), r"labels hold -101"),
]
UNSHIFTED = batch(labels=IDS)


@pytest.mark.parametrize(("content", "message"), [*WRONG, *WRONG_VALUES])
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_batch_is_refused_at_any_time(content: object, message: str, first: bool) -> None:
    with pytest.raises(DataError, match=rf"^batch 5 of the loader.*{message}"):
        check_batch(content, VOCAB, where="batch 5 of the loader", first=first)


def test_labels_that_were_not_shifted_are_refused_in_the_first_batch() -> None:
    with pytest.raises(DataError, match=r"labels equal input_ids: .* shift them by one"):
        check_batch(UNSHIFTED, VOCAB)
    check_batch(UNSHIFTED, VOCAB, first=False)


def test_on_a_device_values_are_left_alone_unless_sampled() -> None:
    for content, _ in WRONG_VALUES:
        assert isinstance(content, dict)
        # The meta device has no values, as a GPU has none that the host can read without waiting.
        elsewhere = {name: value.to("meta") for name, value in content.items()}
        check_batch(elsewhere, VOCAB, sampled=False)
        with pytest.raises((RuntimeError, NotImplementedError)):
            check_batch(elsewhere, VOCAB, sampled=True)
    with pytest.raises(DataError, match="has shape"):
        check_batch({"input_ids": IDS.to("meta"), "labels": IDS[:1].to("meta")}, VOCAB, sampled=False)


@pytest.mark.parametrize("index", [[0, -1], (3, 4), torch.tensor([0, 1])])
def test_a_good_batch_of_prompts_passes(index: object) -> None:
    check_prompt_batch({"prompt": ["a", ""], "index": index}, "batch 0")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "NoneType"),
        (["a"], "list"),
        ({"prompt": ["a"]}, r"\['prompt'\]"),
        ({"prompt": "ab", "index": [0, 1]}, "prompt='ab'"),
        ({"prompt": ["a", 3], "index": [0, 1]}, r"prompt=\['a', 3\]"),
        ({"prompt": ["a"], "index": [0, 1]}, r"index=\[0, 1\]"),
        ({"prompt": ["a"], "index": [0.5]}, r"index=\[0\.5\]"),
        ({"prompt": ["a"], "index": 0}, "index=0"),
        ({"prompt": [], "index": []}, r"prompt=\[\]"),
    ],
)
def test_a_bad_batch_of_prompts_is_refused(content: object, got: str) -> None:
    with pytest.raises(DataError, match=rf"^batch 0 must be a dict with prompt, a list of texts.* got .*{got}"):
        check_prompt_batch(content, "batch 0")
