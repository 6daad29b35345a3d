"""`data=facts`: real facts about people and places in many forms; what training showed, and how often, is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pkm_lightning.data.cache import CacheKey, Source
from pkm_lightning.data.datamodule import Splits, TokenDataModule
from pkm_lightning.data.facts.build import build_facts, read_facts
from pkm_lightning.data.facts.recall import DEFAULT_FORMS, recall_items
from pkm_lightning.data.facts.selection import Fact, FactsChoice
from pkm_lightning.data.facts.sources import PEOPLE, PLACES, FactPackage
from pkm_lightning.data.facts.templates import TEMPLATES
from pkm_lightning.data.packing import PackedOrder, pack_rows
from pkm_lightning.data.recall import RecallItem
from pkm_lightning.data.statements import StatementRows, StatementStore
from pkm_lightning.data.tokenizer import Tokenizer, TokenizerChoice
from pkm_lightning.errors import check_choice, check_range

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pkm_lightning.data.datamodule import LoaderOptions


class FactsDataModule(TokenDataModule):
    """Statements about real subjects, each a document: prompt, space, answer, end token.

    Training cycles through `exposures` statements of each fact an epoch. Validation asks a fixed sample of facts in the
    one form that training never shows for that fact; `recall_items` asks in all forms.

    Args:
        packing: `documents` fills rows of `seq_len` with whole statements, `none` gives each statement a row.
        loss: `answer` for the answer and the end token alone, `all` for every token.
        tokenizer: `bpe`, `bytes`, or the path of a `tokenizer.json`.
        vocab_size: of a `bpe` tokenizer, 258 or more.
        loader: see `LoaderOptions`; the other arguments: see `FactsChoice` and configs/data/facts.yaml.

    Raises:
        ConfigError: for a value out of range.
    """

    def __init__(
        self,
        *,
        people: int,
        people_relations: Sequence[str],
        countries: int,
        country_relations: Sequence[str],
        cities: int,
        control_subjects: int,
        exposures: float,
        exposure_distribution: str,
        zipf_exponent: float,
        max_exposures: int,
        question_subjects: float,
        question_share: float,
        seed: int,
        eval_facts: int,
        packing: str,
        loss: str,
        tokenizer: str,
        vocab_size: int,
        **loader: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**loader)
        check_choice("data.packing", packing, ["documents", "none"])
        check_choice("data.loss", loss, ["answer", "all"])
        self.packing = packing
        self.loss = loss
        self.choice = FactsChoice(
            people=people,
            people_relations=tuple(people_relations),
            countries=countries,
            country_relations=tuple(country_relations),
            cities=cities,
            control_subjects=control_subjects,
            exposures=exposures,
            exposure_distribution=exposure_distribution,
            zipf_exponent=zipf_exponent,
            max_exposures=max_exposures,
            question_subjects=question_subjects,
            question_share=question_share,
            seed=seed,
            eval_facts=eval_facts,
        )
        self._tokenizer_choice = TokenizerChoice(tokenizer, vocab_size)

    @property
    def vocab_size(self) -> int:
        """The configured vocabulary; every id is below it."""
        return self._tokenizer_choice.vocab_size()

    def cache_key(self) -> CacheKey:
        """Choice of facts, tokenizer, wording of the templates, and the installed packages."""
        arguments = {
            "facts": asdict(self.choice),
            "tokenizer": self._tokenizer_choice.identity(),
            "templates": hashlib.sha256(json.dumps(TEMPLATES).encode()).hexdigest(),
            "packages": {package.name: package.identity() for package in self._packages()},
        }
        return CacheKey("facts", arguments)

    def view(self) -> dict[str, Any]:
        """Row width, packing and loss."""
        return {"seq_len": self.seq_len, "packing": self.packing, "loss": self.loss}

    def build(self, folder: Path) -> list[Source]:
        """Choose, tokenise and store the facts."""
        build_facts(folder, self.choice, self._tokenizer_choice)
        return [package.source() for package in self._packages()]

    def load(self, folder: Path) -> Splits:
        """Open the statements; refuses a `seq_len` that cannot hold the longest."""
        store = StatementStore(folder)
        store.require_fit(self.seq_len)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        capacity = self.seq_len if self.packing == "documents" else None
        exposures = np.load(folder / "exposures.npy")
        return Splits(
            tokenizer=tokenizer,
            train=StatementRows(store, width=capacity, answer_only=self.loss == "answer", pad_id=tokenizer.pad_id),
            order=PackedOrder(exposures, store.lengths, capacity=capacity, seed=self.order_seed),
            validation=StatementRows(store, width=capacity, answer_only=True, pad_id=tokenizer.pad_id),
            validation_keys=pack_rows(np.load(folder / "validation.npy"), store.lengths, capacity),
        )

    def facts(self) -> list[Fact]:
        """All facts, those of the controls included."""
        return read_facts(self.cache_folder())

    @property
    def n_facts(self) -> int:
        """Facts that training shows, those of the controls not among them; builds if need be."""
        return sum(not fact.control for fact in self.facts())

    def recall_items(self, limit: int | None = None, forms: Sequence[str] = DEFAULT_FORMS) -> list[RecallItem]:
        """Questions about what training showed, a fixed sample.

        Args:
            limit: at most so many items of each form; None for `eval_facts`.
            forms: see `RecallItem`; besides the default ones there is `unseen_question`.
        """
        if limit is not None:
            check_range("limit", limit, low=0)
        for form in forms:
            check_choice("forms", form, [*DEFAULT_FORMS, "unseen_question"])
        folder = self.cache_folder()
        codes = np.load(folder / "codes.npy")
        return recall_items(
            read_facts(folder),
            codes[np.unique(np.load(folder / "exposures.npy"))],
            np.load(folder / "sample.npy"),
            per_form=self.choice.eval_facts if limit is None else min(limit, self.choice.eval_facts),
            seed=self.choice.seed,
            forms=forms,
        )

    def _packages(self) -> list[FactPackage]:
        places = self.choice.countries + self.choice.cities > 0
        return [PEOPLE] * (self.choice.people > 0) + [PLACES] * places
