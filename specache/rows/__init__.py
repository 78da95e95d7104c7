"""Fetching 16-bit rows from the slow tier, and the hot set that caches recently used ones."""
