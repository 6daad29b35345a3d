"""Transformers whose feed-forward networks are interchangeable plugins, sparse memory among them."""

__version__ = "0.1.0"
