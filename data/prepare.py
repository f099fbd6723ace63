"""Make or fetch the data that a run needs, if it is missing. Takes train_gpt.py's own flags; run.sh calls it first.

    python data/prepare.py --preset cpu

A data_dir that is no preset's is the user's own: nothing to do.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from data import corpus, fineweb  # noqa: E402
from data.shards import command, user_error  # noqa: E402


def main(argv: list[str]) -> None:
    from train_gpt import PRESETS, find_data, parse_config

    cfg, _ = parse_config(argv)
    folder = find_data(cfg).resolve()
    if folder == (ROOT / PRESETS["cpu"].data_dir).resolve():
        corpus.main([])
    elif folder == (ROOT / PRESETS["short"].data_dir).resolve():
        fineweb.fetch(shards_needed(-(-tokens_needed(cfg) // cfg.epochs)), "10B", folder)


def tokens_needed(cfg: "Config") -> int:  # noqa: F821
    """Tokens that the run trains on; documents cut at the limit leave the rest unread, so shards hold more."""
    from train_gpt import Schedule

    return sum(stage.batch_tokens for stage in map(Schedule(cfg).stage, range(cfg.num_steps)))


def shards_needed(tokens: int) -> int:
    """Twice the tokens that are trained on: a document is cut at the longest length, and the rest of it is skipped."""
    shards, most = -(-2 * tokens // fineweb.SHARD_TOKENS), fineweb.TRAIN_SHARDS["10B"]
    if shards > most:
        raise user_error(
            f"a run of {tokens:,} tokens needs {shards} shards, FineWeb 10B has {most}: fetch `python "
            f"data/fineweb.py {shards} --dataset 100B` and pass --data_dir data/fineweb100B"
        )
    return shards


if __name__ == "__main__":
    command(main)
