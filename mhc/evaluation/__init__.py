"""Scores and continuations of texts, and the benchmarks that ask for them."""
