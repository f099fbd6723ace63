"""Writing token shards, and what the commands of this folder share. The reader is train_gpt.py's read_shard."""
import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Callable

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


def write_file(path: Path, *parts: bytes) -> None:
    """Whole or not at all: a temporary name beside it, on disk, and only then its own name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise user_error(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, tokens) -> None:
    """A header of 256 int32 (magic, version, count, zeros), then the tokens as uint16, both little-endian."""
    import numpy as np
    from train_gpt import HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION
    tokens = np.asarray(tokens)
    assert tokens.ndim == 1 and tokens.size > 0, f"{path}: a shard holds one row of tokens, not {tokens.shape}"
    assert 0 <= tokens.min() and tokens.max() < 2**16, f"{path}: tokens {tokens.min()}..{tokens.max()} do not fit uint16"
    assert tokens.size < 2**31, f"{path}: {tokens.size} tokens do not fit the header's int32"
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    write_file(path, header.tobytes(), np.ascontiguousarray(tokens, dtype="<u2").data)
