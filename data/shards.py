"""Writing token shards, and what the commands of this folder share. The reader is train_gpt.py's read_shard."""

import argparse
import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the folder of train_gpt.py
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def user_error(message: str) -> Exception:
    """train_gpt's UserError. Imported only when needed: it brings torch, and "nothing to do" should not wait for that."""
    from train_gpt import UserError

    return UserError(message)


def command(main: Callable[[list[str]], None]) -> None:
    """Runs a command's main(argv). A UserError is one line and exit code 2, Ctrl-C is 130, a bug keeps its trace."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        leave("interrupted: what was finished stays, run the command again for the rest", 130)
    except Exception as error:
        from train_gpt import UserError

        if not isinstance(error, UserError):
            raise
        leave(f"error: {error}", 2)


def leave(message: str, code: int) -> None:
    """Ends at once: a plain sys.exit would first wait for downloads still running in other threads."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser that reports a wrong flag like any other error of the user."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0], allow_abbrev=False)

    def fail(message: str) -> None:
        raise user_error(f"{message} (--help lists the flags)")

    parser.error = fail
    return parser


def say(line: str) -> None:
    """A line of output; a progress bar makes room for it."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def sha256(data: bytes | Path) -> str:
    if isinstance(data, Path):
        with open(data, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(data).hexdigest()


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise user_error(f"{path}: cannot make this folder: {error.strerror}") from error
    return path


@contextlib.contextmanager
def alone_in(folder: Path):
    """Two that write the same folder would spoil each other's files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise user_error(
                f"{folder}: another process is writing this folder; wait for it or end it"
            ) from None
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
        raise user_error(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def shard_is_whole(path: Path) -> bool:
    """Whether it is there with as many bytes as its header says: no more than that, so that it costs nothing to ask."""
    try:
        with open(path, "rb") as file:
            header = file.read(12)
        return path.stat().st_size == 1024 + 2 * int.from_bytes(header[8:], "little")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise user_error(f"{path}: cannot be read: {error.strerror}") from error


def write_shard(path: Path, tokens) -> None:
    """A header of 256 int32 (magic, version, count, zeros), then the tokens as uint16, both little-endian."""
    import numpy as np

    tokens = np.asarray(tokens)
    assert tokens.ndim == 1 and tokens.size > 0, (
        f"{path}: a shard holds one row of tokens, not {tokens.shape}"
    )
    assert tokens.min() >= 0 and tokens.max() < 2**16, (
        f"{path}: tokens {tokens.min()}..{tokens.max()} do not fit uint16"
    )
    write_file(path, shard_header(tokens.size), np.ascontiguousarray(tokens, dtype="<u2").data)


def shard_header(tokens: int) -> bytes:
    import numpy as np

    from train_gpt import HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION

    assert 0 < tokens < 2**31, f"{tokens} tokens do not fit the header's int32"
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()
