"""The tasks, one file each, made by name from `catalogue`."""
