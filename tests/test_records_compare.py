"""Statistics of runs: the seeds' tables from their raw numbers, to the printed digit, and the comparisons."""

import csv
import io
import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, assert_user_error, run_command

from cli import UserError
from records import compare, groups, reader, stats
from records.groups import Group
from records.stats import Sample
from records.tables import table

NUMBERS = ROOT / "records" / "numbers"

# Seed 000: time mean, sd, delta, p of Welch's test; loss mean, sd, delta, p against 3.28
SEED_000 = """
H0   5    95.62    0.06     0.00     NaN  3.2793  0.0009   0.0000  0.0705
H1   5    95.58    0.05    -0.04  0.2285  3.2784  0.0019  -0.0009  0.0620
H2   5    95.72    0.04     0.10  0.0159  3.2778  0.0014  -0.0015  0.0112
H3   5    97.39    0.04     1.77  0.0000  3.2796  0.0017   0.0003  0.3303
H4   5    95.64    0.07     0.02  0.6056  3.2776  0.0012  -0.0017  0.0057
H5   5    95.69    0.04     0.07  0.0695  3.2778  0.0010  -0.0015  0.0034
H6   5    95.66    0.05     0.04  0.2212  3.2986  0.0028   0.0193  0.9999
"""
SEED_000_STEPS = """
1555   0    5    95.62    0.06   3.2793   0.0009   0.0705
1550  -5   10    95.38    0.05   3.2783   0.0016   0.0045   **
1547  -8   10    95.29    0.08   3.2782   0.0015   0.0021   **
1545 -10   20    95.14    0.06   3.2793   0.0016   0.0302    *
1540 -15   10    94.80    0.04   3.2796   0.0010   0.0988
1535 -20   17    94.47    0.04   3.2805   0.0014   0.9121
"""
SEED_000_RECORD = (
    [3.2765, 3.2777, 3.281, 3.2799, 3.2764, 3.2777, 3.2776, 3.2794, 3.2779, 3.2783],
    [95.352, 95.319, 95.321, 95.327, 95.248, 95.303, 95.283, 95.072, 95.359, 95.319],
)
SEED_002 = """
H0  10  98.1066  0.0904    0.0000     NaN  3.2778  0.0010    0.0000 0.0000
H1  10  97.7141  0.0533   -0.3925  0.0000  3.2784  0.0009    0.0006 0.0002
"""


def printed(capsys, *argv: object) -> list[list[str]]:
    """The cells that a comparison prints, without head, steps, and empty ones at a line's end."""
    compare.main([*(str(word) for word in argv), "--format", "csv"])
    head, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    found = []
    for row in rows:
        kept = [cell for name, cell in zip(head, row, strict=True) if name != "steps" or argv[0] == "steps"]
        while kept and not kept[-1]:
            kept.pop()
        found.append(kept)
    return found


def cells(text: str) -> list[list[str]]:
    return [line.replace("NaN", "-").split() for line in text.strip().splitlines()]


def test_seed_000_its_table(capsys):
    found = printed(capsys, "groups", NUMBERS / "seed_000.txt", "--target", 3.28)
    assert [[row[0].split()[0], *row[1:10]] for row in found] == cells(SEED_000)


def test_seed_000_its_record():
    losses, times = map(Sample.of, SEED_000_RECORD)
    found = (stats.below(losses, 3.28), losses.mean, losses.std, times.mean, times.std)
    assert [f"{value:.4f}" for value in found] == ["0.0021", "3.2782", "0.0015", "95.2903", "0.0831"]


def test_seed_000_its_table_of_steps(capsys):
    """The p of 1550, 1545, 1540 and 1535 steps cannot be had to the digit.

    Only rounded means and deviations of those runs are published. The seed's p lies between those of the
    corners of what they may have been before they were rounded.
    """
    found = printed(capsys, "steps", NUMBERS / "seed_000_steps.txt", "--target", 3.28)
    wanted = cells(SEED_000_STEPS)
    assert [row[:7] for row in found] == [row[:7] for row in wanted]
    assert [row[8:] for row in found] == [row[8:] for row in wanted]  # the marks
    assert [row[7] for row in (found[0], found[2])] == ["0.0705", "0.0021"]  # from raw numbers
    for row, mine in zip(wanted, found, strict=True):
        n, mean, std, p = int(row[2]), float(row[5]), float(row[6]), float(row[7])
        corners = [
            stats.below(Sample(n, mean + dm, std + ds), 3.28) for dm in (-5e-5, 5e-5) for ds in (-5e-5, 5e-5)
        ]
        assert min(corners) - 5e-5 <= p <= max(corners) + 5e-5
        assert min(corners) - 5e-5 <= float(mine[7]) <= max(corners) + 5e-5


def test_seed_001_its_records(capsys):
    """Its losses to the digit.

    Its times were averaged in float32, which keeps 7 or 8 digits: its 112216.3906 and 84.2895 ms are
    what torch makes of the list, and differ from the exact figures by the spacing of float32 there, 1/128 ms.
    """
    before, after = printed(capsys, "groups", NUMBERS / "seed_001.txt", "--target", 3.28, "--digits", 4)
    assert [before[n] for n in (1, 6, 7, 9)] == ["5", "3.2778", "0.0014", "0.0110"]
    assert [after[n] for n in (1, 6, 7, 9)] == ["25", "3.2784", "0.0017", "0.0000"]
    read = groups.read_numbers((NUMBERS / "seed_001.txt").read_text(), NUMBERS)
    seeds = ((112949.9453, 99.0496), (112216.3906, 84.2895))
    for group, row, seed in zip(read, (before, after), seeds, strict=True):
        std, mean = torch.std_mean(torch.tensor(group.times.values))
        assert (float(mean), float(std)) == pytest.approx(seed, abs=1 / 128)
        assert (float(row[2]), float(row[3])) == pytest.approx(seed, abs=1 / 128)
        assert float(row[2]) == pytest.approx(
            float(np.mean(group.times.values, dtype=np.longdouble)), abs=5e-5
        )


def test_seed_002_its_table(capsys):
    found = printed(capsys, "groups", NUMBERS / "seed_002.txt", "--target", 3.28, "--digits", 4)
    assert [row[:10] for row in found] == cells(SEED_002)


# ---- the tests themselves


@pytest.mark.parametrize("seed", range(5))
def test_statistics_are_scipys(seed):
    rng = np.random.default_rng(seed)
    a, b = (
        list(map(float, rng.normal(3.28 + shift, 0.001 * (1 + shift), n)))
        for shift, n in ((0, 7), (0.001, 4 + seed))
    )
    known = scipy.stats.ttest_1samp(a, 3.2801, alternative="less").pvalue
    assert stats.below(Sample.of(a), 3.2801) == pytest.approx(known, rel=1e-9)
    known = scipy.stats.ttest_ind(a, b, equal_var=False).pvalue
    assert stats.welch(Sample.of(a), Sample.of(b)) == pytest.approx(known, rel=1e-9)
    known = scipy.stats.ttest_rel(a[:4], b[:4]).pvalue
    assert stats.paired(dict(enumerate(a[:4])), dict(enumerate(b[:4])) | {9: 1.0}) == pytest.approx(
        known, rel=1e-6
    )


def test_statistics_where_there_is_nothing_to_test():
    one, same, nan = Sample.of([3.2]), Sample.of([3.2, 3.2]), Sample.of([3.2, math.nan])
    assert (one.n, one.mean) == (1, 3.2) and math.isnan(one.std)
    assert Sample.of([]).n == 0 and math.isnan(Sample.of([]).mean) and math.isnan(nan.mean)
    for p in (
        stats.below(one, 3.28),
        stats.below(same, 3.2),
        stats.below(same, 3.28),  # not 0.0: numbers that do not vary prove nothing
        stats.below(nan, 3.28),
        stats.welch(one, same),
        stats.welch(same, same),
        stats.welch(nan, Sample.of([1.0, 2.0])),
        stats.paired({0: 1.0}, {0: 2.0}),
    ):
        assert math.isnan(p)


def test_holms_correction():
    assert stats.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx(
        [0.03, 0.06, math.nan, 0.06], nan_ok=True
    )
    assert stats.holm([0.5, 0.6]) == [1.0, 1.0]


def test_marks():
    assert [stats.stars(p) for p in (0.0099, 0.01, 0.0499, 0.05, math.nan)] == ["**", "*", "*", "", ""]


# ---- groups from logs


def write_runs(
    folder, losses: list[float], seconds: list[float], steps: int = 10, seeds: bool = True
) -> None:
    folder.mkdir()
    for n, (loss, second) in enumerate(zip(losses, seconds, strict=True)):
        head = f'config:{{"seed": {n}}}\n' if seeds else ""
        (folder / f"{n}.txt").write_text(
            f"{head}step:0/{steps} val_loss:9.0 train_time:0ms\n"
            f"step:{steps // 2}/{steps} val_loss:{loss + 1} train_time:{500 * second:.0f}ms\n"
            f"step:{steps}/{steps} val_loss:{loss} train_time:{1000 * second:.0f}ms\n"
        )


def test_groups_of_logs_named_and_without_a_target(tmp_path, capsys):
    write_runs(tmp_path / "a", [3.0, 3.1, 3.2], [10.0, 11.0, 12.0])
    write_runs(tmp_path / "b", [2.0, 2.1, 2.2], [20.0, 21.0, 22.0])
    (tmp_path / "b" / "stopped.txt").write_text("step:3/10 val_loss:1.0 train_time:9ms\n")
    rows = printed(capsys, "groups", tmp_path / "a", f"new={tmp_path / 'b'}", "--digits", 1)
    assert rows[0] == ["a", "3", "11.0", "1.0", "0.0", "-", "3.1000", "0.1000", "0.0000", "-"]
    test = scipy.stats.ttest_ind([3.0, 3.1, 3.2], [2.0, 2.1, 2.2], equal_var=False)
    p = f"{test.pvalue:.4f}"  # of times and losses
    assert rows[1] == ["new", "3 of 4", "21.0", "1.0", "10.0", p, "2.1000", "0.1000", "-1.0000", p, "**"]
    compare.main(["groups", str(tmp_path / "b")])
    assert "b: stopped left out, it stops at step 3 of 10; --step 3" in capsys.readouterr().err
    assert printed(capsys, "groups", tmp_path / "a", "--step", 5)[0][6] == "4.1000"


def test_raw_numbers_go_out_and_in_again(tmp_path, capsys):
    write_runs(tmp_path / "a", [3.0, 3.1, 3.2], [10.0, 11.0, 12.0])
    first = printed(capsys, "groups", tmp_path / "a")
    compare.main(["groups", str(tmp_path / "a"), "--numbers"])
    (tmp_path / "numbers.txt").write_text(capsys.readouterr().out)
    assert printed(capsys, "groups", tmp_path / "numbers.txt") == first
    assert printed(capsys, "steps", tmp_path / "numbers.txt")[0][:3] == ["10", "0", "3"]


def test_seeds_go_out_and_in_again(tmp_path, capsys):
    write_runs(tmp_path / "a", [3.0, 3.1, 3.2], [10.0, 11.0, 12.0])
    write_runs(tmp_path / "b", [3.0, 3.1, 3.3], [10.0, 11.0, 12.5])
    first = printed(capsys, "pairs", tmp_path / "a", tmp_path / "b")
    compare.main(["groups", str(tmp_path / "a"), str(tmp_path / "b"), "--numbers"])
    (tmp_path / "numbers.txt").write_text(capsys.readouterr().out)
    assert printed(capsys, "pairs", tmp_path / "numbers.txt") == first and first[0][6] == "3"


@pytest.mark.parametrize("seeds", ["1, 1, 2", "1, 2", "1, 2, 2.5", "-1, 2, 3", "1, 2, nan"])
def test_seeds_that_are_none(tmp_path, seeds):
    (tmp_path / "x.txt").write_text(f"A:\n  losses = [3, 3.1, 3.2]\n  seeds = [{seeds}]\n")
    with pytest.raises(UserError, match="A: .*seeds"):
        compare.main(["groups", str(tmp_path / "x.txt")])


def test_numbers_are_not_executed_and_wrong_ones_named(tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "x.txt").write_text(f"A:\n  losses = [open({str(trap)!r}, 'w')]\n")
    with pytest.raises(UserError, match="x.txt: A: losses is no list of numbers"):
        compare.main(["groups", str(tmp_path / "x.txt")])
    assert not trap.exists()
    (tmp_path / "x.txt").write_text("A:\n  loss_summary = [3, 2]\n")
    with pytest.raises(UserError, match=r"loss_summary wants \[n, mean, deviation\]"):
        compare.main(["groups", str(tmp_path / "x.txt")])


def test_pairs_know_seeds(tmp_path, capsys):
    write_runs(tmp_path / "a", [3.0, 3.1, 3.25], [10.0, 11.0, 12.0])
    write_runs(tmp_path / "b", [2.99, 3.08, 3.24], [20.0, 21.0, 22.0])
    write_runs(tmp_path / "c", [2.99, 3.08, 3.24], [20.0, 21.0, 22.0], seeds=False)
    rows = printed(capsys, "pairs", *(tmp_path / name for name in "abc"))
    assert [row[:2] for row in rows] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert [row[:2] for row in printed(capsys, "pairs", *(tmp_path / name for name in "abc"), "--first")] == [
        ["a", "b"],
        ["a", "c"],
    ]
    by_seed = scipy.stats.ttest_rel([3.0, 3.1, 3.25], [2.99, 3.08, 3.24]).pvalue
    assert rows[0][8] == rows[0][9] == f"{by_seed:.4f}"  # unpaired, three runs would show nothing
    assert rows[1][7:9] == ["-", "-"]
    assert [row[6] for row in rows] == ["3", "0", "0"]  # seeds that both have
    assert (
        rows[0][3]
        == f"{scipy.stats.ttest_ind([3.0, 3.1, 3.25], [2.99, 3.08, 3.24], equal_var=False).pvalue:.4f}"
    )


def test_pairs_say_the_difference_that_their_seeds_have(tmp_path, capsys):
    """It may have another sign than that of the means: runs of other seeds are in those."""
    write_runs(tmp_path / "a", [3.0, 3.1, 3.2], [10.0, 11.0, 12.0])
    write_runs(tmp_path / "b", [3.01, 3.12], [10.0, 11.0])
    compare.main(["pairs", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "csv"])
    head, row = list(csv.reader(io.StringIO(capsys.readouterr().out)))[:2]
    assert row[head.index("loss Δ")] == "-0.0350" and row[head.index("Δ by seed")] == "0.0150"
    assert head.index("Δ by seed") + 1 == head.index("p by seed")


def test_a_seed_that_comes_twice_is_said(tmp_path, capsys):
    write_runs(tmp_path / "a", [3.0, 3.1, 3.2], [10.0, 11.0, 12.0])
    path = tmp_path / "a" / "2.txt"
    path.write_text(path.read_text().replace('"seed": 2', '"seed": 1'))
    compare.main(["groups", str(tmp_path / "a")])
    assert "note: a: 2 has the seed of 1, 1; pairs by seed leave" in capsys.readouterr().err


def test_steps_regroup_runs(tmp_path, capsys):
    write_runs(tmp_path / "a", [3.0, 3.1], [10.0, 11.0], steps=20)
    write_runs(tmp_path / "b", [2.0, 2.1], [20.0, 21.0], steps=10)
    write_runs(tmp_path / "c", [2.2], [22.0], steps=10)
    rows = printed(capsys, "steps", *(tmp_path / name for name in "abc"), "--target", 3.28)
    assert [row[:3] for row in rows] == [["20", "0", "2"], ["10", "-10", "3"]] and rows[1][5] == "2.1000"


def test_crossing(tmp_path, capsys):
    write_runs(tmp_path / "a", [3.0, 3.0], [10.0, 30.0])  # 4.0 halfway, then 3.0
    write_runs(tmp_path / "b", [2.0], [12.0])  # 3.0 halfway
    [run, _] = reader.read_paths([tmp_path / "a"])
    assert compare.crossing(run, 3.5) == compare.Crossing(7.5, pytest.approx(7.5))
    assert compare.crossing(run, 2.9) is None
    assert compare.crossing(run, 9.0) == compare.Crossing(0, 0)
    assert compare.crossing(run, 4.0) == compare.Crossing(5, 5.0)
    rows = printed(capsys, "crossing", tmp_path / "a", tmp_path / "b", "--level", 3.5)
    assert [row[:4] for row in rows] == [["1", "b", "1 of 1", "5.50"], ["2", "a", "2 of 2", "15.00"]]
    assert printed(capsys, "crossing", tmp_path / "a", "--level", 1)[0] == [
        "1",
        "a",
        "0 of 2",
        "-",
        "-",
        "-",
        "-",
    ]


def test_tables_as_markdown_and_csv():
    head, rows = ["name", "p"], [["a|b", "1"], ["c, d", "22"]]
    assert table(head, rows, "markdown").splitlines() == [
        "| name | p |",
        "| --- | ---: |",
        "| a\\|b | 1 |",
        "| c, d | 22 |",
    ]
    assert table(head, rows, "csv").splitlines() == ["name,p", "a|b,1", '"c, d",22']
    assert table(head, rows).splitlines() == ["name   p", "-" * 8, "a|b    1", "c, d  22"]


def test_what_a_user_gets_wrong(tmp_path):
    command = [sys.executable, "-m", "records.compare"]
    assert_user_error(run_command([*command, "groups", tmp_path / "x"]), "x: not there")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("milk\n  eggs\n")
    for argv, words in (
        (["groups", tmp_path / "empty"], "empty: no run there has the val_loss"),
        (["groups", tmp_path / "list.txt"], "list.txt: neither a log nor a file of numbers"),
        (["pairs", NUMBERS / "seed_001.txt", "--digits", "-1"], "--digits"),
        (["crossing", tmp_path / "empty"], "--level"),
        (["group", tmp_path], "invalid choice"),
    ):
        with pytest.raises(UserError, match=words):
            compare.main([str(word) for word in argv])
    assert run_command([*command, "--help"]).stdout.count("GROUP") > 3


def test_groups_may_lack_times():
    group = Group("g", Sample.of([3.0, 3.1]), Sample.of([]))
    cells = compare.groups_table([group], 3.28, compare.Style("csv")).splitlines()[1].split(",")
    assert cells[3:7] == ["-", "-", "-", "-"]
