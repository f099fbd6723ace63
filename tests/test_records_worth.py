"""What a change is worth in steps, its picture, and published gains beside ours, in ranks."""

import math
from pathlib import Path

import pytest
import scipy.stats
from conftest import ROOT

from cli import UserError
from records import hypotheses, worth

HEAD = "group,kind,gain,public\n"
SLOPE = 0.5  # by which losses fall for each unit of ln(steps)


def write_numbers(folder: Path, gains: dict[str, tuple[str, float]]) -> Path:
    """Runs of a baseline, of it at 80 % of its steps, and of ideas worth so many percent of steps."""
    groups = {"base": (0.0, 100), "short": (-SLOPE * math.log(0.8), 80)}
    for name, (kind, gain) in gains.items():
        change = -SLOPE * math.log(1 - gain / 100)
        groups[name] = (change if kind == "remove" else -change, 100)
    lines = []
    for n, (name, (change, steps)) in enumerate(groups.items()):
        losses = [
            4 + change + own + 1e-4 * ((n * seed) % 3 - 1) for seed, own in ((1, 0.0), (2, 0.05), (3, 0.02))
        ]
        lines += [f"{name}:", f"  losses = {losses}", "  seeds = [1, 2, 3]", f"  steps = {steps}"]
    path = folder / "numbers.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


IDEAS = {
    "a": ("remove", 12.0),
    "b": ("add", 5.0),
    "c": ("remove", 3.0),
    "d": ("add", 1.0),
    "e": ("add", -2.0),
}


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(worth, "DRAWS", 1000)


def show(tmp_path, capsys, public: dict[str, float]) -> list[str]:
    gains = tmp_path / "gains.csv"
    gains.write_text(
        HEAD + "".join(f"{name},{IDEAS[name][0]},{gain},there\n" for name, gain in public.items())
    )
    worth.main([str(write_numbers(tmp_path, IDEAS)), "--lengths", "short", "--public", str(gains)])
    return capsys.readouterr().out.splitlines()


def test_gains_here_are_shares_of_steps_whether_added_or_removed(tmp_path, capsys):
    lines = show(tmp_path, capsys, {name: gain for name, (_, gain) in IDEAS.items()})
    for line, (name, (kind, gain)) in zip(lines[2:], IDEAS.items(), strict=False):
        cells = line.split()
        assert cells[:3] == [name, kind, f"{gain:.1f}"] and abs(float(cells[3]) - gain) < 0.11, line
        assert float(cells[4]) <= gain <= float(cells[5])
    assert "5 ideas; Spearman's rho 1.00" in lines[-1] and "Kendall's tau 1.00" in lines[-1]


def test_the_opposite_order_correlates_negatively(tmp_path, capsys):
    lines = show(tmp_path, capsys, {name: -gain for name, (_, gain) in IDEAS.items()})
    assert "rho -1.00" in lines[-1] and [line.split()[0] for line in lines[2:7]] == list("edcba")


def test_p_of_a_permutation_and_the_interval():
    ours, errors = [9.0, 7.0, 5.0, 4.0, 2.0, 1.0, 0.5, 0.1], [0.01] * 8
    found = worth.correlations([8.0, 7.5, 5.0, 4.0, 3.0, 1.0, 0.6, 0.2], ours, errors)
    assert found["rho"] == 1 and found["rho p"] < 0.01 and found["rho low"] > 0.9
    mixed = worth.correlations([1.0, 7.5, 0.2, 4.0, 3.0, 5.0, 8.0, 0.6], ours, errors)
    assert abs(mixed["rho"]) < 0.3 and mixed["rho p"] > 0.3 and mixed["rho low"] < 0 < mixed["rho high"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("group,kind,gain\na,add,1\n", "no column public"),
        (HEAD + "a,adds,1,x\n", "line 2: kind is 'adds'; give add or remove"),
        (HEAD + "a,add,much,x\n", "line 2: gain is 'much'"),
        (HEAD + "a,add,nan,x\n", "gain is 'nan'"),
        (HEAD + "a,add,100,x\n", "gain is '100'"),
        (HEAD + "a,add\n", "line 2: gain is ''"),
        (HEAD + "a,add,1,x\na,remove,2,x\n", "a stands there twice"),
        (HEAD + "a,add,1,x\n", "1 published ideas have a group here"),
        ("", "no column group, kind, gain, public"),
        (HEAD + 'a,"add,1,x\n', "no CSV file"),
    ],
)
def test_files_of_gains_that_are_none(tmp_path, text, words):
    (tmp_path / "gains.csv").write_text(text)
    numbers = write_numbers(tmp_path, IDEAS)
    with pytest.raises(UserError, match=words):
        worth.main([str(numbers), "--lengths", "short", "--public", str(tmp_path / "gains.csv")])


def test_the_published_gains_are_of_hypotheses_that_there_are():
    ideas = worth.read_ideas(ROOT / "records" / "numbers" / "public_gains.csv")
    names = {one.name for one in hypotheses.HYPOTHESES} | {"cpu-mudd"}  # in the preset now
    assert len(ideas) > 10 and all(idea.group in names for idea in ideas)


# ---- losses in steps


def baseline_at(tmp_path, steps: dict[str, int], slope: float) -> None:
    """A file of numbers: runs whose losses fall by `slope` for each unit of ln(steps), and differ by seed."""
    own = {7: 0.0, 8: 0.02, 9: -0.01}
    lines = []
    for name, count in steps.items():
        losses = [4 + at - slope * math.log(count / 100) for at in own.values()]
        lines += [f"{name}:", f"  losses = {losses}", "  seeds = [7, 8, 9]", f"  steps = {count}"]
    (tmp_path / "numbers.txt").write_text("\n".join(lines) + "\n")


def test_worth_in_steps(tmp_path, capsys):
    """What equals the baseline at 90 % of its steps is said to, in seeds' own order, and beyond with a ~."""
    baseline_at(tmp_path, {"base": 100, "short": 80, "long": 125}, 0.5)
    text = (tmp_path / "numbers.txt").read_text()
    like_90 = [
        4 + at + error - 0.5 * math.log(0.9) for at, error in ((-0.01, 0.001), (0.0, 0.0), (0.02, -0.001))
    ]
    far = [value + 0.5 for value in like_90]
    text += f"like:\n  losses = {like_90}\n  seeds = [9, 7, 8]\n  steps = 100\n"
    text += f"far:\n  losses = {far}\n  seeds = [9, 7, 8]\n  steps = 100\n"
    (tmp_path / "numbers.txt").write_text(text)
    words = [str(tmp_path / "numbers.txt"), "--lengths", "short", "long", "--format", "markdown"]
    worth.main(words)
    lines = capsys.readouterr().out.splitlines()[2:4]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["like", "far"]
    assert rows[0][1:4] == ["3", "0.0527", "0.0010"] and rows[0][6:8] == ["\\*\\*", "90.0"]
    error = scipy.stats.t.ppf(0.975, 2) * 0.001 / math.sqrt(3) / 0.5
    assert rows[0][8:] == [f"{90 * math.exp(-error):.1f}", f"{90 * math.exp(error):.1f}"]
    assert rows[1][7] == f"~{100 * 0.9 * math.exp(-1):.1f}"


def test_a_slope_of_next_to_nothing_makes_no_endless_numbers(tmp_path, capsys):
    baseline_at(tmp_path, {"base": 100, "long": 125}, 1e-6)
    text = (tmp_path / "numbers.txt").read_text()
    text += "other:\n  losses = [5.0, 5.1, 5.3]\n  seeds = [7, 8, 9]\n  steps = 100\n"
    (tmp_path / "numbers.txt").write_text(text)
    worth.main([str(tmp_path / "numbers.txt"), "--lengths", "long", "--out", str(tmp_path / "w.png")])
    assert "~0.0" in capsys.readouterr().out and (tmp_path / "w.png").exists()


def test_worth_of_what_has_no_slope(tmp_path):
    baseline_at(tmp_path, {"base": 100, "other": 100, "longer": 125}, -0.5)
    numbers = str(tmp_path / "numbers.txt")
    with pytest.raises(UserError, match="other has 100 steps, base 100"):
        worth.main([numbers, "--lengths", "other"])
    with pytest.raises(UserError, match="base does not get better with more steps"):
        worth.main([numbers, "--lengths", "longer"])
    with pytest.raises(UserError, match="at least two groups"):
        worth.main([numbers, "--lengths", "longer", "other"])
    with pytest.raises(UserError, match="required: --lengths"):
        worth.main([numbers])
    with pytest.raises(UserError, match="nowhere: not there"):
        worth.main([numbers, "--lengths", "nowhere"])


def test_the_picture_has_a_bar_for_each_group_and_is_no_other_file(tmp_path, capsys):
    numbers = str(write_numbers(tmp_path, IDEAS))
    worth.main([numbers, "--lengths", "short", "--out", str(tmp_path / "w.svg")])
    text = (tmp_path / "w.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in IDEAS) and "written: " in capsys.readouterr().out
    gains = tmp_path / "gains.csv"
    gains.write_text(HEAD + "".join(f"{name},{kind},{gain},there\n" for name, (kind, gain) in IDEAS.items()))
    worth.main([numbers, "--lengths", "short", "--public", str(gains), "--out", str(tmp_path / "p.svg")])
    text = (tmp_path / "p.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in IDEAS) and "as published" in text
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(UserError, match="none of these tools made it"):
        worth.main([numbers, "--lengths", "short", "--out", str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_text() == "mine"
