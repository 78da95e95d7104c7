"""The state of a batch: one sequence per prompt, and its layers."""
