"""Which model computes, and whether it is still the one that filled a cache or a session."""
