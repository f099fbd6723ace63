"""How fast data.text is, against tiktoken's batch encoder alone, on one and two cores; and its memory.

    python -m tests.programs.text_speed [--runs 3] [--vocab VOCAB.TIKTOKEN]

data.text is timed from the first document to its last shard on disk: reading JSON lines, encoding, writing,
but not Python's start. The encoder alone gets the same documents as a list in memory; its tokens are thrown
away.
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

from cli import arguments, command, need
from data import bpe, corpus, text
from data.shards import ROOT


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
    tokenizer = bpe.encoding(ranks, len(ranks))
    documents = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    began = time.perf_counter()
    tokenizer.encode_ordinary_batch(documents, num_threads=jobs)
    return time.perf_counter() - began


def whole_command(source: Path, vocab: Path, jobs: int) -> float:
    """Seconds of data.text's work on one file of JSON lines."""
    import train_gpt  # noqa: F401  (imported before the clock starts)

    with tempfile.TemporaryDirectory() as folder:
        sources, _ = text.find_sources([str(source)], None, "text", cut=2048)
        settings = {
            "inputs": "",
            "vocab": text.vocab_stamp(str(vocab)),
            "val_tokens": 100_000,
            "shard_tokens": 10**8,
            "max_doc_len": 1024,
        }
        maker = text.ShardMaker(Path(folder), sources, settings)
        began = time.perf_counter()
        maker.make_shards(str(vocab), jobs)
        return time.perf_counter() - began


MEASURES = {"encoder_alone": encoder_alone, "whole_command": whole_command}


def measure(what: str, source: Path, vocab: Path, jobs: int) -> tuple[float, float]:
    """Seconds and peak MiB of a process of its own, on `jobs` cores."""
    program = [
        sys.executable,
        "-m",
        "tests.programs.text_speed",
        "--measure",
        what,
        str(source),
        str(vocab),
        str(jobs),
    ]
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    done = subprocess.run(
        program,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    return seconds, peak


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--vocab", type=Path, default=corpus.OUT / corpus.VOCAB)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    need(args.runs >= 1, f"--runs {args.runs}: must be at least 1")
    if args.measure:
        what, source, vocab, jobs = args.measure
        seconds = MEASURES[what](Path(source), Path(vocab), int(jobs))
        unit = 2**20 if sys.platform == "darwin" else 2**10
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
        return
    compare(args.runs, args.vocab)


def compare(runs: int, vocab: Path) -> None:
    documents = corpus_documents()
    size = sum(len(document.encode()) for document in documents) / 1e6
    print(f"{len(documents):,} documents, {size:.1f} MB of text")
    print(f"MB a second, median of {runs} (least to most)")
    print(f"{'cores':>5} {'encoder alone':>24} {'data.text':>24} {'share':>6}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "corpus.jsonl")
        source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        for jobs in (1, 2):
            rates = {what: [] for what in MEASURES}
            for _ in range(runs):  # in turns: a busy machine is busy for both
                for what, found in rates.items():
                    found.append(size / measure(what, source, vocab, jobs)[0])
            cells = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in rates.values()]
            share = statistics.median(rates["whole_command"]) / statistics.median(rates["encoder_alone"])
            print(f"{jobs:>5} {cells[0]:>24} {cells[1]:>24} {share:>6.2f}", flush=True)
        peak = measure("whole_command", source, vocab, 2)[1]
        source.write_text(source.read_text() * 5)
        more = measure("whole_command", source, vocab, 2)[1]
        print(f"peak memory of data.text on two cores: {peak:.0f} MiB, on five times the text {more:.0f} MiB")


if __name__ == "__main__":
    command(main)
