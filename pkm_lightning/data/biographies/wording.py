"""The vocabulary of biographies: a token per word of a name or value, and one per phrase that states an attribute.

A name of three words and a value of two then take three and two tokens, and the embedding stays small beside the trunk.
Names and values share their words, so that a token does not reveal which of them it belongs to.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pkm_lightning.data.facts.invented_names import InventedNames
from pkm_lightning.data.sentencepiece_file import SPACE
from pkm_lightning.data.tokenizer import Tokenizer

#: Phrases between a person's name and a value, by attribute; in lower case, while words begin with a capital.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "birth_place": ("was born in", "comes from", "is a native of", "first saw the light in", "has roots in"),
    "home": ("lives in", "resides in", "has a house in", "settled in", "pays taxes in"),
    "university": ("studied at", "graduated from", "holds a degree from", "went to lectures at", "is an alumnus of"),
    "employer": ("works for", "is employed by", "earns a salary at", "has a position with", "is on the staff of"),
    "spouse": ("is married to", "shares a life with", "exchanged rings with", "said yes to", "is the spouse of"),
    "teacher": ("learned from", "was taught by", "is a pupil of", "took lessons from", "was instructed by"),
    "club": ("plays for", "is a member of", "trains with", "wears the colours of", "spends evenings with"),
    "friend": ("is a friend of", "went to school with", "grew up beside", "often writes to", "confides in"),
}
#: Phrases per attribute.
WORDINGS = 5
_CONTROL = ("<eos>", "<unk>")


def first_ids(words: int) -> tuple[int, int]:
    """Returns the id of the first word and that of the first phrase; phrase w of attribute k is `WORDINGS * k + w`."""
    return len(_CONTROL), len(_CONTROL) + words


def vocab_size(words: int, attributes: int) -> int:
    """Returns the number of ids."""
    return first_ids(words)[1] + attributes * WORDINGS


def make_tokenizer(words: int, attributes: int) -> Tokenizer:
    """Returns the tokenizer of biographies; it encodes what they hold, and any other text as `<unk>`."""
    # Always the same words, whatever the people: models of different draws share a vocabulary.
    names = InventedNames(0, np.random.Generator(np.random.PCG64(0)))
    phrases = [phrase for of_one in list(ATTRIBUTES.values())[:attributes] for phrase in of_one]
    texts = [*(names.word() for _ in range(words)), *phrases]
    tokens = [*_CONTROL, *(SPACE + text.replace(" ", SPACE) for text in texts)]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    prefix = normalizers.Replace(Regex(r"\A(?=\S)"), SPACE)
    backend.normalizer = normalizers.Sequence([prefix, normalizers.Replace(" ", SPACE)])
    # Cut around words with a capital; what stands between two of them is a phrase.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}[A-Z][a-z]*"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(list(_CONTROL))
    return Tokenizer(backend, "the tokenizer of biographies")
