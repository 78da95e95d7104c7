"""Benchmarks of speed and memory: one file per benchmark, a registry. Quality is `specache.eval`'s business."""
