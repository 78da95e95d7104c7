"""The HTTP server: one model behind the APIs of OpenAI and Anthropic, over one cache and one engine."""
