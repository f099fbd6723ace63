"""Your own text as token shards: files, folders, JSON lines, standard input, Hugging Face datasets.

    python -m data.text OUT INPUT... [--vocab gpt2|train:SIZE|FILE] [--max_doc_len N] [--jobs N]

Every 20th document is for validation, until that has --val_tokens. The same inputs give the same shards, byte
for byte, with any number of jobs, also if the command was killed in between and run again.
"""

import contextlib
import itertools
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from cli import (
    UserError,
    arguments,
    command,
    need,
    os_reason,
    path_flag,
    shell_word,
    shown,
    text_flag,
)
from data.shards import (
    INTERRUPTED,
    ROOT,
    TOKEN_BYTES,
    VOCAB,
    alone_in,
    make_folder,
    move,
    say,
    sha256,
    shard_is_whole,
    vocab_file,
    write_file,
    write_once,
)
from data.sources import Source, find_sources, halves

STATE = ".text.json"
VAL_EVERY = 20
VOCAB_CHARS = 2**26  # of the text's beginning that a vocabulary is trained on
BATCH_CHARS = 2**18  # that one job encodes at a time
SAVE_SECONDS = 20
BOUNDS = {"val_tokens": (1, 2**40), "shard_tokens": (1, 2**30), "max_doc_len": (16, 2**20), "jobs": (1, 1024)}


def main(argv: list[str]) -> None:
    args = parse(argv)
    # two characters a token: of English, such documents are 500 to 1,000 tokens of the default's 1,024
    sources, left_out = find_sources(args.inputs, args.format, args.field, cut=2 * args.max_doc_len)
    if left_out:
        print(
            f"{left_out} file(s) of the folders are left out: neither text nor JSON lines by their names, "
            f"no files, or linked twice",
            flush=True,
        )
    stamps = json.dumps([source.stamp for source in sources]).encode()
    settings = {
        "inputs": sha256(stamps),
        "vocab": vocab_stamp(args.vocab),
        "val_tokens": args.val_tokens,
        "shard_tokens": args.shard_tokens,
        "max_doc_len": args.max_doc_len,
    }
    with alone_in(make_folder(args.out)):
        ShardMaker(args.out, sources, settings).make(args.vocab, args.jobs)


def parse(argv: list[str]):
    parser = arguments(__doc__)
    add = parser.add_argument
    add("out", type=path_flag, metavar="OUT", help="folder for the shards")
    add("inputs", nargs="+", metavar="INPUT", help="file, folder, - or hf:OWNER/NAME[:CONFIG[:SPLIT]]")
    add("--vocab", default="gpt2", help="gpt2 (default), train:SIZE with BOS, or a vocab.tiktoken")
    add("--format", choices=("text", "json"), help="of the inputs; default: by their names, - is text")
    add(
        "--field",
        type=text_flag,
        default="text",
        help="that holds the text in JSON lines and datasets (default text)",
    )
    add("--val_tokens", type=int, default=10_485_761, metavar="N", help="for validation, or a document more")
    add("--shard_tokens", type=int, default=100_000_000, metavar="N", help="in a shard, at most")
    add(
        "--max_doc_len",
        type=int,
        default=1024,
        metavar="N",
        help="tokens: longer plain texts become several documents (default 1024; GPU presets read 2048)",
    )
    add("--jobs", type=int, default=cores(), metavar="N", help="default: all cores")
    args = parser.parse_intermixed_args(argv)
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name)
        need(low <= value <= high, f"--{name} {shown(value)}: must lie between {low} and {high}")
    return args


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The vocabulary


def vocab_stamp(vocab: str) -> str:
    """What names the vocabulary for good: a file by its content."""
    if vocab == "gpt2":
        return vocab
    if vocab.startswith("train:"):
        size = vocab.removeprefix("train:")
        fits = size.isdecimal() and len(size) < 9 and 257 <= int(size) <= 2**16
        need(fits, f"--vocab {shown(vocab)}: give train:SIZE with a SIZE from 257 to 65536")
        return vocab
    there = Path(vocab).is_file()
    need(there, f"--vocab {shown(vocab)}: no such file; give gpt2, train:SIZE or a vocab.tiktoken")
    return f"file {sha256(Path(vocab))}"


class Position(NamedTuple):
    """How far the inputs were read: documents of the source with this number, and their CRC-32."""

    source: int
    documents: int
    crc: int


@dataclass
class Document:
    text: str
    cuttable: bool  # plain text: of more tokens than --max_doc_len it becomes several documents
    end: Position


def vocab_content(vocab: str, out: Path, documents: Iterator[Document]) -> tuple[bytes, Iterator[Document]]:
    """The file vocab.tiktoken; and the documents again, of which a training takes some from the beginning."""
    from data.bpe import load_vocab, train_bpe, whole_characters
    from data.corpus import gpt2_vocab

    if vocab == "gpt2":
        return gpt2_vocab(out), documents
    if not vocab.startswith("train:"):
        ranks = load_vocab(Path(vocab))
        need(len(ranks) < 2**16, f"--vocab {shown(vocab)}: {len(ranks)} tokens and BOS do not fit 16 bits")
        return vocab_file(ranks), documents
    head, chars = [], 0
    for document in documents:
        head.append(document)
        chars += len(document.text)
        if chars >= VOCAB_CHARS:
            break
    texts = [document.text for document in head if document.text.strip()]
    training = [whole_characters(text) for n, text in enumerate(texts) if n % VAL_EVERY]
    print(f"training a vocabulary on {sum(map(len, training)):,} characters", flush=True)
    try:
        ranks = train_bpe(training, int(vocab.removeprefix("train:")) - 1)
    except UserError as error:
        raise UserError(f"--vocab {vocab}: {error}") from None
    return vocab_file(ranks), itertools.chain(head, documents)


# From documents to tokens


@dataclass
class Batch:
    """Documents that are encoded together; empty ones are only counted. end: behind the last of them."""

    documents: list[Document] = field(default_factory=list)
    end: Position = Position(0, 0, 0)
    empty: int = 0
    bytes: int = 0


def documents_from(sources: list[Source], begin: Position) -> Iterator[Document]:
    """Each document behind `begin`. UserError: the text before it is not what it was.

    A source that was read to its end has then `last`, its last position.
    """
    for number in range(begin.source, len(sources)):
        source, crc, count = sources[number], 0, 0
        for count, text in enumerate(source.documents(), 1):
            crc = zlib.crc32(text.encode("utf-8", "surrogatepass"), crc)
            if number > begin.source or count > begin.documents:
                yield Document(text, source.kind == "text", Position(number, count, crc))
            elif count == begin.documents and crc != begin.crc:
                raise UserError(changed(source))
        if number == begin.source and count < begin.documents:
            raise UserError(changed(source))
        source.last = Position(number, count, crc)


def changed(source: Source) -> str:
    name = shown(source.name)
    return f"{name}: its text is not what it was when this began; give the same again, or another OUT"


def batches(documents: Iterator[Document]) -> Iterator[Batch]:
    batch, chars = Batch(), 0
    for document in documents:
        batch.end = document.end
        if not document.text.strip():
            batch.empty += 1
            continue
        batch.documents.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = Batch(end=batch.end), 0
    yield batch


def encode_batch(tokenizer, bos_id: int, max_doc_len: int, batch: Batch) -> list[list]:
    """For each document of the batch its rows of uint16, BOS first: one, or several where it was cut."""
    found = []
    for document in batch.documents:
        limit = max_doc_len if document.cuttable else None
        rows, size = rows_of_text(tokenizer, bos_id, limit, document.text)
        found.append(rows)
        batch.bytes += size
    return found


def rows_of_text(tokenizer, bos_id: int, limit: int | None, text: str) -> tuple[list, int]:
    """A text as rows of at most `limit` tokens, BOS included, and its bytes of UTF-8."""
    import numpy as np

    from data.bpe import encode, whole_characters

    rows, size, parts = [], 0, [text]
    while parts:
        part = parts.pop()
        tokens = encode(tokenizer, part)
        if limit is not None and len(tokens) >= limit:
            parts += reversed(halves(part))
            continue
        row = np.empty(len(tokens) + 1, dtype="<u2")
        row[0] = bos_id
        row[1:] = tokens
        rows.append(row)
        size += len(whole_characters(part).encode())
    return rows, size


class Writer:
    """The shards of one split. Tokens go to a .part file, sealed when the next document would not fit.

    shards: that are sealed; tokens: in the open one; total: in all of them.
    """

    def __init__(self, out: Path, split: str, limit: int, shards: int, tokens: int, total: int):
        self.out, self.split, self.limit = out, split, limit
        self.shards, self.tokens, self.total = shards, tokens, total
        self.rows, self.file, self.unpublished = [], None, []

    def path(self, number: int) -> Path:
        return self.out / f"text_{self.split}_{number + (self.split == 'train'):06d}.bin"

    def part(self, number: int) -> Path:
        path = self.path(number)
        return path.with_name(f".{path.name}.part")

    def resume(self) -> None:
        """Takes up what the state says: sealed shards without final names, and the tokens of an open one."""
        from train_gpt import HEADER_BYTES

        for number in range(self.shards):
            path = self.path(number)
            if self.part(number).exists():
                self.publish_shard(number)
            again = f"delete {shown(self.out)} and make it again"
            need(path.exists(), f"{shown(path)}: is gone; {again}")
            need(shard_is_whole(path), f"{shown(path)}: is not as long as its header says; {again}")
        if self.tokens:
            part, size = self.part(self.shards), HEADER_BYTES + 2 * self.tokens
            whole = part.exists() and part.stat().st_size >= size
            need(
                whole,
                f"{shown(part)}: holds less than was written; delete {shown(self.out)} and make it again",
            )
            self.file = open(part, "r+b")  # noqa: SIM115 (open until it is sealed)
            self.file.truncate(size)
            self.file.seek(size)

    def add(self, row) -> None:
        if self.tokens and self.tokens + len(row) > self.limit:
            self.seal()
        self.rows.append(row)
        self.tokens += len(row)
        self.total += len(row)

    def write(self, to_disk: bool = False) -> None:
        import numpy as np

        from train_gpt import HEADER_BYTES

        if self.rows:
            if self.file is None:
                self.file = open(self.part(self.shards), "wb")  # noqa: SIM115 (open until it is sealed)
                self.file.write(bytes(HEADER_BYTES))
            self.file.write(np.concatenate(self.rows).data)
            self.rows = []
        if to_disk and self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def seal(self) -> None:
        """Whole under its .part name. The final name comes when the state is saved that counts it."""
        from data.shards import shard_header

        self.write()
        self.file.seek(0)
        self.file.write(shard_header(self.tokens))
        self.write(to_disk=True)
        self.file.close()
        self.unpublished.append(self.shards)
        self.file, self.tokens, self.shards = None, 0, self.shards + 1

    def publish(self) -> list[Path]:
        published = [self.publish_shard(number) for number in self.unpublished]
        self.unpublished = []
        return published

    def publish_shard(self, number: int) -> Path:
        path = self.path(number)
        need(
            not os.path.lexists(path),
            f"{shown(path)}: is there, and this command did not make it; move it away",
        )
        move(self.part(number), path)
        return path

    def discard(self) -> None:
        """Removes what never got a final name."""
        if self.file:
            self.file.close()
            self.file = None
        for number in (*self.unpublished, self.shards):
            self.part(number).unlink(missing_ok=True)

    def discard_published(self) -> None:
        for number in range(self.shards):
            self.path(number).unlink(missing_ok=True)


# One folder of shards


def new_state(settings: dict) -> dict:
    return {
        "settings": settings,
        "done": False,
        "vocab": None,  # its sha256
        "position": [0, 0, 0],
        "stdin": None,  # the position at the end of standard input, once that was reached
        "documents": 0,  # with text, as the inputs have them
        "rows": 0,  # documents of the shards: more, where long texts were cut
        "empty": 0,
        "bytes": 0,
        "train": {"shards": 0, "tokens": 0, "total": 0},
        "val": {"shards": 0, "tokens": 0, "total": 0},
    }


def load_state(out: Path, settings: dict) -> dict | None:
    """What an earlier call wrote into this folder; None: nothing. UserError: this call does not fit it."""
    path = out / STATE
    if not os.path.lexists(path):
        need(
            not any(out.glob("*.bin")),
            f"{shown(out)}: holds shards that this command did not make; choose another folder",
        )
        return None
    try:
        state = json.loads(path.read_bytes())
        counts = [
            *state["position"],
            *(state["stdin"] or ()),
            *state["train"].values(),
            *state["val"].values(),
        ]
        counts += [state[name] for name in ("documents", "rows", "empty", "bytes")]
        whole = (
            new_state({}).keys() == state.keys()
            and new_state({})["train"].keys() == state["train"].keys() == state["val"].keys()
            and len(state["position"]) == 3
            and len(state["stdin"] or "...") == 3
            and all(type(count) is int and count >= 0 for count in counts)
        )
        known = dict(state["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    need(whole, f"{shown(path)}: is not what this command writes; delete {shown(out)} and make it again")
    for name in settings:
        what = f"--{name}" if name != "inputs" else "inputs, or inputs that have changed since"
        need(
            known.get(name) == settings[name],
            f"{shown(out)}: was begun with other {what}; give the same again, or another folder",
        )
    return state


class ShardMaker:
    """Makes one folder of shards, from the beginning or from the position where an earlier call ended."""

    def __init__(self, out: Path, sources: list[Source], settings: dict):
        self.out, self.sources, self.settings = out, sources, settings
        found = load_state(out, settings)
        self.state = found or new_state(settings)
        self.is_saved = found is not None
        self.written: list[Path] = []  # by this call, beside the shards
        limit = settings["shard_tokens"]
        self.writers = {split: Writer(out, split, limit, **self.state[split]) for split in ("train", "val")}
        self.saved_at = time.monotonic()
        sizes = [source.size for source in sources]
        self.bytes_before = None if None in sizes else list(itertools.accumulate(sizes, initial=0))

    def make(self, vocab: str, jobs: int) -> None:
        try:
            self.check_stdin()
            self.make_shards(vocab, jobs)
        except BaseException:
            if not self.is_saved:
                self.discard()
            raise
        self.report()

    def check_stdin(self) -> None:
        """Standard input has no size and time to know it by: where it is not read on, it is compared."""
        known, state = self.state["stdin"], self.state
        for number, source in enumerate(self.sources):
            if source.name == "-" and known and (state["done"] or number < state["position"][0]):
                for _ in documents_from([source], Position(0, *known[1:])):
                    raise UserError(changed(source))  # there is more than there was

    def make_shards(self, vocab: str, jobs: int) -> None:
        state = self.state
        for writer in self.writers.values():
            writer.resume()
        documents = documents_from(self.sources, Position(*state["position"]))
        path = self.out / VOCAB
        if state["vocab"] is None:
            content, documents = vocab_content(vocab, self.out, documents)
            self.write_beside(path, content)
            state["vocab"] = sha256(content)
        same = path.is_file() and sha256(path) == state["vocab"]
        need(
            same,
            f"{shown(path)}: is not the one that was begun with; delete {shown(self.out)} and make it again",
        )
        self.write_token_bytes()
        if state["done"]:
            return
        if any(state["position"]):
            say(f"{self.out}: going on behind {state['documents']:,} documents")
        try:
            self.encode_all(documents, jobs)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(
                f"{shown(self.out)}: cannot be written: {os_reason(error)}; what is saved stays, "
                f"the same command goes on"
            ) from error

    def write_beside(self, path: Path, content: bytes) -> None:
        if write_once(path, content):
            self.written.append(path)

    def write_token_bytes(self) -> None:
        from data.bpe import load_vocab, token_bytes_file

        self.write_beside(self.out / TOKEN_BYTES, token_bytes_file(load_vocab(self.out / VOCAB)))

    def encode_all(self, documents: Iterator[Document], jobs: int) -> None:
        """Reads and writes in this thread, encodes in `jobs` others (tiktoken lets go of Python's lock)."""
        from tqdm import tqdm

        from data.bpe import encoding, load_vocab

        ranks = load_vocab(self.out / VOCAB)
        tokenizer, bos_id = encoding(ranks, len(ranks)), len(ranks)
        max_doc_len = self.settings["max_doc_len"]
        waiting: deque[tuple[Batch, Future]] = deque()
        pool = ThreadPoolExecutor(jobs)
        total = self.bytes_before[-1] if self.bytes_before else None
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)
        try:
            for batch in batches(documents):
                waiting.append((batch, pool.submit(encode_batch, tokenizer, bos_id, max_doc_len, batch)))
                if len(waiting) > 2 * jobs:  # no further ahead: memory does not grow with the text
                    self.take(*waiting.popleft())
                    bar.update(self.bytes_done() - bar.n)
            for batch, encoded in waiting:
                self.take(batch, encoded)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()
        if not self.writers["train"].total:
            self.refuse_too_little()
        for writer in self.writers.values():
            if writer.tokens:
                writer.seal()
        self.state["done"] = True
        self.save()

    def bytes_done(self) -> int:
        """Of the inputs as they are on the disk, or of text where an input has no size."""
        if self.bytes_before is None:
            return self.state["bytes"]
        number = self.state["position"][0]
        return self.bytes_before[number] + self.sources[number].bytes_read

    def take(self, batch: Batch, encoded: Future) -> None:
        """A batch's documents to their splits, in order. A state is saved only behind a whole batch."""
        state, train, val = self.state, self.writers["train"], self.writers["val"]
        for rows in encoded.result():
            to_val = state["documents"] % VAL_EVERY == 0 and val.total < self.settings["val_tokens"]
            for row in rows:
                (val if to_val else train).add(row)
            state["documents"] += 1
            state["rows"] += len(rows)
        state["position"] = list(batch.end)
        state["empty"] += batch.empty
        state["bytes"] += batch.bytes
        for writer in (train, val):
            writer.write()
        if train.unpublished or val.unpublished or time.monotonic() > self.saved_at + SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Tokens first, then the state that counts them, then final names: a kill loses nothing."""
        for split, writer in self.writers.items():
            writer.write(to_disk=True)
            self.state[split] = {"shards": writer.shards, "tokens": writer.tokens, "total": writer.total}
        for source in self.sources:
            if source.name == "-" and source.last:
                self.state["stdin"] = list(source.last)
        write_file(self.out / STATE, json.dumps(self.state, indent=1).encode())
        self.is_saved = True
        for writer in self.writers.values():
            for path in writer.publish():
                say(f"{path}: {(path.stat().st_size - 1024) // 2:,} tokens")
        self.saved_at = time.monotonic()

    def discard(self) -> None:
        """Removes what this call wrote: nothing of it is counted anywhere yet."""
        with contextlib.suppress(OSError):
            for writer in self.writers.values():
                writer.discard()
            for path in self.written:
                path.unlink(missing_ok=True)

    def refuse_too_little(self) -> NoReturn:
        """There is not one training document. What was written goes, so that the folder can be used again."""
        self.discard()
        if self.is_saved:
            (self.out / STATE).unlink(missing_ok=True)
            for writer in self.writers.values():
                writer.discard_published()
        raise UserError(
            f"{self.state['documents']} document(s) with text in the inputs: training needs two at least, "
            f"one of them for validation (a text file is cut at <|endoftext|>, and after --max_doc_len)"
        )

    def report(self) -> None:
        state, train, val = self.state, self.state["train"], self.state["val"]
        tokens = train["total"] + val["total"] - state["rows"]  # without BOS
        say(
            f"{self.out}: complete, {state['rows']:,} documents ({state['empty']:,} empty ones left out), "
            f"{train['total']:,} training tokens in {train['shards']} shard(s), {val['total']:,} for "
            f"validation, {state['bytes'] / max(tokens, 1):.2f} bytes a token"
        )
        for line in training_command(self.out, train["total"], val["total"]):
            print(line)


# How to train on it


def training_command(out: Path, train_tokens: int, val_tokens: int) -> list[str]:
    """Lines: how much of the text a run here reads, and its command: the machine's preset, made to fit."""
    from data.bpe import load_vocab
    from data.prepare import tokens_needed
    from train_gpt import parse_config

    bos_id = len(load_vocab(out / VOCAB))
    flags = {"data_dir": os.path.realpath(out), "vocab_size": bos_id + 1, "bos_id": bos_id}
    cfg, _ = parse_config(flag_words(flags))
    flags = {"preset": cfg.preset} | flags
    if val_tokens <= cfg.val_tokens:
        size = min(cfg.val_seq_len, max((val_tokens - 1) // 128 * 128, 1))
        flags |= {"val_tokens": (val_tokens - 1) // size * size, "val_seq_len": size}
    steps = most_steps(flags, cfg.num_steps) if val_tokens > 1 else 0
    if not steps:
        one_step = tokens_needed(parse_config(flag_words(flags | {"num_steps": 1}))[0])
        if val_tokens > 1 and train_tokens > 2 * one_step:
            return [
                f"of each document training reads the first {cfg.stages[0].max_doc_len:,} tokens, too few "
                "here for one step; cut the documents, or give them as plain text"
            ]
        return [
            "that is too little text for one step of training; add more and make it anew in another folder"
        ]
    if steps < cfg.num_steps:
        flags["num_steps"] = steps
    read = tokens_needed(parse_config(flag_words(flags))[0])
    script = "train_gpt.py" if Path.cwd() == ROOT else shell_word(str(ROOT / "train_gpt.py"))
    words = " ".join(map(shell_word, flag_words(flags)))
    share = min(read / train_tokens, 1)
    return [
        f"{steps:,} steps train on {read:,} tokens, {share:.0%} of the text's for training",
        f"train on it: python {script} {words}",
    ]


def flag_words(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def most_steps(flags: dict, num_steps: int) -> int:
    """The most steps, up to num_steps, that the shards are enough for; 0: not for one."""
    low, high = 0, num_steps  # enough for low
    if is_enough(flags | {"num_steps": num_steps}):
        return num_steps
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(flags | {"num_steps": middle}):
            low = middle
        else:
            high = middle
    return low


def is_enough(flags: dict) -> bool:
    import train_gpt

    try:
        cfg, _ = train_gpt.parse_config(flag_words(flags))
        train_gpt.Loader(cfg).check_enough(train_gpt.Schedule(cfg))
    except train_gpt.UserError:
        return False
    return True


if __name__ == "__main__":
    command(main, INTERRUPTED)
