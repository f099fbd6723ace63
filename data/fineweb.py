"""Fetch FineWeb as GPT-2 tokens: the validation shard and the first N training shards, 100M tokens each.

    python data/fineweb.py [N] [--dataset 10B|100B] [--out DIR]      default: 9 shards, enough for the short track

Fetches only what is missing. A file gets its final name when it is whole and right. HF_ENDPOINT, HF_HUB_OFFLINE and
HF_TOKEN work as everywhere with huggingface_hub.
"""
import errno
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))
from data.shards import arguments, command, make_folder, user_error  # noqa: E402

TRAIN_SHARDS = {"10B": 103, "100B": 1029}
SHARD_TOKENS = 100_000_000
VOCAB_SIZE, BOS_ID = 50257, 50256
AT_ONCE = 4


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("shards", nargs="?", type=int, default=9, metavar="N", help="training shards (default 9)")
    parser.add_argument("--dataset", choices=TRAIN_SHARDS, default="10B")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: data/fineweb10B or data/fineweb100B")
    args = parser.parse_args(argv)
    fetch(args.shards, args.dataset, args.out or HERE / f"fineweb{args.dataset}")


def fetch(shards: int, dataset: str, out: Path) -> None:
    most = TRAIN_SHARDS[dataset]
    if not 1 <= shards <= most:
        raise user_error(f"{shards} shards: FineWeb {dataset} has 1 to {most} training shards")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    missing = [name for name in names if not (out / name).exists()]
    if missing:
        print(f"{out}: {len(missing)} of {len(names)} shards are missing, fetching", flush=True)
        fetch_files(missing, f"kjj0/fineweb{dataset}-gpt2", make_folder(out))
    add_vocab(out)
    print(f"{out}: complete, {shards} training shards")


def fetch_files(names: list[str], repo: str, out: Path) -> None:
    fetch_file(names[0], repo, out)     # alone: a hub out of reach is then said once, not by every thread
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for _ in pool.map(lambda name: fetch_file(name, repo, out), names[1:]):
            pass
    finally:                            # on an error or Ctrl-C: start no more, and do not wait for the others
        pool.shutdown(wait=False, cancel_futures=True)
    shutil.rmtree(out / ".staging", ignore_errors=True)


def fetch_file(name: str, repo: str, out: Path) -> None:
    import huggingface_hub
    from train_gpt import read_shard
    staged = out / ".staging" / name    # same disk as `out`, so that the move at the end is one step
    try:
        huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", local_dir=staged.parent)
    except Exception as error:          # whatever this call raises is about the hub, the network or the disk
        raise user_error(f"{out / name}: not fetched from {repo}: {reason(error)}") from error
    try:
        read_shard(staged, VOCAB_SIZE, BOS_ID)
    except Exception:
        staged.unlink(missing_ok=True)  # or the hub's client would take it for done the next time
        raise
    staged.replace(out / name)


def reason(error: Exception) -> str:
    """One line. Not the hub's own text, which runs over many and may hold a signed address."""
    from huggingface_hub import constants, errors
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it, or put the shards there yourself"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the hub has no such file in this dataset"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub knows no such dataset, or HF_TOKEN is wrong for it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the hub cannot be reached; check the network or HF_ENDPOINT, then run this again"
    if getattr(error, "errno", None) == errno.ENOSPC:
        return "no space left on the disk; a shard takes 200 MB"
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"{type(error).__name__}{f' {status}' if status else ''}; run this again to go on where it stopped"


def add_vocab(out: Path) -> None:
    """GPT-2's vocabulary beside the shards, for bits per byte and samples. Training does without it if need be."""
    from data.corpus import gpt2_vocab
    from train_gpt import UserError
    try:
        gpt2_vocab(out)
    except UserError as error:
        print(f"note: {out} has no vocab.tiktoken, so bits per byte will be missing: {error}", file=sys.stderr)


if __name__ == "__main__":
    command(main)
