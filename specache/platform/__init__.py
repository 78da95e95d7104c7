"""The machine, its memory and files, and the installed PyTorch."""
