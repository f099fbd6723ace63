"""Byte-level BPE: train a small vocabulary, keep it in tiktoken's text format, load it into tiktoken.

The split pattern is GPT-2's, so a vocabulary trained here differs from GPT-2's only in its size and its merges.
"""

import base64
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import regex
import tiktoken

from data.shards import user_error, write_file

# tiktoken's spelling of GPT-2's pattern: possessive quantifiers, the same pieces
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
BOS = "<|endoftext|>"

Pair = tuple[int, int]


def train_bpe(documents: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """The ranks of vocab_size tokens: the 256 bytes, then merges of the most frequent pair, the smallest ids first at a tie.

    Works on unique words with their counts, and a merge visits only the words that hold its pair: 12 MB take seconds.
    """
    assert vocab_size >= 256, f"{vocab_size=}: the 256 single bytes are always in"
    words, times = unique_words(documents)
    counts: dict[Pair, int] = defaultdict(int)
    holders: dict[Pair, set[int]] = defaultdict(
        set
    )  # the words a pair is in; may still name words that lost it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += times[i]
            holders[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    ranks = {token: i for i, token in enumerate(tokens)}
    while len(tokens) < vocab_size:
        if not heap:
            raise user_error(
                f"a vocabulary of {vocab_size} tokens needs more text: this one ends at {len(tokens)}"
            )
        count, pair = heapq.heappop(heap)
        if counts.get(pair) != -count:
            continue  # changed since; its present count is in the heap too
        merged = tokens[pair[0]] + tokens[pair[1]]
        # the same bytes between token boundaries have always been merged the same way, so this is new
        assert merged not in ranks, f"{merged} is made twice"
        ranks[merged] = len(tokens)
        tokens.append(merged)
        for changed in merge_pair(pair, ranks[merged], words, times, counts, holders):
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


def merge_pair(pair: Pair, new: int, words, times, counts, holders) -> set[Pair]:
    """Replaces the pair by the token `new` in all words, keeps counts and holders true, returns the pairs that changed."""
    a, b = pair
    changed: set[Pair] = set()
    for i in holders.pop(pair):
        word, n, out, at = words[i], times[i], [], 0
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


def save_vocab(path: Path, ranks: dict[bytes, int]) -> None:
    lines = [
        base64.b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    write_file(path, b"".join(lines))


def load_vocab(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise user_error(
            f"{path}: cannot be read: {error.strerror}; it is made together with the shards"
        ) from error
    except ValueError as error:
        raise user_error(
            f"{path}: not a vocabulary: lines are `base64 rank`; delete it and make the data again"
        ) from error
    if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([b]) in ranks for b in range(256)):
        raise user_error(f"{path}: not a whole vocabulary: ranks must be 0, 1, 2 ... and hold all 256 bytes")
    return ranks


def encoding(ranks: dict[bytes, int], bos_id: int) -> tiktoken.Encoding:
    return tiktoken.Encoding("speedrun", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={BOS: bos_id})
