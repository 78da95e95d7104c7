"""16-bit rows on their way from the slow tier, and the hot set that keeps recent ones."""
