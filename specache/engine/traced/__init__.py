"""Decoder layers recorded from the model's own code, and run in C++."""
