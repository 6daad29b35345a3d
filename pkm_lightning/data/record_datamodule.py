"""Data sources whose documents are records: texts, prompts with answers, or conversations."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pkm_lightning.data.cache import CacheKey, Source
from pkm_lightning.data.chat_choice import check_chat_template, chosen_template
from pkm_lightning.data.readers.fields import Fields, Kind
from pkm_lightning.data.readers.record_reader import RecordReader
from pkm_lightning.data.sharded import CorpusDataModule, refuse_windows
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.errors import check_flag

#: Of the folder with prepared data, as Hugging Face names it.
TEMPLATE = "chat_template.jinja"


class RecordDataModule(CorpusDataModule):
    """Base of data sources of records, the loss on the answers, or on the whole text where there is no prompt.

    The first record decides which fields all records must have: prompt and answer if it has both, else messages, else
    text.

    Args:
        text_field, prompt_field, answer_field, messages_field: names of the fields or columns.
        chat_template: `chatml`, the path of a Jinja file, or None: see `chosen_template`.
        skip_nulls: whether records are left out, and counted, in which a field that is read is null.
        options: see `CorpusDataModule`.
    """

    def __init__(
        self,
        *,
        text_field: str,
        prompt_field: str,
        answer_field: str,
        messages_field: str,
        chat_template: str | None,
        skip_nulls: bool = False,  # runs of earlier versions have no such key
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_chat_template(chat_template)
        check_flag("data.skip_nulls", skip_nulls)
        self.fields = Fields(
            text=text_field, prompt=prompt_field, answer=answer_field, messages=messages_field, skip_nulls=skip_nulls
        )
        self.chat_template = chat_template

    @abstractmethod
    def reader(self, path: str | Sequence[str], part: str) -> RecordReader:
        """Returns the records of some files."""

    @cached_property
    def _template(self) -> TemplateRenderer:
        return chosen_template(self.chat_template, self.tokenizer_choice)

    def renderer(self) -> TemplateRenderer:
        """Returns the chat template, with a process of its own for each reader."""
        return TemplateRenderer(self._template.template, self._template.names, self._template.source)

    def reading(self) -> dict[str, Any]:
        """Returns the names of the fields, and the template."""
        fields = [self.fields.text, self.fields.prompt, self.fields.answer, self.fields.messages]
        template = json.dumps([self._template.template, self._template.names], sort_keys=True)
        reading: dict[str, Any] = {"fields": fields, "chat_template": hashlib.sha256(template.encode()).hexdigest()}
        # Left out where it is false, so that data of before there was such a key are found.
        return reading | ({"skip_nulls": True} if self.fields.skip_nulls else {})

    def cache_key(self) -> CacheKey:
        """Returns what decides the prepared records.

        Raises:
            ConfigError: conversations would be cut anywhere.
        """
        if self.packing == "windows" and self.reader(self.path, "train").kind is Kind.CONVERSATION:
            refuse_windows(f"data.path={self.path}")
        return super().cache_key()

    def build(self, folder: Path) -> list[Source]:
        """Tokenises the records; beside the tokenizer of conversations lies the template that has rendered them."""
        sources = super().build(folder)
        if self.reader(self.path, "train").kind is Kind.CONVERSATION:
            (folder / TEMPLATE).write_text(self._template.template, encoding="utf-8")
        return sources
