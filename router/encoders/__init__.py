"""Texts to rows: any Hugging Face sentence encoder, hashed character n-grams, and a cache by content."""
