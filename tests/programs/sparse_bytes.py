"""Bytes that each of eight ranks sends for the bigram table's gradient in preset short, dense and sparse.

    python -m tests.programs.sparse_bytes [--ranks 8]

It counts; it starts no processes. The first time it fetches GPT-2's vocabulary. One Adam step, on the
gradients of two steps' tokens: the embedded corpus re-encoded with GPT-2's vocabulary and packed as in
training, each stage from the corpus's start. dense: the reduce-scatter of the whole table in bfloat16.
sparse: of rows that other ranks own, the index (int64) and the values (bfloat16).
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train_gpt as tg
from data import bpe, corpus
from data.shards import write_shard

SHORT = tg.PRESETS["short"]
TABLE_ROWS = SHORT.bigram_rows * SHORT.vocab_rows


def gpt2_tokens() -> np.ndarray:
    """The corpus, training and validation text, in GPT-2's tokens, (n,)."""
    corpus.main([])
    words = {rank: word for word, rank in bpe.load_vocab(corpus.OUT / corpus.VOCAB).items()}
    texts = []
    for name in (corpus.TRAIN, corpus.VAL):
        tokens = tg.read_shard(corpus.OUT / name, corpus.VOCAB_SIZE, corpus.BOS_ID)
        documents = np.split(tokens, np.flatnonzero(tokens == corpus.BOS_ID)[1:])
        texts += [
            b"".join(words[token] for token in document[1:].tolist()).decode() for document in documents
        ]
    kept = Path(tempfile.gettempdir(), "gpt2_vocab")
    kept.mkdir(exist_ok=True)
    vocab = kept / corpus.VOCAB
    vocab.write_bytes(corpus.gpt2_vocab(kept))
    encoded = bpe.encoding(bpe.load_vocab(vocab), SHORT.bos_id).encode_ordinary_batch(texts)
    return np.concatenate([[SHORT.bos_id, *document] for document in encoded])


def rows_by_rank(loader: tg.Loader, stage: tg.Stage, ranks: int) -> list[np.ndarray]:
    """The table's rows that each rank's tokens of two steps touch."""
    touched = [[] for _ in range(ranks)]
    for _ in range(2):
        for n, (tokens, _) in enumerate(loader.load_batches(stage)):
            is_first = tg.Documents.find(tokens, SHORT.bos_id).is_first
            touched[n % ranks] += [
                rows for rows, _ in tg.ngram_rows(tokens, is_first, TABLE_ROWS, SHORT.ngrams)
            ]
    return [torch.cat(rows).unique().numpy() for rows in touched]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    ranks = parser.parse_args().ranks
    rows_per_rank, row_bytes = -(-TABLE_ROWS // ranks), 2 * SHORT.model_dim
    dense = rows_per_rank * (ranks - 1) * row_bytes
    with tempfile.TemporaryDirectory() as folder:
        tokens = gpt2_tokens()
        write_shard(Path(folder, "gpt2_train_000000.bin"), tokens)
        table = f"a table of {TABLE_ROWS:,} rows x {SHORT.model_dim}"
        print(f"{len(tokens):,} tokens; {table}; {ranks} ranks; an Adam step:")
        columns = f"{'rows a rank touches':>20} {'dense, MB a rank':>17} {'sparse, MB a rank':>18}"
        print(f"{'tokens a step':>13} {columns} {'most':>6} {'dense / sparse':>15}")
        for batch_tokens in sorted({stage.batch_tokens for stage in SHORT.stages}):
            stage = next(stage for stage in SHORT.stages if stage.batch_tokens == batch_tokens)
            try:
                touched = rows_by_rank(tg.Loader(replace(SHORT, data_dir=folder)), stage, ranks)
            except tg.UserError:
                print(f"{batch_tokens:>13,} two steps need more tokens than there are")
                continue
            sent = []
            for rank, rows in enumerate(touched):
                sent.append(int((rows // rows_per_rank != rank).sum()) * (8 + row_bytes))
            mean_rows = np.mean([len(rows) for rows in touched])
            megabytes = f"{dense / 1e6:>17.1f} {np.mean(sent) / 1e6:>18.1f} {max(sent) / 1e6:>6.1f}"
            print(f"{batch_tokens:>13,} {mean_rows:>20,.0f} {megabytes} {dense / np.mean(sent):>15.1f}")


if __name__ == "__main__":
    main()
