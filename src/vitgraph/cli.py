"""The `vitgraph` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from vitgraph import __version__
from vitgraph.commands.bench import bench
from vitgraph.commands.demo import demo
from vitgraph.commands.encode import encode
from vitgraph.commands.inspect import inspect
from vitgraph.commands.outputs import log
from vitgraph.errors import VitgraphError

USER_ERROR = 2


class _Commands(TyperGroup):
    """Turns a user's mistake into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VitgraphError as error:
            if ctx.params.get("debug"):
                raise
            log().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(USER_ERROR) from None


app = typer.Typer(
    cls=_Commands,
    name="vitgraph",
    help="Run the vision encoder of a multimodal LLM as one CUDA graph.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"vitgraph {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _add_command(command: Callable[..., Any]) -> None:
    """Registers a command with its docstring as help: each paragraph one line, brackets not read as markup."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help=escape("\n\n".join(" ".join(p.split()) for p in paragraphs)))(command)


for _command in (demo, encode, inspect, bench):
    _add_command(_command)


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 some files failed or a check did not hold, 2 a user's mistake."""
    sys.exit(app())


if __name__ == "__main__":
    main()
