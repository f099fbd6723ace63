"""How much probability a trained model gives to tokens that cannot follow the last one.

    python -m tests.programs.impossible_pairs CHECKPOINT [--tokens 4096]

Two tokens cannot follow each other if the tokenizer, given their text, makes other tokens of it. On the
first tokens of the run's validation it prints what a mask over such tokens would be worth: -ln(1 - their
probability), nats a token. Pairs with white space alone, half a character or BOS count as possible: what
stands beside them decides. Each pair goes through the tokenizer, which takes most of the time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import train_gpt as tg
from cli import arguments, command, need
from evals.model import Trained, load, model_arguments


def words_of(trained: Trained) -> list[bytes]:
    """The bytes of each token; b"" for those that are possible beside all, BOS and white space."""
    words = [b""] * trained.cfg.vocab_size
    for word, token in trained.ranks.items():
        words[token] = word if word.strip() else b""
    return words


def possible_after(token: int, words: list[bytes], encode: Callable[[str], list[int]]) -> Tensor:
    """(V,) bool: which tokens can follow `token`."""
    possible = torch.ones(len(words), dtype=torch.bool)
    for after, word in enumerate(words if words[token] else []):
        try:
            text = (words[token] + word).decode()
        except UnicodeDecodeError:
            continue
        possible[after] = not word or encode(text) == [token, after]
    return possible


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="of the validation")
    args = parser.parse_args(argv)
    need(args.tokens > 0, f"--tokens {args.tokens}: must be at least 1")
    trained = load(args.checkpoint, args.vocab, args.device, args.dtype)
    encode = trained.vocabulary.encode_ordinary
    tokens = torch.from_numpy(tg.Validation(trained.cfg).tokens[: args.tokens + 1].astype("int64"))
    last, targets = tokens[:-1], tokens[1:, None]
    with torch.no_grad():
        shares = trained.logits(trained.hidden(last)).softmax(-1).cpu()
    words = words_of(trained)
    rows = {token: possible_after(token, words, encode) for token in last.unique().tolist()}
    possible = torch.stack([rows[token] for token in last.tolist()])
    wrong = int((~possible.gather(1, targets)).sum())
    mass = shares.masked_fill(possible, 0).sum(-1).double()
    never = float((~torch.stack(list(rows.values()))).double().mean())
    loss, gain = -shares.gather(1, targets).log().mean(), -torch.log1p(-mass).mean()
    print(f"{len(last):,} tokens, loss {float(loss):.4f}")
    print(
        f"of {len(rows):,} x {len(words):,} pairs {never:.2%} are impossible; {wrong} of them are in the text"
    )
    print(f"their probability {float(mass.mean()):.2%}; without them {float(gain):.4f} nats a token less")


if __name__ == "__main__":
    command(main)
