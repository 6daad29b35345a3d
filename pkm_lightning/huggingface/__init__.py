"""Exchange with Hugging Face transformers (extra `hf`): export, pretrained trunks, registered classes."""
