"""What specache needs to know of a model before it runs."""
