"""Your own text as token shards: files, folders, JSON lines, standard input, Hugging Face datasets.

    python data/text.py OUT INPUT... [--vocab gpt2|train:SIZE|FILE] [--val_tokens N] [--shard_tokens N] [--jobs N]

Every 20th document is for validation, until that has --val_tokens. The same inputs give the same shards, byte for byte,
with any number of jobs, also if the command was killed in between and run again.
"""

import itertools
import json
import os
import shlex
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))
from data.shards import alone_in, arguments, command, make_folder, move, say, sha256, user_error, write_file  # noqa: E402
from data.sources import Source, find_sources  # noqa: E402

STATE, VOCAB = ".text.json", "vocab.tiktoken"
VAL_EVERY = 20
VOCAB_CHARS = 2**26  # of the text's beginning that a vocabulary is trained on
BATCH_CHARS = 2**18  # that one job encodes at a time
SAVE_SECONDS = 20

Place = tuple[int, int, int]  # number of the input, its documents that are done, their CRC-32


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="file, folder, - or hf:OWNER/NAME[:CONFIG[:SPLIT]]"
    )
    parser.add_argument(
        "--vocab", default="gpt2", help="gpt2 (default), train:SIZE with BOS, or a vocab.tiktoken"
    )
    parser.add_argument(
        "--format", choices=("text", "json"), help="of the inputs; default: by their names, - is text"
    )
    parser.add_argument(
        "--field", default="text", help="that holds the text in JSON lines and datasets (default text)"
    )
    parser.add_argument(
        "--val_tokens", type=int, default=10_485_761, metavar="N", help="for validation, or a document more"
    )
    parser.add_argument(
        "--shard_tokens", type=int, default=100_000_000, metavar="N", help="in a shard, at most"
    )
    parser.add_argument("--jobs", type=int, default=cores(), metavar="N", help="default: all cores")
    args = parser.parse_args(argv)
    for name, least, most in (("val_tokens", 1, 2**40), ("shard_tokens", 1, 2**30), ("jobs", 1, 1024)):
        if not least <= getattr(args, name) <= most:
            raise user_error(f"--{name} {getattr(args, name)}: must lie between {least} and {most}")
    sources, others = find_sources(args.inputs, args.format, args.field)
    if others:
        print(
            f"{others} file(s) of the folders are left out: neither text nor JSON lines by their names",
            flush=True,
        )
    stamps = json.dumps([source.stamp for source in sources]).encode()
    settings = {
        "inputs": sha256(stamps),
        "vocab": vocab_stamp(args.vocab),
        "val_tokens": args.val_tokens,
        "shard_tokens": args.shard_tokens,
    }
    with alone_in(make_folder(args.out)):
        Run(args.out, sources, settings).make(args.vocab, args.jobs)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The vocabulary


def vocab_stamp(vocab: str) -> str:
    """What names the vocabulary for good: a file by its content."""
    if vocab == "gpt2":
        return vocab
    if vocab.startswith("train:"):
        size = vocab.removeprefix("train:")
        if not (size.isdecimal() and 257 <= int(size) <= 2**16):
            raise user_error(f"--vocab {vocab}: give train:SIZE with a SIZE from 257 to 65536")
        return vocab
    if not Path(vocab).is_file():
        raise user_error(f"--vocab {vocab}: no such file; give gpt2, train:SIZE or a vocab.tiktoken")
    return f"file {sha256(Path(vocab))}"


def make_vocab(vocab: str, out: Path, documents: Iterator[tuple[Place, str]]) -> Iterator[tuple[Place, str]]:
    """Puts vocab.tiktoken into `out`. Returns the documents again: a training takes some from the beginning."""
    from data.bpe import load_vocab, save_vocab, train_bpe
    from data.corpus import gpt2_vocab

    head: list[tuple[Place, str]] = []
    if vocab == "gpt2":
        gpt2_vocab(out)
    elif vocab.startswith("train:"):
        chars = 0
        while chars < VOCAB_CHARS and (item := next(documents, None)):
            head.append(item)
            chars += len(item[1])
        training = [text for n, text in enumerate(text for _, text in head if text.strip()) if n % VAL_EVERY]
        print(f"training a vocabulary on {sum(map(len, training)):,} characters", flush=True)
        save_vocab(
            out / VOCAB, train_bpe(map(whole_characters, training), int(vocab.removeprefix("train:")) - 1)
        )
    else:
        ranks = load_vocab(Path(vocab))
        if len(ranks) >= 2**16:
            raise user_error(f"--vocab {vocab}: {len(ranks)} tokens and BOS do not fit 16 bits")
        save_vocab(out / VOCAB, ranks)
    return itertools.chain(head, documents)


def whole_characters(text: str) -> str:
    """As tiktoken reads it: JSON can hold halves of a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# From documents to tokens


@dataclass
class Batch:
    """Documents that are encoded together; empty ones are only counted. place: behind the last of them."""

    texts: list[str] = field(default_factory=list)
    place: Place = (0, 0, 0)
    empty: int = 0
    bytes: int = 0


def documents_from(sources: list[Source], place: Place) -> Iterator[tuple[Place, str]]:
    """Each document behind `place`, with the place behind it. UserError if the text before `place` is not what it was."""
    begin, done, known = place
    for number in range(begin, len(sources)):
        at = crc = 0
        for at, text in enumerate(sources[number].documents(), 1):
            crc = zlib.crc32(text.encode("utf-8", "surrogatepass"), crc)
            if number > begin or at > done:
                yield (number, at, crc), text
            elif at == done and crc != known:
                raise changed(sources[number])
        if number == begin and at < done:
            raise changed(sources[number])


def changed(source: Source) -> Exception:
    return user_error(
        f"{source.name}: its text is not what it was when this began; give the same again, or another OUT"
    )


def batches(documents: Iterator[tuple[Place, str]]) -> Iterator[Batch]:
    batch, chars = Batch(), 0
    for batch.place, text in documents:
        if not text.strip():
            batch.empty += 1
            continue
        batch.texts.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = Batch(place=batch.place), 0
    yield batch


def encode(coder, bos_id: int, batch: Batch):
    """The batch's documents as rows of uint16, BOS first, as encode_ordinary has them."""
    import numpy as np

    rows = []
    for text in batch.texts:
        try:
            tokens = coder.encode_to_numpy(
                text, disallowed_special=()
            )  # no list of Python numbers in between
        except UnicodeEncodeError:
            text = whole_characters(text)
            tokens = coder.encode_to_numpy(text, disallowed_special=())
        batch.bytes += len(text.encode())
        rows.append(np.empty(len(tokens) + 1, dtype="<u2"))
        rows[-1][0] = bos_id
        rows[-1][1:] = tokens
    return rows


class Writer:
    """The shards of one split. Tokens go to a .part file at once; it is sealed when the next document would not fit."""

    def __init__(self, out: Path, split: str, limit: int, shards: int, tokens: int, total: int):
        self.out, self.split, self.limit = out, split, limit
        self.shards, self.tokens, self.total = (
            shards,
            tokens,
            total,
        )  # sealed ones, in the open one, in all of them
        self.held, self.file, self.sealed = [], None, []

    def path(self, number: int) -> Path:
        return self.out / f"text_{self.split}_{number + (self.split == 'train'):06d}.bin"

    def part(self, number: int) -> Path:
        path = self.path(number)
        return path.with_name(f".{path.name}.part")

    def go_on(self) -> None:
        """Takes up what the state says: sealed shards that have no final name yet, and the tokens of an open one."""
        from train_gpt import HEADER_BYTES

        for number in range(self.shards):
            if self.part(number).exists():
                move(self.part(number), self.path(number))
            if not self.path(number).exists():
                raise user_error(f"{self.path(number)}: is gone; delete {self.out} and make it again")
        if self.tokens:
            part, size = self.part(self.shards), HEADER_BYTES + 2 * self.tokens
            if not part.exists() or part.stat().st_size < size:
                raise user_error(f"{part}: holds less than was written; delete {self.out} and make it again")
            self.file = open(part, "r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def add(self, row) -> None:
        if self.tokens and self.tokens + len(row) > self.limit:
            self.seal()
        self.held.append(row)
        self.tokens += len(row)
        self.total += len(row)

    def write(self, to_disk: bool = False) -> None:
        import numpy as np

        from train_gpt import HEADER_BYTES

        if self.held:
            if self.file is None:
                self.file = open(self.part(self.shards), "wb")
                self.file.write(bytes(HEADER_BYTES))
            self.file.write(np.concatenate(self.held).data)
            self.held = []
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
        self.sealed.append(self.shards)
        self.file, self.tokens, self.shards = None, 0, self.shards + 1

    def publish(self) -> list[Path]:
        paths = [self.path(number) for number in self.sealed]
        for number in self.sealed:
            move(self.part(number), self.path(number))
        self.sealed = []
        return paths


class Run:
    """Makes one folder of shards, from the beginning or from the place where an earlier call ended."""

    def __init__(self, out: Path, sources: list[Source], settings: dict):
        self.out, self.sources = out, sources
        self.state = self.load(settings) or {
            "settings": settings,
            "done": False,
            "vocab": None,
            "place": (0, 0, 0),
            "documents": 0,
            "empty": 0,
            "bytes": 0,
            "train": {"shards": 0, "tokens": 0, "total": 0},
            "val": {"shards": 0, "tokens": 0, "total": 0},
        }
        self.val_tokens, limit = settings["val_tokens"], settings["shard_tokens"]
        self.writers = {split: Writer(out, split, limit, **self.state[split]) for split in ("train", "val")}
        self.saved = time.monotonic()

    def load(self, settings: dict) -> dict | None:
        path = self.out / STATE
        if not path.exists():
            if any(self.out.glob("*.bin")):
                raise user_error(
                    f"{self.out}: holds shards that this command did not make; choose another folder"
                )
            return None
        try:
            state = json.loads(path.read_bytes())
            known = state["settings"]
        except (OSError, ValueError, KeyError) as error:
            raise user_error(f"{path}: cannot be read; delete {self.out} and make it again") from error
        for name in settings:
            if known.get(name) != settings[name]:
                what = f"--{name}" if name != "inputs" else "inputs, or inputs that have changed since"
                raise user_error(
                    f"{self.out}: was begun with other {what}; give the same again, or another folder"
                )
        return state

    def make(self, vocab: str, jobs: int) -> None:
        state = self.state
        for writer in self.writers.values():
            writer.go_on()
        documents = documents_from(self.sources, tuple(state["place"]))
        if state["vocab"] is None:
            documents = make_vocab(vocab, self.out, documents)
            state["vocab"] = sha256(self.out / VOCAB)
        elif not (self.out / VOCAB).exists() or sha256(self.out / VOCAB) != state["vocab"]:
            raise user_error(
                f"{self.out / VOCAB}: is not the one that was begun with; delete {self.out} and make it again"
            )
        if not state["done"]:
            if any(state["place"]):
                print(f"{self.out}: going on behind {state['documents']:,} documents", flush=True)
            try:
                self.encode_all(documents, jobs)
            except OSError as error:
                raise user_error(
                    f"{self.out}: cannot be written: {error.strerror}; what is saved stays, make room and "
                    f"run this again"
                ) from error
        self.report()

    def encode_all(self, documents: Iterator[tuple[Place, str]], jobs: int) -> None:
        """Reads and writes in this thread, encodes in `jobs` others (tiktoken lets go of Python's lock), never far ahead."""
        from tqdm import tqdm

        from data.bpe import encoding, load_vocab

        ranks = load_vocab(self.out / VOCAB)
        coder, bos_id = encoding(ranks, len(ranks)), len(ranks)
        known = all(source.size for source in self.sources)
        before = list(itertools.accumulate((source.size or 0 for source in self.sources), initial=0))
        waiting: deque = deque()
        pool = ThreadPoolExecutor(jobs)
        bar = tqdm(total=before[-1] if known else None, unit="B", unit_scale=True, disable=None)
        try:
            for batch in batches(documents):
                waiting.append((batch, pool.submit(encode, coder, bos_id, batch)))
                if len(waiting) > 2 * jobs:
                    self.take(*waiting.popleft())
                    number = self.state["place"][0]
                    bar.update(
                        (before[number] + self.sources[number].at if known else self.state["bytes"]) - bar.n
                    )
            for batch, rows in waiting:
                self.take(batch, rows)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()
        if not self.writers["train"].total:
            self.give_up()
        for writer in self.writers.values():
            if writer.tokens:
                writer.seal()
        self.state["done"] = True
        self.save()

    def take(self, batch: Batch, rows) -> None:
        """A batch's documents to their splits, in order. A state is saved only behind a whole batch."""
        state, train, val = self.state, self.writers["train"], self.writers["val"]
        for row in rows.result():
            to_val = state["documents"] % VAL_EVERY == 0 and val.total < self.val_tokens
            (val if to_val else train).add(row)
            state["documents"] += 1
        state["place"] = batch.place
        state["empty"] += batch.empty
        state["bytes"] += batch.bytes
        for writer in (train, val):
            writer.write()
        if train.sealed or val.sealed or time.monotonic() > self.saved + SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """The tokens first, then the state that counts them, then final names: a kill in between loses nothing."""
        for split, writer in self.writers.items():
            writer.write(to_disk=True)
            self.state[split] = {"shards": writer.shards, "tokens": writer.tokens, "total": writer.total}
        write_file(self.out / STATE, json.dumps(self.state, indent=1).encode())
        for writer in self.writers.values():
            for path in writer.publish():
                say(f"{path}: {(path.stat().st_size - 1024) // 2:,} tokens")
        self.saved = time.monotonic()

    def give_up(self) -> None:
        for writer in self.writers.values():
            if writer.file:
                writer.file.close()
            writer.part(0).unlink(missing_ok=True)
        for name in (STATE, VOCAB):
            (self.out / name).unlink(missing_ok=True)
        raise user_error(
            f"{self.state['documents']} document(s) with text in the inputs: training needs two at least, "
            f"one of them for validation (a text file is cut at {'<|endoftext|>'} and every 8,000 characters)"
        )

    def report(self) -> None:
        state, train, val = self.state, self.state["train"], self.state["val"]
        tokens = train["total"] + val["total"] - state["documents"]  # without BOS
        print(
            f"{self.out}: complete, {state['documents']:,} documents ({state['empty']:,} empty ones left out), "
            f"{train['total']:,} training tokens in {train['shards']} shard(s), {val['total']:,} for validation, "
            f"{state['bytes'] / max(tokens, 1):.2f} bytes a token"
        )
        print(training_command(self.out, val["total"]))


def training_command(out: Path, val_tokens: int) -> str:
    """How to train on it here: the machine's preset, and what of it must change to fit this text."""
    from data.bpe import load_vocab
    from train_gpt import Loader, Schedule, UserError, check_config, parse_config

    bos_id = len(load_vocab(out / VOCAB))
    flags = {"data_dir": str(out.resolve()), "vocab_size": bos_id + 1, "bos_id": bos_id}
    cfg = parse_config([part for name, value in flags.items() for part in (f"--{name}", str(value))])[0]
    flags = {"preset": cfg.preset} | flags
    if val_tokens <= cfg.val_tokens:
        size = min(cfg.val_seq_len, max((val_tokens - 1) // 128 * 128, 1))
        flags |= {"val_tokens": (val_tokens - 1) // size * size, "val_seq_len": size}
    steps = cfg.num_steps
    while steps:
        try:
            fewer = replace(cfg, num_steps=steps)
            check_config(fewer)
            Loader(fewer).check_enough(Schedule(fewer))
            break
        except UserError:
            steps = flags["num_steps"] = steps * 9 // 10
    if not steps or val_tokens == 1:
        return "that is too little text for one step of training; add more and make it anew in another folder"
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    return "train on it: python train_gpt.py " + " ".join(words)


if __name__ == "__main__":
    command(main)
