"""Sample text from a trained model, printed as it is made.

    python -m evals.sample CHECKPOINT ["prompt"] [--tokens 200] [--temperature 0.8] [--samples 1]

CHECKPOINT is a file, or a folder whose newest is taken (logs). The end of a document ends a sample.
"""

import argparse
import codecs
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cli import arguments, command, need
from evals.kv_cache import KVCache
from evals.model import Trained, load, model_arguments, pick_device


def main(argv: list[str]) -> None:
    args = parse(argv)
    place = pick_device(args.device)
    dtype = args.dtype or ("float32" if place == "cpu" else None)
    trained = load(args.checkpoint, args.vocab, place, dtype)
    prompt = trained.encode(args.prompt)
    past, began = KVCache(trained, len(prompt) + args.tokens), time.perf_counter()
    x = past.feed(torch.tensor(prompt))[-1:]
    read, made = time.perf_counter(), 0
    rng = torch.Generator().manual_seed(args.seed)
    pick = partial(choose, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, rng=rng)
    for n in range(args.samples):
        if args.samples > 1:
            show(f"--- sample {n + 1} of {args.samples}\n")
        show(args.prompt)
        made += write(trained, generate(trained, past.copy(), x, args.tokens, pick), show)
        show("\n")
    seconds = time.perf_counter() - read
    rate = made / max(seconds, 1e-9)
    first = f"prompt of {len(prompt)} tokens in {read - began:.2f} s"
    print(
        f"sample.py: {trained.source}: {first}, then {made} tokens in {seconds:.2f} s: {rate:.0f} a second",
        file=sys.stderr,
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = arguments(__doc__)
    model_arguments(parser, dtype="float32 on a CPU, where it is faster, else the one it was trained in")
    add = parser.add_argument
    add("prompt", nargs="?", default="", help="text to go on from (default: the start of a document)")
    add("--tokens", type=int, default=200, help="at most, a sample (default %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default %(default)s)")
    add("--top_k", type=int, default=50, help="only the k likeliest tokens; 0: all (default %(default)s)")
    add("--top_p", type=float, default=1.0, help="only the likeliest that share this (default %(default)s)")
    add("--samples", type=int, default=1, help="how many (default %(default)s)")
    add("--seed", type=int, default=0, help="the same seed, the same samples (default %(default)s)")
    args = parser.parse_intermixed_args(argv)
    warm = args.temperature == 0 or 0.01 <= args.temperature <= 100
    need(1 <= args.tokens <= 2**24, f"--tokens {args.tokens}: must lie between 1 and {2**24}")
    need(warm, f"--temperature {args.temperature}: 0, or 0.01 to 100")
    need(args.top_k >= 0, f"--top_k {args.top_k}: must not be negative")
    need(0 < args.top_p <= 1, f"--top_p {args.top_p}: must lie above 0 and not above 1")
    need(1 <= args.samples <= 10**6, f"--samples {args.samples}: must lie between 1 and 1000000")
    need(0 <= args.seed < 2**63, f"--seed {args.seed}: must lie between 0 and 2^63")
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
    past, rng = KVCache(trained, len(ids) + tokens), torch.Generator().manual_seed(seed)
    found = [prompt]
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
    write(trained, generate(trained, past, past.feed(torch.tensor(ids))[-1:], tokens, pick), found.append)
    return "".join(found)


def generate(
    trained: Trained, past: KVCache, x: Tensor, count: int, pick: Callable[[Tensor], int]
) -> Iterator[int]:
    """Up to count tokens, to the end of the document. x (1, D): what the head reads after the last token
    of past.
    """
    for n in range(count):
        token = pick(trained.logits(x)[0])
        if token == trained.cfg.bos_id:
            return
        yield token
        if n < count - 1:
            x = past.feed(torch.tensor([token]))


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, rng: torch.Generator) -> int:
    """logits (vocab_size,) -> a token of the top_k likeliest (0: all) that are needed for a share of
    top_p, 1904.09751.
    """
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
    """Shows each token's text as soon as its characters are whole, as a token may be half of one ->
    number of tokens.
    """
    decoder, vocabulary, count = codecs.getincrementaldecoder("utf-8")("replace"), trained.vocabulary, 0
    for count, token in enumerate(tokens, 1):  # noqa: B007
        show(decoder.decode(vocabulary.decode_single_token_bytes(token)))
    show(decoder.decode(b"", final=True))
    return count


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    command(main)
