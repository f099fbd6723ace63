"""Published gains beside ours: by the same measure, in ranks, with what a user gets wrong."""

import math
from pathlib import Path

import pytest
from conftest import ROOT

from cli import UserError
from records import hypotheses, transfer

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
    monkeypatch.setattr(transfer, "DRAWS", 1000)


def show(tmp_path, capsys, public: dict[str, float]) -> list[str]:
    gains = tmp_path / "gains.csv"
    gains.write_text(
        HEAD + "".join(f"{name},{IDEAS[name][0]},{gain},there\n" for name, gain in public.items())
    )
    transfer.main([str(gains), str(write_numbers(tmp_path, IDEAS)), "--lengths", "short"])
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
    here = [
        transfer.Worth(gain, gain - 0.01, gain + 0.01) for gain in (9.0, 7.0, 5.0, 4.0, 2.0, 1.0, 0.5, 0.1)
    ]
    found = transfer.correlations([8.0, 7.5, 5.0, 4.0, 3.0, 1.0, 0.6, 0.2], here)
    assert found["rho"] == 1 and found["rho p"] < 0.01 and found["rho low"] > 0.9
    mixed = transfer.correlations([1.0, 7.5, 0.2, 4.0, 3.0, 5.0, 8.0, 0.6], here)
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
        (HEAD + "a,add,1,x\n", "1 ideas stand in both files"),
        ("", "no column group, kind, gain, public"),
        (HEAD + 'a,"add,1,x\n', "no CSV file"),
    ],
)
def test_files_of_gains_that_are_none(tmp_path, text, words):
    (tmp_path / "gains.csv").write_text(text)
    numbers = write_numbers(tmp_path, IDEAS)
    with pytest.raises(UserError, match=words):
        transfer.main([str(tmp_path / "gains.csv"), str(numbers), "--lengths", "short"])


def test_lengths_that_are_not_there(tmp_path):
    (tmp_path / "gains.csv").write_text(HEAD)
    numbers = str(write_numbers(tmp_path, IDEAS))
    with pytest.raises(UserError, match="--lengths other: no such group"):
        transfer.main([str(tmp_path / "gains.csv"), numbers, "--lengths", "other"])


def test_the_published_gains_are_of_hypotheses_that_there_are():
    ideas = transfer.read_ideas(ROOT / "records" / "numbers" / "public_gains.csv")
    names = {one.name for one in hypotheses.HYPOTHESES}
    assert len(ideas) > 10 and all(idea.group in names for idea in ideas)
