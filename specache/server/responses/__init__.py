"""OpenAI's Responses API over the machinery of chats."""
