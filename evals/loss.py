"""Loss and bits per byte of a trained model on token shards and text files.

    python -m evals.loss CHECKPOINT [FILE ...] [--tokens N] [--val_seq_len N]

Without FILE: the validation of the run that made it, as its log has it. A text file is one document; bits
per byte count its UTF-8 bytes. Longer streams are cut into sequences of the run's --val_seq_len, as
validation does.
"""

import argparse
import math
from pathlib import Path

import numpy as np

import train_gpt as tg
from cli import UserError, arguments, command, need, os_reason, path_flag, shown
from data.bpe import token_bytes
from evals.model import Trained, load, model_arguments, sequences


def main(argv: list[str]) -> None:
    args = parse(argv)
    trained = load(args.checkpoint, args.vocab, args.device, args.dtype, args.val_seq_len)
    # All are read before one is measured.
    streams = {shown(file): read_stream(file, trained) for file in args.files}
    if not streams:
        streams["the run's validation"] = tg.Validation(trained.cfg).tokens
    for name, tokens in streams.items():
        print(line(trained, tokens[: args.tokens + 1] if args.tokens else tokens, name), flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = arguments(__doc__)
    model_arguments(parser)
    parser.add_argument(
        "files", nargs="*", type=path_flag, metavar="FILE", help="a shard (.bin) or UTF-8 text"
    )
    parser.add_argument("--tokens", type=int, default=0, help="only the first, of each file (default: all)")
    shorter = "tokens of a sequence (default: the run's); fewer take less memory and cut more documents"
    parser.add_argument("--val_seq_len", type=int, metavar="N", help=shorter)
    args = parser.parse_intermixed_args(argv)
    need(args.tokens >= 0, f"--tokens {args.tokens}: must not be negative")
    length = args.val_seq_len
    need(length is None or 1 <= length <= 2**24, f"--val_seq_len {length}: must lie between 1 and {2**24}")
    return args


def line(trained: Trained, tokens: np.ndarray, name: str) -> str:
    """One line with what train_gpt.py's log calls val_loss and val_bpb."""
    nats, count = total_loss(trained, tokens), len(tokens) - 1
    size = text_bytes(trained, tokens[1:])
    bpb = f" bpb:{nats / (math.log(2) * size):.4f}" if size else ""
    return f"loss:{nats / count:.4f}{bpb} tokens:{count} {name}"


def total_loss(trained: Trained, tokens: np.ndarray) -> float:
    """Nats, summed over all tokens but the first."""
    return sum(
        float(trained.losses(part).double().sum()) for part in sequences(tokens, trained.cfg.val_seq_len)
    )


def text_bytes(trained: Trained, tokens: np.ndarray) -> int | None:
    """Bytes of the text that the tokens stand for (BOS: none); None without a vocabulary."""
    if trained.ranks is None:
        return None
    return int(token_bytes(trained.ranks).astype(np.int64)[tokens].sum())


def read_stream(file: Path, trained: Trained) -> np.ndarray:
    """A shard's tokens, or a text as one document (n,). UserError: not there, or neither of them."""
    try:
        need(file.is_file(), f"{shown(file)}: not a file that can be read")
        with file.open("rb") as opened:
            magic = np.frombuffer(opened.read(4).ljust(4, b"\0"), dtype="<i4")[0]
        if file.suffix == ".bin" or magic == tg.SHARD_MAGIC:
            tokens = tg.read_shard(file, trained.cfg.vocab_size, trained.cfg.bos_id)
        else:
            text = file.read_bytes().decode("utf-8-sig")  # a byte order mark is no text
            tokens = np.array(trained.encode(text))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; give text, or a shard (.bin)") from None
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read ({os_reason(error)})") from None
    need(len(tokens) > 1, f"{file}: no text in it to measure a loss on")
    return tokens


if __name__ == "__main__":
    command(main)
