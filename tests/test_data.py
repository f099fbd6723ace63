"""data/: BPE, shards, the embedded corpus, what a run needs. No network but pip's, to make the corpus."""

import base64
import itertools
import os
import random
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import regex
from conftest import ROOT, assert_user_error, run_command

from cli import UserError
from data import bpe, corpus, fineweb, prepare, prose, shards
from train_gpt import HEADER_BYTES, Schedule, parse_config, read_shard

BOS = corpus.BOS_ID
COMMAND = [sys.executable, "-m", "data.corpus"]
SPLITS = (corpus.TRAIN, corpus.VAL, corpus.TUNE_VAL)


def one_line(message: str) -> None:
    assert message.strip() and "\n" not in message.strip() and "Traceback" not in message, message


# BPE


def naive_bpe(documents: list[str], vocab_size: int) -> dict[bytes, int]:
    """The definition: count all pairs of all words anew for each merge."""
    words = Counter(
        tuple(bytes([b]) for b in word.encode()) for d in documents for word in regex.findall(bpe.PATTERN, d)
    )
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        counts = Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += n
        a, b = min(counts, key=lambda pair: (-counts[pair], ranks[pair[0]], ranks[pair[1]]))
        ranks[a + b] = len(ranks)
        merged = Counter()
        for word, n in words.items():
            out = []
            for token in word:  # a run "aaa" becomes "aa" "a": a token just merged is not merged again
                if out and out[-1] == (a, 0) and token == b:
                    out[-1] = (a + b, 1)
                else:
                    out.append((token, 0))
            merged[tuple(token for token, _ in out)] += n
        words = merged
    return ranks


TEXT = (
    "It was the best of times, it was the worst of times; 1859 and 1895. "
    "Aaaa baaaab abababa!!! don't we'll\n\n\n"
    "Éa naïve café — “quoted” \U0001f600\U0001f600  two  spaces\t\ttabs \n"
)


@pytest.mark.parametrize("seed", range(4))
def test_bpe_is_the_naive_one(seed):
    rng = random.Random(seed)
    letters, size = [
        (TEXT * 3, 330),
        ("".join(rng.choices("ab ", k=3000)), 400),
        ("".join(rng.choices("abcd é", k=2000)), 380),
        ("a" * 60 + " aa aaa" * 9, 262),
    ][seed]
    documents = [letters[: len(letters) // 2], letters[len(letters) // 2 :]]
    assert bpe.train_bpe(documents, size) == naive_bpe(documents, size)


def test_bpe_does_not_depend_on_the_order_of_documents():
    documents = [TEXT, "the cat sat on the mat " * 5, "some other times"]
    assert bpe.train_bpe(documents, 300) == bpe.train_bpe(documents[::-1], 300)


def test_bpe_says_when_text_is_too_small():
    with pytest.raises(UserError, match="enough for 258 tokens"):
        bpe.train_bpe(["abab"], 300)


def test_vocab_roundtrips_through_file_and_text(tmp_path):
    ranks = bpe.train_bpe([TEXT], 320)
    shards.save_vocab(tmp_path / "vocab.tiktoken", ranks)
    loaded = bpe.load_vocab(tmp_path / "vocab.tiktoken")
    assert loaded == ranks and sorted(loaded.values()) == list(range(320))
    coder = bpe.encoding(loaded, 320)
    rng = random.Random(0)
    for text in (
        TEXT,
        "",
        "never seen: Ωmega \u200b\r\n",
        "".join(chr(rng.randrange(32, 0xD000)) for _ in range(500)),
    ):
        assert coder.decode(coder.encode_ordinary(text)) == text
    assert coder.decode([320]) == bpe.BOS and coder.n_vocab == 321
    assert len(coder.encode_ordinary("the times")) < 9, "no merge is used"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"YQ==\n",
        b"not base64! 3\n",
        b"YQ== 0\nYg== x\n",
        b"".join(base64.b64encode(bytes([b])) + b" 7\n" for b in range(256)),
    ],
)
def test_bad_vocab_is_one_line(tmp_path, content):
    path = tmp_path / "vocab.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        bpe.load_vocab(path)
    one_line(str(error.value))
    assert str(path) in str(error.value)


# Shards


def test_shard_roundtrip(tmp_path):
    tokens = np.array([BOS, 0, 1, 4094, BOS, 7] * 100)
    path = tmp_path / "some_000000.bin"
    shards.write_shard(path, tokens)
    assert path.stat().st_size == HEADER_BYTES + 2 * tokens.size
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, tokens.size] and not header[3:].any()
    assert (read_shard(path, 4096, BOS) == tokens).all()
    assert os.listdir(tmp_path) == [path.name], "something is left beside the shard"


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as error:
        shards.write_shard(tmp_path / "x.bin", np.array([BOS, 1]))
    one_line(str(error.value))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("tokens", [[], [70000], [-1], [[1, 2]]])
def test_what_is_no_row_of_tokens_is_not_written(tmp_path, tokens):
    with pytest.raises(AssertionError):
        shards.write_shard(tmp_path / "x.bin", np.array(tokens, dtype=np.int64))
    assert os.listdir(tmp_path) == []


# The embedded corpus


@pytest.fixture(scope="session")
def documents(corpus_dir) -> dict[str, list[str]]:
    """The decoded documents of both splits."""
    coder = bpe.encoding(bpe.load_vocab(corpus_dir / corpus.VOCAB), BOS)
    found = {}
    for name in SPLITS:
        tokens = read_shard(corpus_dir / name, corpus.VOCAB_SIZE, BOS)
        assert tokens[0] == BOS
        rows = np.split(np.asarray(tokens), np.flatnonzero(tokens == BOS))[1:]
        found[name] = coder.decode_batch([row[1:].tolist() for row in rows], errors="strict")
    return found


def is_book(document: str) -> bool:
    """Only the books' lines are wrapped; others' paragraphs are one line each."""
    lines = document.split("\n")
    return len(lines) > 6 and max(map(len, lines)) < 100 and "Ingredients:" not in document


def test_corpus_is_what_the_constants_say(corpus_dir):
    assert corpus.missing(corpus_dir) == []
    assert len(bpe.load_vocab(corpus_dir / corpus.VOCAB)) == corpus.BOS_ID == 4095
    for name in (corpus.VAL, corpus.TUNE_VAL):
        assert len(read_shard(corpus_dir / name, corpus.VOCAB_SIZE, BOS)) >= 250_000
    assert len(read_shard(corpus_dir / corpus.TRAIN, corpus.VOCAB_SIZE, BOS)) >= 8_000_000
    readme = (corpus_dir / "README.md").read_text()
    assert all(
        licence in readme for licence in ("CC BY-SA 4.0", "CC BY-SA 3.0", "Princeton", "public domain")
    )
    assert len((corpus_dir / "articles.txt").read_text().splitlines()) == 10_033
    assert len((corpus_dir / "recipes.txt").read_text().splitlines()) > 3_000
    assert len((corpus_dir / "encyclopedia.txt").read_text().splitlines()) > 80
    assert (corpus_dir / "WordNet-license.txt").read_text().startswith("This software and database")


def test_second_call_does_nothing(corpus_dir):
    before = {path: path.stat().st_mtime_ns for path in corpus_dir.iterdir()}
    done = run_command([sys.executable, "-X", "importtime", "-m", "data.corpus"])
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "complete" in done.stdout, done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in corpus_dir.iterdir()}
    heavy = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()} & {
        "torch",
        "numpy",
        "tiktoken",
        "train_gpt",
    }
    assert not heavy, f"imports {heavy} to find out that there is nothing to do"


def test_a_damaged_corpus_is_not_complete(corpus_dir, tmp_path):
    copy_corpus(corpus_dir, tmp_path)
    assert corpus.missing(tmp_path) == []
    with open(tmp_path / corpus.VAL, "r+b") as file:
        file.seek(5000)
        file.write(b"\0\1")
    assert corpus.missing(tmp_path) == [corpus.VAL]
    (tmp_path / corpus.VAL).unlink()
    assert corpus.missing(tmp_path) == [corpus.VAL]


def copy_corpus(corpus_dir, folder) -> None:
    (folder / "tune").mkdir()
    for name in (*corpus.MADE, *corpus.NOTES, *(f"tune/{name}" for name in corpus.SHARED)):
        (folder / name).write_bytes((corpus_dir / name).read_bytes())


def test_tuning_has_the_same_training_text_and_vocabulary(corpus_dir, tmp_path, capsys):
    """`--data_dir data/corpus/tune` differs in what validates; what it shares is put back if it is gone."""
    for name in corpus.SHARED:
        assert (corpus_dir / "tune" / name).read_bytes() == (corpus_dir / name).read_bytes()
    splits = {path.name for path in (corpus_dir / "tune").glob("*_*_*.bin")}
    assert splits == {path.name for path in corpus_dir.glob("*_*_*.bin")} == {corpus.TRAIN, corpus.VAL}
    copy_corpus(corpus_dir, tmp_path)
    for name in corpus.SHARED:
        (tmp_path / "tune" / name).unlink()
    corpus.main(["--out", str(tmp_path)])
    assert corpus.missing(tmp_path) == []
    assert sorted(os.listdir(tmp_path / "tune")) == sorted([*corpus.SHARED, corpus.VAL])


def test_no_document_is_on_both_sides(documents):
    def key(document: str) -> str:
        return " ".join(document.lower().split())

    train, val, tune = ({key(d) for d in documents[name]} for name in SPLITS)
    assert not (train & val or train & tune or val & tune)
    assert len(val) == len(documents[corpus.VAL]) and len(tune) == len(documents[corpus.TUNE_VAL])
    assert len(train) > 0.999 * len(documents[corpus.TRAIN]), "documents come twice"


def test_both_translations_of_a_chapter_are_on_one_side(documents):
    """What validates must not be known from its other translation."""
    for name in SPLITS:
        text = "\n".join(documents[name])
        first = "And God said, Let there be light: and there was light" in text
        assert first == ('God said, "Let there be light," and there was light' in text), name


def test_a_short_run_sees_all_sources_like_a_long_one(documents):
    for name in SPLITS:
        sizes = np.array([len(d) for d in documents[name]])
        books = np.array([is_book(d) for d in documents[name]])
        share = (sizes * books).sum() / sizes.sum()
        assert 0.2 < share < 0.3, share
        for part in np.array_split(np.arange(len(sizes)), 10 if name == corpus.TRAIN else 3):
            assert abs((sizes[part] * books[part]).sum() / sizes[part].sum() - share) < 0.05


def test_validation_is_readable_english(documents):
    text = " ".join(documents[corpus.VAL][:40])
    words = regex.findall(r"[A-Za-z']+", text.lower())
    common = sum(word in {"the", "of", "and", "to", "a", "in", "was", "is", "that", "it"} for word in words)
    assert common / len(words) > 0.2 and sum(c.isascii() for c in text) / len(text) > 0.97
    sizes = np.array([len(d) for d in documents[corpus.TRAIN]])
    assert np.maximum(sizes - 1.3 * corpus.DOCUMENT_CHARS, 0).sum() < 0.002 * sizes.sum(), "long documents"
    for markup in ("{{", "[[", "<ref", "&nbsp;", "thumb|", "http"):
        assert not any(markup in d for d in documents[corpus.TRAIN]), markup
    assert not any("gutenberg" in d.lower() and "small print" in d.lower() for d in documents[corpus.TRAIN])


def test_split_takes_its_share_and_drops_what_comes_twice():
    rng = random.Random(0)
    sections = [f"section {i} " + "x" * rng.randrange(1, 3000) for i in range(500)]
    train, val, tune = corpus.split(sections + [sections[0].upper(), "  " + sections[1]])
    assert len(train) + len(val) + len(tune) == len({*train, *val, *tune}) == 500
    for part in (val, tune):
        assert 0.032 <= sum(map(len, part)) / sum(map(len, sections)) < 0.042
    assert corpus.split(sections[::-1]) == corpus.split(sections), (
        "the split depends on the order of the texts"
    )


def test_mix_holds_the_proportion_everywhere():
    few, many = ["b" * 3000] * 40, ["w" * 300] * 200
    mixed = corpus.interleave(few, many)
    assert sorted(mixed) == sorted(few + many)
    books = np.cumsum([len(d) * (d[0] == "b") for d in mixed])
    total = np.cumsum([len(d) for d in mixed])
    assert np.abs(books - total * 2 / 3).max() <= 3000, "more than a document away from the fair share"


def test_pieces_lose_nothing():
    prose = "\n\n".join(f"Paragraph {i}. " + "word " * 150 for i in range(40))
    poem = "\n".join(f"line {i} of a long poem" for i in range(600))
    for section in (prose, poem, "short"):
        cut = corpus.pieces([section])
        assert Counter(" ".join(cut).split()) == Counter(section.split())
        assert max(map(len, cut)) < 1.3 * corpus.DOCUMENT_CHARS
        assert len(cut) == -(-len(section) // corpus.DOCUMENT_CHARS)


def test_wrong_bytes_are_not_kept(tmp_path, monkeypatch):
    """The sources are replaced by a small text: the hashes cannot match."""
    words = [
        f"Some words about number {i} and {i * i % 97}, {chr(97 + i % 26) * 3}{i % 89}." for i in range(6000)
    ]
    articles = {str(i): " ".join(words[10 * i : 10 * i + 30]) for i in range(590)}
    texts = corpus.Texts(
        {"Book": "\n\n\n".join(words)}, articles, {"A": words[:40]}, articles, words, words, ""
    )
    monkeypatch.setattr(corpus, "read_texts", lambda folder: texts)
    monkeypatch.setattr(corpus, "BOS_ID", 300)
    with pytest.raises(UserError, match="vocab.tiktoken.*sha256") as error:
        corpus.make(tmp_path / "new")
    one_line(str(error.value))
    assert os.listdir(tmp_path / "new") == []


def test_pip_out_of_reach_is_one_line(tmp_path):
    done = run_command(
        [*COMMAND, "--out", tmp_path / "new"],
        PIP_INDEX_URL="http://127.0.0.1:9/",
        PIP_RETRIES="0",
        PIP_EXTRA_INDEX_URL="",
        PIP_NO_CACHE_DIR="1",
        PIP_NO_INDEX="0",
        PIP_FIND_LINKS="",
    )
    assert_user_error(done, "corpus.py: error: pip")
    assert os.listdir(tmp_path / "new") == []


def test_files_of_others_stay(corpus_dir, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# My notes")
    monkeypatch.setattr(corpus, "make", lambda out: pytest.fail("makes it"))
    with pytest.raises(UserError, match="README.md: is there, and not the embedded corpus's"):
        corpus.main(["--out", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == "# My notes" and os.listdir(tmp_path) == ["README.md"]
    with pytest.raises(UserError, match="names no file or folder"):
        corpus.main(["--out", ""])
    made = []
    monkeypatch.setattr(corpus, "make", made.append)
    monkeypatch.setattr(corpus, "share_with_tune", made.append)
    older = tmp_path / "older"
    older.mkdir()
    (older / "README.md").write_bytes((corpus_dir / "README.md").read_bytes())
    (older / corpus.TRAIN).write_bytes(b"an older version's")
    corpus.main(["--out", str(older)])
    assert made == [older, older]


@pytest.mark.parametrize("name", [corpus.VOCAB, corpus.TRAIN, f"tune/{corpus.VOCAB}"])
def test_the_default_folder_may_be_somebodys_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "OUT", tmp_path)
    monkeypatch.setattr(corpus, "make", lambda out: pytest.fail("makes it"))
    (tmp_path / "tune").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: is there, and not the embedded corpus's"):
        corpus.main(["--out", str(tmp_path)])
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["text_train_000001.bin", "tune/x_val_000000.bin"])
def test_a_shard_more_would_be_another_corpus(corpus_dir, tmp_path, name):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus_dir, folder)
    corpus.main(["--out", str(folder)])
    (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: no shard of the embedded corpus; move it"):
        corpus.main(["--out", str(folder)])


def test_a_vocabulary_with_a_token_of_70000_bytes(tmp_path):
    file = tmp_path / "vocab.tiktoken"
    shards.save_vocab(file, {bytes([b]): b for b in range(256)} | {b"a" * 70_000: 256})
    with pytest.raises(UserError, match="a token of 70,000 bytes is too long"):
        bpe.load_vocab(file)


def test_a_folder_that_hides_the_projects_data_is_named(tmp_path):
    (tmp_path / "data" / "corpus").mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "data.prepare", "--preset", "cpu"]
    done = run_command(command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert_user_error(done, "data/corpus: hides the project's own data/corpus", "--data_dir")


def test_bytes_of_each_token_are_those_of_the_text(corpus_dir):
    lengths = np.load(corpus_dir / "token_bytes.npy", allow_pickle=False)
    assert lengths.dtype == np.uint16 and lengths.shape == (4096,) and lengths[BOS] == 0
    tokens = read_shard(corpus_dir / corpus.VAL, corpus.VOCAB_SIZE, BOS)
    coder = bpe.encoding(bpe.load_vocab(corpus_dir / corpus.VOCAB), BOS)
    text = coder.decode_bytes([token for token in tokens.tolist() if token != BOS])
    assert lengths[tokens].sum() == len(text)


def test_wikipedias_markup():
    lines = [
        "{{Infobox|a={{nested|x}}}}'''Acid''' is a [[chemical compound|compound]].<ref>A [[b]]</ref>",
        "[[File:a.jpg|thumb|A [[caption]].]]",
        "{| class",
        "| cell",
        "|}",
        "== Uses ==",
        "=== In food ===",
        "* One [http://x.y a link].",
    ]
    plain = prose.plain_text("\n".join(lines))
    assert plain.split("\n") == ["Acid is a compound.", "", "== Uses ==", "In food", "One a link."]


def test_without_pip_the_one_that_python_brings_is_used(monkeypatch, tmp_path):
    find_spec = corpus.find_spec
    monkeypatch.setattr(corpus, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    if find_spec("ensurepip"):
        done = run_command([*corpus.pip_command(), "--version"])
        assert done.returncode == 0 and done.stdout.startswith("pip "), done
    monkeypatch.setattr(corpus, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no pip"):
        corpus.pip_command()


# What a run needs


def test_prepare_picks_by_data_dir(monkeypatch):
    monkeypatch.setattr(prepare, "add_token_bytes", lambda folder: None)
    called = []
    monkeypatch.setattr(corpus, "main", lambda argv: called.append("corpus"))
    monkeypatch.setattr(fineweb, "fetch", lambda shards, dataset, out: called.append((shards, dataset, out)))
    prepare.main(["--preset", "cpu"])
    prepare.main(["--preset", "cpu", "--data_dir", "data/corpus/tune"])
    prepare.main(["--preset", "short"])
    prepare.main(["--preset", "short", "--data_dir", "/somewhere/else"])
    assert called == ["corpus", "corpus", (9, "10B", ROOT / "data" / "fineweb10B")]


def test_shards_needed():
    assert [prepare.shards_needed(tokens) for tokens in (1, 50_000_000, 50_000_001, 405_000_000)] == [
        1,
        1,
        2,
        9,
    ]
    with pytest.raises(UserError, match="100B"):
        prepare.shards_needed(10**10)


def test_tokens_needed_are_counted_by_stages():
    for flags in (["--preset", "short", "--num_steps", "97"], ["--preset", "medium", "--batch_mul", "0.5"]):
        cfg = parse_config(flags)[0]
        schedule = Schedule(cfg)
        assert prepare.tokens_needed(cfg) == sum(schedule.stage(i).batch_tokens for i in range(cfg.num_steps))
    long = replace(parse_config(["--preset", "cpu"])[0], num_steps=10**12)
    assert prepare.tokens_needed(long) == 10**12 * (15 * 3072 + 20 * 6144 + 65 * 9216) // 100


def read_only(part, path) -> None:
    raise OSError(30, "Read-only file system")


def test_prepare_adds_bytes_of_each_token_to_any_folder(tmp_path, monkeypatch, capsys):
    flags = ["--preset", "cpu", "--data_dir", str(tmp_path)]
    prepare.main(flags)
    assert os.listdir(tmp_path) == []
    shards.save_vocab(tmp_path / "vocab.tiktoken", {bytes([b]): b for b in range(256)})
    with monkeypatch.context() as patch:
        patch.setattr(shards, "move", read_only)
        prepare.main(flags)
    printed = capsys.readouterr().err
    assert printed.startswith("note: bits per byte") and "Read-only" in printed and printed.count("\n") == 1
    assert os.listdir(tmp_path) == ["vocab.tiktoken"]
    prepare.main(flags)
    assert np.load(tmp_path / "token_bytes.npy").tolist() == [1] * 256 + [0]


def test_gpt2_vocab_is_not_fetched_twice(tmp_path, monkeypatch):
    (tmp_path / corpus.VOCAB).write_bytes(b"gpt2")
    monkeypatch.setattr(corpus, "GPT2_SHA256", shards.sha256(b"gpt2"))
    monkeypatch.setattr(corpus, "download", lambda *_: pytest.fail("downloads again"))
    assert corpus.gpt2_vocab(tmp_path) == b"gpt2"
