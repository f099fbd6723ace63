"""HellaSwag (1905.07830): which of four endings does a trained model find likeliest?

    python evals/hellaswag.py CHECKPOINT [FILE] [--items N]         FILE: JSON lines with ctx, endings and label
    python evals/hellaswag.py CHECKPOINT --fetch                    gets the 10,042 validation items from the hub first

An ending's score is the log-probability of its own tokens after the context, summed, or divided by their number.
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

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from data.shards import arguments, command, make_folder, user_error, write_file  # noqa: E402
from evals.model import EXTRAS, Trained, load, model_arguments  # noqa: E402
from train_gpt import need  # noqa: E402

REPO = "Rowan/hellaswag"
PLACE = ROOT / "data" / "hellaswag" / "validation.jsonl"
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
            print(
                f"hellaswag.py: {done} of {len(items)} items, {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
            )
    summed, normed = (right / done).tolist()
    print(
        f"accuracy:{summed:.4f} accuracy_per_token:{normed:.4f} items:{done} seconds:{time.perf_counter() - began:.1f}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = arguments(__doc__)
    model_arguments(parser)
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="JSON lines (default: what --fetch got)"
    )
    parser.add_argument(
        "--fetch", action="store_true", help="get the validation items from the hub, if FILE is not there"
    )
    parser.add_argument("--items", type=int, default=0, metavar="N", help="only the first N (default: all)")
    args = parser.parse_args(argv)
    need(args.items >= 0, f"--items {args.items}: must not be negative")
    return args


@dataclass
class Item:
    context: str
    endings: list[str]
    label: int  # which of the endings is right


def read_items(file: Path) -> list[Item]:
    """UserError names the file and the line that is no item."""
    need(file.is_file(), f"{file}: no such file; --fetch gets HellaSwag's validation items from the hub")
    items = []
    for number, text in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(text)
            item = Item(row["ctx"], list(row["endings"]), int(row["label"]))
            assert all(isinstance(part, str) and part for part in [item.context, *item.endings])
            assert 0 <= item.label < len(item.endings)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise user_error(
                f"{file}: line {number} is no item: JSON with ctx, endings and label, the right one"
            ) from None
        items.append(item)
    need(len(items) > 0, f"{file}: holds no items")
    return items


def score(trained: Trained, items: list[Item]) -> Iterator[tuple[Tensor, int]]:
    """For each item: log-probabilities of its endings (2, endings), summed and a token, and the label."""
    for pack in packs(trained, items):
        tokens = torch.tensor([token for _, rows in pack for row, _ in rows for token in row])
        gained, at = -trained.losses(tokens), 0  # of tokens[1:]
        for item, rows in pack:
            sums = []
            for row, size in rows:
                at += len(row)
                sums.append(gained[at - size - 1 : at - 1].double().sum())
            sums = torch.stack(sums)
            yield torch.stack((sums, sums / torch.tensor([size for _, size in rows]))), item.label


Rows = list[tuple[list[int], int]]  # an ending each: BOS, context and ending; how many tokens the ending has


def packs(trained: Trained, items: list[Item]) -> Iterator[list[tuple[Item, Rows]]]:
    """Items in the order given, as many at a time as fit: each ending is a document, and documents need no padding."""
    most = trained.longest if trained.device.type == "cuda" else min(PACK, trained.longest)
    pack, count = [], 0
    for item in items:
        context, rows = trained.encode(item.context), []
        for ending in item.endings:
            own = trained.vocabulary.encode_ordinary(" " + ending)
            rows.append((context + own, len(own)))
        size = sum(len(row) for row, _ in rows)
        need(
            size <= most,
            f"an item of {size} tokens, more than the {most} that go at once: {item.context[:40]!r}",
        )
        if count + size > most:
            yield pack
            pack, count = [], 0
        pack.append((item, rows))
        count += size
    yield pack


def fetch(file: Path) -> None:
    """The validation items from the hub, as JSON lines. UserError: the hub is out of reach, or a package is missing."""
    try:
        import huggingface_hub
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise user_error(f"--fetch needs the package {error.name}: {EXTRAS}") from None
    print(f"hellaswag.py: fetching {REPO}", file=sys.stderr)
    try:
        names = [
            name
            for name in huggingface_hub.HfApi().list_repo_files(REPO, repo_type="dataset")
            if "validation" in name and name.endswith(".parquet")
        ]
        tables = [
            parquet.read_table(
                huggingface_hub.hf_hub_download(REPO, name, repo_type="dataset"),
                columns=["ctx", "endings", "label"],
            )
            for name in sorted(names)
        ]
    except Exception as error:  # whatever these calls raise is about the hub, the network or the disk
        raise user_error(
            f"{file}: not fetched from {REPO} ({type(error).__name__}): check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, then run this again, or give a FILE"
        ) from error
    rows = [row for table in tables for row in table.to_pylist()]
    need(len(rows) > 0, f"{file}: not fetched: {REPO} has no validation items in parquet")
    make_folder(file.parent)
    write_file(file, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


if __name__ == "__main__":
    command(main)
