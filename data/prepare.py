"""Make or fetch the data that a run needs, if it is missing.

    python -m data.prepare --preset cpu

Takes train_gpt.py's own flags; run.sh calls it first.

A data_dir that is no preset's is the user's own: only token_bytes.npy is made there, from its vocab.tiktoken.
"""

import os
import sys
from pathlib import Path

from cli import UserError, command, need
from data import corpus, fineweb
from data.shards import INTERRUPTED, ROOT, TOKEN_BYTES, VOCAB


def main(argv: list[str]) -> None:
    from train_gpt import PRESETS, find_data, parse_config

    cfg, _ = parse_config(argv)
    folder = os.path.realpath(find_data(cfg))
    embedded = os.path.realpath(ROOT / PRESETS["cpu"].data_dir)
    if folder in (embedded, os.path.join(embedded, "tune")):
        corpus.main([])
    elif folder == os.path.realpath(ROOT / PRESETS["short"].data_dir):
        tokens_per_epoch = -(-tokens_needed(cfg) // cfg.epochs)
        fineweb.fetch(shards_needed(tokens_per_epoch), "10B", Path(folder))
    elif cfg.data_dir in {preset.data_dir for preset in PRESETS.values()}:
        need(
            any(Path(folder).glob("*_train_*.bin")),
            f"{folder}: hides the project's own {cfg.data_dir}, and holds no shards; start from another "
            "folder, or give --data_dir",
        )
    add_token_bytes(Path(folder))


def tokens_needed(cfg: "Config") -> int:  # noqa: F821 (train_gpt's; it is imported only when needed)
    """Tokens that the run trains on; documents cut at the limit leave a rest unread, so shards hold more."""
    from train_gpt import Schedule

    return Schedule(cfg).tokens


def shards_needed(tokens: int) -> int:
    """Twice the tokens that are trained on: of a document only the beginning is read, up to the limit."""
    shards, most = -(-2 * tokens // fineweb.SHARD_TOKENS), fineweb.TRAIN_SHARDS["10B"]
    need(
        shards <= most,
        f"a run of {tokens:,} tokens needs {shards} shards, FineWeb 10B has {most}: fetch "
        f"`python -m data.fineweb {shards} --dataset 100B` and pass --data_dir data/fineweb100B",
    )
    return shards


def add_token_bytes(folder: Path) -> None:
    """For a folder that an older version made. One that cannot be written keeps no run from training."""
    if (folder / TOKEN_BYTES).exists() or not (folder / VOCAB).is_file():
        return
    from data.bpe import load_vocab, write_token_bytes

    ranks = load_vocab(folder / VOCAB)
    try:
        write_token_bytes(folder, ranks)
    except UserError as error:
        print(f"note: bits per byte will be missing: {error}", file=sys.stderr)


if __name__ == "__main__":
    command(main, INTERRUPTED)
