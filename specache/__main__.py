"""`python -m specache` is the command `specache`."""

from __future__ import annotations

from specache.cli.main import app

if __name__ == "__main__":  # not in the processes that a command starts
    app(prog_name="specache")
