"""The planted language: its text, its labels, its tokenizer and the small model trained on it."""
