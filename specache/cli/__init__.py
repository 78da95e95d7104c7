"""The command line: `specache generate`, `chat`, `demo`, `eval`, `bench`, `plan` and `doctor`.

Nothing here computes: a command reads its options, loads a model, calls the library and prints. Modules that
need torch or transformers import them inside functions, so that `specache --help` answers at once.
"""
