"""The `specache` command."""

from __future__ import annotations

from typing import Annotated

import typer

from specache import __version__
from specache.cli import bench, chat, demo, doctor, evaluate, generate, plan, serve, session
from specache.cli.console import write
from specache.cli.program import Program

app = Program(
    name="specache",
    help="Long-context generation over a low-bit key-value cache, with speculative prefetch of the 16-bit pairs that matter.",
    epilog="Start with [bold]specache demo[/bold]. [bold]specache COMMAND --help[/bold] explains a command. "
    "SPECACHE_CACHE names the folder for converted models and sessions (default: specache in XDG_CACHE_HOME or ~/.cache), "
    "SPECACHE_DEBUG=1 shows where an error came from. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 ended.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=generate.EPILOG)(generate.generate)
app.command(epilog=chat.EPILOG)(chat.chat)
app.command(epilog=serve.EPILOG)(serve.serve)
app.command(epilog=demo.EPILOG)(demo.demo)
app.add_typer(session.app, name="session")
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.command(epilog=plan.EPILOG)(plan.plan)
app.command()(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"specache {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


if __name__ == "__main__":
    app()
