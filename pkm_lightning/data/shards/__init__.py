"""Tokenised text on disk: memory-mapped shards, how they are built, and how they are read."""
