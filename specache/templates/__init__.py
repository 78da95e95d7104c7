"""Chat templates: from a conversation to token ids, and from the tokens of an answer to its text and its reasoning."""
