"""Requests in, tokens out: scheduling, sampling, and the forward pass over the cache."""
