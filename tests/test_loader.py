"""Shards and what is refused of them, the order of sequences, validation, how much work a step is."""

import base64
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_up_text, tiny
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg
from cli import UserError
from data.bpe import load_vocab, write_token_bytes
from data.shards import write_shard

BOS = 255  # tiny()'s


def stage(batch_tokens: int, max_doc_len: int, until: float = 2.0) -> tg.Stage:
    return tg.Stage(
        until=until, batch_tokens=batch_tokens, windows=(16, 48), max_doc_len=max_doc_len, lr_mul=1.0
    )


# Shards


def shard_bytes(
    tokens, magic: int = tg.SHARD_MAGIC, version: int = tg.SHARD_VERSION, count: int | None = None
) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


def test_the_format_is_the_one_of_public_shards():
    assert (tg.SHARD_MAGIC, tg.SHARD_VERSION, tg.HEADER_BYTES) == (20240520, 1, 1024)


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_a_good_shard_is_read_as_it_was_written(tmp_path, count):
    tokens = made_up_text(count)
    (tmp_path / "a.bin").write_bytes(shard_bytes(tokens))
    write_shard(tmp_path / "b.bin", tokens)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    read = tg.read_shard(tmp_path / "a.bin", 256, BOS)
    assert read.dtype == np.uint16 and np.array_equal(read, tokens)


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "0"),
        (shard_bytes([])[:1023], "1023"),
        (b"\x89PNG" + bytes(2000), "magic"),
        (shard_bytes([BOS, 1, 2], magic=20240521), "20240521"),
        (shard_bytes([BOS, 1, 2], version=2), "version 2"),
        (shard_bytes([BOS, 1, 2])[:-2], "1030"),  # cut between two tokens: 1024 + 6 bytes were promised
        (shard_bytes([BOS, 1, 2])[:-1], "1030"),  # cut within one
        (shard_bytes([BOS, 1, 2]) + b"\0\0", "1030"),
        (shard_bytes([BOS, 1, 2], count=-1), "header"),
        (shard_bytes([]), "no tokens"),
        (shard_bytes([BOS, 1, 256]), "256"),
        (shard_bytes([BOS, 65535, 2]), "65535"),
        (shard_bytes([1, 2, 3]), "--bos_id 255"),
    ],
    ids=[
        "nothing",
        "short header",
        "png",
        "magic",
        "version",
        "cut",
        "cut within a token",
        "too long",
        "negative count",
        "empty",
        "token outside",
        "largest token",
        "no document",
    ],
)
def test_a_bad_shard_is_refused_by_name(tmp_path, content, word):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(tg.UserError) as refused:
        tg.read_shard(path, 256, BOS)
    message = str(refused.value)
    assert str(path) in message and word in message and len(message.splitlines()) == 1, message


def test_a_document_must_begin_among_the_first_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "FIRST_DOCUMENTS", 10)
    for place, good in ((9, True), (10, False)):
        tokens = np.ones(20, dtype=int)
        tokens[place] = BOS
        write_shard(tmp_path / "a.bin", tokens)
        if good:
            assert len(tg.read_shard(tmp_path / "a.bin", 256, BOS)) == 20
        else:
            with pytest.raises(tg.UserError, match="a.bin.*no document"):
                tg.read_shard(tmp_path / "a.bin", 256, BOS)


@pytest.mark.parametrize("make, split", [(tg.Loader, "train"), (tg.Validation, "val")])
@pytest.mark.parametrize("there", ["a folder", "a dangling link"])
def test_what_has_a_shards_name_and_is_no_file_is_refused_by_name(tmp_path, make, split, there):
    path = tmp_path / f"x_{split}_000000.bin"
    path.mkdir() if there == "a folder" else path.symlink_to(tmp_path / "gone.bin")
    with pytest.raises(tg.UserError) as refused:
        make(tiny(data_dir=str(tmp_path)))
    message = str(refused.value)
    assert str(path) in message and "not a file" in message and len(message.splitlines()) == 1, message


@pytest.mark.parametrize("make, split", [(tg.Loader, "train"), (tg.Validation, "val")])
def test_a_missing_pattern_is_refused(tmp_path, make, split):
    other = "val" if split == "train" else "train"
    write_shard(tmp_path / f"x_{other}_000000.bin", made_up_text(2000))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(tg.UserError, match=rf"--data_dir {folder}: no \*_{split}_\*\.bin"):
            make(tiny(data_dir=str(folder)))


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    for n in (10, 2, 1):
        write_shard(tmp_path / f"x_train_{n:06d}.bin", [BOS, n])
    assert [path.name[-7:-4] for path in tg.find_shards(tiny(data_dir=str(tmp_path)), "train")] == [
        "001",
        "002",
        "010",
    ]


def test_a_folder_beside_the_program_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beside = Path(tg.__file__).resolve().parent / "tests"
    assert tg.find_data(tiny(data_dir="tests")) == beside
    (tmp_path / "tests").mkdir()  # where it is as given, that comes first
    assert tg.find_data(tiny(data_dir="tests")).resolve() == (tmp_path / "tests").resolve()


# The order of training sequences


def plain_sequences(shards: list[list[int]], wanted: list[tuple[int, int]]) -> list[list[int]] | None:
    """docs/model.md, "Data", in plain Python: for each (tokens, limit) whole documents, cut at the limit.
    None: too few."""
    documents = []
    for tokens in shards:
        for token in tokens:
            if token == BOS:
                documents.append([BOS])
            elif documents and documents[-1] is not None:
                documents[-1].append(token)
        documents.append(None)  # a document never goes on in the next shard
    documents = [document for document in documents if document is not None]
    sequences = []
    for count, limit in wanted:
        sequence: list[int] = []
        while len(sequence) < count:
            if not documents:
                return None
            sequence += documents.pop(0)[:limit]
        sequences.append(sequence[:count])
    return sequences


def write_shards(folder: Path, shards: list[list[int]]) -> None:
    for n, tokens in enumerate(shards):
        write_shard(folder / f"x_train_{n:06d}.bin", tokens)


def random_shards(seed: int, sizes: tuple[int, ...] = (700, 90, 400, 1, 650)) -> list[list[int]]:
    """Documents of very different lengths, often across a limit; later shards mostly begin within one."""
    rng, shards = np.random.default_rng(seed), []
    for n, size in enumerate(sizes):
        tokens = rng.integers(0, BOS, size)
        tokens[np.unique(rng.exponential(30, size // 4).astype(int).cumsum() % size)[n > 0 :]] = BOS
        tokens[0 if n == 0 else -1] = BOS  # the last document of a shard may be its BOS alone
        shards.append(tokens.tolist())
    return shards


STAGES = (stage(256, 40, until=1 / 3), stage(320, 16, until=2 / 3), stage(192, 1000))


def config(folder: Path, **changes) -> tg.Config:
    return tiny(data_dir=str(folder), **{"stages": STAGES, "num_steps": 6, "micro_batches": 4, **changes})


def wanted(cfg: tg.Config) -> list[tuple[int, int]]:
    """(tokens with their last target, limit) of each sequence of the run."""
    stages = [tg.Schedule(cfg).stage(step) for step in range(cfg.num_steps)]
    return [
        (row.batch_tokens // cfg.micro_batches + 1, row.max_doc_len)
        for row in stages
        for _ in range(cfg.micro_batches)
    ]


def walk(cfg: tg.Config, rank: int = 0, ranks: int = 1) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What one rank trains on, a list for each step."""
    loader, schedule = tg.Loader(cfg), tg.Schedule(cfg)
    return [list(loader.load_batches(schedule.stage(step), rank, ranks)) for step in range(cfg.num_steps)]


@pytest.mark.parametrize("seed", range(6))
def test_sequences_are_those_of_a_plain_walk_over_shards_and_stages(tmp_path, seed):
    shards = random_shards(seed)
    write_shards(tmp_path, shards)
    cfg = config(tmp_path)
    expected = plain_sequences(shards, wanted(cfg))
    # It crosses shards.
    assert expected is not None and sum(map(len, expected)) > len(shards[0]) + len(shards[1])
    batches = [batch for step in walk(cfg) for batch in step]
    assert len(batches) == len(expected) == 24
    for (tokens, targets), sequence in zip(batches, expected, strict=True):
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens[0] == BOS
        assert tokens.tolist() == sequence[:-1] and targets.tolist() == sequence[1:]


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """Shards of documents of log-normal length, many of them longer than the limits of `short` and
    `medium`."""
    folder, shards, rng = tmp_path_factory.mktemp("long"), [], np.random.default_rng(0)
    for _ in range(4):
        lengths = rng.lognormal(7.0, 1.0, 90).astype(int) + 1
        documents = [[BOS, *rng.integers(0, BOS, length).tolist()] for length in lengths]
        assert sum(length > 4096 for length in lengths) > 1
        shards.append(sum(documents, []))
    write_shards(folder, shards)
    return folder, shards


@pytest.mark.parametrize("preset, limit", [("short", 2048), ("medium", 4096)])
def test_the_stream_of_a_record_preset_on_any_number_of_ranks(long_documents, preset, limit):
    """A step of every stage, at an eighth of its tokens: eight sequences from whole documents, cut at the
    preset's limit."""
    folder, shards = long_documents
    record = tg.PRESETS[preset]
    stages = tuple(replace(stage, batch_tokens=stage.batch_tokens // 8) for stage in record.stages)
    cfg = tiny(data_dir=str(folder), stages=stages, micro_batches=8, num_steps=1, epochs=20)
    expected = plain_sequences(
        20 * shards, [(row.batch_tokens // 8 + 1, limit) for row in stages for _ in range(8)]
    )
    # One begins with a cut document.
    assert any(sequence[limit : limit + 1] == [BOS] for sequence in expected)
    for ranks in (1, 2, 4, 8):
        found = [[] for _ in range(8 * len(stages))]
        for rank in range(ranks):
            loader = tg.Loader(cfg)
            for step, row in enumerate(stages):
                for n, (tokens, targets) in enumerate(loader.load_batches(row, rank, ranks)):
                    found[8 * step + n * ranks + rank] = [*tokens.tolist(), int(targets[-1])]
                    assert torch.equal(tokens[1:], targets[:-1])
        assert found == expected


@pytest.mark.parametrize(
    "limit, expected",
    [
        # The rest of the document in which a sequence ends is unread.
        (
            100,
            [[BOS, 1, 2, 3, 4], [BOS, 5, 6, BOS, 7]],
        ),
        (3, [[BOS, 1, 2, BOS, 5], [BOS, 7, 8, BOS, 9]]),  # every document cut at three tokens
        (1, [[BOS] * 5, None]),
    ],
)
def test_documents_by_hand(tmp_path, limit, expected):
    write_shards(tmp_path, [[9, 9, BOS, 1, 2, 3, 4, BOS, 5, 6, BOS, 7, 8, 9], [4, 4, BOS, 9], [BOS, 1, 2]])
    loader = tg.Loader(config(tmp_path))
    for sequence in expected:
        if sequence is None:
            with pytest.raises(tg.UserError):
                loader.next_sequence(5, limit)
        else:
            assert np.concatenate(loader.next_sequence(5, limit)).tolist() == sequence


def test_tokens_before_the_first_document_of_a_shard_are_skipped(tmp_path):
    write_shards(tmp_path, [[7, 7, 7, BOS, 1, 2], [8, 8, BOS, 3, 4]])
    assert np.concatenate(tg.Loader(config(tmp_path)).next_sequence(6, 100)).tolist() == [
        BOS,
        1,
        2,
        BOS,
        3,
        4,
    ]


def test_a_new_limit_holds_from_the_next_document_on(tmp_path):
    document = [BOS, *range(1, 10)]
    write_shards(tmp_path, [document * 4])
    loader = tg.Loader(config(tmp_path))
    assert np.concatenate(loader.next_sequence(8, 4)).tolist() == document[:4] * 2
    assert np.concatenate(loader.next_sequence(12, 6)).tolist() == document[:6] * 2  # goes on where it was


def test_a_second_epoch_begins_again_with_the_first_shard(tmp_path):
    shards = random_shards(3)
    write_shards(tmp_path, shards)
    cfg = config(tmp_path, num_steps=12, epochs=3)
    expected = plain_sequences(shards * 3, wanted(cfg))
    assert plain_sequences(shards, wanted(cfg)) is None
    assert [tokens.tolist() for step in walk(cfg) for tokens, _ in step] == [
        sequence[:-1] for sequence in expected
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_micro_batches_do_not_depend_on_the_number_of_ranks(tmp_path, ranks):
    write_shards(tmp_path, random_shards(1))
    cfg = config(tmp_path)
    alone = walk(cfg)
    shares = [walk(cfg, rank, ranks) for rank in range(ranks)]
    for step, batches in enumerate(alone):
        assert len(batches) == 4
        for n, (tokens, targets) in enumerate(batches):
            share = shares[n % ranks][step]
            assert len(share) == 4 // ranks
            assert torch.equal(share[n // ranks][0], tokens) and torch.equal(share[n // ranks][1], targets)


@pytest.mark.parametrize("seed, epochs", [(0, 1), (1, 1), (2, 1), (0, 2)])
def test_a_run_is_refused_exactly_when_its_data_would_run_out(tmp_path, seed, epochs):
    shards = random_shards(seed, sizes=(500, 60, 300))
    write_shards(tmp_path, shards)
    outcomes = []
    for num_steps in range(1, 9 * epochs):
        cfg = config(tmp_path, num_steps=num_steps, epochs=epochs)
        enough = plain_sequences(shards * epochs, wanted(cfg)) is not None
        outcomes.append(enough)
        loader = tg.Loader(cfg)
        if enough:
            loader.check_enough(tg.Schedule(cfg))
            assert len(walk(cfg)) == num_steps
        else:
            with pytest.raises(tg.UserError, match=rf"--num_steps {num_steps}\b") as refused:
                loader.check_enough(tg.Schedule(cfg))
            assert str(tmp_path) in str(refused.value) and len(str(refused.value).splitlines()) == 1
            with pytest.raises(tg.UserError):
                walk(cfg)
        assert (loader.file, loader.document) == (0, 0)  # the check reads with a loader of its own
    assert any(outcomes) and not all(outcomes)


@pytest.mark.parametrize("missing", [0, 1])
def test_data_may_end_with_the_very_last_target(tmp_path, missing):
    # Four times 16 tokens and a target.
    cfg = config(tmp_path, num_steps=2, micro_batches=2, stages=(stage(32, 100),))
    write_shards(tmp_path, [[BOS, *range(16)] * 2, ([BOS, *range(16)] * 2)[: 34 - missing]])
    if missing:
        with pytest.raises(tg.UserError, match="--num_steps 2"):
            tg.Loader(cfg).check_enough(tg.Schedule(cfg))
    else:
        tg.Loader(cfg).check_enough(tg.Schedule(cfg))
        assert len(walk(cfg)) == 2


def test_a_bad_later_shard_is_found_before_the_run(tmp_path):
    write_shards(tmp_path, random_shards(0))
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    cfg = config(tmp_path)
    with pytest.raises(tg.UserError, match="x_train_000001.bin"):
        tg.Loader(cfg).check_enough(tg.Schedule(cfg))


# Validation


def validation(folder: Path, *shards, **changes) -> tg.Validation:
    for n, tokens in enumerate(shards):
        write_shard(folder / f"x_val_{n:06d}.bin", tokens)
    return tg.Validation(tiny(data_dir=str(folder), **{"val_tokens": 512, "val_seq_len": 128, **changes}))


def test_validation_is_the_stream_as_it_is_across_shards(tmp_path):
    stream = made_up_text(700, seed=3)
    shards = [stream[:200], np.concatenate(([BOS], stream[200:]))]  # the second shard has a BOS of its own
    found = validation(tmp_path, *shards)
    stream = np.concatenate(shards)
    assert found.count == 4
    tokens, targets = zip(*[found.sequence(n) for n in range(found.count)], strict=True)
    assert all(len(part) == 128 and part.dtype == torch.int64 for part in (*tokens, *targets))
    assert (
        torch.cat(tokens).tolist() == stream[:512].tolist()
        and torch.cat(targets).tolist() == stream[1:513].tolist()
    )


@pytest.mark.parametrize("count, good", [(513, True), (512, False), (100, False)])
def test_too_few_validation_tokens_are_refused(tmp_path, count, good):
    if good:
        assert validation(tmp_path, made_up_text(count)).count == 4
    else:
        with pytest.raises(tg.UserError, match="--val_tokens 512") as refused:
            validation(tmp_path, made_up_text(count))
        assert f" {count}" in str(refused.value) and str(tmp_path) in str(refused.value)


SMALL = dict(vocab_size=8, bos_id=7, val_tokens=6, val_seq_len=3)
SIZES = np.array([1, 2, 3, 4, 5, 1, 1, 0], dtype=np.uint16)  # bytes of the eight tokens; the BOS, 7, has none


def test_bits_per_byte_by_hand(tmp_path):
    np.save(tmp_path / "token_bytes.npy", SIZES)
    found = validation(tmp_path, [7, 0, 1, 7, 2, 3, 3, 3], **SMALL)
    # Targets 0 1 7 2 3 3: 1 + 2 + 0 + 3 + 4 + 4 = 14 bytes; six losses of ln 2 are 6 bits. The eighth token
    # is not read.
    assert found.bytes == 14
    assert found.bits_per_byte(math.log(2)) == pytest.approx(6 / 14)
    assert found.bits_per_byte(2.5) == pytest.approx(2.5 / math.log(2) * 6 / 14)


def test_without_bytes_of_tokens_there_are_no_bits_per_byte(tmp_path):
    assert validation(tmp_path, [7, 0, 1, 7, 2, 3, 3, 3], **SMALL).bits_per_byte(1.0) is None


def array_bytes(array: np.ndarray, save=np.save) -> bytes:
    content = io.BytesIO()
    save(content, array)
    return content.getvalue()


BAD_ARRAYS = {
    "nothing": b"",
    "text": b"YQ== 0\n" * 8,
    "cut": array_bytes(SIZES)[:-1],
    "half a header": array_bytes(SIZES)[:40],
    "a header without its brackets": array_bytes(SIZES).replace(b"(8,), }", b"(8,),  "),
    "a header of another language": array_bytes(SIZES).replace(b"False", b"[[[[["),
    "a header of code": array_bytes(SIZES).replace(b"(8,), }", b"f(x=1)}"),
    "another size": array_bytes(SIZES[:-1]),
    "another type": array_bytes(SIZES.astype(np.int64)),
    "two dimensions": array_bytes(SIZES.reshape(8, 1)),
    "a promise of more than there is": array_bytes(SIZES).replace(b"(8,), }    ", b"(8000,), } "),
    "a pickle": array_bytes(np.array([print] * 8, dtype=object)),
    "a zip": array_bytes(SIZES, np.savez),
}


@pytest.mark.parametrize("bad", BAD_ARRAYS)
def test_an_array_that_does_not_fit_is_refused_by_name(tmp_path, bad):
    path = tmp_path / "token_bytes.npy"
    path.write_bytes(BAD_ARRAYS[bad])
    with pytest.raises(tg.UserError, match="make the data again") as refused:
        tg.read_token_bytes(tmp_path, tiny(**SMALL))
    assert str(path) in str(refused.value) and len(str(refused.value).splitlines()) == 1


# The vocabulary, from which data/ makes that array

WORDS = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]  # of a..z among them
WORDS += ["YmM= 256", "ZGVm 257", "Z2hpag== 258", "a2xtbm8= 259"]  # bc, def, ghij, klmno


def assert_vocabulary_refused(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="vocabulary") as refused:
        load_vocab(path)
    assert str(path) in str(refused.value) and len(str(refused.value).splitlines()) == 1


# A second line for 0; a second line for bc.
@pytest.mark.parametrize(
    "line",
    [
        "ZGVm",
        "ZGVm x",
        "ZGVm -1",
        "ZGVm -257",
        "ZGVm 260",
        "not a vocabulary",
        "",
        "YQ= 257",
        "Y*Q== 257",
        "a 257",
        "é 257",
        "{} 257",  # not base64
        "ZGVm 0",
        "YmM= 257",
    ],
)
def test_a_malformed_vocabulary_is_refused(tmp_path, line):
    assert_vocabulary_refused(tmp_path / "vocab.tiktoken", [*WORDS[:257], line, *WORDS[258:]])


@pytest.mark.parametrize("missing", [0, 3, 257])
def test_a_vocabulary_without_one_of_its_tokens_is_refused(tmp_path, missing):
    lines = WORDS[:missing] + WORDS[missing + 1 :]
    assert_vocabulary_refused(tmp_path / "vocab.tiktoken", lines)


def test_the_lines_of_a_vocabulary_may_come_in_any_order(tmp_path):
    (tmp_path / "vocab.tiktoken").write_text("\n".join(WORDS[::-1]))
    write_token_bytes(tmp_path, load_vocab(tmp_path / "vocab.tiktoken"))
    found = tg.read_token_bytes(tmp_path, tiny(vocab_size=261, bos_id=260))
    assert found.tolist() == [1] * 256 + [2, 3, 4, 5, 0]


# How much work a step is


def brute_force_pairs(tokens: list[int], window: int, paired: bool) -> int:
    """Looks at every query and key. Paired: two positions for each token."""
    starts, start = [], 0
    for i, token in enumerate(tokens):
        start = i if token == BOS else start
        starts += [2 * start] * 2 if paired else [start]
    return sum(starts[q] <= k <= q and q - k < window for q in range(len(starts)) for k in range(len(starts)))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("window", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_attended_pairs_are_those_of_a_full_look(seed, window, paired):
    tokens = made_up_text(80, seed=seed)
    tokens[np.random.default_rng(seed).integers(0, 80, 5)] = BOS
    tokens[0] = BOS if seed else 3  # a validation sequence may begin within a document
    assert tg.attended_pairs(tokens, BOS, window, paired) == brute_force_pairs(
        tokens.tolist(), window, paired
    )


def counted_flops(cfg: tg.Config, backward: bool) -> int:
    """What torch counts in the matrix products of 64 tokens, with attention's own two taken out."""
    kernels = tg.plain_kernels(attention=lambda q, k, v, *rest: v + 0 * (q + k))
    model, tokens = tg.GPT(cfg, kernels=kernels), torch.from_numpy(made_up_text(65))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = model(tokens[:-1], tokens[1:], torch.ones(2), (16, 48))
        if backward:
            loss.backward()
    return counter.get_total_flops()


NO_GATES = dict(smear_chunk="", skip_chunk="", attn_chunk="", ve_chunk="")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 32},
        {"mlp_ratio": 3},
        {"vocab_size": 300},
        {"extra_inputs": 0, "bigram_rows": 0},
        {"windows": "slss-l", "paired_heads": "p.....", "value_embeds": ".0...1", "skips": "a....a"},
    ],
    ids=str,
)
def test_matrix_flops_are_what_torch_counts(changes):
    cfg = tiny(**NO_GATES, **changes)
    assert sum(tg.matrix_flops(cfg).values()) * 64 == counted_flops(cfg, backward=False)


def test_gates_are_a_little_more_than_matrix_flops_says():
    cfg = tiny()
    assert 1.0 < counted_flops(cfg, backward=False) / (sum(tg.matrix_flops(cfg).values()) * 64) < 1.05


def test_forward_and_backward_are_three_times_forward():
    cfg = tiny(**NO_GATES)
    assert 3 * sum(tg.matrix_flops(cfg).values()) * 64 == counted_flops(cfg, backward=True)


def test_step_flops_are_matrices_and_attended_pairs_of_each_layer():
    cfg = replace(
        tiny(), windows="sl-s", paired_heads="p..p", value_embeds="....", skips="....", backout="...."
    )
    batches = [tg.split_targets(made_up_text(61, seed=seed)) for seed in range(2)]
    expected = 0
    for tokens, _ in batches:
        for window, paired in ((10, True), (25, False), (10, True)):
            heads = 2 if paired else 4  # 64 / 16 heads; a pair of them is one of twice the length
            pairs = heads * brute_force_pairs(tokens.tolist(), window, paired)
            # Forward and two for backward; scores and sum; multiply and add.
            expected += 3 * pairs * 2 * 2 * 16
        expected += 3 * 60 * sum(tg.matrix_flops(cfg).values())
    assert sum(tg.step_flops(cfg, batches, (10, 25)).values()) == expected
    head = 3 * 2 * 60 * tg.matrix_flops(cfg)["head"]
    assert sum(tg.step_flops(cfg, batches, (10, 25), 64).values()) == expected - head * 3 // 4
