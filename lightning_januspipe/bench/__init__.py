"""Runs the benchmarks of ``januspipe bench``: training steps, replicas, graph ranks, and emulated devices."""
