"""Byte-level BPE: train a small vocabulary, keep it in tiktoken's text format, load it into tiktoken.

The split pattern is GPT-2's: a vocabulary trained here differs from GPT-2's only in its size and its merges.
"""

import base64
import heapq
import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import regex
import tiktoken

from cli import UserError, need, os_reason, shown
from data.shards import TOKEN_BYTES, write_once

# tiktoken's spelling of GPT-2's pattern: possessive quantifiers, the same pieces
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
BOS = "<|endoftext|>"
# What \s is to tiktoken: Unicode's White_Space. Python's own \s holds four separators more.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN_CHARS = 10_000
MAX_VOCAB_FILE = 2**26  # bytes; 65,536 tokens take about one megabyte

Pair = tuple[int, int]


def train_bpe(documents: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """The ranks of vocab_size tokens: the 256 bytes, then merges of the most frequent pair.

    At a tie the lowest ids come first. Works on unique words with their counts, and a merge visits only the
    words that hold its pair: 12 MB take seconds. UserError: the text has too few different pairs.
    """
    assert vocab_size >= 256, f"{vocab_size=}: the 256 single bytes are always in"
    words, frequencies = unique_words(documents)
    counts: dict[Pair, int] = defaultdict(int)
    holders: dict[Pair, set[int]] = defaultdict(set)  # the words a pair is in, and some that lost it
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            counts[pair] += frequencies[i]
            holders[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    ranks = {token: i for i, token in enumerate(tokens)}
    while len(tokens) < vocab_size:
        enough = (
            f"this text is enough for {len(tokens)} tokens and BOS; give more, or train:{len(tokens) + 1}"
        )
        need(heap, enough)
        count, pair = heapq.heappop(heap)
        if counts.get(pair) != -count:
            continue  # changed since; its present count is in the heap too
        merged = tokens[pair[0]] + tokens[pair[1]]
        # the same bytes between token boundaries have always been merged the same way, so this is new
        assert merged not in ranks, f"{merged} is made twice"
        ranks[merged] = len(tokens)
        tokens.append(merged)
        for changed in merge_pair(pair, ranks[merged], words, frequencies, counts, holders):
            if counts[changed] > 0:
                heapq.heappush(heap, (-counts[changed], changed))
            else:
                del counts[changed]
    return ranks


def unique_words(documents: Iterable[str]) -> tuple[list[list[int]], list[int]]:
    """Each distinct word as a list of byte values, and how often it occurs."""
    split = regex.compile(PATTERN)
    found: Counter[str] = Counter()
    for document in documents:
        found.update(split.findall(document))
    return [list(word.encode()) for word in found], list(found.values())


def merge_pair(pair: Pair, new: int, words, frequencies, counts, holders) -> set[Pair]:
    """Replaces the pair by the token `new` in all words, keeps holders -> the pairs whose counts changed."""
    a, b = pair
    changed: set[Pair] = set()
    for i in holders.pop(pair):
        word, n, out, at = words[i], frequencies[i], [], 0
        last = len(word) - 1
        while at <= last:
            if word[at] != a or at == last or word[at + 1] != b:
                out.append(word[at])
                at += 1
                continue
            if out:
                counts[out[-1], a] -= n
                counts[out[-1], new] += n
                holders[out[-1], new].add(i)
                changed.update(((out[-1], a), (out[-1], new)))
            if at + 2 <= last:
                right = word[at + 2]
                counts[b, right] -= n
                counts[new, right] += n
                holders[new, right].add(i)
                changed.update(((b, right), (new, right)))
            out.append(new)
            at += 2
        words[i] = out
    changed.discard(pair)  # none is left: also a run "aaa" keeps no two neighbours
    del counts[pair]
    return changed


def load_vocab(path: Path) -> dict[bytes, int]:
    """Ranks 0 .. n-1 by token. UserError: not a file of tiktoken's format that holds all 256 bytes."""
    try:
        size = path.stat().st_size
        need(path.is_file(), f"{shown(path)}: not a file that can be read")
        need(size <= MAX_VOCAB_FILE, f"{shown(path)}: not a vocabulary: {size:,} bytes are too many")
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise UserError(
            f"{shown(path)}: cannot be read: {os_reason(error)} (it is made together with the shards)"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{shown(path)}: not a vocabulary: lines are `base64 rank`; delete it and make the data again"
        ) from error
    whole = sorted(ranks.values()) == list(range(len(lines))) and all(bytes([b]) in ranks for b in range(256))
    need(whole, f"{shown(path)}: not a whole vocabulary: ranks must be 0, 1, 2 ... and hold all 256 bytes")
    longest = max(map(len, ranks))
    need(longest < 2**16, f"{shown(path)}: not a vocabulary: a token of {longest:,} bytes is too long")
    return ranks


def encoding(ranks: dict[bytes, int], bos_id: int) -> tiktoken.Encoding:
    return tiktoken.Encoding("speedrun", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={BOS: bos_id})


def token_bytes(ranks: dict[bytes, int]) -> np.ndarray:
    """(len(ranks) + 1,) uint16: the bytes of UTF-8 that each token stands for; 0 for BOS, the last."""
    lengths = np.zeros(len(ranks) + 1, dtype="<u2")
    for token, rank in ranks.items():
        lengths[rank] = len(token)
    return lengths


def token_bytes_file(ranks: dict[bytes, int]) -> bytes:
    content = io.BytesIO()
    np.save(content, token_bytes(ranks), allow_pickle=False)
    return content.getvalue()


def write_token_bytes(folder: Path, ranks: dict[bytes, int]) -> None:
    """token_bytes.npy, unless it is there. UserError: another file has its name."""
    write_once(folder / TOKEN_BYTES, token_bytes_file(ranks))


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens (n,) that encode_ordinary has, without a Python number for each.

    tiktoken fails on several 100,000 white spaces in a row: its pattern takes them all, finds a word behind
    them, and goes back. It always splits before such a run and before its last character; so does this first.
    """
    text = whole_characters(text)
    parts, start = [], 0
    # From the first of a run, and never back: a text that ends in one would take the square of its length.
    long_run = rf"(?<![{WHITE_SPACE}])[{WHITE_SPACE}]{{{LONG_RUN_CHARS},}}+(?=[^{WHITE_SPACE}])"
    for run in re.finditer(long_run, text) if len(text) > LONG_RUN_CHARS else ():
        parts += [text[start : run.start()], run[0][:-1]]
        start = run.end() - 1
    parts.append(text[start:])
    tokens = [tokenizer.encode_to_numpy(part, disallowed_special=()) for part in parts if part]
    return np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.uint32)


def whole_characters(text: str) -> str:
    """text as tiktoken reads it: JSON can hold halves of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
