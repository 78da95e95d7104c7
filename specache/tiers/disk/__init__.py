"""The slow tier on disk."""
