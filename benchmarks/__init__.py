"""Benchmarks of the project's claims, each figure measured beside its yardstick."""
