"""Lists, watching, differences, exports of logs; READMEs; power, side by side, leaderboards; pictures."""

import csv
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
from conftest import CLEAN_ENV, ROOT

from cli import UserError
from records import compare, export, groups, logs, plot, reader, report, stats

LINE = "=" * 100
KERNELS = "\n\n" + "-" * 40 + "\n# triton_kernels.py\n" + "-" * 40 + "\n\nimport triton\nBLOCK = {block}\n"


def our_log(seed: int, loss: float = 3.2, rate: float = 0.03, steps: int = 4, last: int = 4) -> str:
    config = json.dumps({"preset": "cpu", "seed": seed, "muon_lr": rate})
    head = ["import torch", f"rate = {rate}", LINE, f"config:{config}", "preset:cpu overrides:{}"]
    head += [f"started: 2026-01-0{seed + 1}T00:00:00Z", "hardware: AMD, 2 cores; 1 process(es)", LINE]
    events = []
    for step in range(last + 1):
        taken = f"train_time:{step * 100}ms"
        events.append(f"step:{step}/{steps} {taken} train_loss:{loss + (steps - step) / 2:.5f}")
        events.append(f"step:{step}/{steps} val_loss:{loss + steps - step:.5f} {taken}")
    events += ["peak_memory:1244MiB tokens:9"] * (last == steps)
    return "\n".join(head + events) + "\n"


def public_log(block: int) -> str:
    """As the speedrun's logs are: source with a kernel file behind it, nvidia-smi's table, events."""
    gpu = "|   {}  NVIDIA H100 80GB HBM3          On  |   00000000:61:00.0 Off |                    0 |"
    head = ["import torch", "x = 1" + KERNELS.format(block=block), LINE, "Running Python 3.12.7 (main)"]
    head += ["Running PyTorch 2.9.0 compiled", *(gpu.format(n) for n in range(8)), LINE]
    events = ["step:0/20 val_loss:10.8 train_time:0ms", "step:20/20 val_loss:3.27712 train_time:90.5s"]
    return "\n".join([*head, *events, "peak memory allocated: 31249 MiB reserved: 46000 MiB"]) + "\n"


@pytest.fixture
def folder(tmp_path):
    """Three whole logs, one that stopped, one of the public form in a .stdout file."""
    place = tmp_path / "runs"
    place.mkdir()
    for seed, loss in enumerate((3.25, 3.19, 3.22)):
        (place / f"s{seed}.txt").write_text(our_log(seed, loss))
    (place / "short.txt").write_text(our_log(3, 3.1, last=2) + "failed: the training loss is nan at step 3\n")
    (place / "public.stdout").write_text(public_log(64))
    return place


def listed(capsys, *argv: object) -> list[dict[str, str]]:
    logs.main([*(str(word) for word in argv), "--format", "csv"])
    return list(csv.DictReader(capsys.readouterr().out.splitlines()))


# ---- the list


def test_the_list_has_paths_digits_memory_hardware_and_states(folder, capsys):
    rows = {row["run"]: row for row in listed(capsys, folder)}
    public = rows[f"{folder / 'public.stdout'}"]
    assert public["val_loss"] == "3.27712" and public["seconds"] == "90.500"
    assert public["peak MiB"] == "31249" and public["hardware"] == "8 x NVIDIA H100 80GB HBM3"
    short = rows[f"{folder / 'short.txt'}"]
    assert (short["state"], short["steps"], short["val_loss"]) == ("failed", "2/4", "5.10000")
    assert short["note"] == "failed: the training loss is nan at step 3"
    assert rows[f"{folder / 's1.txt'}"]["state"] == "finished"


def test_the_list_is_sorted_and_filtered(folder, capsys):
    def names(*argv) -> list[str]:
        return [row["run"].rpartition("/")[2] for row in listed(capsys, folder, *argv)]

    assert names("--sort", "loss") == ["s1.txt", "s2.txt", "s0.txt", "public.stdout", "short.txt"]
    assert names("--sort", "memory", "--reverse")[0] == "public.stdout"
    assert names("--where", "loss<3.23", "--where", "run~s") == ["s1.txt", "s2.txt"]
    assert names("--where", "state!=finished") == ["short.txt"]
    assert names("--where", "preset=cpu", "--last", "2") == ["s2.txt", "short.txt"]


def test_a_log_is_followed_until_its_run_ends(tmp_path):
    path, lines = tmp_path / "run.txt", our_log(0).splitlines(keepends=True)
    path.write_text("".join(lines[:10]))
    command = [sys.executable, "-m", "records.logs", "--follow", path, "--patience", "60"]
    process = subprocess.Popen(command, cwd=ROOT, env=CLEAN_ENV, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith(
        "run: step 0 of 4, train_loss 5.20000, val_loss 7.20000 (step 0)"
    )
    with path.open("a") as log:
        log.write("".join(lines[10:13]))
        log.flush()
        assert "step 2 of 4" in process.stdout.readline()
        log.write("".join(lines[13:]))
    rest = process.stdout.read().splitlines()
    assert "step 4 of 4, train_loss 3.20000, val_loss 3.20000 (step 4), 100 ms a step" in rest[-2]
    assert rest[-1] == "run: finished" and process.wait() == 0


def test_following_ends_where_nothing_comes(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(our_log(0, last=2))
    began = time.monotonic()
    logs.main(["--follow", str(tmp_path / "a.txt"), "--patience", "0.05"])
    assert "no new line for 0.05 s" in capsys.readouterr().out and time.monotonic() - began < 5


# ---- differences


def test_differences_of_two_runs(folder, tmp_path, capsys):
    (tmp_path / "b.txt").write_text(our_log(1, rate=0.05).replace("hardware: AMD", "hardware: Intel"))
    logs.main(["diff", str(folder / "s0.txt"), str(tmp_path / "b.txt")])
    shown = capsys.readouterr().out
    for words in (
        "muon_lr  0.03  0.05",
        "-rate = 0.03\n+rate = 0.05\n",
        "hardware  AMD, 2 cores; 1 process(es)  Intel",
    ):
        assert words in shown
    (tmp_path / "c.stdout").write_text(public_log(128))
    logs.main(["diff", str(folder / "public.stdout"), str(tmp_path / "c.stdout")])
    shown = capsys.readouterr().out
    assert "source, training script: the same" in shown
    assert "--- public: triton_kernels.py\n+++ c: triton_kernels.py\n" in shown
    assert "-BLOCK = 64\n+BLOCK = 128\n" in shown and "configuration: not in both logs" in shown
    for paths in ([folder, folder / "s0.txt"], [folder / "s0.txt"]):
        with pytest.raises(UserError):
            logs.main(["diff", *map(str, paths)])


# ---- exports


def test_curves_as_csv_and_json_lines(folder, tmp_path, capsys):
    for name in ("x.csv", "x.jsonl"):
        logs.main(["export", str(folder / "s0.txt"), "--out", str(tmp_path / name)])
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    found = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert len(rows) == len(found) == 10
    assert (found[9]["run"], found[9]["step"], found[9]["seconds"]) == (str(folder / "s0.txt"), 4, 0.4)
    assert found[9]["val_loss"] == 3.25 == float(rows[9]["val_loss"]) and rows[9]["train_loss"] == ""
    assert "10 lines of 1 runs" in capsys.readouterr().out


def test_rows_for_pandas(folder):
    pandas = pytest.importorskip("pandas", reason="a user's own; no tool here needs it")
    runs = reader.read_paths([folder])
    curves = pandas.DataFrame(export.curve_rows(runs)).dropna(subset="val_loss")
    assert curves.groupby("run").val_loss.min().min() == 3.19
    summary = pandas.DataFrame(export.run_rows(runs))
    assert list(summary["config.seed"].dropna()) == [0, 1, 2, 3] and summary.failure.notna().sum() == 1


def test_event_files_of_tensorboard_are_read_back(folder, tmp_path):
    pytest.importorskip("tensorboard", reason="an extra of records/requirements.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs.main(
        [
            "export",
            str(folder / "s0.txt"),
            str(folder / "s1.txt"),
            "--to",
            "tensorboard",
            "--out",
            f"{tmp_path}/tb",
        ]
    )
    events = EventAccumulator(str(tmp_path / "tb" / "s1"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert points == [(step, pytest.approx(3.19 + 4 - step)) for step in range(5)]
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == ["s0", "s1"]


# ---- raw numbers of public READMEs

README = """## New record: smear

Validation:
```
import scipy.stats
accs = [3.2781,3.2792,3.2765,
        3.2796]  # four
times = [152.771,152.816, 152.834,152.755,]
print("p=%.4f" % scipy.stats.ttest_1samp(accs, 3.28, alternative="less").pvalue)
# p=0.0084
losses = [float(x) for x in open("x")]
```
### Before
val_losses = [3.2796, 3.2781]
losses_after = [3.1, 3.2]
times_after = [9, 8]
"""


def test_lists_at_the_start_of_a_line(tmp_path):
    found = groups.read_numbers(README, tmp_path / "README.md")
    assert [group.name for group in found] == ["Validation", "Before", "after"]
    assert found[0].losses.values == (3.2781, 3.2792, 3.2765, 3.2796) and found[0].times.n == 4
    assert found[1].losses.values == (3.2796, 3.2781) and found[2].times.values == (9.0, 8.0)
    twice = groups.read_numbers("losses = [3, 4]\nlosses = [5, 6]\n", tmp_path / "x.txt")
    assert [group.name for group in twice] == ["x", "x #2"]


# ---- comparisons


def test_names_with_a_step(folder, capsys):
    for text, name, step in (
        (f"new={folder}@2", "new", 2),
        (f"{folder}@3", "runs", 3),
        (f"{folder}", "runs", None),
    ):
        assert groups.named_path(text) == groups.NamedPath(name, folder, step)
    compare.main(["groups", f"early={folder / 's0.txt'}@2", str(folder / "s0.txt"), "--loss_digits", "6"])
    shown = capsys.readouterr().out
    assert "5.250000" in shown and "3.250000" in shown
    with pytest.raises(UserError, match="not there"):
        groups.named_path(f"a={folder}x@2")


def test_places_of_one_name_are_told_apart(tmp_path, capsys, monkeypatch):
    """By the folders before it, as many as it takes; a place that is named twice stays as it is."""
    for n, place in enumerate(("a/x/this", "b/x/this", "c/this")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "r.txt").write_text(our_log(n, 3 + n / 10))
    folders = [str(tmp_path / place) for place in ("a/x/this", "b/x/this", "c/this")]
    names = ["a/x/this", "b/x/this", "c/this"]
    assert [one.name for one in groups.named_paths(folders)] == names
    assert [group.name for group in groups.read_groups(folders, None, "val_loss")] == names
    assert [one.name for one in groups.named_paths([folders[2]] * 2 + [f"this={tmp_path / 'a'}"])] == [
        "c/this",
        "c/this",
        "this",
    ]
    compare.main(["crossing", *folders, "--level", "4"])
    compare.main(["side", folders[0], folders[2]])
    report.main([*folders, "--out", str(tmp_path / "r.html")])
    shown = capsys.readouterr().out
    assert all(f"{name}  " in shown for name in names) and "x/this: loss" in shown
    assert all(f'"name": "{name}"' in (tmp_path / "r.html").read_text() for name in names)
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda groups, args: drawn.extend(groups))
    plot.main(["loss", *folders, "--out", str(tmp_path / "x.png")])
    assert [name for name, _ in drawn] == names


def test_which_p_decides_is_said(folder, capsys):
    for argv, words in (
        (["groups", folder, folder, "--target", "3.28"], "loss p decides: the target"),
        (["groups", folder / "s0.txt", folder / "s1.txt"], "`pairs` decides, paired by the seeds"),
        (["pairs", folder / "s0.txt", folder / "s1.txt"], "p by seed Holm decides"),
    ):
        compare.main([str(word) for word in argv])
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("n, effect, alpha", [(3, 0.01, 0.01), (3, 0.005, 0.01), (4, 0.005, 0.01)])
def test_power_of_few_runs_is_that_of_welchs_test_not_of_students(n, effect, alpha):
    draws = np.random.default_rng(0).normal(size=(2, n, 20_000)) * 0.0013
    p = scipy.stats.ttest_ind(draws[0] + effect, draws[1], equal_var=False).pvalue
    assert abs((p < alpha).mean() - stats.power("two groups", n, effect, 0.0013, alpha)) < 0.012


@pytest.mark.parametrize("test", stats.TESTS)
def test_power_is_what_simulated_runs_have(test):
    """At the number of runs that 80 % power needs, a test of made-up runs finds the effect about so often."""
    import scipy.stats

    n = stats.runs_needed(test, 0.002, 0.0013, 0.01, 0.8)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(shift, 0.0013, (4000, n)) for shift in (0, -0.002))
    if test == "two groups":
        p = scipy.stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue
    else:
        p = scipy.stats.ttest_1samp(
            b, 0, axis=1, alternative="less" if test == "target" else "two-sided"
        ).pvalue
    found = (p < 0.01).mean()
    assert 0.78 < found < 0.93 and stats.power(test, n - 1, 0.002, 0.0013, 0.01) < 0.8
    assert stats.runs_needed(test, 1e-7, 1.0, 0.01, 0.8) is None


def test_two_runs_side_by_side(folder, capsys):
    compare.main(["side", f"a={folder / 's0.txt'}", f"b={folder / 's1.txt'}", "--format", "csv"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[0] == ["step", "a: loss", "time", "b: loss", "loss Δ", "time", "time Δ"]
    assert rows[-1] == ["4", "3.25000", "0.40", "3.19000", "-0.0600", "0.40", "0.00"] and len(rows) == 6
    with pytest.raises(UserError, match="5 runs there"):
        compare.main(["side", str(folder), str(folder)])


def test_a_leaderboard_of_ours_and_of_public_records(tmp_path, capsys):
    """Ours have this/, public ones logs in the folder, logs in folders of it, or only a README."""
    records = {"2026-01-01_Ours/this": 3.2, "2025-01-01_Public": 3.22, "2025-02-01_Two/new": 3.21}
    records |= {"2025-02-01_Two/high": 3.5, "2026-01-01_Ours/baseline": 1.0}
    for name, loss in records.items():
        (tmp_path / name).mkdir(parents=True)
        for seed in range(3):
            (tmp_path / name / f"{seed}.txt").write_text(our_log(seed, loss + seed / 1000))
    (tmp_path / "2024-01-01_Old").mkdir()
    (tmp_path / "2024-01-01_Old" / "README.md").write_text("# Old\nlosses = [3.1, 3.2]\ntimes = [0.1, 0.2]\n")
    (tmp_path / "notes").mkdir()
    compare.main(["leaderboard", str(tmp_path), "--target", "3.28", "--format", "csv"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    names = [
        "2024-01-01_Old",
        "2025-01-01_Public",
        "2025-02-01_Two/new",
        "2026-01-01_Ours",
        "2025-02-01_Two/high",
    ]
    assert [row[1] for row in rows[1:]] == names
    assert rows[4][2:8] == ["3", "4", "0.40", "0.00", "3.2010", "0.0010"] and rows[1][-1] == "README"


# ---- pictures


def test_a_small_difference_gets_a_panel_of_its_own():
    def line(name: str, size: float) -> plot.Line:
        return plot.Line(name, 1, [([0.0], [size], [0.0])], True)

    lines = [line("base", 0.0), line("large", -1.5), line("small", 0.02), line("tiny", 0.01)]
    above, below = plot.panels(lines)
    assert [one.name for one in above] == ["large"]
    assert [one.name for one in below] == ["base", "small", "tiny"]
    assert plot.panels(lines[2:]) == [lines[2:]]


def test_more_than_ten_curves_are_told_apart(tmp_path, monkeypatch):
    import matplotlib.pyplot as pyplot

    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, out: kept.append(figure))
    paths = []
    for n in range(24):
        (tmp_path / f"r{n}.txt").write_text(our_log(n % 9, 3 + n / 10))
        paths.append(str(tmp_path / f"r{n}.txt"))
    plot.main(["loss", *paths, "--out", str(tmp_path / "x.png")])
    lines = [line for line in kept[0].axes[0].lines if len(line.get_xdata()) == 5]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 24
    assert len(kept[0].axes[0].get_legend().texts) == 24
    pyplot.close("all")


def test_ticks_of_logarithmic_axes_are_plain_numbers(tmp_path):
    figure, axes = plot.canvas(tmp_path / "x.png")
    axes.plot([0, 1], [90, 3000])
    plot.time_axis(axes.yaxis)
    figure.canvas.draw()
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert {"100", "200", "500", "1000", "2000"} <= set(shown) and not math.isnan(axes.get_ylim()[0])
