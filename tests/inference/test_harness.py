"""The adapter's conventions: what a request becomes, in which order, and what does not fit."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_group import Groups
from toys import Letters, dense, transformer

from pkm_lightning.errors import ConfigError
from pkm_lightning.inference import harness
from pkm_lightning.inference.generation import Answer, generate
from pkm_lightning.inference.harness import HarnessModel
from pkm_lightning.inference.harness_sampling import sampling_of
from pkm_lightning.inference.sampling import Sampling
from pkm_lightning.model import Transformer

CPU = torch.device("cpu")
TEXTS = ["ab cd", "a", "where is it", "", "the cat is here and there and everywhere"]


def adapter(**changes: Any) -> HarnessModel:
    settings: dict[str, Any] = {"context": 16, "device": CPU, "batch_size": 3, "progress": False}
    return HarnessModel(toy(), Letters(), **{**settings, **changes})


def toy() -> Transformer:
    return transformer([dense(2), dense(2)]).eval()


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=arguments_of_one, task_name="toy") for arguments_of_one in arguments]


def log_p(ids: list[int], n: int) -> float:
    """Returns ln p of the last `n` of `ids`, by one forward."""
    model = toy()
    with torch.no_grad():
        logits_TW = model.unembed(model(torch.tensor([ids[:-1]])).hidden_BTD)[0].log_softmax(-1)
    return sum(float(logits_TW[t - 1, ids[t]]) for t in range(len(ids) - n, len(ids)))


def test_likelihoods_come_in_the_order_of_the_requests() -> None:
    pairs = [(context, " yes" if i % 2 else " no no") for i, context in enumerate([*TEXTS, *TEXTS])]
    encode, expected = Letters().encode, []
    for context, continuation in pairs:
        # An empty context is the end of the text before, and what is too long loses its beginning.
        ids = ([*encode(context)] or [0]) + encode(continuation)
        expected.append(log_p(ids[-17:], len(continuation)))
    scores = adapter().loglikelihood(requests(*pairs))
    assert [nats for nats, _ in scores] == pytest.approx(expected, abs=1e-5)


def test_a_token_that_begins_texts_stands_before_each() -> None:
    encode = Letters().encode
    scores = adapter(begin_id=7).loglikelihood(requests(("", "ab"), ("b", "cd")))
    expected = [log_p([7, *encode("ab")], 2), log_p([7, *encode("bcd")], 2)]
    assert [nats for nats, _ in scores] == pytest.approx(expected, abs=1e-5)


def test_a_token_that_is_named_and_not_put_before_texts_is_the_empty_context() -> None:
    encode, model = Letters().encode, adapter(prefix_id=7)
    scores = model.loglikelihood(requests(("", "ab"), ("b", "cd")))
    expected = [log_p([7, *encode("ab")], 2), log_p(encode("bcd"), 2)]
    assert [nats for nats, _ in scores] == pytest.approx(expected, abs=1e-5)
    assert model.loglikelihood_rolling(requests(("ab",))) == pytest.approx(expected[:1], abs=1e-5)


def test_a_text_longer_than_the_context_is_predicted_in_windows() -> None:
    long = "abcdefghijklmnopqrstuvwxyz0123456789"
    ids = Letters().encode(long)
    # 16 tokens after the end of a text, 16 after the last of them, and the last 4 with as much context as fits.
    expected = log_p([0, *ids[:16]], 16) + log_p(ids[15:32], 16) + log_p(ids[19:36], 4)
    totals = adapter().loglikelihood_rolling(requests(("",), (long,), ("ab",)))
    assert totals == pytest.approx([0.0, expected, log_p([0, *Letters().encode("ab")], 2)], abs=1e-5)


def test_answers_are_those_of_generation_in_the_order_of_the_requests() -> None:
    kwargs = [{"until": ["a"], "max_gen_toks": 6}, {"until": [], "max_gen_toks": 2, "do_sample": False}]
    asked = [(text, kwargs[i % 2]) for i, text in enumerate(TEXTS[:4])]
    answers = adapter().generate_until(requests(*asked))
    for (text, settings), answer in zip(asked, answers, strict=True):
        sampling = Sampling(max_new_tokens=settings["max_gen_toks"], stop=tuple(settings["until"]))
        ((expected,),) = generate(toy(), Letters(), [text], sampling, device=CPU)
        assert answer == expected.text


def test_a_long_prompt_loses_its_beginning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def echo(
        model: Transformer, codec: Letters, prompts: list[str], sampling: Sampling, **_: Any
    ) -> list[list[Answer]]:
        return [[Answer(0, 0, [], codec.decode(codec.encode(prompt)))] for prompt in prompts]

    monkeypatch.setattr(harness, "generate", echo)
    with caplog.at_level(logging.WARNING):
        read = adapter().generate_until(requests(*((text, {"max_gen_toks": 6}) for text in TEXTS)))
    assert read == [text[-10:] for text in TEXTS]
    assert "2 of 5 prompts do not fit in the context of 16 tokens and lose their beginning" in caplog.text


def test_nothing_follows_with_certainty() -> None:
    assert adapter().loglikelihood(requests(("ab", ""), ("ab", "c")))[0] == (0.0, True)


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="a continuation has 17 tokens, more than the context of 16"):
        adapter().loglikelihood(requests(("a", "b" * 17)))
    adapter().loglikelihood(requests(("a", "b" * 16)))


def sampled(**kwargs: Any) -> Sampling:
    return sampling_of(kwargs, context=300, task="toy")


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, Sampling(max_new_tokens=256)),
        ({"until": "x", "max_new_tokens": 5}, Sampling(max_new_tokens=5, stop=("x",))),
        ({"until": ["x", "", "y"], "max_gen_toks": 5}, Sampling(max_new_tokens=5, stop=("x", "y"))),
        ({"max_gen_toks": 5, "do_sample": False, "temperature": 0.7}, Sampling(max_new_tokens=5)),
        ({"max_gen_toks": 5, "do_sample": True}, Sampling(max_new_tokens=5, temperature=1.0)),
        ({"max_gen_toks": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 0, "num_beams": 1},
         Sampling(max_new_tokens=5, temperature=0.5, top_p=0.9)),
    ],
)  # fmt: skip
def test_generation_settings_of_a_task(kwargs: dict[str, Any], expected: Sampling) -> None:
    assert sampled(**kwargs) == expected


def test_a_short_context_leaves_half_of_it_to_an_answer_of_no_stated_length() -> None:
    assert sampling_of({}, context=40, task="toy").max_new_tokens == 20


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"max_gen_toks": 300}, r"toy: answers of 300 tokens \(max_gen_toks\) leave no room .* context of 300"),
        ({"num_beams": 4}, r"toy: generation_kwargs.num_beams=4 is not offered; allowed: until, max_gen_toks"),
    ],
)
def test_generation_settings_that_cannot_be_followed_are_refused(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sampled(**kwargs)


def all_kinds() -> tuple[Any, ...]:
    lm = adapter()
    pairs = requests(*((text, " yes") for text in TEXTS))
    answers = lm.generate_until(requests(*((text, {"max_gen_toks": 4}) for text in TEXTS)))
    return lm.loglikelihood(pairs), lm.loglikelihood_rolling(requests(("abc",))), answers


def test_ranks_share_the_requests_and_all_get_all_results(ranks: Groups) -> None:
    """The one rolling request leaves a rank without work, whose forwards the other one needs all the same."""
    likelihoods, totals, answers = all_kinds()
    for of_rank in ranks(2).run(all_kinds):
        assert [nats for nats, _ in of_rank[0]] == pytest.approx([nats for nats, _ in likelihoods], abs=1e-5)
        assert (of_rank[1], of_rank[2]) == (pytest.approx(totals, abs=1e-5), answers)


def test_a_model_that_has_diverged_is_said_to_have(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with caplog.at_level(logging.WARNING):
        HarnessModel(model, Letters(), context=16, device=CPU, batch_size=3, progress=False).loglikelihood(
            requests(("a", "b"), ("a", "c"))
        )
        ((greedy,), (drawn, _)) = (
            generate(model, Letters(), ["ab"], Sampling(**settings), device=CPU)[0]
            for settings in ({}, {"temperature": 1.0, "samples": 2})
        )
    assert (greedy.text, greedy.ended, drawn.ended) == ("", "nan", "nan")
    said = [record.getMessage() for record in caplog.records]
    assert "2 of 2 likelihoods are no numbers (NaN)" in said[0]
    assert "2 of 2 answers end where the logits are no numbers (NaN)" in said[2]
