"""Benchmarks: what a kernel or the engine does, against a reference in the same run, at steady state."""
