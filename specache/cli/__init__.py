"""The command line: `generate`, `chat`, `session`, `plan`, `demo`, `eval`, `bench` and `doctor`.

Commands contain no algorithm: they read options, load a model, call the library and print.
"""
