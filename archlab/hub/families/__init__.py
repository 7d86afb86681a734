"""Families of Hugging Face checkpoints: each file says one `FAMILY`, and is found by itself."""
