"""The chat template of conversations in the data: that of the tokenizer, one that the configuration names, or ours."""

from __future__ import annotations

from pathlib import Path

from pkm_lightning.data.bpe_process import EOS
from pkm_lightning.data.conversations import CHATML, CHATML_TOKENS, DEFAULT_TEMPLATE
from pkm_lightning.data.files import expanded, read_text, require_file
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.data.tokenizer_choice import TokenizerChoice
from pkm_lightning.errors import ConfigError, nearest

__all__ = ["check_chat_template", "chosen_template"]

#: Names of control tokens in vocabularies that are made here: none begins a text.
_NAMES = {"bos_token": "", "eos_token": EOS}


def check_chat_template(choice: str | None) -> None:
    """Refuses a value of `data.chat_template` that is neither null, `chatml` nor a path.

    Raises:
        ConfigError: naming the value and what is allowed.
    """
    if isinstance(choice, str) and choice != "chatml" and not Path(choice).suffix:
        raise ConfigError(
            f"data.chat_template={choice!r} is not known; allowed: null, chatml, or the path of a Jinja file with an "
            f"ending, such as template.jinja.{nearest(choice, ['chatml'])}"
        )


def chosen_template(choice: str | None, tokenizer: TokenizerChoice) -> TemplateRenderer:
    """Returns the template that renders conversations.

    Args:
        choice: `data.chat_template`: `chatml`, the path of a Jinja file, or None for the tokenizer's own template, or
            `DEFAULT_TEMPLATE` where it has none.
        tokenizer: whose control tokens the template writes.

    Raises:
        ConfigError: the vocabulary lacks control tokens of `chatml`.
        DataError: a file cannot be read.
    """
    read = None if tokenizer.kind in ("bpe", "bytes") else tokenizer.read()
    names = _NAMES if read is None else read.control_tokens
    if choice == "chatml":
        missing = [
            token
            for token in CHATML_TOKENS
            if token not in tokenizer.special_tokens and not (read is not None and _is_control_token(read, token))
        ]
        if missing:
            raise ConfigError(
                f"data.chat_template=chatml: data.tokenizer={tokenizer.kind} has no control token "
                f"{' or '.join(missing)}; set \"data.special_tokens=['{CHATML_TOKENS[0]}','{CHATML_TOKENS[1]}']\", or "
                "leave data.chat_template out."
            )
        return TemplateRenderer(CHATML, names, "data.chat_template=chatml")
    if choice is not None:
        file = expanded(choice)
        require_file(f"data.chat_template={choice}", file, "give chatml, or the path of a Jinja file")
        return TemplateRenderer(read_text(file), names, f"data.chat_template={choice}")
    if read is not None and read.chat_template is not None:
        return TemplateRenderer(read.chat_template, names, f"of data.tokenizer={tokenizer.kind}")
    return TemplateRenderer(DEFAULT_TEMPLATE, names, "data.chat_template=null")


def _is_control_token(tokenizer: Tokenizer, name: str) -> bool:
    ids = tokenizer.encode_rendered(name)
    return len(ids) == 1 and not tokenizer.decode(ids)
