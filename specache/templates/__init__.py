"""Chat templates: encode conversations, and split an answer's tokens into reasoning and text."""
