"""What the benchmarks share: how a measurement is repeated, and what is written beside its figures."""
