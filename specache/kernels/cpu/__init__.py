"""The C++ kernels (csrc/)."""
