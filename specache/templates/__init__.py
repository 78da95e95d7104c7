"""Chat templates: encode conversations as token ids, and split an answer's tokens into reasoning
and text.
"""
