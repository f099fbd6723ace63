"""HellaSwag (1905.07830): which of four endings does a trained model find likeliest?

    python -m evals.hellaswag CHECKPOINT [FILE] [--items N]
    python -m evals.hellaswag CHECKPOINT --fetch

FILE has JSON lines with ctx, endings and label; --fetch gets the 10,042 validation items from the hub first.

An ending's score is the log-probability of its own tokens after the context, summed, or divided by their
number. An item with an ending that is longer than the model's positions is skipped, and counted.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cli import UserError, arguments, command, need, os_reason, path_flag, shown
from data.shards import make_folder, write_file
from evals.model import EXTRAS, Trained, load, model_arguments

REPO = "Rowan/hellaswag"
PLACE = Path(__file__).resolve().parent.parent / "data" / "hellaswag" / "validation.jsonl"
PACK = 8192  # tokens that go through the model at once on a CPU, which gains nothing from more


def main(argv: list[str]) -> None:
    args = parse(argv)
    file = args.file or PLACE
    if args.fetch and not file.exists():
        fetch(file)
    items = read_items(file)[: args.items or None]
    trained, began = load(args.checkpoint, args.vocab, args.device, args.dtype), time.perf_counter()
    right, done = torch.zeros(2), 0
    for scores, label in score(trained, items):
        right += scores.argmax(dim=-1) == label
        done += 1
        if done % 1000 == 0:
            seconds = time.perf_counter() - began
            print(f"hellaswag.py: {done} of {len(items)} items, {seconds:.0f} s", file=sys.stderr)
    most = tokens_at_once(trained)
    need(done > 0, f"{file}: each of its {len(items)} items has an ending of more than {most} tokens")
    summed, normed = (right / done).tolist()
    skipped = f" skipped:{len(items) - done}" if done < len(items) else ""
    seconds = time.perf_counter() - began
    print(
        f"accuracy:{summed:.4f} accuracy_per_token:{normed:.4f} items:{done}{skipped} seconds:{seconds:.1f}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = arguments(__doc__)
    model_arguments(parser)
    file, fetched = (
        "JSON lines (default: what --fetch got)",
        "get the validation items from the hub, if FILE is not there",
    )
    parser.add_argument("file", nargs="?", type=path_flag, metavar="FILE", help=file)
    parser.add_argument("--fetch", action="store_true", help=fetched)
    parser.add_argument("--items", type=int, default=0, metavar="N", help="only the first N (default: all)")
    args = parser.parse_intermixed_args(argv)
    need(args.items >= 0, f"--items {args.items}: must not be negative")
    return args


@dataclass
class Item:
    context: str
    endings: list[str]
    label: int  # which of the endings is right


def read_items(file: Path) -> list[Item]:
    """UserError names the file and the line that is no item. Blank lines are left out."""
    try:
        there = file.exists()
        need(there, f"{shown(file)}: no such file; --fetch gets HellaSwag's validation items from the hub")
        need(file.is_file(), f"{shown(file)}: not a file that can be read")
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read ({os_reason(error)})") from None
    items = [
        read_item(text, f"{file}: line {number}") for number, text in enumerate(lines, 1) if text.strip()
    ]
    need(items, f"{file}: holds no items")
    return items


def read_item(text: bytes, where: str) -> Item:
    try:
        row = json.loads(text)
        context, endings, label = row["ctx"], row["endings"], row["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where} is no item: JSON with ctx, endings and label, the right one") from None
    need(isinstance(context, str) and context, f"{where} is no item: its ctx is no text")
    texts = isinstance(endings, list) and all(isinstance(ending, str) and ending for ending in endings)
    need(texts and len(endings) > 1, f"{where} is no item: its endings are not a list of texts")
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 4:
        label = int(label)  # as the hub has it
    inside = type(label) is int and 0 <= label < len(endings)
    need(inside, f"{where} is no item: its label is not one of 0 to {len(endings) - 1}")
    return Item(context, endings, label)


Row = tuple[list[int], int]  # an ending: BOS, context and ending; how many of the tokens are the ending's


def score(trained: Trained, items: list[Item]) -> Iterator[tuple[Tensor, int]]:
    """For each item that fits: log-probabilities of its endings (2, endings), summed and a token, and the
    label.
    """
    most = tokens_at_once(trained)
    waiting: list[tuple[Item, list[Row]]] = []
    for item in items:
        rows = ending_rows(trained, item)
        if max(len(row) for row, _ in rows) > most:
            continue
        waiting.append((item, rows))
        if sum(len(row) for _, rows in waiting for row, _ in rows) > most:
            yield from score_pack(trained, waiting, most)
            waiting = []
    yield from score_pack(trained, waiting, most)


def tokens_at_once(trained: Trained) -> int:
    return trained.longest if trained.device.type == "cuda" else min(PACK, trained.longest)


def ending_rows(trained: Trained, item: Item) -> list[Row]:
    context, rows = trained.encode(item.context), []
    for ending in item.endings:
        own = trained.encode(" " + ending)[1:]
        rows.append((context + own, len(own)))
    return rows


def score_pack(
    trained: Trained, pack: list[tuple[Item, list[Row]]], most: int
) -> Iterator[tuple[Tensor, int]]:
    """Endings are documents, and documents need no padding: as many of them at a time as fit into `most`
    tokens.
    """
    rows = [row for _, rows in pack for row in rows]
    sums = iter(ending_scores(trained, rows, most))
    for item, item_rows in pack:
        summed = torch.stack([next(sums) for _ in item_rows])
        sizes = torch.tensor([size for _, size in item_rows])
        yield torch.stack((summed, summed / sizes)), item.label


def ending_scores(trained: Trained, rows: list[Row], most: int) -> Iterator[Tensor]:
    """The log-probability of each ending, float64."""
    group: list[Row] = []
    for row in rows:
        if group and sum(len(tokens) for tokens, _ in [*group, row]) > most:
            yield from group_scores(trained, group)
            group = []
        group.append(row)
    if group:
        yield from group_scores(trained, group)


def group_scores(trained: Trained, group: list[Row]) -> Iterator[Tensor]:
    tokens = torch.tensor([token for row, _ in group for token in row])
    gained = -trained.losses(tokens).double()  # of tokens[1:]
    end = 0
    for row, size in group:
        end += len(row)
        yield gained[end - size - 1 : end - 1].sum()


def fetch(file: Path) -> None:
    """The validation items from the hub, as JSON lines. UserError: no hub in reach, or a package is
    missing.
    """
    try:
        import huggingface_hub
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"--fetch needs the package {error.name}: {EXTRAS}") from None
    print(f"hellaswag.py: fetching {REPO}", file=sys.stderr)
    rows = []
    try:
        for name in sorted(huggingface_hub.HfApi().list_repo_files(REPO, repo_type="dataset")):
            if "validation" in name and name.endswith(".parquet"):
                path = huggingface_hub.hf_hub_download(REPO, name, repo_type="dataset")
                rows.extend(parquet.read_table(path, columns=["ctx", "endings", "label"]).to_pylist())
    except Exception as error:  # whatever these calls raise is about the hub, the network or the disk
        kind = type(error).__name__
        advice = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then run this again, or give a FILE"
        raise UserError(f"{file}: not fetched from {REPO} ({kind}): {advice}") from error
    need(rows, f"{file}: not fetched: {REPO} has no validation items in parquet")
    make_folder(file.parent)
    write_file(file, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


if __name__ == "__main__":
    command(main)
