"""Greedy answers in batches against a step-by-step reference for one prompt at a time."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import Letters, memory_ffns, transformer

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.inference.generation import Answer, Generation, generate, greedy
from pkm_lightning.inference.read_tokens import ReadTokens
from pkm_lightning.inference.sampling import Sampling
from pkm_lightning.model import Transformer

CPU = torch.device("cpu")
PROMPTS = ["ab", "cat", "dog", "eel", "a", "", "what is it?", "x", "ab", "where are we", "12345", "54321"]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Returns an untrained model whose end of text is likely enough for some answers to end."""
    model = transformer(*memory_ffns()).eval()
    model.init_weights(2)
    assert model.unembedding is not None
    with torch.no_grad():
        model.unembedding.weight[0] *= 1.5
    return model


def step_by_step(model: Transformer, prompt: str, max_new_tokens: int) -> str:
    codec = Letters()
    ids, answer = codec.encode(prompt) or [codec.eos_id], []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits_W = model.unembed(model(torch.tensor([ids + answer])).hidden_BTD)[0, -1]
        answer.append(int(logits_W.argmax()))
        if answer[-1] == codec.eos_id:
            break
    return codec.decode(answer).strip()


def test_answers_equal_step_by_step_in_batches_of_any_size(model: Transformer) -> None:
    expected = [step_by_step(model, prompt, 12) for prompt in PROMPTS]
    # Some answers must be cut and others end on their own, at several lengths.
    assert len({len(answer) for answer in expected}) > 3
    assert max(map(len, expected)) > 8
    for batch_size in (2, 512):
        assert greedy(model, Letters(), PROMPTS, device=CPU, max_new_tokens=12, batch_size=batch_size) == expected
    short = greedy(model, Letters(), PROMPTS, device=CPU, max_new_tokens=3)
    assert max(map(len, short)) <= 3
    assert all(answer.startswith(cut) for answer, cut in zip(expected, short, strict=True))


def test_no_prompts_no_answers(model: Transformer) -> None:
    assert greedy(model, Letters(), [], device=CPU) == []


def test_samples_depend_on_seed_and_prompt_and_not_on_the_batch(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=1.0, top_k=20, samples=3, seed=7)
    answers = generate(model, Letters(), PROMPTS, sampling, device=CPU)
    assert [[answer.sample for answer in group] for group in answers] == [[0, 1, 2]] * len(PROMPTS)
    assert len({answer.text for group in answers for answer in group}) > len(PROMPTS)
    assert generate(model, Letters(), PROMPTS, sampling, device=CPU, batch_size=2) == answers
    other = generate(model, Letters(), PROMPTS, dataclasses.replace(sampling, seed=8), device=CPU)
    assert other != answers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_the_tokenizer_does_not_have_are_never_written(model: Transformer, temperature: float) -> None:
    class Sized(Letters):
        def __init__(self, vocab_size: int) -> None:
            self.vocab_size = vocab_size

    def answers(codec: Letters) -> list[list[int]]:
        made = generate(model, codec, PROMPTS, sampling, device=CPU)
        return [answer.ids for group in made for answer in group]

    sampling = Sampling(max_new_tokens=10, temperature=temperature, samples=2)
    whole = answers(Letters())
    assert max(itertools.chain.from_iterable(whole)) >= 30
    assert max(itertools.chain.from_iterable(answers(Sized(30)))) < 30
    assert model.unembedding is not None
    assert answers(Sized(len(model.unembedding.weight))) == whole


def test_an_answer_ends_at_a_stop_text_at_the_end_of_text_or_at_its_length(model: Transformer) -> None:
    plain = generate(model, Letters(), PROMPTS, Sampling(max_new_tokens=12), device=CPU)
    letter = collections.Counter("".join(answer.text for (answer,) in plain)).most_common(1)[0][0]
    stopped = generate(model, Letters(), PROMPTS, Sampling(max_new_tokens=12, stop=("never", letter)), device=CPU)
    assert {answer.ended for (answer,) in plain} == {"eos", "length"}
    assert "stop" in {answer.ended for (answer,) in stopped}
    for (whole,), (cut,) in zip(plain, stopped, strict=True):
        assert cut.text == whole.text.split(letter)[0]
        assert cut.ended == ("stop" if letter in whole.text else whole.ended)
        assert (whole.ended == "length") is (len(whole.ids) == 12)


def test_a_reader_sees_every_answer_grow(model: Transformer) -> None:
    seen: dict[int, list[str]] = {}
    sampling = Sampling(max_new_tokens=6)
    answers = generate(
        model, Letters(), PROMPTS, sampling, device=CPU, watch=lambda a: seen.setdefault(a.prompt, []).append(a.text)
    )
    for number, (answer,) in enumerate(answers):
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen[number]))
        assert seen[number][-1] == answer.text
        assert len(seen[number]) == len(answer.ids) + (answer.ended == "eos")


def test_an_answer_ends_where_the_model_reads_no_more(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=9)
    whole = generate(model, Letters(), PROMPTS, sampling, device=CPU)
    cut = generate(model, Letters(), PROMPTS, sampling, device=CPU, context=13)
    endings = set()
    for prompt, (long,), (short,) in zip(PROMPTS, whole, cut, strict=True):
        # The last token of an answer is never read.
        room = 13 - max(1, len(prompt)) + 1
        assert short.ids == long.ids[:room]
        is_whole = len(long.ids) < room or len(long.ids) == room == sampling.max_new_tokens
        ended = long.ended if is_whole else "context"
        assert short.ended == ended
        endings.add(ended)
    assert endings == {"context", "length", "eos"}


def test_a_prompt_that_the_model_does_not_read_is_refused_first(model: Transformer) -> None:
    forwards: list[Answer] = []
    with pytest.raises(
        ConfigError, match=r"^prompt 7 has 11 tokens, .* sequences of 10 \(1 more are too long\); shorten"
    ):
        generate(model, Letters(), PROMPTS, Sampling(), device=CPU, context=10, watch=forwards.append)
    assert forwards == []


def test_draws_depend_on_no_other_setting(model: Transformer) -> None:
    """A billion tokens reserve nothing, and random numbers are drawn as they are needed."""
    endless = Sampling(max_new_tokens=10**9, temperature=2.0, seed=3)
    long = generate(model, Letters(), ["ab"], endless, device=CPU, context=301)[0][0]
    short = generate(model, Letters(), ["ab"], dataclasses.replace(endless, max_new_tokens=290), device=CPU)[0][0]
    assert long.ids[:290] == short.ids
    numbered = Generation(model, Letters(), ["x", "ab"], dataclasses.replace(endless, max_new_tokens=9), device=CPU,
                          numbers=[5, 0])  # fmt: skip
    numbered.run()
    assert numbered.answers[1][0].ids == short.ids[:9]


def test_what_was_written_remains_after_an_interruption(model: Transformer) -> None:
    def interrupt(answer: Answer) -> None:
        if len(answer.ids) == 3:
            raise KeyboardInterrupt

    whole = generate(model, Letters(), ["cat", "dog"], Sampling(max_new_tokens=9), device=CPU, batch_size=1)
    made = Generation(model, Letters(), ["cat", "dog"], Sampling(max_new_tokens=9), device=CPU, batch_size=1,
                      watch=interrupt)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        made.run()
    made.interrupt()
    (first,), (second,) = made.answers
    assert (first.ids, first.text) == (whole[0][0].ids[:3], Letters().decode(whole[0][0].ids[:3]))
    assert (second.ids, second.text) == ([], "")
    assert first.ended == second.ended == "interrupted"


@pytest.mark.parametrize(
    ("text", "stop", "settled"),
    [
        ("ab", [], "ab"),
        ("ab\ufffd", [], "ab"),
        ("ab<", ["<end>"], "ab"),
        ("a<en", ["<end>", "b"], "a"),
        ("<e", ["x"], "<e"),
    ],
)
def test_what_may_still_change_is_not_settled(text: str, stop: list[str], settled: str) -> None:
    assert Answer(0, 0, [], text).settled(stop) == settled
    assert Answer(0, 0, [], text, "eos").settled(stop) == text


def test_a_longer_text_reads_only_what_is_new(model: Transformer) -> None:
    codec, past, read = Letters(), ReadTokens(model), []

    def answer(prompt: str) -> list[int]:
        made = Generation(model, codec, [codec.encode(prompt)], Sampling(max_new_tokens=5), device=CPU, past=past)
        made.run()
        read.append(made.speed.prompt_tokens)
        return made.answers[0][0].ids

    first = codec.decode(answer("what is it"))
    for prompt in ("what is it" + first + " and why", "what is he", "x"):
        assert answer(prompt) == generate(model, codec, [prompt], Sampling(max_new_tokens=5), device=CPU)[0][0].ids
    # The last token of an answer was never read, and what differs is read again.
    assert read == [10, 9, 2, 1]
    past.forget()
    assert answer("x") == generate(model, codec, ["x"], Sampling(max_new_tokens=5), device=CPU)[0][0].ids


def test_other_tokens_may_end_an_answer_too(model: Transformer) -> None:
    (whole,) = generate(model, Letters(), ["cat"], Sampling(max_new_tokens=9), device=CPU)[0]
    made = Generation(model, Letters(), ["cat"], Sampling(max_new_tokens=9), device=CPU, end_ids=[whole.ids[4]])
    made.run()
    first = whole.ids.index(whole.ids[4])
    assert (made.answers[0][0].ids, made.answers[0][0].ended) == (whole.ids[:first], "eos")


class Scripted:
    """A stand-in for a model that answers each prompt with the given ids, one per forward, and then letters."""

    is_cacheable = True

    def __init__(self, answers: list[list[int]], end_ids: tuple[int, ...] = ()) -> None:
        self.answers, self.end_ids, self.forwards = answers, end_ids, 0

    def new_cache(self, batch: int, capacity: int) -> SimpleNamespace:
        return SimpleNamespace(select=self._select)

    def _select(self, rows_B: torch.Tensor) -> None:
        self.answers = [self.answers[row] for row in rows_B.tolist()]

    def __call__(self, ids_BT: torch.Tensor, **_: object) -> SimpleNamespace:
        step = self.forwards
        self.forwards += 1
        next_B = [answer[step] if step < len(answer) else 5 for answer in self.answers]
        return SimpleNamespace(hidden_BTD=torch.tensor(next_B)[:, None, None])

    def unembed(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden_BD[:, 0], 50)


def test_generation_ends_when_every_answer_has_ended_once() -> None:
    model = Scripted([[2, 0], [3, 4, 4, 0]])
    answers = greedy(model, Letters(), ["a", "b"], device=torch.device("cpu"))  # type: ignore[arg-type]
    assert answers == ["a", "bcc"]
    assert model.forwards == 4


def test_tokens_that_the_model_names_end_an_answer_too() -> None:
    model = Scripted([[2, 9, 3, 0]], end_ids=(9,))
    assert greedy(model, Letters(), ["a"], device=CPU) == ["a"]  # type: ignore[arg-type]
    assert model.forwards == 2


class Shift(nn.Module):
    """A plugin that reads the token before, and states nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x_BTD: torch.Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(self.linear(x_BTD + nn.functional.pad(x_BTD, (0, 0, 1, -1))))


def test_a_plugin_that_reads_earlier_tokens_is_run_on_all_of_them() -> None:
    model = transformer([Shift(), Shift()]).eval()
    model.init_weights(2)
    expected = [step_by_step(model, prompt, 8) for prompt in PROMPTS]
    assert greedy(model, Letters(), PROMPTS, device=CPU, max_new_tokens=8) == expected
    assert len(set(expected)) > 6
