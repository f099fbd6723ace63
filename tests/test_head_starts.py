"""Embedding, head and bigram table that start from counts, and the table of which only touched rows move."""

import math
from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import made_up_text, tiny, write_shard, write_vocabulary

import train_gpt as tg

CPU = torch.device("cpu")
ONE_PROCESS = tg.DistEnv(0, 1, CPU)

# ---- spectral_start


def sized(vocab: int, dim: int, smoothing: float) -> tg.Config:
    return tiny(vocab_size=vocab, model_dim=dim, spectral=smoothing, embed_std=1.0)


def markov(count: int, vocab: int, seed: int) -> np.ndarray:
    """Each token follows from the one before, by a table of few likely successors."""
    rng = np.random.default_rng(seed)
    successors, tokens = (
        np.random.default_rng(0).integers(0, vocab, (vocab, 3)),
        np.zeros(count, dtype=np.int64),
    )
    for i in range(1, count):
        tokens[i] = successors[tokens[i - 1], rng.integers(3)] if rng.random() < 0.9 else rng.integers(vocab)
    return tokens


def bigram_loss(embed: torch.Tensor, head: torch.Tensor, tokens: np.ndarray) -> float:
    tokens = torch.from_numpy(tokens)
    return float(F.cross_entropy(embed[tokens[:-1]] @ head, tokens[1:]))


def test_it_starts_as_a_bigram_model_of_text_that_it_has_not_seen():
    vocab, seen, unseen = 128, markov(40_000, 128, seed=1), markov(5_000, 128, seed=2)
    counts = np.zeros((vocab, vocab)) + 0.1
    np.add.at(counts, (seen[:-1], seen[1:]), 1)
    best = float(-np.log(counts / counts.sum(1, keepdims=True))[unseen[:-1], unseen[1:]].mean())
    embed, head = tg.spectral_start(sized(vocab, 48, 5.0), seen, CPU)
    assert embed.shape == (vocab, 48) and head.shape == (48, vocab)
    # Normed, as the model reads it.
    torch.testing.assert_close(embed.square().mean(1), torch.ones(vocab), atol=1e-3, rtol=0)
    loss, shuffled = (
        bigram_loss(embed, head, unseen),
        bigram_loss(embed, head, np.random.default_rng(0).permutation(unseen)),
    )
    assert best < loss < best + 0.6 and loss < np.log(vocab) - 1 < shuffled, (best, loss, shuffled)


def test_large_vocabularies_go_through_sparse_matrices_and_give_the_same():
    tokens = markov(20_000, 128, seed=3)
    dense = tg.spectral_start(sized(128, 32, 50.0), tokens, CPU)
    # The same text, most of the vocabulary unused.
    wide = tg.spectral_start(sized(2**13 + 64, 32, 50.0), tokens, CPU)
    assert all(torch.isfinite(t).all() for t in wide)
    assert bigram_loss(*wide, tokens) == pytest.approx(bigram_loss(*dense, tokens), abs=0.15)


def test_similar_tokens_start_near_each_other():
    """Tokens 2k and 2k + 1 are drawn at random for one another: what stands around them is the same."""
    tokens = 2 * markov(60_000, 64, seed=4) + np.random.default_rng(5).integers(0, 2, 60_000)
    embed, _ = tg.spectral_start(sized(128, 24, 10.0), tokens, CPU)
    near = (embed @ embed.T / 24).fill_diagonal_(-1)
    assert (near.argmax(1) == torch.arange(128) ^ 1).float().mean() > 0.95


def tiny_trainer(tiny_data, log_dir, **changes) -> tg.Trainer:
    sizes = dict(spectral=10.0, untie_share=0.0, embed_std=0.1, data_dir=str(tiny_data), log_dir=str(log_dir))
    return tg.Trainer(tiny(**sizes | changes), {})


def test_a_run_starts_from_its_first_shard_and_the_time_counts(tiny_data, tmp_path):
    trainer = tiny_trainer(tiny_data, tmp_path)
    tokens = tg.read_shard(sorted(tiny_data.glob("*_train_*.bin"))[0], 256, 255).astype(np.int64)
    embed, head = tg.spectral_start(trainer.cfg, tokens, CPU)
    torch.testing.assert_close(trainer.model.embed.detach(), embed)
    torch.testing.assert_close(trainer.model.lm_head.detach(), head)
    assert trainer.clock.seconds() > 0 and trainer.clock.started is None
    assert tiny_trainer(tiny_data, tmp_path, spectral=0.0).clock.seconds() == 0


def test_it_needs_an_embedding_of_its_own():
    with pytest.raises(tg.UserError, match=r"--spectral 800\.0.*--untie_share 0"):
        tg.parse_config(["--preset=cpu", "--untie_share=0.5"])


# ---- ngram_start


def ngram_config(**changes) -> tg.Config:
    sizes = dict(vocab_size=128, bos_id=127, ngrams=3, bigram_rows=40, bigram_signs=64, ngram_start=9.0)
    starts = dict(spectral=5.0, embed_std=0.1, untie_share=0.0)
    return tiny(**sizes | starts | changes)


def of_two_tokens(count: int, seed: int) -> np.ndarray:
    """Each token follows from the two before, by hash; documents of about 60 tokens."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros(count, dtype=np.int64)
    for i in range(2, count):
        a, b = tokens[i - 2], tokens[i - 1]
        tokens[i] = (7 * a + 3 * b + rng.integers(2)) % 11 if rng.random() < 0.9 else rng.integers(11)
    tokens[rng.random(count) < 1 / 60] = 127
    return tokens


def slow_table(cfg, embed, head, signs, tokens) -> torch.Tensor:
    """The same by dictionaries, a context at a time, in float64."""
    table = torch.zeros(cfg.bigram_rows * 128, cfg.model_dim, dtype=torch.float64)
    directions = tg.logit_directions(head, tokens).double()
    logs = F.log_softmax(tg.norm(embed) @ head, dim=1).double()
    known = {(b, c): math.exp(float(logs[b, c])) for b in range(12) for c in range(12)}
    known |= {(127, c): math.exp(float(logs[127, c])) for c in range(12)}
    for length in (2, 3):
        after, shorter, known = defaultdict(Counter), known, {}
        for i in range(len(tokens) - length):
            *context, follows = map(int, tokens[i : i + length + 1])
            if 127 not in (*context[1:], follows):
                after[tuple(context)][follows] += 1
        for context, counts in after.items():
            total, row = sum(counts.values()), 0
            for c, n in counts.items():
                before = shorter[*context[1:], c]
                p = known[*context, c] = (n + 5 * before) / (total + 5)
                row = row + p * math.log(p / before) * directions[c]
            if total > 1:
                is_first = torch.arange(length) == 0
                found = tg.ngram_rows(torch.tensor(context), is_first, len(table), length)
                place, key = (int(x[-1]) for x in found[-1])
                table[place] += row * (signs[key % cfg.bigram_signs].double() if signs is not None else 1)
    return table * cfg.ngram_start


def ngram_table(cfg, embed, head, signs, tokens, trained_head=None) -> torch.Tensor:
    """The table that starts from counts of these tokens, (rows, D)."""
    table = torch.zeros(cfg.bigram_rows * cfg.vocab_rows, cfg.model_dim)
    directions = tg.logit_directions(head if trained_head is None else trained_head, tokens)
    tg.add_ngram_start_(table, cfg, (embed, head), directions, signs, tg.all_ngrams(cfg, tokens))
    return table


@pytest.mark.parametrize("signs", [64, 0])
def test_rows_are_what_a_dictionary_of_contexts_gives(signs):
    cfg = ngram_config(bigram_signs=signs)
    tokens = of_two_tokens(6_000, seed=1)
    start = tg.spectral_start(cfg, tokens, CPU)
    sign = tg.GPT(cfg).bigram_sign if signs else None
    table = ngram_table(cfg, *start, sign, tokens)
    expected = slow_table(cfg, *start, sign, tokens)
    assert (expected != 0).any(1).sum() > 300
    torch.testing.assert_close(table.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_model_knows_what_follows_two_tokens_before_its_first_step():
    cfg, losses = ngram_config(bigram_rows=100, val_seq_len=3072), {}
    seen, unseen = of_two_tokens(60_000, seed=2), of_two_tokens(3_000, seed=3)
    unseen[0] = 127
    tokens, targets = tg.split_targets(unseen)
    model = tg.GPT(cfg)
    embed, head = tg.spectral_start(cfg, seen, CPU)
    model.embed.data.copy_(embed)
    model.lm_head.data.copy_(head)
    for name, table in dict(
        zeros=torch.zeros_like(model.bigram_embed),
        counts=ngram_table(cfg, embed, head, model.bigram_sign, seen),
        others=ngram_table(cfg, embed, head, model.bigram_sign, np.random.default_rng(0).permutation(seen)),
    ).items():
        model.bigram_embed.data.copy_(table)
        with torch.no_grad():
            losses[name] = float(model(tokens, targets, torch.ones(1), (16, 48), learn=False))
    assert losses["counts"] < losses["zeros"] - 0.2, losses
    assert losses["others"] > losses["zeros"] - 0.05, losses


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_a_text_too_short_for_contexts_leaves_rows_at_zero(count):
    cfg = ngram_config()
    tokens = np.arange(100, 100 + count) % 127
    start = tg.spectral_start(cfg, of_two_tokens(2_000, seed=4), CPU)
    assert ngram_table(cfg, *start, None, tokens).count_nonzero() == 0


# ---- parts of a run, and the text that each counts


@pytest.fixture(scope="module")
def numbered_data(tmp_path_factory) -> Path:
    """Two shards of unequal size; each of 300 documents begins with its number, as two tokens."""
    folder, rng = tmp_path_factory.mktemp("numbered"), np.random.default_rng(0)
    for shard, numbers in enumerate((range(200), range(200, 300))):
        documents = []
        for number in numbers:
            words = rng.integers(100, 250, rng.integers(20, 120))
            documents.append(np.r_[255, number // 100, number % 100, words])
        write_shard(folder / f"x_train_{shard:06}.bin", np.concatenate(documents))
    write_shard(folder / "x_val_000000.bin", np.r_[255, np.arange(3_000) % 100])
    write_vocabulary(folder, 255, 128)
    return folder


def numbers_in(tokens: np.ndarray) -> set[int]:
    begins = np.flatnonzero(tokens[:-2] == 255)
    return set((100 * tokens[begins + 1] + tokens[begins + 2]).tolist())


def numbered_config(data: Path, **changes) -> tg.Config:
    starts = dict(spectral=10.0, untie_share=0.0, embed_std=0.1, ngram_start=4.0)
    return tiny(**starts | dict(data_dir=str(data), epochs=4) | changes)


@pytest.mark.parametrize("num_steps, count", [(4, 1), (32, 1), (36, 2), (60, 2), (80, 3)])
def test_no_part_of_a_run_counts_what_it_reads(numbered_data, num_steps, count):
    cfg = numbered_config(numbered_data, num_steps=num_steps)
    schedule, loader = tg.Schedule(cfg), tg.Loader(cfg)
    parts = tg.parts_of_run(cfg, schedule)
    assert next(iter(parts)) == 0 and len(parts) == count
    for first, after in pairwise([*parts, num_steps]):
        read = set()
        for step in range(first, after):
            for tokens, _ in loader.load_batches(schedule.stage(step)):
                read |= numbers_in(tokens.numpy())
        counted = tg.tokens_outside(cfg, *parts[first])
        assert counted[0] == 255 and counted.dtype == np.int64
        assert len(read) <= 0.95 * 300, "a part reads too much"
        missing = set(range(300)) - read - numbers_in(counted)
        assert not read & numbers_in(counted) and len(missing) <= 1, (read & numbers_in(counted), missing)


@pytest.mark.parametrize("most", [10**9, 5_000, 700])
def test_what_lies_outside_of_a_part_is_counted_from_its_end_on(numbered_data, monkeypatch, most):
    monkeypatch.setattr(tg, "COUNTED", most)
    cfg = numbered_config(numbered_data)
    text = np.concatenate([tg.read_shard(path, 256, 255) for path in tg.find_shards(cfg, "train")])
    for begin, end in [
        (0, 0),
        (0, 9_000),
        (3_000, 9_000),
        (9_000, len(text)),
        (len(text) - 50, len(text) + 80),
    ]:
        for epoch in range(2):
            found = tg.tokens_outside(cfg, begin + epoch * len(text), end + epoch * len(text))
            around = np.roll(text, -end)[: len(text) - (end - begin)]
            assert np.array_equal(found, around[:most])
    assert len(tg.tokens_outside(cfg, 10, 10 + len(text))) == 0


def test_a_step_that_reads_more_than_a_part_may_is_a_part(numbered_data):
    stages = (tg.Stage(1.0, batch_tokens=20480, windows=(16, 48), max_doc_len=512, lr_mul=1.0),)
    cfg = numbered_config(numbered_data, stages=stages, num_steps=4, epochs=9, adam_every=1)
    parts = tg.parts_of_run(cfg, tg.Schedule(cfg))
    assert list(parts) == [0, 1, 2, 3]
    assert [len(tg.tokens_outside(cfg, *part)) > 0 for part in parts.values()] == [True] * 4


def test_shards_that_counting_does_not_need_are_not_read(numbered_data, monkeypatch):
    """Thousands of shards may lie there, and one that is damaged matters to who reads it."""
    cfg = numbered_config(numbered_data)
    first, last = tg.find_shards(cfg, "train")
    read, read_shard = [], tg.read_shard
    monkeypatch.setattr(tg, "read_shard", lambda path, *rest: read.append(path) or read_shard(path, *rest))
    size = tg.shard_tokens(first)
    assert size == len(read_shard(first, 256, 255))
    assert len(tg.tokens_outside(cfg, 100, size + 100)) and set(read) == {first, last}
    read.clear()
    assert len(tg.tokens_outside(cfg, size, size + tg.shard_tokens(last))) == size and read == [first]
    monkeypatch.setattr(tg, "COUNTED", 50)
    read.clear()
    assert len(tg.tokens_outside(cfg, 10, 60)) == 50 and read == [first]


def test_the_table_starts_again_where_no_gradient_of_the_old_one_waits(numbered_data):
    for every in (1, 2, 3):
        cfg = numbered_config(numbered_data, epochs=9, num_steps=100, adam_every=every)
        parts = tg.parts_of_run(cfg, tg.Schedule(cfg))
        assert len(parts) > 2 and not any(step % every for step in parts)


def test_what_a_resumed_run_counted_before_is_not_on_its_clock(tiny_data, tmp_path):
    counts = tiny_trainer(tiny_data, tmp_path, ngram_start=4.0, epochs=5, num_steps=100).counts
    for since, counted in ((max(counts.restarts) + 1, False), (max(counts.restarts), True)):
        again = tg.Counts(counts.cfg, tg.Schedule(counts.cfg), counts.first_shard, counts.env, counts.dtype)
        again.prepare(since)
        assert ("bigram_model" in vars(again)) == counted


def test_a_run_starts_its_table_from_counts(tiny_data, tmp_path):
    trainer = tiny_trainer(tiny_data, tmp_path, ngram_start=4.0)
    assert not trainer.counts.restarts
    unread = tg.tokens_outside(trainer.cfg, *trainer.counts.parts[0])
    start = [p.detach().float() for p in (trainer.model.embed, trainer.model.lm_head)]
    expected = ngram_table(trainer.cfg, *start, None, unread)
    assert expected.count_nonzero() > 100
    torch.testing.assert_close(trainer.model.bigram_embed.detach(), expected, rtol=1e-4, atol=1e-4)
    for switch in (dict(ngram_start=0.0), dict(spectral=0.0, ngram_start=4.0)):
        without = tiny_trainer(tiny_data, tmp_path, **switch)
        assert without.model.bigram_embed.count_nonzero() == 0 and without.counts.parts == {}
    assert tiny_trainer(tiny_data, tmp_path, ngram_start=4.0, bigram_rows=0).model.bigram_embed is None


@pytest.mark.parametrize("by_row", [False, True])
def test_with_each_part_the_table_starts_again_as_the_trained_head_asks(tiny_data, tmp_path, by_row):
    changes = dict(ngram_start=4.0, epochs=5, num_steps=100, bigram_by_row=by_row, val_every=0)
    trainer = tiny_trainer(tiny_data, tmp_path, **changes)
    train_step, begun = trainer.train_step, []

    def look_first(step: int) -> torch.Tensor:
        if step in trainer.counts.restarts:
            state = trainer.optimizer.state["bigram_embed"]
            assert all(value.count_nonzero() == 0 for value in state.values())
            head = trainer.model.lm_head.detach().clone()
            table = trainer.model.bigram_embed.detach().clone()
            begun.append((step, head, table))
        return train_step(step)

    trainer.train_step = look_first
    trainer.fit()
    assert [step for step, *_ in begun] == trainer.counts.restarts and len(begun) >= 2
    for step, head, table in begun:
        unread = tg.tokens_outside(trainer.cfg, *trainer.counts.parts[step])
        expected = ngram_table(trainer.cfg, *trainer.counts.bigram_model, None, unread, head)
        torch.testing.assert_close(table, expected)
        first_head = ngram_table(trainer.cfg, *trainer.counts.bigram_model, None, unread)
        assert (table - first_head).norm() > 0.01 * table.norm(), "the head had not moved"
    log = next(tmp_path.glob("*.txt")).read_text(encoding="utf-8")
    for step in trainer.counts.restarts:
        assert f"bigram table: starts again at step {step}, from counts of " in log


# ---- rows that no token touched


def row_steps(count: int, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of a table on so many steps, each of a few rows, (rows, width)."""
    rng, grads = torch.Generator().manual_seed(0), []
    for _ in range(count):
        grad, touched = torch.zeros(rows, width), torch.randint(rows, (rows // 4,), generator=rng)
        grad[touched] = torch.randn(len(touched), width, generator=rng)
        grads.append(grad.to(dtype))
    return grads


def test_each_row_counts_its_own_steps_and_has_one_second_moment():
    """Adam's formula in Python's floats, a row at a time, as if the others were not there."""
    table = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    expected = table.double().tolist()
    second_moment, moves = torch.zeros(12, 1), torch.zeros(12, 1)
    memory = [(0.0, 0)] * 12
    lr, wd, beta2, eps = 0.3, 0.2, 0.95, 1e-10
    for grad in row_steps(40, 12, 5, torch.float32):
        rates = dict(lr=lr, wd=wd, betas=(0.0, beta2), eps=eps)
        tg.adam_rows_(table, None, grad, second_moment, moves, **rates)
        for row, g in enumerate(grad.double().tolist()):
            if not any(g):
                continue
            v, n = memory[row]
            v, n = beta2 * v + (1 - beta2) * sum(x * x for x in g) / 5, n + 1
            memory[row] = v, n
            for k, x in enumerate(g):
                update = x / (math.sqrt(v / (1 - beta2**n)) + eps)
                kept = 1 - wd * lr**2 if update * expected[row][k] > 0 else 1.0
                expected[row][k] = kept * expected[row][k] - lr * update
    torch.testing.assert_close(table.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    assert moves.flatten().tolist() == [n for _, n in memory] and min(n for _, n in memory) > 1


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_touched_rows_alone_is_moving_the_whole_table(dtype, sparse):
    """The same gradients to both."""
    cfg, results = tiny(bigram_by_row=True, adam_every=1), []
    for adam_rows_ in (tg.adam_rows_, partial(tg.move_touched_rows_, tg.adam_rows_)):
        kernels = tg.plain_kernels(new_mantissa=tg.new_float32_copy, adam_rows_=adam_rows_)
        model = tg.GPT(cfg, dtype, kernels)
        optimizer, name = tg.Optimizer(cfg, model, ONE_PROCESS), "bigram_embed"
        state = optimizer.state[name]
        assert "moves" in state and "momentum_buffer" not in state
        optimizer.lr_mul.fill_(1.0)
        for grad in row_steps(30, len(model.bigram_embed), cfg.model_dim, dtype):
            by_rows = sparse and adam_rows_ is not tg.adam_rows_
            with torch.no_grad():
                wait = optimizer.update_param(name, grad.to_sparse(1) if by_rows else grad)
                wait()
        results.append([model.bigram_embed.detach(), *state.values()])
    for a, b in zip(*results, strict=True):  # a mean over a row may be rounded otherwise
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    assert (results[0][0] != 0).any(1).sum() > 300


def test_a_model_that_moves_rows_learns_and_gives_its_table_a_sparse_gradient():
    cfg = tiny(bigram_by_row=True, ngrams=3, adam_every=1)
    touched = partial(tg.move_touched_rows_, tg.adam_rows_)
    kernels = tg.plain_kernels(sparse_bigram_grad=True, adam_rows_=touched)
    model = tg.GPT(cfg, kernels=kernels)
    optimizer = tg.Optimizer(cfg, model, ONE_PROCESS)
    tokens, targets = tg.split_targets(made_up_text(257))
    losses = []
    for step in range(8):
        loss = model(tokens, targets, torch.ones(1), (16, 48))
        loss.backward()
        assert model.bigram_embed.grad.is_sparse
        optimizer.step(step, 1.0, 0.9, untie=False)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5, losses


# ---- copy_start


def test_a_long_layers_keys_start_as_queries_where_they_look_back():
    cfg = tiny(copy_start=True)
    plain, model = tg.GPT(tiny()), tg.GPT(cfg)
    still, attending = 2 * cfg.rotary_pairs, [layer for layer in model.layers if layer.attends]
    assert 0 < still < cfg.head_dim and {"long", "short"} == {layer.window for layer in attending}
    for n, layer in enumerate(attending):
        q, k = model.qkvo[n, :2].unflatten(1, (cfg.num_heads, cfg.head_dim))
        same = (q == k).flatten(2).all(2)  # (heads, dimensions)
        if layer.window == "long":
            assert same[:, still:].all() and not same[:, :still].any()
            before = plain.qkvo[n, 1].unflatten(0, (cfg.num_heads, cfg.head_dim))
            assert torch.equal(k[:, :still], before[:, :still])
        else:
            assert torch.equal(model.qkvo[n], plain.qkvo[n])
    assert torch.equal(tg.GPT(tiny(copy_start=True, key_offset=False)).qkvo, plain.qkvo)


def test_so_a_token_attends_to_what_followed_the_same_token():
    """The last token occurs once before: the weight on what followed it there."""
    weights = {}
    for copy_start in (False, True):
        found = []

        def attention(q, k, v, first_key, window, scale, found=found):
            found.append(torch.einsum("qhd,khd->hqk", q, k) * scale)
            return tg.reference_attention(q, k, v, first_key, scale)

        layers = dict(windows="l", paired_heads=".", value_embeds=".", skips=".", backout=".")
        cfg = tiny(copy_start=copy_start, softmax_scale=0.5, **layers)
        model = tg.GPT(cfg, kernels=tg.plain_kernels(attention=attention))
        tokens = torch.cat((torch.tensor([255]), torch.arange(10, 40), torch.tensor([20])))
        with torch.no_grad():
            model.hidden(tokens, (64, 64))
        scores = torch.cat(found)[:, -1]  # (heads, keys) of the last token, which is 20
        weights[copy_start] = float(scores.softmax(1)[:, 12].mean())  # the place of 21
    assert weights[True] > 2 * weights[False] and weights[True] > 0.1, weights


def test_and_says_it_where_a_table_is_its_own():
    """What followed the last token before is likelier than without; layers that share a table stay."""
    layers = dict(windows="sll", paired_heads="...", value_embeds="010", skips="...", backout="...")
    cfg = tiny(copy_start=True, softmax_scale=0.5, copy_values=30.0, **layers)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.cat((torch.tensor([255]), torch.arange(10, 40), torch.tensor([20])))
    silent, model = tg.GPT(cfg), tg.GPT(cfg)
    for each in (silent, model):
        each.lm_head.data.copy_(torch.randn(each.lm_head.shape, generator=rng.manual_seed(1)))
    directions = tg.logit_directions(model.lm_head.detach(), np.arange(256).repeat(3))
    tg.start_saying(model, directions)
    for name, p in model.named_parameters():
        changed = {"value_embed_1", "qkvo"}
        assert torch.equal(p, getattr(silent, name)) == (name not in changed), name
    assert torch.equal(model.qkvo[[0, 2]], silent.qkvo[[0, 2]])
    torch.testing.assert_close(model.value_embed_1.detach(), 30 * directions)
    with torch.no_grad():
        logits = [each.hidden(tokens, (64, 64))[-1] @ each.lm_head for each in (silent, model)]
    gain = logits[1].log_softmax(0) - logits[0].log_softmax(0)
    assert gain[21] > 0.1 and gain[21] == gain.max(), (gain[21], gain.max())


SWITCHES = {
    "as it is": {},
    "no copying": {"copy_start": False},
    "no key offset": {"key_offset": False},
    "silent": {"copy_values": 0.0},
    "no directions": {"spectral": 0.0},
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_a_run_starts_saying_what_it_copies_if_it_copies(switch, tiny_data, tmp_path):
    layers = dict(windows="sl", paired_heads="..", value_embeds=".0", skips="..", backout="..")
    trainer = tiny_trainer(tiny_data, tmp_path, **layers | dict(copy_start=True, copy_values=5.0) | switch)
    head, table = trainer.model.lm_head.detach(), trainer.model.value_embed_0.detach()
    directions = tg.logit_directions(head, trainer.loader.tokens)
    assert torch.allclose(table, 5 * directions, rtol=1e-3, atol=1e-5) == (not switch)
    assert (trainer.model.qkvo[1, 2].count_nonzero() == 0) == (not switch)
