"""Evaluation runs: benchmarks, strategies and step counts in one call, resumable and in several processes."""
