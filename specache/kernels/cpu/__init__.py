"""The kernels in C++ (csrc/)."""
