"""Bytes and time, computed before anything runs."""
