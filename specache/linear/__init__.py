"""Products with a model's weights on a CPU."""
