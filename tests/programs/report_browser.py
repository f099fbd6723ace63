"""Opens a report in a real headless browser: no network, no error, the numbers are there, no log runs.

    python -m tests.programs.report_browser [--browser /usr/bin/chromium] [--screenshot FILE.png]

Needs Chromium and `pip install playwright`; what it checks without a browser is in test_records_report.py.
"""

import shutil
import tempfile
from pathlib import Path

from cli import UserError, arguments, command, need
from records import report
from tests.test_records_report import MARKUP, write_runs


def check(page, address: str) -> list[str]:
    """What is wrong with the page."""
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (problems.append("a log's text was run"), dialog.dismiss()))
    page.goto(address)
    page.wait_for_selector(".plot .main-svg")
    elsewhere = [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    problems += [f"asked for {url}" for url in elsewhere]
    text = page.inner_text("body")
    problems += [f"{word} is not on the page" for word in ("3.1000", MARKUP) if word not in text]
    plots, drawn = page.locator(".plot").count(), page.locator(".plot .scatterlayer .trace").count()
    if plots < 4 or drawn < plots:
        problems.append(f"{plots} plots with {drawn} curves")
    if page.evaluate("window.hacked"):
        problems.append("a log's text was run")
    page.hover(".plot .nsewdrag")
    return problems


def main(argv: list[str]) -> int:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("playwright is not installed: pip install playwright") from None
    parser = arguments(__doc__)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    parser.add_argument("--screenshot", type=Path)
    args = parser.parse_intermixed_args(argv)
    need(shutil.which(args.browser), f"--browser {args.browser}: no such program; install Chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        groups = write_runs(Path(folder))
        out = Path(folder) / "report.html"
        report.main([*map(str, groups), "--out", str(out), "--target", "3.28"])
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 2400})
        page.context.set_offline(True)
        problems = check(page, out.as_uri())
        if args.screenshot:
            page.screenshot(path=args.screenshot, full_page=True)
        browser.close()
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    command(main)
