"""Documents of files, folders, JSON lines, standard input and Hugging Face datasets, in a fixed order."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from cli import UserError, need, os_reason, shown

SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".json": "json",
}
UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SEPARATOR = "<|endoftext|>"  # between the documents of a plain text file
BLOCK = 2**20  # bytes read at a time
MAX_LINE = 2**28  # bytes of a line of JSON

# How files begin that people take for text: (first bytes, what they are, what to do).
BINARY_FORMATS = (
    (b"%PDF-", "PDF", "take its text out (pdftotext)"),
    (b"PK\x03\x04", "a zip archive (docx, xlsx, odt and epub are zip too)", "unpack it, or save it as text"),
    (b"PAR1\x15", "Parquet", "give its folder as hf:FOLDER"),
    (b"ARROW1\x00", "Arrow", "give its folder as hf:FOLDER"),
    (b"Obj\x01", "Avro", "convert it to JSON lines"),
    (b"\x89PNG", "a PNG picture", "leave it out"),
    (b"\xff\xd8\xff", "a JPEG picture", "leave it out"),
    (b"GIF87a", "a GIF picture", "leave it out"),
    (b"GIF89a", "a GIF picture", "leave it out"),
    (b"\x1f\x8b", "packed by gzip", "give its name the ending .gz"),
    (b"BZh9", "packed by bzip2", "give its name the ending .bz2"),
    (b"\xfd7zXZ\x00", "packed by xz", "give its name the ending .xz"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it (zstd -dc FILE, into -)"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"Rar!\x1a", "a RAR archive", "unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as text"),
    (b"{\\rtf", "rich text (RTF)", "save it as plain text"),
    (b"SQLite format 3", "an SQLite database", "export its text as JSON lines"),
    (b"\x89HDF", "HDF5", "export its text as JSON lines"),
    (b"\x93NUMPY", "a numpy array", "leave it out"),
    (b"\x7fELF", "a program", "leave it out"),
    (b"\xff\xfe\x00\x00", "UTF-32", "convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\x00\x00\xfe\xff", "UTF-32", "convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "UTF-16", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    ((20240520).to_bytes(4, "little"), "a token shard", "train on its folder with --data_dir"),
)


class Source:
    """One input.

    name: as the command line has it; kind: text, json or hub; field: that holds a record's text;
    cut: characters of a plain text, after which its next document may begin.
    """

    def __init__(self, name: str, kind: str, field: str, cut: int):
        self.name, self.kind, self.field, self.cut = name, kind, field, cut
        self.path = None if name == "-" or kind == "hub" else Path(name)
        about = self.path.stat() if self.path else None
        self.size = about.st_size if about else None  # bytes, where that is known
        changed = about.st_mtime_ns if about else None
        self.stamp = [name, kind, field, self.size, changed]  # another stamp is another input
        self.bytes_read = 0
        self.last = None  # the position behind its last document, once that was read

    def documents(self) -> Iterator[str]:
        """Its documents in order, from the first. UserError: the input, and what of it cannot be read."""
        if self.kind == "hub":
            yield from hub_documents(self.name, self.field)
            return
        try:
            with open(self.path, "rb") if self.path else standard_input() as raw:
                suffix = self.path.suffix.lower() if self.path else ""
                file = UNPACK[suffix](raw) if suffix in UNPACK else raw
                if self.kind == "json":
                    documents = json_documents(file, self.name, self.field)
                else:
                    documents = text_documents(file, self.name, self.cut)
                for document in documents:
                    self.bytes_read = raw.tell() if self.path else 0
                    yield document
        except BrokenPipeError:
            raise  # not from reading: whoever read our output has gone
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            damaged = f"it is damaged or cut ({type(error).__name__})"
            reason = os_reason(error) if getattr(error, "strerror", None) else damaged
            raise UserError(f"{shown(self.name)}: cannot be read: {reason}") from error


def standard_input() -> BinaryIO:
    need(sys.stdin is not None, "-: standard input is closed; put a file or a pipe into it")
    return sys.stdin.buffer


# Which inputs


def find_sources(inputs: list[str], kind: str | None, field: str, cut: int) -> tuple[list[Source], int]:
    """The inputs as given, folders as their files sorted by path; and how many files of folders are none."""
    sources, left_out = [], 0
    for given in inputs:
        if given.startswith("hf:"):
            parts = given.removeprefix("hf:").split(":")
            need(parts[0] and len(parts) <= 3, f"{shown(given)}: give hf:OWNER/NAME[:CONFIG[:SPLIT]]")
            sources.append(Source(given, "hub", field, cut))
        elif given == "-":
            sources.append(Source(given, kind or "text", field, cut))
        elif is_folder(given):
            files, others = text_files(given)
            left_out += others
            sources += [Source(str(path), kind or kind_of(path), field, cut) for path in files]
        else:
            sources.append(Source(given, kind or kind_of(Path(given)) or "text", field, cut))
    need_different([source.name for source in sources])
    return sources, left_out


def is_folder(given: str) -> bool:
    """UserError: neither a folder nor a file."""
    need(given, "an INPUT of '' names nothing; the current folder is .")
    try:
        mode = os.stat(given).st_mode
    except OSError as error:
        raise UserError(f"{shown(given)}: cannot be read: {os_reason(error)}") from error
    readable = stat.S_ISDIR(mode) or stat.S_ISREG(mode)
    need(readable, f"{shown(given)}: is no file or folder; what comes out of a pipe or device goes into -")
    return stat.S_ISDIR(mode)


def need_different(names: list[str]) -> None:
    """A text that is trained on twice, and validated with what was trained on, is a mistake."""
    first: dict[str, str] = {}
    for name in names:
        real = name if name == "-" or name.startswith("hf:") else os.path.realpath(name)
        need(real not in first, f"{shown(name)}: is given 2 times, also as {shown(first.get(real))}")
        first[real] = name


def text_files(folder: str) -> tuple[list[Path], int]:
    """The text files below a folder, sorted by path, and how many others there are.

    Links are followed, and what is reached twice is read once. Hidden files and folders are not looked at.
    """
    texts, others, seen = [], 0, set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse_folder):
        if is_known(Path(parent), seen):
            folders.clear()
            others += 1
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if kind_of(path) and path.is_file() and not is_known(path, seen):
                texts.append(path)
            else:
                others += 1
    known = " ".join(SUFFIXES)
    need(texts, f"{shown(folder)}: no text in this folder; name files one by one that are not {known}")
    return sorted(texts), others


def is_known(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether the same file or folder was met before, by another name."""
    about = path.stat()
    identity = (about.st_dev, about.st_ino)
    if identity in seen:
        return True
    seen.add(identity)
    return False


def refuse_folder(error: OSError) -> NoReturn:
    raise UserError(f"{shown(error.filename)}: cannot be read: {os_reason(error)}") from error


def kind_of(path: Path) -> str | None:
    packed = path.suffix.lower() in UNPACK
    return SUFFIXES.get((path.with_suffix("") if packed else path).suffix.lower())


def need_text(head: bytes, name: str) -> None:
    """UserError: the first bytes of a file are those of another format than text."""
    for magic, format_name, remedy in BINARY_FORMATS:
        need(not head.startswith(magic), f"{shown(name)}: is {format_name}, not text; {remedy}")
    need(
        head[257:262] != b"ustar", f"{shown(name)}: is a tar archive, not text; unpack it and give its folder"
    )
    zeros = head.count(b"\0")
    need(
        100 * zeros <= len(head),
        f"{shown(name)}: is no text in UTF-8 (zero bytes); convert it or leave it out",
    )


# Plain text


def text_documents(file: BinaryIO, name: str, cut: int) -> Iterator[str]:
    """A text cut at separators, and between paragraphs where more than `cut` characters have come.

    All line ends come out as \\n, so that a text is cut alike whatever system it is from.
    """
    text, more = "", True
    blocks = decoded_blocks(file, name)
    while more:
        block = next(blocks, None)
        more = block is not None
        text += block or ""
        start = 0
        while len(text) - start > (2 * cut + len(SEPARATOR) if more else 0):
            end = document_end(text, start, cut)
            mark = text.find(SEPARATOR, start, end + len(SEPARATOR) - 1)
            if mark < 0:
                yield text[start:end]
                start = end
                continue
            yield text[start:mark]
            start = mark + len(SEPARATOR)
            if text.startswith("\n", start):
                start += 1
        text = text[start:]


def decoded_blocks(file: BinaryIO, name: str) -> Iterator[str]:
    """The text in blocks, without a byte order mark, line ends as \\n. UserError: a byte that is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0
    while True:
        block = file.read(BLOCK)
        if position == 0:
            need_text(block, name)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = position - pending + error.start
            raise UserError(
                f"{shown(name)}: no UTF-8 at byte {at}; convert it (iconv) or leave it out"
            ) from error
        yield line_ends.decode(text, final=not block)
        if not block:
            return
        position += len(block)


def document_end(text: str, start: int, cut: int) -> int:
    """Where the document that begins at start ends: between paragraphs, lines, words, or anywhere."""
    if len(text) - start <= 2 * cut:
        return len(text)
    for boundary in ("\n\n", "\n", " "):
        at = text.find(boundary, start + cut, start + 2 * cut)
        if at >= 0:
            return at + len(boundary)
    return start + 2 * cut


def halves(text: str) -> tuple[str, str]:
    """text cut in two near its middle: between paragraphs, lines or words, or anywhere if need be."""
    middle, quarter = len(text) // 2, len(text) // 4
    for boundary in ("\n\n", "\n", " "):
        at = text.rfind(boundary, quarter, middle)
        if at < 0:
            at = text.find(boundary, middle, middle + quarter)
        if at >= 0:
            end = at + len(boundary)
            return text[:end], text[end:]
    return text[:middle], text[middle:]


# JSON lines and datasets


def json_documents(file: BinaryIO, name: str, field: str) -> Iterator[str]:
    for number, line in enumerate(json_lines(file, name), 1):
        where = f"{shown(name)}: line {number}"
        if number == 1:
            need_text(line, name)
        if not line.strip():
            continue
        try:
            # numbers of more digits than int takes are none of our business
            record = json.loads(line.decode("utf-8-sig"), parse_int=float)
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is no UTF-8; convert it (iconv) or leave it out") from error
        except ValueError as error:
            raise UserError(f"{where} is no JSON; it takes JSON lines, one object a line") from error
        except RecursionError as error:
            raise UserError(f"{where} is nested too deep to be read; leave that part of it out") from error
        yield text_of(record, field, where)


def json_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Lines with any line end: JSON has none of them within a text."""
    while True:
        line = file.readline(MAX_LINE)
        if not line:
            return
        need(
            len(line) < MAX_LINE, f"{shown(name)}: has a line of more than {MAX_LINE:,} bytes, no JSON lines"
        )
        yield from line.splitlines()


def text_of(record: object, field: str, where: str) -> str:
    """A record's text. null in its place is an empty document."""
    text = record.get(field, record) if isinstance(record, dict) else record
    if text is None:
        return ""
    if isinstance(text, str):
        return text
    if text is record and isinstance(record, dict):
        found = f"it has {', '.join(record)}"[:200]
    else:
        found = f"it is a {json_type(text)}"
    raise UserError(f"{where} has no text in a field {field!r}, {found}; name the field with --field")


def json_type(value: object) -> str:
    names = {bool: "truth value", float: "number", int: "number", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def hub_documents(name: str, field: str) -> Iterator[str]:
    """hf:OWNER/NAME[:CONFIG[:SPLIT]], streamed: nothing is downloaded but what passes through."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings name signed addresses
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{shown(name)}: needs the package `datasets`, which training does not: pip install datasets"
        ) from error
    repo, config, split, *_ = [*name.removeprefix("hf:").split(":"), "", ""]
    try:
        rows = load_dataset(repo, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield text_of(row, field, f"{shown(name)}: row {number}")
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:  # whatever comes out of that library is about the dataset or the way to it
        first = re.sub(r"\w+://\S+", "...", (str(error).strip().splitlines() or [""])[0])[:200]
        raise UserError(
            f"{shown(name)}: cannot be streamed ({type(error).__name__}: {first}); what is made stays, "
            f"the same command goes on"
        ) from error
