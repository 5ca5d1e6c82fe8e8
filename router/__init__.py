"""Choosing adapters per query: encoders, scorers, gates and policies behind `model: "auto"`."""
