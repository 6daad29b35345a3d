"""Tokens with one folded text have one canonical token, the first of them."""

from __future__ import annotations

from pkm_lightning.memory.canonical_tokens import canonical_ids


def test_case_white_space_and_unicode_form_fold() -> None:
    texts = [
        "",
        "Paris",
        " paris",
        "PARIS\n",
        "paris.",
        "\N{LATIN SMALL LIGATURE FI}n",
        "fin",
        " ",
        "\n\n",
        "stra\u00dfe",
    ]
    assert canonical_ids([*texts, "STRASSE", "a  b", "a\tB"]) == [0, 1, 1, 1, 4, 5, 5, 7, 7, 9, 9, 11, 11]


def test_control_tokens_and_parts_of_characters_stand_for_themselves() -> None:
    assert canonical_ids(["", "", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}", "a", "A"]) == [
        0,
        1,
        2,
        3,
        4,
        4,
    ]


def test_a_folded_text_folds_to_itself() -> None:
    """Letters whose case folding leaves NFKC would otherwise be canonical for none of their forms."""
    texts = [chr(code) for code in range(0x20, 0x3000)]
    first = canonical_ids(texts)
    assert [first[token] for token in first] == first
