"""Benchmarks and the measurements they wrote."""
