"""Choices of groups that only `prepare` knows, from its primary configuration's `hydra.searchpath`."""
