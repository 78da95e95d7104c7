"""The methods that are compared, one file each, made by name from `catalogue`."""
