"""What every command of data/, evals/ and records/ shares: how it reads its flags, and how it fails."""

import argparse
import contextlib
import errno
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

REMEDIES = {
    errno.EACCES: "choose one that you may read and write",
    errno.EPERM: "choose one that you may read and write",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "make room and run this again",
    errno.EDQUOT: "make room and run this again",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class UserError(Exception):
    """Something a user can put right. The message is one line: the file, flag or value, and what to do."""


def need(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring (None under `python -OO`) and whose errors are
    UserErrors.

    Flags may stand before, between and after positional arguments: read them with parse_intermixed_args.
    """
    return Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_known_args(self, args=None, namespace=None):
        for word in args or ():  # argparse of Python 3.11 takes --flag=-- for a flag without a value
            need(not (word.startswith("--") and word.endswith("=--")), f"{shown(word)}: -- is no value")
        return super().parse_known_args(args, namespace)


def path_flag(text: str) -> Path:
    """The type of a flag or argument that names a file or folder: '' is an unset variable, and not the
    current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("'' names no file or folder; the current folder is .")
    return Path(text)


def text_flag(text: str) -> str:
    """The type of a flag that is text, and no name of a file: what a command line holds may be no UTF-8."""
    if text.encode("utf-8", "replace").decode() != text:
        raise argparse.ArgumentTypeError(f"{one_line(text, 40)!r} is not UTF-8 text")
    return text


# ----- Words for messages


def one_line(text: str, limit: int = 1000) -> str:
    """text without line ends and control characters (a terminal would obey them), at most `limit`
    characters.
    """
    shown = "".join(c if c.isprintable() else " " for c in text)
    shown = shown.encode("utf-8", "replace").decode()  # names that are not UTF-8 hold lone surrogates
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def shown(name: object) -> str:
    """A name or value as part of a message: on one line, and the middle left out where it is very long."""
    text = one_line(str(name), limit=10_000)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def shell_word(text: str) -> str:
    """text as a shell reads it; what a terminal would obey is written as $'...' with escapes."""
    if one_line(text, limit=len(text)) == text:
        return shlex.quote(text)
    escaped = (
        chr(b) if chr(b).isalnum() and b < 128 or b in b"/._- " else f"\\x{b:02x}" for b in os.fsencode(text)
    )
    return f"$'{''.join(escaped)}'"


def os_reason(error: OSError) -> str:
    """What the system says, and what to do about it where that is known."""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{error.strerror or error}{f'; {remedy}' if remedy else ''}"


# ----- Notes: what a user should know, beside what was asked for

COMMANDS: list[str] = []  # the one that this process runs
NOTES: list[str] = []  # wait for the first output; where a command is refused they are a part of its line


def note(line: str) -> None:
    """It waits only in a command's process; elsewhere it is said at once."""
    NOTES.append(one_line(line))
    if not COMMANDS:
        show_notes()


def show_notes() -> None:
    """On stderr, which may be closed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for line in NOTES:
            print(line, file=sys.stderr)
    NOTES.clear()


# ----- A command's life


def command(main: Callable[[list[str]], int | None], interrupted: str = "interrupted") -> NoReturn:
    """Runs a command's main(argv) and ends the process.

    0, or what main returns; 2 and one line for what a user can put right; 1 and one line with the place of
    the traceback for a bug of ours; 130 for Ctrl-C, with the word `interrupted`; silently 143 for SIGTERM and
    141 for a closed pipe (`| head`).
    """
    open_standard_streams()
    on_stop_signals(raise_interrupt)
    COMMANDS.append(sys.argv[0])
    try:
        code = main(sys.argv[1:]) or 0
        show_notes()
        sys.stdout.flush()  # a full disk behind > FILE shows here
    except BaseException as error:
        code = report(error, interrupted)
    leave(code)


def report(error: BaseException, interrupted: str = "interrupted") -> int:
    """Says in one line how a command ended -> its exit code."""
    train_gpt = sys.modules.get("train_gpt")  # it imports nothing of the project: its UserError is its own
    user_errors = (UserError, train_gpt.UserError) if hasattr(train_gpt, "UserError") else UserError
    if isinstance(error, SystemExit):  # --help
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, BrokenPipeError):
        return 141
    if isinstance(error, KeyboardInterrupt):
        show_notes()
        return 143 if str(error) == "SIGTERM" else complain(interrupted, 130)
    if isinstance(error, user_errors):
        return refuse(str(error))
    if isinstance(error, ModuleNotFoundError):
        remedy = "use the Python of ./run.sh (.venv/bin/python), or pip install -r requirements.txt"
        return refuse(f"{error.name} is not installed in {shown(sys.executable)}: {remedy}")
    if isinstance(error, OSError):  # what the system refuses or lacks
        where = shown(os.fsdecode(error.filename)) if error.filename else "the output"
        return refuse(f"{where}: {os_reason(error)}")
    return complain(f"a bug of this program: {describe_bug(error)}", 1)


def refuse(message: str) -> int:
    """What a user can put right; the notes so far say why, perhaps -> exit code."""
    notes = [line for line in NOTES if line not in message]
    why = f" ({'; '.join(notes[:3])})" if notes else ""
    return complain(f"error: {message}{why}", 2)


def describe_bug(error: BaseException) -> str:
    """One line, and the traceback in a file of its own."""
    summary = one_line(f"{type(error).__name__}: {error}", 300)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="traceback-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        return f"{summary}; please report it with {file.name}"
    except OSError:
        return f"{summary}; its traceback could not be written anywhere"


def complain(message: str, code: int) -> int:
    """One line on stderr, where somebody may read it, -> code."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(one_line(f"{Path(sys.argv[0]).name}: {message}", 2000), file=sys.stderr)
    return code


def leave(code: int) -> NoReturn:
    """Ends at once: sys.exit would first wait for threads that still download, and complain of a closed
    pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def open_standard_streams() -> None:
    """What the caller closed (>&-) swallows what is printed; else the next file to be opened would take its
    number. A character that the terminal cannot show becomes a question mark.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115, for as long as the process lives
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# ----- Signals


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as behind nohup
        signal.signal(signal.SIGINT, handler)


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt with the signal's name. An import of torch would swallow it, or abort: then later."""
    if is_importing(frame):
        again = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number))
        again.daemon = True
        again.start()
        return
    raise KeyboardInterrupt(signal.Signals(number).name)


def is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


# `python -m data.text` has begun to import: a folder's __init__ imports this first.
if sys.argv[:1] == ["-m"]:
    open_standard_streams()
    on_stop_signals(lambda number, _: os._exit(128 + number))  # nothing is done yet, nothing to clean up
    sys.excepthook = lambda kind, error, trace: leave(report(error))  # a package that is missing
