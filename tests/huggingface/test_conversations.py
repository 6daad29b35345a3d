"""Conversations as training data: tokens and learned mask of transformers, for templates with marks and without."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
from tokenizer_makers import sentencepiece_model
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pkm_lightning.data.conversations import CHATML, DEFAULT_TEMPLATE, conversation_segments
from pkm_lightning.data.sentencepiece_file import read_model
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.data.tokenizer import Tokenizer, train_bpe

CONTROL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|turn|>"]
#: As the templates of ChatML models that add a system message of their own.
WITH_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
#: As the templates of models whose turns have headers, and whose text begins with a token of its own.
HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] | trim + '<|turn|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|turn|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
"""
TEMPLATES = {"default": DEFAULT_TEMPLATE, "chatml": CHATML, "with system": WITH_SYSTEM, "headers": HEADERS}

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CONVERSATIONS: dict[str, list[tuple[str, str]]] = {
    "one turn": [(USER, "What is the capital?"), (ASSISTANT, "The city of Paris.")],
    "several turns": [(SYSTEM, "Be brief."), *[(USER, "And now?"), (ASSISTANT, "Now, 12 cities.")] * 3],
    "unicode": [
        (USER, "na\u00efve \u6771\u4eac \u2028 \U0001f600\x00\x0b"),
        (ASSISTANT, "\u6f22\u5b57\nand\tmore \U0001f1eb\U0001f1f7"),
    ],
    "empty answers": [(USER, "Say nothing."), (ASSISTANT, ""), (USER, ""), (ASSISTANT, "Yes.")],
    "names of control tokens": [(USER, "<eos> <|im_end|>"), (ASSISTANT, "<|im_start|> is a token.")],
    "no last answer": [(USER, "One?"), (ASSISTANT, "One."), (USER, "Two?")],
}


def _own() -> Backend:
    return Backend.from_str(train_bpe(["the capital of the city of Paris is what, and now\n" * 20], 300).to_json())


def _of_sentencepiece(**spaces: Any) -> Backend:
    """A BPE that puts a space before texts, as the two kinds of files of Llama 2 do."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    backend = read_model(sentencepiece_model("bpe", **options), "mine")
    backend.add_special_tokens(["<eos>"])
    for name, part in spaces.items():
        setattr(backend, name, part)
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "own": _own,
    "a space before each text": lambda: _of_sentencepiece(),
    "a space before the first text": lambda: _of_sentencepiece(
        normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
}


@pytest.fixture(scope="module", params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    backend = BACKENDS[request.param]()
    backend.add_special_tokens(CONTROL)
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return Tokenizer.load(path)


@functools.cache
def renderer_of(template: str) -> TemplateRenderer:
    """Returns one process per template: starting it takes most of the time of a test."""
    return TemplateRenderer(template, {"bos_token": "<|begin|>", "eos_token": "<eos>"}, "the template")


def without_marks(template: str) -> str:
    return re.sub(r"\{%-? (end)?generation %\}", "", template)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_mask_are_those_of_transformers(tokenizer: Tokenizer, name: str, conversation: str) -> None:
    messages = [{"role": role, "content": content} for role, content in CONVERSATIONS[conversation]]
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(tokenizer.to_json()), bos_token="<|begin|>", eos_token="<eos>"
    )
    expected = theirs.apply_chat_template(
        messages, chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = expected["input_ids"], expected["assistant_masks"]
    end = len(mask) - mask[::-1].index(1)
    for template in (TEMPLATES[name], without_marks(TEMPLATES[name])):
        (segments,) = conversation_segments(renderer_of(template), [("a:1", messages)])
        before = accumulate((segment.text for segment in segments), initial="")
        parts = [
            (tokenizer.encode_rendered(segment.text, text), segment.learned)
            for segment, text in zip(segments, before, strict=False)
        ]
        ours = list(chain.from_iterable(part for part, _ in parts))
        learned = [int(is_learned) for part, is_learned in parts for _ in part]
        if name == "default":  # the end token of the last answer is that of the document
            ours, learned = [*ours, tokenizer.eos_id], [*learned, int(parts[-1][1])]
        assert (ours, learned) == (ids[:end], mask[:end])
