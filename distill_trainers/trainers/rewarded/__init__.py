"""Rewards of what a student samples, beside its divergence: for every method that samples."""
