"""Using a trained model: generation and scoring of answers, shared by commands and callbacks."""
