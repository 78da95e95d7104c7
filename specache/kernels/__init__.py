"""Compute kernels: one signature per operation (`dispatch`), one implementation per backend."""
