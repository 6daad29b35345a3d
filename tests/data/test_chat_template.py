"""Chat templates: conversations as text and as ids, in a sandbox; what a template refuses is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkm_lightning.data import template_renderer
from pkm_lightning.data.chat_template import ChatTemplate
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer
from pkm_lightning.errors import ConfigError

#: Written as those of ChatML models, with what templates use of Jinja and of Hugging Face.
TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- 'A:' + message.content + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message.role[0] + ':' + message.content | trim }}
    {%- endif %}
{{ '\\n' }}
{%- if loop.index > 9 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}A:{% endif %}
"""
ROME = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Rome? "}]


def template(text: str = TEMPLATE, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    return ChatTemplate(text, tokenizer or bytes_tokenizer(), Path("run/chat_template.jinja"))


def test_a_conversation_is_rendered_up_to_the_answer() -> None:
    turns = [*ROME, {"role": "assistant", "content": "Yes."}]
    assert template().render(ROME) == "s:Be brief.\nu:Rome?\nA:"
    assert template().render(turns, answer_follows=False) == "s:Be brief.\nu:Rome?\nA:Yes.<eos>\n"


def test_control_tokens_of_a_template_are_control_tokens_and_those_of_a_text_are_text() -> None:
    tokenizer = bytes_tokenizer()
    ids = template(tokenizer=tokenizer).encode([*ROME, {"role": "assistant", "content": "Yes."}, ROME[1]])
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids) == "s:Be brief.\nu:Rome?\nA:Yes.\nu:Rome?\nA:"
    assert tokenizer.eos_id not in tokenizer.encode("<eos>")
    assert len(tokenizer.encode("<eos>")) == len("<eos>")


@pytest.mark.parametrize(
    ("after", "expected"), [("{{ eos_token }}", ["<eos>"]), ("<pad>\n", ["<pad>"]), ("\n", []), ("", []), ("END", [])]
)
def test_the_control_token_after_an_answer_ends_answers(after: str, expected: list[str]) -> None:
    tokenizer = bytes_tokenizer()
    made = template("{% for m in messages %}{{ m.content }}" + after + "{% endfor %}", tokenizer)
    assert made.end_ids() == [tokenizer.encode_rendered(name)[0] for name in expected]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 4000000000 }}", "more than 1 GiB of memory"),
        ("{{ '%4000000000d' % 1 }}", "more than 1 GiB of memory"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "renders 99,980,001 characters"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", ""),
    ],
)
def test_a_template_that_cannot_be_used_is_named_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"run/chat_template.jinja: the chat template cannot be used .*{reason}"):
        template(text).render(ROME)


def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_renderer, "SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match="it has not ended after 1 s of computing"):
        template(endless).render(ROME)


def test_templates_know_the_day() -> None:
    assert template("{{ strftime_now('%Y') | int > 2000 }}").render([]) == "True"
