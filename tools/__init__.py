"""Benchmarks and inspection tools; run them from the repository root: python -m tools.<name>."""
