"""Answers: reading one out of a text, and whether two of them are the same. No model, no torch."""
