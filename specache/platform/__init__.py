"""This machine, its memory and its files, and PyTorch as it is installed."""
