"""Writing token shards, and what this folder's commands share. The reader is train_gpt.py's read_shard."""

import base64
import contextlib
import errno
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from cli import UserError, need, one_line, os_reason, shown

ROOT = Path(__file__).resolve().parent.parent  # the folder of train_gpt.py
VOCAB = "vocab.tiktoken"  # beside the shards: `base64 rank` a line
TOKEN_BYTES = "token_bytes.npy"  # beside it: how many bytes each token stands for
INTERRUPTED = "interrupted: what was finished stays, run the command again for the rest"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # file systems that cannot lock


# Flags and output


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


def save_vocab(path: Path, ranks: dict[bytes, int]) -> None:
    write_file(path, vocab_file(ranks))


def vocab_file(ranks: dict[bytes, int]) -> bytes:
    """tiktoken's text format: `base64 rank`, a line a token."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)


def write_once(path: Path, content: bytes) -> bool:
    """Writes a file that may be there already with this content -> whether it was written.

    UserError: something else has this name. It is somebody's, and stays.
    """
    if not os.path.lexists(path):
        write_file(path, content)
        return True
    need(
        holds(path, content),
        f"{shown(path)}: is already there and is not what belongs there; move it, or choose another folder",
    )
    return False


def holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


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
