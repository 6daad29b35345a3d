"""Readers of files of the user's: text, JSON lines, conversations, Parquet and Arrow; each yields documents."""
