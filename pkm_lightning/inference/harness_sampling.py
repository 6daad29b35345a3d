"""The `generation_kwargs` of a task of lm-evaluation-harness as settings of this package's generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from pkm_lightning.errors import ConfigError
from pkm_lightning.inference.sampling import Sampling

#: Tokens of an answer where the task does not say, as of the harness's `hf` model.
_ANSWER_TOKENS = 256
#: What draws a token, beside the temperature.
_DRAWING = ("top_k", "top_p", "min_p", "repetition_penalty")
#: Settings under which these other keys change nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1, "use_cache": True}


def sampling_of(kwargs: Mapping[str, Any], *, context: int, task: str) -> Sampling:
    """Returns how a task wants its answers.

    Args:
        kwargs: `generation_kwargs` of the task; tokens and stop texts under any of the names that the harness takes.
        context: tokens that the model may read at once.
        task: its name, for messages.

    Raises:
        ConfigError: the answers leave no room for a prompt, or a key that generation does not offer.
    """
    default = _ANSWER_TOKENS if context > _ANSWER_TOKENS else max(1, context // 2)
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(kwargs), default))
    new_tokens = settings.pop("max_gen_toks")
    if new_tokens >= context:
        raise ConfigError(
            f"{task}: answers of {new_tokens} tokens (max_gen_toks) leave no room for a prompt in the context of "
            f"{context} that the model was trained for; lower max_gen_toks in the task, or use a model with a longer "
            "context."
        )
    stop = tuple(text for text in handle_stop_sequences(settings.pop("until"), eos=None) if text)
    draws = settings.pop("do_sample")
    temperature = settings.pop("temperature", None)
    # 0 cuts nothing there.
    drawing = {name: value for name in _DRAWING if (value := settings.pop(name, None))}
    foreign = [name for name, value in settings.items() if _NEUTRAL.get(name) != value]
    if foreign:
        raise ConfigError(
            f"{task}: generation_kwargs.{foreign[0]}={settings[foreign[0]]!r} is not offered; allowed: until, "
            f"max_gen_toks, do_sample, temperature, {', '.join(_DRAWING)}."
        )
    # A task that draws without a temperature means the distribution as it is.
    return Sampling(max_new_tokens=new_tokens, temperature=(temperature or 1.0) if draws else 0.0, stop=stop, **drawing)
