"""The kernels in plain PyTorch: the fallback of every faster backend."""
