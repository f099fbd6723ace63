"""What the tools of this folder share: extras, printing, types of flags, files that are written whole."""

import argparse
import importlib
import math
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from cli import UserError, need, note, one_line, os_reason, show_notes

MARK = "gpt-speedrun records"  # in each picture and page that these tools write: only such a file is replaced


def extra(module: str):
    """Imports one of requirements.txt's packages, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{package} is missing ({error}); pip install -r records/requirements.txt") from None


# ---- printing


def say(text: str) -> None:
    """text on stdout, now: whoever reads it (`| head`) may be waiting. Notes that wait come first."""
    show_notes()
    print(text, flush=True)


def warn(line: str) -> None:
    """One line on stderr, with the next output; where there is none, in the line of the error."""
    note(line)


# ---- flags


def number_flag(low: float, high: float, whole: bool = False) -> Callable[[str], float]:
    """The type of a flag that holds a number from low to high, both included; never nan."""

    def parse(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise argparse.ArgumentTypeError(f"{one_line(text, 40)!r}: give {kind} from {low:g} to {high:g}")
        return value

    return parse


def words_flag(text: str) -> list[str]:
    """The type of a flag that holds several words, with commas between them."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"{one_line(text, 40)!r}: give words with commas between them")
    return words


LOSS = number_flag(-1e6, 1e6)
STEP = number_flag(0, 10**12, whole=True)
DIGITS = number_flag(0, 12, whole=True)

# ---- reading and writing


def file_kind(path: Path) -> str:
    """ "file", "folder", "other" (a pipe, a device) or "missing". UserError for what cannot be looked at."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError) as error:
        detail = os_reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{one_line(str(path), 200)}: cannot be read ({detail})") from None
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "other"


def read_text(path: Path, limit: int = 16 * 2**20) -> str:
    """A file's text, which must be UTF-8 and at most `limit` bytes."""
    need(file_kind(path) == "file", f"{path}: cannot be read (not there, or no file)")
    try:
        need(path.stat().st_size <= limit, f"{path}: cannot be read (larger than {limit >> 20} MiB)")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot be read (not UTF-8)") from None


def check_output(path: Path, flag: str = "--out") -> None:
    """UserError unless a file can be made at path, or the one that is there was made by these tools."""
    kind = file_kind(path)
    need(kind in ("missing", "file"), f"{flag} {path}: there is a {kind} of that name; give another name")
    if kind == "file":
        try:
            content = path.read_bytes() if path.stat().st_size < 64 * 2**20 else b""
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be read ({os_reason(error)})") from None
        mine = MARK.encode() in content
        need(
            mine, f"{flag} {path}: is there, and none of these tools made it; give another name or remove it"
        )
    parent = path.parent
    need(file_kind(parent) == "folder", f"{flag} {path}: cannot be written, {parent} is no folder")


def write_whole(path: Path, write: Callable[[Path], object], flag: str = "--out") -> None:
    """Calls write(temporary path) and renames that to path: the file is there whole or not at all."""
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=".part-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o666 & ~current_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({os_reason(error)})") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, flag: str = "--out") -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), flag)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
