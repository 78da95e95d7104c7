"""Benchmarks of speed and memory, one file each. Quality is measured by `specache.eval`."""
