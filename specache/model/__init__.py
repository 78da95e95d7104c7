"""Facts about a model that specache needs before it runs."""
