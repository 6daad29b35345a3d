"""`data=biographies`: texts about invented people, each with a known number of random bits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from pkm_lightning.data.base import FactSpace
from pkm_lightning.data.biographies.people import PeopleChoice, draw_people
from pkm_lightning.data.biographies.sequences import BiographySequences, ExposureOrder, sequence_length
from pkm_lightning.data.biographies.wording import ATTRIBUTES, make_tokenizer, vocab_size
from pkm_lightning.data.cache import CacheKey, Source
from pkm_lightning.data.datamodule import LoaderOptions, Splits, TokenDataModule
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import ConfigError, check_choice, check_integer

#: Seeds of sentences and wordings in evaluations, beyond those of training.
_EVALUATION_SEED = 2**40
#: Of so many people validations get one at most.
_PEOPLE_PER_VALIDATION = 4


class BiographiesDataModule(TokenDataModule):
    """Biographies as in bioS of Allen-Zhu and Li (arXiv 2404.05405, section 2): a name, then a sentence per attribute.

    Order and wording of the sentences are drawn anew in each exposure. Validations and the test read biographies in
    further orders and wordings, of other people each; their targets are the words of names and values alone.

    Args:
        people: N.
        words: in the vocabulary that the words of names and values are drawn from.
        attributes: values per person K, the first ones of `wording.ATTRIBUTES`.
        value_words: words per value.
        exposures: times that training shows each person; `trainer.max_steps=auto` ends it there.
        loss: `all` tokens, or `facts`: those of names and values, and the end token.
        seed: decides the people.
        draw: 1, 2, ...: other people than those of smaller numbers at this seed.
        eval_people: people that the test reads about; validations read about a quarter as many.
        options: see `LoaderOptions`.

    Raises:
        ConfigError: for a value out of range.
    """

    def __init__(
        self,
        *,
        people: int,
        words: int,
        attributes: int,
        value_words: int,
        exposures: int,
        loss: str,
        seed: int,
        draw: int,
        eval_people: int,
        **options: Unpack[LoaderOptions],
    ) -> None:
        # The vocabulary is made for the data, whatever these would choose.
        super().__init__(tokenizer="bytes", vocab_size=0, **options)
        self.choice = PeopleChoice(people, words, attributes, value_words, seed, draw)
        check_integer("data.exposures", exposures, 1)
        check_integer("data.eval_people", eval_people, 1)
        check_choice("data.loss", loss, ["all", "facts"])
        self.exposures, self.loss, self.eval_people = exposures, loss, eval_people
        needed = sequence_length(attributes, value_words)
        if self.seq_len != needed:
            raise ConfigError(
                f"data.seq_len={self.seq_len} is not the length of a biography of {attributes} attributes with "
                f"{value_words} words each; set data.seq_len={needed}."
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids: words, phrases, and two control tokens."""
        return vocab_size(self.choice.words, self.choice.attributes)

    @property
    def steps(self) -> int:
        """Optimizer steps that show each person `exposures` times."""
        return -(-self.choice.people * self.exposures // self.global_batch_size)

    @property
    def fact_space(self) -> FactSpace:
        """What names and values were drawn from."""
        return self.choice.space

    @property
    def n_facts(self) -> int:
        """Names and values."""
        return self.choice.people * (1 + self.choice.attributes)

    def cache_key(self) -> CacheKey:
        """Returns the choice of people and the wording of the phrases."""
        wording = hashlib.sha256(json.dumps(ATTRIBUTES).encode()).hexdigest()
        return CacheKey("biographies", {"people": asdict(self.choice), "wording": wording})

    def view(self) -> dict[str, Any]:
        """Returns sequence length, loss, and the number of people that are tested."""
        return {"seq_len": self.seq_len, "loss": self.loss, "eval_people": self.eval_people}

    def build(self, folder: Path) -> list[Source]:
        """Draws the people, and writes the tokenizer."""
        names_N3, values_NKV = draw_people(self.choice)
        np.save(folder / "names.npy", names_N3.astype(np.int16))
        np.save(folder / "values.npy", values_NKV.astype(np.int16))
        make_tokenizer(self.choice.words, self.choice.attributes).save(folder / "tokenizer.json")
        return [Source("invented people", files={})]

    def load(self, folder: Path) -> Splits:
        """Opens the people."""
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        people = self.choice.people
        n_validation = min(self.eval_people, people) // _PEOPLE_PER_VALIDATION
        train, held_out = (
            BiographySequences(folder, words=self.choice.words, end_id=tokenizer.eos_id, seed=seed, loss=loss)
            for seed, loss in (
                (self.order_seed, self.loss),
                (_EVALUATION_SEED + self.choice.seed, "measured"),
            )
        )
        n_test = min(self.eval_people, people - n_validation)
        return Splits(
            tokenizer=tokenizer,
            train=train,
            order=ExposureOrder(people, self.exposures, self.order_seed),
            validation=held_out,
            validation_keys=range(people - n_validation, people) if n_validation else range(people),
            test=held_out if n_validation else None,
            test_keys=range(n_test) if n_validation else (),
        )
