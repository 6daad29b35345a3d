"""The end token of a tokenizer whose vocabulary has several candidates, kept within its `tokenizer.json`.

A pretrained model ends its answers with the token that its `tokenizer_config.json` names, which the format of
`tokenizer.json` has no place for. A template of the post-processor declares it without using it, under the label
`eos_token`: the file stays one that every reader of the format takes, and gives the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as Backend

_LABEL = "eos_token"
_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def declared_end(backend: Backend) -> str | None:
    """Returns the name of the end token that the file of `backend` declares, or None."""
    if backend.post_processor is None:
        return None
    for template in _templates(json.loads(backend.post_processor.__getstate__())):
        if _LABEL in template["special_tokens"]:
            return str(template["special_tokens"][_LABEL]["tokens"][0])
    return None


def with_declared_end(backend: Backend, name: str) -> Backend:
    """Returns a copy of `backend`, whose vocabulary has the token `name`, that declares it as the end token."""
    described: dict[str, Any] = json.loads(backend.to_str())
    processor = described["post_processor"]
    template = next(_templates(processor), None)
    if template is None:
        template = {**_TEMPLATE, "special_tokens": {}}
        earlier = [] if processor is None else [processor]
        described["post_processor"] = {"type": "Sequence", "processors": [*earlier, template]}
    template["special_tokens"][_LABEL] = {"id": _LABEL, "ids": [backend.token_to_id(name)], "tokens": [name]}
    return Backend.from_str(json.dumps(described, ensure_ascii=False))


def _templates(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if processor is None:
        return
    if processor["type"] == "TemplateProcessing":
        yield processor
    for part in processor.get("processors", []):
        yield from _templates(part)
