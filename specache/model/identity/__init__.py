"""Identify the model that computes, and detect changes since it filled a cache or a session."""
