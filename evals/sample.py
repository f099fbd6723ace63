"""Sample text from a trained model, printed as it is made.

    python evals/sample.py CHECKPOINT ["prompt"] [--tokens 200] [--temperature 0.8] [--top_k 50] [--top_p 1] [--samples 1]

CHECKPOINT is a file, or a folder whose newest is taken (logs). The end of a document ends a sample.
"""

import argparse
import codecs
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from data.shards import arguments, command  # noqa: E402
from evals.model import Cache, Trained, load, model_arguments, pick_device  # noqa: E402
from train_gpt import need  # noqa: E402


def main(argv: list[str]) -> None:
    args = parse(argv)
    place = pick_device(args.device)
    trained = load(args.checkpoint, args.vocab, place, args.dtype or ("float32" if place == "cpu" else None))
    prompt = trained.encode(args.prompt)
    past, began = Cache(trained, len(prompt) + args.tokens), time.perf_counter()
    x = past.feed(torch.tensor(prompt))[-1:]
    read, made = time.perf_counter(), 0
    pick = partial(
        choose,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        rng=torch.Generator().manual_seed(args.seed),
    )
    try:
        for n in range(args.samples):
            show(f"--- sample {n + 1} of {args.samples}\n" * (args.samples > 1) + args.prompt)
            made += write(trained, generate(trained, past.copy(), x, args.tokens, pick), show)
            show("\n")
    except BrokenPipeError:  # `| head`: whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    seconds = time.perf_counter() - read
    print(
        f"sample.py: {trained.source}: prompt of {len(prompt)} tokens in {read - began:.2f} s, then {made} tokens "
        f"in {seconds:.2f} s: {made / max(seconds, 1e-9):.0f} a second",
        file=sys.stderr,
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = arguments(__doc__)
    model_arguments(parser, dtype="float32 on a CPU, where it is faster, else the one it was trained in")
    parser.add_argument(
        "prompt", nargs="?", default="", help="text to go on from (default: the start of a document)"
    )
    parser.add_argument("--tokens", type=int, default=200, help="at most, a sample (default %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default %(default)s)"
    )
    parser.add_argument(
        "--top_k", type=int, default=50, help="only the k likeliest tokens; 0: all (default %(default)s)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="only the likeliest that share this (default %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=1, help="how many (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed, the same samples (default %(default)s)"
    )
    args = parser.parse_args(argv)
    for name, good, rule in (
        ("tokens", args.tokens >= 1, "must be at least 1"),
        ("temperature", args.temperature == 0 or 0.01 <= args.temperature <= 100, "0, or 0.01 to 100"),
        ("top_k", args.top_k >= 0, "must not be negative"),
        ("top_p", 0 < args.top_p <= 1, "must lie above 0 and not above 1"),
        ("samples", args.samples >= 1, "must be at least 1"),
        ("seed", 0 <= args.seed < 2**63, "must lie between 0 and 2^63"),
    ):
        need(good, f"--{name} {getattr(args, name)}: {rule}")
    need(args.prompt.encode("utf-8", "replace").decode() == args.prompt, "the prompt is not UTF-8 text")
    return args


def complete(
    trained: Trained,
    prompt: str,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The prompt and what the model makes of it: what the command prints, as a string."""
    ids = trained.encode(prompt)
    past, rng, found = Cache(trained, len(ids) + tokens), torch.Generator().manual_seed(seed), [prompt]
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
    write(trained, generate(trained, past, past.feed(torch.tensor(ids))[-1:], tokens, pick), found.append)
    return "".join(found)


def generate(
    trained: Trained, past: Cache, x: Tensor, count: int, pick: Callable[[Tensor], int]
) -> Iterator[int]:
    """Up to count tokens, to the end of the document. x (1, D): what the head reads after the last token of past."""
    for n in range(count):
        token = pick(trained.logits(x)[0])
        if token == trained.cfg.bos_id:
            return
        yield token
        if n < count - 1:
            x = past.feed(torch.tensor([token]))


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, rng: torch.Generator) -> int:
    """logits (vocab_size,) -> a token of the top_k likeliest (0: all) that are needed for a share of top_p, 1904.09751."""
    logits = logits.cpu()
    if temperature == 0:
        return int(logits.argmax())
    best, ids = logits.topk(min(top_k or len(logits), len(logits))) if top_k or top_p < 1 else (logits, None)
    share = (best / temperature).softmax(-1)
    if top_p < 1:
        share[share.cumsum(-1) - share >= top_p] = 0  # the first whose sum reaches it is the last to stay
    place = torch.multinomial(share, 1, generator=rng)
    return int(place if ids is None else ids[place])


def write(trained: Trained, tokens: Iterator[int], show: Callable[[str], object]) -> int:
    """Shows each token's text as soon as its characters are whole, as a token may be half of one -> number of tokens."""
    decoder, vocabulary, count = codecs.getincrementaldecoder("utf-8")("replace"), trained.vocabulary, 0
    for count, token in enumerate(tokens, 1):  # noqa: B007
        show(decoder.decode(vocabulary.decode_single_token_bytes(token)))
    show(decoder.decode(b"", final=True))
    return count


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    command(main)
