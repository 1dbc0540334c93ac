"""Benchmark of decoding: every way to decode one model on one machine, taking turns."""
