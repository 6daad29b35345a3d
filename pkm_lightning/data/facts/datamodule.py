"""`data=facts`: real facts about people and places in many forms, each shown a known number of times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from pkm_lightning.data.base import RecallItem
from pkm_lightning.data.cache import CacheKey, Source
from pkm_lightning.data.datamodule import Splits, TokenDataModule, TokenOptions
from pkm_lightning.data.facts.build import PARTS, build_facts, read_facts
from pkm_lightning.data.facts.recall import DEFAULT_FORMS, recall_items
from pkm_lightning.data.facts.selection import Fact, FactsChoice
from pkm_lightning.data.facts.sources import PEOPLE, PLACES, FactPackage
from pkm_lightning.data.facts.templates import TEMPLATES
from pkm_lightning.data.packing import PackedOrder, pack
from pkm_lightning.data.statements import StatementSequences, StatementStore
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import check_choice, check_range


class FactsDataModule(TokenDataModule):
    """Sentences about real subjects, each a document: prompt, space, answer, end token.

    Each epoch shows `exposures` statements per fact. The test asks a fixed sample of facts in the one form that
    training never shows for that fact, validations ask others; `recall_items` and `validation_items` ask in all forms.

    Args:
        packing: `documents` fills sequences of `seq_len` with whole statements, `none` uses one sequence per statement.
        loss: `answer` for the answer and the end token alone, `all` for every token.
        options: see `TokenOptions`; the other arguments: see `FactsChoice` and configs/data/facts.yaml.

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
        draw: int = 0,  # configurations of earlier versions lack it, and skip
        skip: int = 0,
        **options: Unpack[TokenOptions],
    ) -> None:
        super().__init__(**options)
        check_choice("data.packing", packing, ["documents", "none"])
        check_choice("data.loss", loss, ["answer", "all"])
        self.packing = packing
        self.loss = loss
        # Questions by what was asked for: a run asks for the same at each validation, and drawing them takes a second.
        self._asked: dict[tuple[Path, str, int, tuple[str, ...]], list[RecallItem]] = {}
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
            draw=draw,
            skip=skip,
        )

    def cache_key(self) -> CacheKey:
        """Returns choice of facts, tokenizer, wording of the templates, and the installed packages."""
        # Another release of a package, or other wording of the templates, is other data.
        facts = asdict(self.choice)
        if not facts["skip"]:  # so that data of before there was such a key are found
            del facts["skip"]
        arguments = {
            "facts": facts,
            "tokenizer": self.tokenizer_choice.identity(),
            "templates": hashlib.sha256(json.dumps(TEMPLATES).encode()).hexdigest(),
            "packages": {package.name: package.identity() for package in self._packages()},
        }
        return CacheKey("facts", arguments)

    def view(self) -> dict[str, Any]:
        """Returns sequence length, packing and loss."""
        return {"seq_len": self.seq_len, "packing": self.packing, "loss": self.loss}

    def build(self, folder: Path) -> list[Source]:
        """Chooses, tokenises and stores the facts."""
        build_facts(folder, self.choice, self.tokenizer_choice)
        return [package.source() for package in self._packages()]

    def load(self, folder: Path) -> Splits:
        """Opens the statements.

        Raises:
            ConfigError: `seq_len` cannot hold the longest.
        """
        store = StatementStore(folder)
        store.require_fit(self.seq_len)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        capacity = self.seq_len if self.packing == "documents" else None
        exposures = np.load(folder / "exposures.npy")
        # On the answer whatever `loss` is, so that held-out losses of both settings can be compared.
        held_out = StatementSequences(store, width=capacity, answer_only=True, pad_id=tokenizer.pad_id)
        of_test, of_validation = (np.load(folder / f"{part}.npy") for part in PARTS)
        divided = len(of_validation) > 0
        test = pack(of_test, store.lengths, capacity)
        return Splits(
            tokenizer=tokenizer,
            train=StatementSequences(store, width=capacity, answer_only=self.loss == "answer", pad_id=tokenizer.pad_id),
            order=PackedOrder(exposures, store.lengths, capacity=capacity, seed=self.order_seed),
            validation=held_out,
            validation_keys=pack(of_validation, store.lengths, capacity) if divided else test,
            test=held_out if divided else None,
            test_keys=test if divided else (),
        )

    def facts(self) -> list[Fact]:
        """Returns all facts, those of the controls included."""
        return read_facts(self.cache_folder())

    @property
    def n_facts(self) -> int:
        """Facts that training shows, controls excluded; builds what is missing."""
        return sum(not fact.control for fact in self.facts())

    def recall_items(self, limit: int | None = None, forms: Sequence[str] = DEFAULT_FORMS) -> list[RecallItem]:
        """Returns the test's questions about what training shows, a fixed sample.

        Args:
            limit: largest number of items per form; None for `eval_facts`.
            forms: see `RecallItem`; besides the default ones there is `unseen_question`.
        """
        return self._items("test", limit, forms)

    def validation_items(self, limit: int | None = None, forms: Sequence[str] = DEFAULT_FORMS) -> list[RecallItem]:
        """Returns the questions of validations, about other facts than `recall_items`; the same for very few facts."""
        divided = len(np.load(self.cache_folder() / "validation.npy")) > 0
        return self._items("validation" if divided else "test", limit, forms)

    def _items(self, part: str, limit: int | None, forms: Sequence[str]) -> list[RecallItem]:
        if limit is not None:
            check_range("limit", limit, low=0)
        for form in forms:
            check_choice("forms", form, [*DEFAULT_FORMS, "unseen_question"])
        folder = self.cache_folder()
        per_form = self.choice.eval_facts if limit is None else min(limit, self.choice.eval_facts)
        asked = (folder, part, per_form, tuple(forms))
        if asked not in self._asked:
            codes = np.load(folder / "codes.npy")
            self._asked[asked] = recall_items(
                read_facts(folder),
                # Only statements that have an exposure: those of validation are stored after them.
                codes[np.unique(np.load(folder / "exposures.npy"))],
                np.load(folder / f"{part}_sample.npy"),
                per_form=per_form,
                seed=self.choice.seed,
                forms=forms,
            )
        return list(self._asked[asked])

    def _packages(self) -> list[FactPackage]:
        places = self.choice.countries + self.choice.cities > 0
        return [PEOPLE] * (self.choice.people > 0) + [PLACES] * places
