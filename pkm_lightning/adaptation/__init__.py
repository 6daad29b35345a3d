"""Changing what a trained model knows: sparse finetuning, its baselines, and facts that are written and removed."""
