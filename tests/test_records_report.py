"""The report of runs, without a browser: what is in it, and that a log's text cannot be more than text.

`python -m tests.programs.report_browser` opens one in a real browser.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cli import UserError
from records import report

pytest.importorskip("plotly", reason="an extra of records/requirements.txt")
MARKUP = "<img src=x onerror=alert(1)><script>window.hacked=1</script>"


def write_runs(folder: Path) -> list[Path]:
    """Two groups of two logs each, whose source, configuration and failures hold markup."""
    separator = "=" * 100
    for group, loss in (("base", 3.1), ("</script><b>new", 3.0)):
        place = folder / group.replace("/", "_")
        place.mkdir()
        for seed in range(2):
            config = json.dumps({"preset": "cpu", "seed": seed, "note": MARKUP + group})
            lines = [f'"""{MARKUP}"""\nimport torch\nx = {loss}', separator, f"config:{config}"]
            lines += ['preset:cpu overrides:{"seed": 1}', f"hardware: {MARKUP}", separator]
            for step in range(11):
                taken = f"train_time:{100 * step}ms"
                lines.append(f"step:{step}/10 {taken} train_loss:{9 - step / 2 + seed / 10:.4f}")
                lines.append(f"step:{step}/10 val_loss:{loss + (10 - step) / 10:.4f} {taken}")
            lines.insert(-1, f"scalars:resid_scale [1.0, 0.5, {seed}]")
            (place / f"{seed}.txt").write_text("\n".join(lines) + "\n")
    return sorted(path for path in folder.iterdir() if path.is_dir())


class Page(HTMLParser):
    """The elements of a page, and its text outside of scripts."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.figures, self.inside = [], "", "", None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = (tag, dict(attrs).get("id"))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside = None

    def handle_data(self, data):
        if self.inside == ("script", "figures"):
            self.figures += data
        elif self.inside is None:
            self.text += data


def test_a_report_has_everything_and_runs_nothing_of_a_log(tmp_path):
    groups, out = write_runs(tmp_path), tmp_path / "r.html"
    report.main([*map(str, groups), "--out", str(out), "--target", "3.28"])
    page = Page()
    page.feed(out.read_text())
    assert "3.1000" in page.text and MARKUP in page.text  # shown as it is
    assert "finished" in page.text and "-x = 3.0" in page.text and "+x = 3.1" in page.text
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 3 and "img" not in names and "b" not in names
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    links = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert links == ["data:,"]  # nothing is loaded from anywhere
    figures = json.loads(page.figures)
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert len(figures) == 6 and {figure["id"] for figure in figures} <= ids
    curves = [trace["y"][-1] for trace in figures[0]["data"]]
    assert curves == [3.0, 3.0, 3.1, 3.1]
    assert "seeds  Δ by seed  p by seed" in page.text and "loss Δ is of the means of all runs" in page.text
    assert not any("<" in trace["name"] for figure in figures for trace in figure["data"])


def test_a_report_replaces_only_a_report(tmp_path):
    groups, out = write_runs(tmp_path), tmp_path / "r.html"
    report.main([str(groups[0]), "--out", str(out)])
    report.main(["--out", str(out), str(groups[0]), "--title", "Again"])
    assert re.search("<h1>Again</h1>", out.read_text())
    out.write_text("mine")
    with pytest.raises(UserError, match="none of these tools made it"):
        report.main([str(groups[0]), "--out", str(out)])
    assert out.read_text() == "mine"


def test_what_a_user_gets_wrong(tmp_path):
    groups = write_runs(tmp_path)
    (tmp_path / "empty").mkdir()
    for argv, words in (
        ([groups[0], "--out", tmp_path / "r.pdf"], "ends in .html"),
        ([tmp_path / "empty", "--out", tmp_path / "r.html"], "no log with a validation loss"),
        ([groups[0], "--out", tmp_path / "no" / "r.html"], "is no folder"),
        ([groups[0], "--out", tmp_path / "r.html", "--checkpoint", tmp_path / "x.pt"], "no file there"),
    ):
        with pytest.raises(UserError, match=words):
            report.main([str(word) for word in argv])
    assert not (tmp_path / "r.html").exists()
