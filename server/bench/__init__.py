"""A load for any OpenAI-compatible server: which requests, sent when, and what came of them. Needs NumPy alone."""
