"""Plots of logs, and what linear algebra says of embedding tables."""

import json
import math
import pickle

import matplotlib.image
import numpy as np
import pytest
import torch

from cli import UserError
from records import embeddings, plot, reader


def write_run(path, losses: list[float], ms: int, scalars: dict | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    last = 10 * (len(losses) - 1)
    lines = [f"step:{10 * n}/{last} val_loss:{loss} train_time:{ms * n}ms" for n, loss in enumerate(losses)]
    block = [f"scalars:{name} {json.dumps(values)}" for name, values in (scalars or {}).items()]
    path.write_text("\n".join([*lines[:-1], *block, lines[-1]]) + "\n")


def test_means_over_runs_by_step_and_by_time():
    curves = [([0, 10, 20], [4.0, 3.0, 2.0]), ([0, 10, 20, 30], [4.2, 3.4, 2.6, 2.0])]
    x, mean, deviation = plot.by_step(curves)
    assert x == [0, 10, 20] and mean == pytest.approx([4.1, 3.2, 2.3])
    assert deviation == pytest.approx([0.1 * 2**0.5, 0.2 * 2**0.5, 0.3 * 2**0.5])
    x, mean, deviation = plot.by_time([([0.0, 10.0], [4.0, 2.0]), ([0.0, 20.0], [4.0, 2.0])], points=3)
    assert x == [0.0, 5.0, 10.0] and mean == pytest.approx([4.0, 3.25, 2.5])
    assert plot.window((x, mean, deviation), 4, 6) == ([5.0], [mean[1]], [deviation[1]])
    assert plot.window((x, mean, deviation), 11, None) == ([], [], [])


def test_scalars_by_layer_are_means_over_runs(tmp_path):
    for n in range(2):
        scalars = {
            "resid_scale": [1.0 + n, 2.0, 3.0],
            "input_scale": [0, 1, 2, 3, 4, 5 + n],
            "skip_scale": [7.0],
            "backout_scale": [1.0, 2.0],
        }
        write_run(tmp_path / f"{n}.txt", [4.0, 3.0], 5, scalars)
    found = plot.layer_scalars(reader.read_paths([tmp_path]))
    assert {name: [one.mean for one in samples] for name, samples in found.items()} == {
        "resid_scale": [1.5, 2.0, 3.0],
        "input_scale[0]": [0.0, 2.0, 4.0],
        "input_scale[1]": [1.0, 3.0, 5.5],
    }


def test_differences_are_by_seed_or_from_the_mean(tmp_path, monkeypatch):
    seed = property(lambda run: {"0": 0, "1": 1, "7": 7}.get(run.name))
    monkeypatch.setattr(reader.Run, "seed", seed)

    def run(seed: int | None, losses: list[float]) -> reader.Run:
        write_run(tmp_path / "a" / f"{seed}.txt", losses, 5)
        [one] = reader.read_paths([tmp_path / "a" / f"{seed}.txt"])
        return one

    first = [run(0, [4.0, 3.0]), run(1, [4.4, 3.2])]
    found = plot.less_first(
        [run(1, [4.5, 3.3]), run(7, [4.5, 3.3, 3.0]), run(None, [4.2, 3.0])], first, "val_loss"
    )
    assert [x for x, _ in found] == [[0, 10]] * 3
    assert [y for _, y in found] == [pytest.approx(y) for y in ([0.1, 0.1], [0.3, 0.2], [0.0, -0.1])]


@pytest.fixture
def drawn(monkeypatch):
    """What plot.main drew last: its axes."""
    import matplotlib.pyplot as pyplot

    kept = []
    original = pyplot.subplots
    monkeypatch.setattr(
        pyplot, "subplots", lambda *args, **named: kept.append(original(*args, **named)) or kept[-1]
    )
    yield lambda: kept[-1][1]
    pyplot.close("all")


def test_losses_are_drawn_zoomed_with_a_target(tmp_path, drawn, capsys):
    for n in range(3):
        write_run(tmp_path / "a" / f"{n}.txt", [4.0, 3.5 + n / 10, 3.0, 2.9], 500)
    write_run(tmp_path / "b" / "0.txt", [4.1, 3.6, 3.2, 3.1], 700)
    plot.main(
        [
            "loss",
            str(tmp_path / "a"),
            f"other={tmp_path / 'b'}",
            "--out",
            str(tmp_path / "x.png"),
            "--from",
            "10",
            "--target",
            "2.95",
        ]
    )
    assert capsys.readouterr().out == f"written: {tmp_path / 'x.png'}\n"
    a, b, target = drawn().lines
    assert (list(a.get_xdata()), list(a.get_ydata())) == ([10, 20, 30], pytest.approx([3.6, 3.0, 2.9]))
    assert (
        list(b.get_ydata()) == [3.6, 3.2, 3.1]
        and target.get_ydata()[0] == 2.95
        and len(drawn().collections) == 1
    )
    assert [text.get_text() for text in drawn().get_legend().texts] == ["target 2.95"]
    assert [text.get_text() for text in drawn().texts][:2] == ["a (3 runs)", "other"]  # at the curves' ends
    picture = matplotlib.image.imread(tmp_path / "x.png")
    assert picture.shape[0] > 500
    assert 0.001 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5  # neither blank nor black
    plot.main(["loss", str(tmp_path / "a"), "--x", "time", "--each", "--out", str(tmp_path / "y.svg")])
    assert len(drawn().lines) == 3 and list(drawn().lines[0].get_xdata()) == [0.0, 0.5, 1.0, 1.5]
    assert (tmp_path / "y.svg").stat().st_size > 1000


def test_smooth_takes_means_of_the_last_values(tmp_path, drawn):
    write_run(tmp_path / "0.txt", [4.0, 3.0, 5.0, 1.0], 5)
    plot.main(["loss", str(tmp_path), "--smooth", "3", "--from", "10", "--out", str(tmp_path / "x.png")])
    line, axes = drawn().lines[0], drawn()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 20, 30], pytest.approx([3.5, 4.0, 3.0]))
    assert axes.get_ylabel() == "val_loss, nats a token, mean of 3"
    with pytest.raises(UserError, match="--smooth: '0': give a whole number"):
        plot.main(["loss", str(tmp_path), "--smooth", "0", "--out", str(tmp_path / "y.png")])


def test_scalars_are_drawn(tmp_path, drawn):
    write_run(
        tmp_path / "0.txt", [4.0, 3.0], 5, {"resid_scale": [1.0, 2.0, 3.0], "x0_scale": [0.5, 0.25, -1.0]}
    )
    plot.main(["scalars", str(tmp_path), "--out", str(tmp_path / "x.png"), "--keys", "x0_scale"])
    assert [list(container[0].get_ydata()) for container in drawn().containers] == [[0.5, 0.25, -1.0]]


def test_nothing_to_draw_is_said(tmp_path):
    write_run(tmp_path / "0.txt", [4.0, 3.0], 5)
    out = ["--out", str(tmp_path / "x.png")]
    for argv, words in (
        (["loss", str(tmp_path), "--from", "900", *out], "nothing to draw"),
        (["scalars", str(tmp_path), *out], "no such scalars"),
        (["loss", str(tmp_path), "--out", "x.jpeg.txt"], "ends in .png"),
        (["loss", str(tmp_path), "--out", "/no/such/x.png"], "cannot be written"),
        (["loss", str(tmp_path / "none"), *out], "not there"),
    ):
        with pytest.raises(UserError, match=words):
            plot.main(argv)
    assert not (tmp_path / "x.png").exists()


# ---- embeddings


def table_with(eigenvalues: list[float], turned: bool, rows: int = 200) -> np.ndarray:
    """Rows whose second moments have exactly these eigenvalues, along the axes or along turned ones."""
    rng, size = np.random.default_rng(0), len(eigenvalues)
    q, _ = np.linalg.qr(rng.normal(size=(rows, size)))
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0] if turned else np.eye(size)
    return q * np.sqrt(rows * np.array(eigenvalues)) @ turn


@pytest.mark.parametrize("turned", [False, True])
def test_a_spectrum_that_is_known(turned):
    s = embeddings.spectrum(table_with([8.0, 4.0, 2.0, 2.0, 1.0], turned), top=2)
    assert (s.condition, s.spikiness, s.top_share) == pytest.approx((8.0, 4.0, 12 / 17))
    assert s.off_diagonal > 0.05 if turned else s.off_diagonal < 1e-9


def test_the_largest_correlation_is_that_of_second_moments():
    rows = np.random.default_rng(1).normal(size=(50, 4)) + 1.0  # the mean is not taken out
    moments = rows.T @ rows
    known = max(
        abs(moments[i, j]) / math.sqrt(moments[i, i] * moments[j, j]) for i in range(4) for j in range(i)
    )
    assert embeddings.spectrum(rows).off_diagonal == pytest.approx(known)


def test_tables_without_a_spectrum():
    assert math.isnan(embeddings.spectrum(np.zeros((9, 3))).condition)
    rows = np.zeros((9, 3))
    rows[:, 0] = 1
    s = embeddings.spectrum(rows)
    assert s.condition == math.inf and s.off_diagonal == 0 and s.top_share == 1


def checkpoint(path, step: int, values: np.ndarray) -> None:
    padded = torch.cat([torch.tensor(values), torch.full((28, values.shape[1]), 1e6)]).bfloat16()
    torch.save(
        {
            "model": {
                "value_embed_0": padded,
                "lm_head": padded.T.contiguous(),
                "resid_scale": torch.ones(3),
            },
            "config": json.dumps({"vocab_size": len(values)}),
            "step": step,
        },
        path,
    )


def test_the_command_over_several_steps(tmp_path, capsys):
    checkpoint(tmp_path / "b.pt", 4, table_with([16.0, 1.0, 1.0, 1.0], False, rows=100))
    checkpoint(tmp_path / "a.pt", 2, table_with([4.0, 1.0, 1.0, 1.0], False, rows=100))
    embeddings.main([str(tmp_path / "b.pt"), str(tmp_path / "a.pt"), "--top", "1", "--format", "csv"])
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[1:]] == [
        ["value_embed_0", "2", "100 x 4"],
        ["value_embed_0", "4", "100 x 4"],
    ]
    assert [float(row[3]) for row in rows[1:]] == pytest.approx([4, 16], rel=0.02)  # padding rows left out
    embeddings.main([str(tmp_path / "a.pt"), "--tables", "lm_head", "--format", "csv"])
    assert capsys.readouterr().out.splitlines()[1].split(",")[2] == "100 x 4"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"model": Evil(trap), "config": "{}", "step": 1}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(trap)))
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04 half a file")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("a.pt", "b.pt", "c.pt", "tensor.pt", "none.pt"):
        with pytest.raises(UserError, match=f"{name}: no whole checkpoint"):
            embeddings.main([str(tmp_path / name)])
    assert not trap.exists()
    checkpoint(tmp_path / "d.pt", 1, np.ones((10, 4)))
    with pytest.raises(UserError, match="no table begins with foo; there are value_embed_0, lm_head"):
        embeddings.main([str(tmp_path / "d.pt"), "--tables", "foo"])
