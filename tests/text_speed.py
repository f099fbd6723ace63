"""How fast data/text.py is, against tiktoken's batch encoder alone, on one and two cores; and how much memory it takes.

    python tests/text_speed.py [--runs 3] [--vocab VOCAB.TIKTOKEN]        default: the embedded corpus, its own vocabulary

data/text.py is timed from the first document to its last shard on disk: reading JSON lines, encoding, writing, but not
Python's start. The encoder alone gets the same documents as a list in memory, and its lists of tokens are thrown away.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import bpe, corpus, text  # noqa: E402


def corpus_documents() -> list[str]:
    """The training documents of the embedded corpus, made first if it is not there."""
    corpus.main([])
    coder = bpe.encoding(bpe.load_vocab(corpus.OUT / corpus.VOCAB), corpus.BOS_ID)
    tokens = np.fromfile(corpus.OUT / corpus.TRAIN, dtype="<u2", offset=1024)
    rows = np.split(tokens, np.flatnonzero(tokens == corpus.BOS_ID))[1:]
    return coder.decode_batch([row[1:].tolist() for row in rows])


def encoder_alone(source: Path, vocab: Path, jobs: int) -> float:
    """Seconds of encode_ordinary_batch."""
    ranks = bpe.load_vocab(vocab)
    coder, documents = bpe.encoding(ranks, len(ranks)), [json.loads(line)["text"] for line in open(source)]
    began = time.perf_counter()
    coder.encode_ordinary_batch(documents, num_threads=jobs)
    return time.perf_counter() - began


def whole_command(source: Path, vocab: Path, jobs: int) -> float:
    """Seconds of data/text.py's work on one file of JSON lines."""
    import train_gpt  # noqa: F401  (imported before the clock starts)

    with tempfile.TemporaryDirectory() as folder:
        sources, _ = text.find_sources([str(source)], None, "text")
        settings = {
            "inputs": "",
            "vocab": text.vocab_stamp(str(vocab)),
            "val_tokens": 100_000,
            "shard_tokens": 10**8,
        }
        run = text.Run(Path(folder), sources, settings)
        run.report = lambda: None  # the command to train with is no part of the work
        began = time.perf_counter()
        run.make(str(vocab), jobs)
        return time.perf_counter() - began


def measure(what: str, source: Path, vocab: Path, jobs: int) -> tuple[float, float]:
    """Seconds and peak MiB of a process of its own, on `jobs` cores."""
    command = [sys.executable, __file__, "--measure", what, str(source), str(vocab), str(jobs)]
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--vocab", type=Path, default=corpus.OUT / corpus.VOCAB)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, source, vocab, jobs = args.measure
        seconds = globals()[what](Path(source), Path(vocab), int(jobs))
        print(
            seconds,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2**20 if sys.platform == "darwin" else 2**10),
        )
        return
    documents = corpus_documents()
    size = sum(len(document.encode()) for document in documents) / 1e6
    print(
        f"{len(documents):,} documents, {size:.1f} MB of text; MB a second, median of {args.runs} (least to most)"
    )
    print(f"{'cores':>5} {'encoder alone':>24} {'data/text.py':>24} {'share':>6}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "corpus.jsonl")
        source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        for jobs in (1, 2):
            rates = {what: [] for what in ("encoder_alone", "whole_command")}
            for _ in range(args.runs):  # in turns: a busy machine is busy for both
                for what, found in rates.items():
                    found.append(size / measure(what, source, args.vocab, jobs)[0])
            cells = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in rates.values()]
            share = statistics.median(rates["whole_command"]) / statistics.median(rates["encoder_alone"])
            print(f"{jobs:>5} {cells[0]:>24} {cells[1]:>24} {share:>6.2f}", flush=True)
        peak = measure("whole_command", source, args.vocab, 2)[1]
        source.write_text(source.read_text() * 5)
        more = measure("whole_command", source, args.vocab, 2)[1]
        print(
            f"peak memory of data/text.py on two cores: {peak:.0f} MiB, on five times the text {more:.0f} MiB"
        )


if __name__ == "__main__":
    main()
