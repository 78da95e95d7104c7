"""Attention of one layer: over the low-bit copy in a decode step (`decode`), exact (`dense`)."""
