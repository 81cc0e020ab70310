"""Benchmarks: scripts of this repository, no part of the package."""
