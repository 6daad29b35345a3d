"""Transformers whose feed-forward networks are interchangeable plugins, sparse memory among them.

A tensor carries its shape in its name: `q_BTHK`, `ids_TK`. One letter has one meaning in the whole package; other
letters are local, and the head of their file explains them.

| letter | number of |
|---|---|
| B | sequences in a batch |
| T | tokens of a sequence, or of a batch whose sequences are laid end to end |
| D | values of the model dimension |
| H | heads |
| K | reads per token (of one head where there are several) |
| N | rows of a value table |
| S | sub-keys per half |
| E | experts |
| V | values per row of a value table |
"""

__version__ = "0.1.0"
