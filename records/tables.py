"""Tables as text, markdown and CSV, for the other tools of this folder."""

import csv
import io

from cli import one_line

FORMATS = ("text", "markdown", "csv")
WIDEST = 200  # characters of a cell


def table(head: list[str], rows: list[list[str]], form: str = "text", left: tuple[int, ...] = (0,)) -> str:
    """Cells are strings; `left` are the columns that hold words; form is one of FORMATS.

    Cells may come from logs and file names: control characters become blanks, and what markdown would obey
    is escaped.
    """
    counts = [len(row) for row in rows]
    assert set(counts) <= {len(head)}, f"rows of {counts} cells under {len(head)} names"
    head, *rows = ([one_line(cell, WIDEST) for cell in row] for row in [head, *rows])
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([head, *rows])
        return out.getvalue().rstrip("\n")
    if form == "markdown":
        return markdown_table(head, rows, left)
    assert form == "text", form
    return text_table(head, rows, left)


def markdown_table(head: list[str], rows: list[list[str]], left: tuple[int, ...]) -> str:
    rule = ["---" if column in left else "---:" for column in range(len(head))]
    head, *rows = ([escape_markdown(cell) for cell in row] for row in [head, *rows])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def escape_markdown(text: str) -> str:
    """text so that markdown shows it as it is. Not `_`, which within a word means nothing."""
    for character in "\\`*[]|":
        text = text.replace(character, "\\" + character)
    return text.replace("&", "&amp;").replace("<", "&lt;")


def text_table(head: list[str], rows: list[list[str]], left: tuple[int, ...]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return "\n".join([lines[0], rule, *lines[1:]])
