"""The HTTP server: one model behind two APIs, over one cache and one engine."""
