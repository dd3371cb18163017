"""Benchmarks: what is asked and how it is scored, one file each."""
