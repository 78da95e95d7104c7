"""Storage for the 16-bit rows.

`base` is the interface; every tier is a file or folder of its own.
"""
