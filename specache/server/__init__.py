"""The HTTP server: one model behind the OpenAI API, over one cache and one engine."""
