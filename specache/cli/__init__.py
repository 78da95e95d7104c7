"""The command line: `specache generate`, `chat`, `session`, `plan`, `demo`, `eval`, `bench` and `doctor`.

Nothing here computes: a command reads its options, loads a model, calls the library and prints.
"""
