"""Changes of what a trained model knows: which rows of its tables learn, and how far the rest of it stays as it was."""
