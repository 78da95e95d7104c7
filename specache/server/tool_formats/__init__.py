"""How families of models are told about tools, and how they write calls. One file per family."""
