"""Tables as text, markdown and CSV, for the other tools of this folder."""

import csv
import io

FORMATS = ("text", "markdown", "csv")


def table(head: list[str], rows: list[list[str]], form: str = "text", left: tuple[int, ...] = (0,)) -> str:
    """Cells are strings already; `left` are the columns that hold words. form: one of FORMATS."""
    assert all(len(row) == len(head) for row in rows), (
        f"rows of {[len(row) for row in rows]} cells under {len(head)} names"
    )
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([head, *rows])
        return out.getvalue().rstrip("\n")
    if form == "markdown":
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, *rows]]
        rule = ["---" if n in left else "---:" for n in range(len(head))]
        return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])
    assert form == "text", form
    width = [max(len(row[n]) for row in [head, *rows]) for n in range(len(head))]
    pad = lambda n, cell: cell.ljust(width[n]) if n in left else cell.rjust(width[n])  # noqa: E731
    lines = ["  ".join(pad(n, cell) for n, cell in enumerate(row)).rstrip() for row in [head, *rows]]
    return "\n".join([lines[0], "-" * (sum(width) + 2 * len(width) - 2), *lines[1:]])
