"""Writing token shards, and what this folder's commands share. The reader is train_gpt.py's read_shard."""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import cli
from cli import UserError, need, one_line

ROOT = Path(__file__).resolve().parent.parent  # the folder of train_gpt.py
VOCAB = "vocab.tiktoken"  # beside the shards: `base64 rank` a line
TOKEN_BYTES = "token_bytes.npy"  # beside it: how many bytes each token stands for
INTERRUPTED = "interrupted: what was finished stays, run the command again for the rest"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # file systems that cannot lock
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


# How a command runs and fails


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """cli.command for what writes folders: SIGTERM ends it as Ctrl-C does, cleaned up, with exit code 143."""
    for name in ("stdout", "stderr"):  # closed by the caller (>&-): what is printed goes nowhere
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (stays open until the process ends)
    signal.signal(signal.SIGTERM, end_by_signal)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as behind nohup
        signal.signal(signal.SIGINT, end_by_signal)
    cli.command(main, INTERRUPTED)


def end_by_signal(number: int, frame: FrameType | None) -> None:
    """Raises what ends the command. While torch is imported it would be swallowed, or abort: then later."""
    if is_importing(frame):
        again = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number))
        again.daemon = True
        again.start()
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def reports_system_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Decorates a command's main: what the system refuses or lacks is a UserError that names it."""

    @functools.wraps(main)
    def wrapped(argv: list[str]) -> None:
        try:
            main(argv)
            sys.stdout.flush()  # a full disk behind > FILE
        except BrokenPipeError:
            raise  # whoever read our output has gone; cli.command ends quietly
        except ModuleNotFoundError as error:
            raise UserError(
                f"{error.name} is not installed in {shown(sys.executable)}: use the Python of ./run.sh "
                f"(.venv/bin/python), or pip install -r requirements.txt"
            ) from error
        except OSError as error:
            where = shown(os.fsdecode(error.filename)) if error.filename else "the output"
            raise UserError(f"{where}: {os_reason(error)}") from error

    return wrapped


def os_reason(error: OSError) -> str:
    """What the system says, and what to do about it where that is known."""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{error.strerror or error}{f'; {remedy}' if remedy else ''}"


def shown(name: object) -> str:
    """A name or value as part of a message: on one line, and the middle left out where it is very long."""
    text = one_line(str(name), limit=10_000)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def folder_path(text: str) -> Path:
    """The type of a flag that names a folder: '' is an unset variable, and not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' names no folder; the current one is .")
    return Path(text)


def say(line: str) -> None:
    """A line of output; a progress bar makes room for it."""
    from tqdm import tqdm

    try:
        tqdm.write(one_line(line))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk behind > FILE
        raise UserError(f"the output: {os_reason(error)}") from error


# Files that are whole or not there


def sha256(data: bytes | Path) -> str:
    if isinstance(data, Path):
        with open(data, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(data).hexdigest()


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot make this folder: {os_reason(error)}") from error
    return path


@contextlib.contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Two that write the same folder would spoil each other's files: the second waits, or is refused."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            need(wait, f"{shown(folder)}: another process is writing this folder; wait for it or end it")
            say(f"{folder}: another process is writing this folder, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def move(part: Path, path: Path) -> None:
    """A finished file to its final name, when it is on disk."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too
    finally:
        os.close(folder)


def write_file(path: Path, *parts: bytes) -> None:
    """Whole or not at all: a temporary name beside it, on disk, and only then its own name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
        move(temporary, path)
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be written: {os_reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_once(path: Path, content: bytes) -> bool:
    """Writes a file that may be there already with this content -> whether it was written.

    UserError: something else has this name. It is somebody's, and stays.
    """
    if not os.path.lexists(path):
        write_file(path, content)
        return True
    same = path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
    need(
        same,
        f"{shown(path)}: is already there and is not what belongs there; move it, or choose another folder",
    )
    return False


# Shards


def shard_is_whole(path: Path) -> bool:
    """Whether it is there with as many bytes as its header says; nothing more, so that asking is cheap."""
    try:
        with open(path, "rb") as file:
            header = file.read(12)
        return path.stat().st_size == 1024 + 2 * int.from_bytes(header[8:], "little")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {os_reason(error)}") from error


def write_shard(path: Path, tokens) -> None:
    """tokens (n,): a header of 256 int32 (magic, version, n, zeros), then uint16, both little-endian."""
    import numpy as np

    tokens = np.asarray(tokens)
    assert tokens.ndim == 1 and tokens.size > 0, f"{path}: one row of tokens, not {tokens.shape}"
    low, high = tokens.min(), tokens.max()
    assert low >= 0 and high < 2**16, f"{path}: tokens {low}..{high} do not fit uint16"
    write_file(path, shard_header(tokens.size), np.ascontiguousarray(tokens, dtype="<u2").data)


def shard_header(tokens: int) -> bytes:
    import numpy as np

    from train_gpt import HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION

    assert 0 < tokens < 2**31, f"{tokens} tokens do not fit the header's int32"
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()
