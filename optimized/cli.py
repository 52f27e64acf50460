"""The command line, `moebius`.

Every command takes `--json PATH` for what it prints. Exit code 0: good; 1: measured and not good (parity broken, a goal missed); 2: bad
input, with one line that names the value. MOEBIUS_DEBUG=1 shows where such an error comes from.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import COMMANDS, Result, check_writable
from .environment import prepare_process

GOOD, NOT_GOOD, BAD_INPUT = 0, 1, 2

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write the result to this file, as JSON.")]


def command(function: Callable[..., Result]) -> Callable[..., int]:
    """The function as a command: with `--json`, and an exit code instead of its result."""
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def run(*, json_path: Path | None = None, **arguments: Any) -> int:
        if json_path is None:
            return GOOD if function(**arguments).good else NOT_GOOD
        check_writable(json_path, "--json")
        result = function(**arguments)
        _write_json(json_path, result)
        return GOOD if result.good else NOT_GOOD

    option = inspect.Parameter("json_path", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=JsonOption)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()] + [option]
    run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _write_json(path: Path, result: Result) -> None:
    from reference.autograd.checkpoints import record_text, write_atomically

    from .comparison import plain

    data = plain(result.data)
    text = record_text(data, result.rows) if result.rows else json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def application() -> typer.Typer:
    """The commands of the table as one application."""
    app = typer.Typer(
        help="Mixture-of-Experts twice, and the proof that both are equal.", add_completion=False, pretty_exceptions_enable=False
    )
    app.callback()(lambda: None)
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name}", __package__)
        app.command(name, help=inspect.getdoc(module.run))(command(module.run))
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Bad input becomes one line on stderr."""
    try:
        return application()(list(arguments) or ["--help"], prog_name="moebius", standalone_mode=False) or GOOD
    except BrokenPipeError:  # the reader of the output has seen enough, as in `moebius … | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (closed by the interpreter's exit, whose last flush is the point)
        return GOOD
    except Exception as error:
        # ValueError is the project's word for bad input, OSError the system's for a file; a usage error has a message of its own.
        usage = getattr(error, "format_message", None)
        if os.environ.get("MOEBIUS_DEBUG") == "1" or not (usage or isinstance(error, (ValueError, OSError))):
            raise
        message = f"{usage()} (in: {' '.join(['moebius', *arguments])})" if usage else str(error)
        print("moebius: error: " + " ".join(message.split()), file=sys.stderr)
        return BAD_INPUT


def main() -> None:
    """The entry point of `moebius` and of `python -m optimized.cli`."""
    prepare_process()
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a sign shows "?" instead of ending hours of work
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
