"""What every command of data/, evals/ and records/ shares: how it reads its flags, and how it fails."""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something a user can put right. The message is one line: the file, flag or value, and what to do."""


def need(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def user_errors() -> tuple[type[Exception], ...]:
    """UserError, and train_gpt.py's own: that file imports nothing of the project, and brings torch where it is imported."""
    train_gpt = sys.modules.get("train_gpt")
    return (UserError, train_gpt.UserError) if train_gpt else (UserError,)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring (None under `python -OO`) and whose errors are UserErrors.

    Flags may stand before, between and after positional arguments: read them with parse_intermixed_args.
    """
    parser = argparse.ArgumentParser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def fail(message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    parser.error = fail
    return parser


def command(main: Callable[[list[str]], int | None], interrupted: str = "interrupted") -> NoReturn:
    """Runs a command's main(argv) and ends the process.

    0, or what main returns; 2 and one line for what a user can put right; 1 and one line with the place of the traceback
    for a bug of ours; 130 for Ctrl-C, with the word `interrupted`; 141, silently, for a closed pipe (`| head`).
    """
    name = Path(sys.argv[0]).name
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except SystemExit as error:  # --help
        code = error.code if isinstance(error.code, int) else 0
    except BrokenPipeError:
        code = 141
    except KeyboardInterrupt:
        code = complain(f"{name}: {interrupted}", 130)
    except Exception as error:
        if isinstance(error, user_errors()):
            code = complain(f"{name}: error: {one_line(str(error))}", 2)
        else:
            code = complain(f"{name}: a bug of this program: {describe_bug(error)}", 1)
    leave(code)


def one_line(text: str, limit: int = 1000) -> str:
    """text without line ends and control characters (a terminal would obey them), at most `limit` characters."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    shown = shown.encode("utf-8", "replace").decode()  # names that are not UTF-8 hold lone surrogates
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def describe_bug(error: Exception) -> str:
    """One line, and the traceback in a file of its own."""
    summary = one_line(f"{type(error).__name__}: {error}", 300)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="traceback-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        return f"{summary}; please report it with {file.name}"
    except OSError:
        return f"{summary}; its traceback could not be written anywhere"


def complain(message: str, code: int) -> int:
    """message on stderr, which may be closed -> code."""
    try:
        print(message, file=sys.stderr)
    except (OSError, ValueError, AttributeError):
        pass
    return code


def leave(code: int) -> NoReturn:
    """Ends at once: sys.exit would first wait for threads that still download, and complain of a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass
    os._exit(code)
