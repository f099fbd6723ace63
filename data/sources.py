"""Documents out of files, folders, JSON lines, standard input and Hugging Face datasets, always in the same order."""

import bz2
import codecs
import gzip
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data.shards import user_error

SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SEPARATOR = "<|endoftext|>"  # between the documents of a plain text file
CUT = 8000  # characters: a longer plain text is cut, since training skips the rest of a long document
BLOCK = 2**20  # bytes read at a time


class Source:
    """One input. name: as the command line has it; kind: text, json or hub; at: bytes read so far."""

    def __init__(self, name: str, kind: str, field: str):
        self.name, self.kind, self.field, self.at = name, kind, field, 0
        self.path = None if name == "-" or kind == "hub" else Path(name)
        about = self.path.stat() if self.path else None
        self.size = about.st_size if about else None
        self.stamp = [
            name,
            kind,
            field,
            self.size,
            about.st_mtime_ns if about else None,
        ]  # changes when the input does

    def documents(self) -> Iterator[str]:
        """Its documents in order, from the first. UserError names the input and the place that cannot be read."""
        if self.kind == "hub":
            yield from hub_documents(self.name, self.field)
            return
        try:
            with sys.stdin.buffer if self.name == "-" else open(self.path, "rb") as raw:
                file = UNPACK[self.path.suffix](raw) if self.path and self.path.suffix in UNPACK else raw
                found = text_documents(file, self.name)
                if self.kind == "json":
                    found = json_documents(file, self.name, self.field)
                for document in found:
                    self.at = raw.tell() if self.path else 0
                    yield document
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            why = getattr(error, "strerror", None) or f"it is damaged or cut ({type(error).__name__})"
            raise user_error(f"{self.name}: cannot be read: {why}") from error


def find_sources(inputs: list[str], layout: str | None, field: str) -> tuple[list[Source], int]:
    """The inputs as given, folders as their files sorted by path; and how many files of folders are left out."""
    found, others = [], 0
    for given in inputs:
        if given.startswith("hf:"):
            found.append(Source(given, "hub", field))
        elif given == "-" or not Path(given).is_dir():
            if given != "-" and not Path(given).is_file():
                raise user_error(f"{given}: is no file or folder that can be read (a pipe goes into -)")
            found.append(Source(given, layout or kind_of(Path(given)) or "text", field))
        else:
            paths = sorted(
                path for path in Path(given).rglob("*") if path.is_file() and not hidden(path, Path(given))
            )
            texts = [path for path in paths if kind_of(path)]
            if not texts:
                raise user_error(
                    f"{given}: no text in this folder; name files one by one that are not {' '.join(SUFFIXES)}"
                )
            found += [Source(str(path), layout or kind_of(path), field) for path in texts]
            others += len(paths) - len(texts)
    name, times = Counter(source.name for source in found).most_common(1)[0]
    if times > 1:
        raise user_error(f"{name}: is given {times} times")
    return found, others


def kind_of(path: Path) -> str | None:
    return SUFFIXES.get(path.with_suffix("").suffix if path.suffix in UNPACK else path.suffix)


def hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def text_documents(file: BinaryIO, name: str) -> Iterator[str]:
    """A text cut at separators and, where it is long, between paragraphs; else nothing is taken from it or changed in it."""
    decoder, text, read, more = codecs.getincrementaldecoder("utf-8-sig")(), "", 0, True
    while more:
        block = file.read(BLOCK)
        more = bool(block)
        pending = len(decoder.getstate()[0])
        try:
            text += decoder.decode(block, final=not more)
        except UnicodeDecodeError as error:
            at = read - pending + error.start
            raise user_error(f"{name}: no UTF-8 at byte {at}; convert it (iconv) or leave it out") from error
        read += len(block)
        start = 0
        while len(text) - start > (4 * CUT + len(SEPARATOR) if more else 0):
            end = min(document_end(text, start), len(text))
            mark = text.find(SEPARATOR, start, end + len(SEPARATOR) - 1)
            yield text[start : end if mark < 0 else mark]
            start = end if mark < 0 else mark + len(SEPARATOR)
            if mark >= 0 and text.startswith("\n", start):
                start += 1
        text = text[start:]


def document_end(text: str, start: int) -> int:
    """Where the document that begins at start ends: between paragraphs, or between lines, or anywhere if there are none."""
    for boundary, first, last in (("\n\n", CUT, 2 * CUT), ("\n", 2 * CUT, 4 * CUT)):
        at = text.find(boundary, start + first, start + last)
        if at >= 0:
            return at + len(boundary)
    return start + 4 * CUT


def json_documents(file: BinaryIO, name: str, field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise user_error(
                f"{name}: line {number} is no JSON; it takes JSON lines, one object a line"
            ) from error
        yield text_of(record, field, f"{name}: line {number}")


def text_of(record: object, field: str, where: str) -> str:
    text = record.get(field) if isinstance(record, dict) else record
    if not isinstance(text, str):
        what = (
            f"has {', '.join(record)}"[:200] if isinstance(record, dict) else f"is a {type(record).__name__}"
        )
        raise user_error(f"{where} has no text in a field {field!r}, it {what}; name the field with --field")
    return text


def hub_documents(name: str, field: str) -> Iterator[str]:
    """hf:OWNER/NAME[:CONFIG[:SPLIT]], streamed: nothing is downloaded but what passes through."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings name signed addresses
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise user_error(
            f"{name}: needs the package `datasets`, which training does not: pip install datasets"
        ) from error
    repo, config, split, *_ = [*name.removeprefix("hf:").split(":"), "", ""]
    try:
        for number, row in enumerate(
            load_dataset(repo, config or None, split=split or "train", streaming=True), 1
        ):
            yield text_of(row, field, f"{name}: row {number}")
    except Exception as error:  # whatever comes out of that library is about the dataset or the way to it
        from train_gpt import UserError

        if isinstance(error, UserError):
            raise
        first = re.sub(r"\w+://\S+", "...", (str(error).strip().splitlines() or [""])[0])[:200]
        raise user_error(
            f"{name}: cannot be streamed ({type(error).__name__}: {first}); what is made stays, "
            f"the same command goes on"
        ) from error
