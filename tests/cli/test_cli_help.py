"""Command names and flags: a change here is a change that users notice."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from vitgraph import __version__
from vitgraph.cli import app

ENGINE_FLAGS = {
    "--graph",
    "--no-graph",
    "--compile",
    "--no-compile",
    "--budgets",
    "--min-tokens",
    "--max-tokens",
    "--max-items",
    "--max-frames",
    "--attention",
    "--lazy",
    "--no-lazy",
    "--lazy-after",
    "--strict",
    "--no-strict",
    "--memory-limit",
    "--measure",
    "--no-measure",
    "--metadata-cache",
    "--preprocess-threads",
    "--verbose",
    "--no-verbose",
    "--compilation-config",
}
FLAGS = {
    "demo": {"--family", "--out", "--device"},
    "encode": {
        "--out",
        "--force",
        "--batch",
        "--device",
        "--dtype",
        "--fps",
        "--num-frames",
        "--video-max-frames",
        "--video-min-pixels",
        "--video-max-pixels",
    },
    "inspect": {"--dtype", "--time", "--plot", "--force", "--json"},
    "bench": {
        "--geometry",
        "--workload",
        "--ways",
        "--against",
        "--device",
        "--dtype",
        "--runs",
        "--warmup",
        "--seed",
        "--json",
        "--plot",
        "--markdown",
        "--force",
    },
}


def _commands():
    return typer.main.get_command(app).commands


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name):
    assert FLAGS[name] <= _flags(name)


@pytest.mark.parametrize("name", ["demo", "encode", "inspect", "bench"])
def test_engine_flags_are_complete(name):
    assert _flags(name) - FLAGS[name] - {"--help", "-h"} == ENGINE_FLAGS


@pytest.mark.parametrize("name", FLAGS)
def test_everything_has_a_help_text(name):
    command = _commands()[name]
    assert command.help
    assert all(parameter.help for parameter in command.params)


def test_help_names_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in FLAGS)


def test_version(run):
    assert run("--version").output.strip() == f"vitgraph {__version__}"


def test_help_does_not_import_torch():
    code = "import sys, vitgraph.cli; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_users_mistake_is_one_line_and_exit_code_2(run):
    result = run("inspect", "/no/such/checkpoint")
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output


def test_debug_shows_the_error(run):
    result = run("--debug", "inspect", "/no/such/checkpoint")
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


def _flags(name):
    return {flag for p in _commands()[name].params for flag in [*p.opts, *p.secondary_opts] if flag.startswith("-")}
