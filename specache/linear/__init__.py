"""Matrix products with a model's weights on a CPU."""
