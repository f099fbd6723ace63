"""Checkpoints and faults: a resumed run ends as one that was never stopped; what lies on disk is whole."""

import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    LATER_SWITCHES,
    ROOT,
    group_environments,
    made_up_text,
    run_command,
    tiny,
    write_vocabulary,
)

import train_gpt as tg
from data.shards import write_shard

# 13 steps: the long window grows (YaRN) before step 6; the last validation only looks further; embedding and
# head part with the update of step 9, so between the save points 8 and 10; the odd last step leaves a
# gradient that nobody will use.
STEPS, SAVE_POINTS, WINDOW_GROWS, UNTIED = 13, [2, 4, 6, 8, 10, 12, 13], 6, 10
BASE = dict(num_steps=STEPS, val_every=4, micro_batches=2, final_long_window=96) | LATER_SWITCHES
DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]


class Killed(BaseException):
    """Stands for SIGKILL within one process: nothing in the program catches it."""


class RecordedRun(tg.Trainer):
    """Remembers every loss, to the last bit; dies when it is about to do the step number dies_at (from 0)."""

    def __init__(self, cfg, dies_at=None):
        self.losses, self.dies_at = [], dies_at
        super().__init__(cfg, {})
        self.require_finite, self.progress.require_finite = self.progress.require_finite, self.remember

    def remember(self, loss, kind, step):
        self.losses.append((kind, step, loss))
        return self.require_finite(loss, kind, step)

    def fit(self):
        try:
            return super().fit()
        finally:
            self.log.close()

    def train_step(self, step):
        if step == self.dies_at:
            raise Killed
        return super().train_step(step)


@pytest.fixture(autouse=True, scope="module")
def no_measuring():
    """What this machine's matrix products reach is measured at every start, for seconds; not here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "matrix_ceiling", lambda *_: 1e9)
        yield


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory) -> Path:
    """As everybody's, but in shards of 2,000 tokens: a run resumes in the third and the fourth, too."""
    folder = tmp_path_factory.mktemp("data")
    for n in range(6):
        write_shard(folder / f"x_train_{n:06d}.bin", made_up_text(2_000, seed=n))
    write_shard(folder / "x_val_000000.bin", made_up_text(4_000, seed=9))
    write_vocabulary(folder, 255, 128)
    return folder


def state_of(run) -> tuple[dict, tuple]:
    """All that a run's future depends on: tensors, and the rest."""
    tensors = {name: t.clone() for name, t in run.model.state_dict().items()}
    tensors |= {
        f"{name} {key}": t.clone() for name, state in run.optimizer.state.items() for key, t in state.items()
    }
    return tensors, (
        run.steps_done,
        run.tokens_seen,
        run.flops,
        run.optimizer.tied,
        run.loader.file,
        run.loader.document,
        run.progress.average,
    )


def assert_same_state(a: tuple[dict, tuple], b: tuple[dict, tuple]) -> None:
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    different = [name for name in a[0] if not torch.equal(a[0][name], b[0][name])]
    assert not different


def events_of(folder: Path) -> list[str]:
    """The lines of the one log in a folder, behind its header."""
    [path] = folder.glob("*.txt")
    source, header, events = path.read_text().split("\n" + tg.Log.SEPARATOR + "\n")
    return events.splitlines()


def losses_by_step(events: list[str]) -> dict[str, set[str]]:
    """{"7 train_loss": its values}; more than one value: a repeated step came out differently."""
    found = {}
    for line in events:
        match = re.match(r"step:(\d+)/\d+ .*?(val_loss|train_loss):(\S+)", line)
        if match:
            found.setdefault(f"{match[1]} {match[2]}", set()).add(match[3])
    return found


@pytest.fixture(scope="module", params=DTYPES)
def undisturbed(request, tiny_data, tmp_path_factory):
    """One whole run, with a copy of each of its checkpoints."""
    folder, kept = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("kept")
    cfg = tiny(data_dir=str(tiny_data), log_dir=str(folder), dtype=request.param, save_every=2, **BASE)
    save = tg.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tg, "save_checkpoint", lambda path, content: (save(path, content), shutil.copy(path, kept))
        )
        run = RecordedRun(cfg)
        run.fit()
    checkpoints = {int(path.stem[-6:]): path for path in sorted(kept.glob("*.pt"))}
    assert list(checkpoints) == SAVE_POINTS
    return SimpleNamespace(
        cfg=cfg, losses=run.losses, state=state_of(run), checkpoints=checkpoints, events=events_of(folder)
    )


def resumable(undisturbed, folder: Path, step: int, **changes) -> tg.Config:
    """A folder with one checkpoint, and the configuration that goes on from it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(undisturbed.checkpoints[step], folder)
    return replace(undisturbed.cfg, log_dir=str(folder), resume=True, **changes)


# ---- it ends as if nothing had happened


def test_the_save_points_lie_where_it_is_difficult(undisturbed):
    schedule = tg.Schedule(undisturbed.cfg)
    saved = {step: torch.load(path) for step, path in undisturbed.checkpoints.items()}
    assert schedule.windows(WINDOW_GROWS - 1) != schedule.windows(WINDOW_GROWS) != schedule.val_windows(STEPS)
    assert [int(saved[step]["model"]["long_window"]) for step in (WINDOW_GROWS, WINDOW_GROWS + 2, STEPS)] == [
        48,
        64,
        64,
    ]
    assert [saved[step]["tied"] for step in (UNTIED - 2, UNTIED)] == [True, False]
    files = [saved[step]["loader"][0] for step in SAVE_POINTS]
    assert len(set(files)) >= 3 and files == sorted(files)


SOME = [pytest.param(step, marks=[pytest.mark.slow] * (i % 2)) for i, step in enumerate(SAVE_POINTS)]


@pytest.mark.parametrize("step", SOME)
def test_resumed_at_any_save_point_it_ends_bit_for_bit_alike(step, undisturbed, tmp_path):
    run = RecordedRun(resumable(undisturbed, tmp_path, step))
    assert run.steps_done == step
    run.fit()
    assert run.losses == [
        entry for entry in undisturbed.losses if entry[1] >= step + (entry[0] == "training")
    ]
    assert_same_state(run_state := state_of(run), undisturbed.state)
    assert run_state[1][0] == STEPS


@pytest.mark.parametrize("num_steps, dies_at, goes_on_at", [(6, 5, 4), (24, 20, 20)])
def test_a_start_from_counts_and_rows_that_wait_survive_an_interruption(
    tiny_data, tmp_path, num_steps, dies_at, goes_on_at
):
    """The start is made once, or once more with each part of a run; a row counts its own steps, on and on."""
    cfg = tiny(
        data_dir=str(tiny_data),
        save_every=2,
        dtype="bfloat16" if tg.multiplies_bfloat16("cpu") else "float32",  # emulated, it takes long
        adam_every=1,
        num_steps=num_steps,
        epochs=2,
        val_every=0,
        spectral=10.0,
        untie_share=0.0,
        embed_std=0.1,
        bigram_by_row=True,
        ngram_start=8.0,
    )
    whole = RecordedRun(replace(cfg, log_dir=str(tmp_path / "whole"), save_every=0))
    whole.fit()
    cut = replace(cfg, log_dir=str(tmp_path / "cut"), resume=True)
    with pytest.raises(Killed):
        RecordedRun(cut, dies_at=dies_at).fit()
    resumed = RecordedRun(cut)
    assert resumed.steps_done == goes_on_at
    assert any(step < goes_on_at for step in resumed.counts.restarts) == (num_steps > 6)
    resumed.fit()
    assert_same_state(state_of(resumed), state_of(whole))


def test_killed_twice_and_resumed_it_is_one_run_with_one_log(undisturbed, tmp_path):
    # The first time there is nothing to go on from.
    cfg = replace(undisturbed.cfg, log_dir=str(tmp_path), resume=True)
    for dies_at in (5, 11):
        with pytest.raises(Killed):
            RecordedRun(cfg, dies_at).fit()
    run = RecordedRun(cfg)
    run.fit()
    assert_same_state(state_of(run), undisturbed.state)
    events = events_of(tmp_path)
    assert [line for line in events if line.startswith("resume")] == [
        f"resume: no checkpoint in {tmp_path}, starting at step 0",
        "resumed: from step 4 with 1 process(es)",
        "resumed: from step 10 with 1 process(es)",
    ]
    assert losses_by_step(events) == losses_by_step(undisturbed.events)
    assert all(len(values) == 1 for values in losses_by_step(events).values()), (
        "a step done twice came out differently"
    )
    assert len(events) > len(undisturbed.events)  # both tries of a repeated step are in the log


def test_the_clock_goes_on_where_it_stood(undisturbed, tmp_path):
    saved = torch.load(undisturbed.checkpoints[8])
    run = RecordedRun(resumable(undisturbed, tmp_path, 8))
    assert run.clock.total == saved["clock"] > 0
    run.fit()
    times = [int(time) for time in re.findall(r"train_time:(\d+)ms", "\n".join(events_of(tmp_path)))]
    assert times == sorted(times) and times[0] >= int(1e3 * saved["clock"])


def test_what_may_differ_changes_nothing(undisturbed, tiny_data, tmp_path):
    """Other folders, other intervals, a warm-up on dummy tokens: the same end."""
    assert {field.name for field in fields(tg.Config)} > tg.MAY_DIFFER
    cfg = resumable(
        undisturbed,
        tmp_path / "elsewhere",
        6,
        save_every=5,
        val_every=3,
        rank_timeout=7.0,
        warmup=True,
        save_on_stop=True,
        data_dir=str(shutil.copytree(tiny_data, tmp_path / "data")),
    )
    run = RecordedRun(cfg)
    tg.warm_up(run)
    run.fit()
    assert_same_state(state_of(run), undisturbed.state)
    assert run.losses[-1] == undisturbed.losses[-1]


def without_training(monkeypatch):
    """Steps that cost nothing and learn nothing, for tests of when something is saved."""

    def step(run, number):
        run.steps_done = number + 1
        return torch.tensor([1.0, 0.0])

    monkeypatch.setattr(tg.Trainer, "train_step", step)
    monkeypatch.setattr(tg.Trainer, "validate", lambda *_: 1.0)


@pytest.mark.parametrize(
    "save_every, num_steps, adam_every, expected",
    [
        (1, 7, 2, [2, 4, 6, 7]),
        (2, 8, 2, [2, 4, 6, 8]),
        (3, 13, 2, [4, 6, 10, 12, 13]),
        (4, 9, 2, [4, 8, 9]),
        (5, 12, 2, [6, 10, 12]),
        (100, 6, 2, [6]),
        (0, 6, 2, []),
        (3, 7, 1, [3, 6, 7]),
        (4, 13, 3, [6, 9, 12, 13]),
    ],
)
def test_it_saves_where_no_gradient_waits_and_once_at_the_end(
    save_every, num_steps, adam_every, expected, tiny_data, tmp_path, monkeypatch
):
    """Between Adam's turns the sum so far would be lost. The end is saved once, even if it is due anyway."""
    saved = []
    monkeypatch.setattr(tg, "save_checkpoint", lambda path, content: saved.append(content["step"]))
    without_training(monkeypatch)
    run = RecordedRun(
        tiny(
            data_dir=str(tiny_data),
            log_dir=str(tmp_path),
            num_steps=num_steps,
            save_every=save_every,
            adam_every=adam_every,
        )
    )
    run.fit()
    assert saved == expected


# ---- other numbers of processes


def program(given: dict, environment: dict, output: str) -> None:
    """The program on a tiny configuration, in a process of its own; keep, pause, save_again are no fields."""
    keep, pause, save_again = given.pop("keep", 2), given.pop("pause", 0), given.pop("save_again", False)
    os.environ.update(environment)
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115, as long as the process lives
    train_step, restore = tg.Trainer.train_step, tg.Trainer.restore

    def slow_step(*args):
        time.sleep(pause)
        return train_step(*args)

    def restore_and_save(run, saved):
        restore(run, saved)
        save_now(run)

    tg.Trainer.train_step = slow_step
    if save_again:
        tg.Trainer.restore = restore_and_save
    tg.KEPT_CHECKPOINTS, tg.matrix_ceiling = keep, lambda *_: 1e9
    tg.parse_config = lambda argv: (tiny(**given), {})
    sys.exit(tg.main())


FORKS = get_context("forkserver")  # processes of it have it already, and start in no time
FORKS.set_forkserver_preload(["train_gpt", "pytest"])


def start(folder: Path, *given: dict) -> list:
    """A group of processes, one for each dict, as torchrun would start them; the folder gets their output."""
    processes = []
    for rank, environment in enumerate(group_environments(len(given))):
        configuration = given[rank]
        arguments = configuration, environment, f"{folder}/process{rank}"
        processes.append(FORKS.Process(target=program, args=arguments, daemon=True))
        processes[-1].start()
    return processes


HANGS = 240  # seconds after which a process does not only work on a slow machine


def finish(folder: Path, processes: list, timeout: float = HANGS) -> list[tuple[int, str, str]]:
    """[(exit code, stdout, stderr)] of each; they have so many seconds."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    for process in processes:  # none, if all is well
        process.kill()
        process.join()
    return [
        (process.exitcode, *((folder / f"process{rank}.{end}").read_text() for end in ("out", "err")))
        for rank, process in enumerate(processes)
    ]


def same_bits(a: dict, b: dict) -> bool:
    same = lambda x, y: same_bits(x, y) if isinstance(x, dict) else torch.equal(x, y)  # noqa: E731
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def assert_close_ends(a: dict, b: dict) -> None:
    """Two runs' checkpoints of the same step: other orders of summation, no other tokens."""
    assert all(a[name] == b[name] for name in ("step", "tied", "loader", "tokens_seen"))
    for name, p in a["model"].items():
        distance = (p.float() - b["model"][name].float()).norm() / b["model"][name].float().norm().clamp_min(
            1e-3
        )
        assert distance < 0.02, (name, distance)


@pytest.mark.parametrize("step", [6])
def test_resumed_by_two_processes_it_ends_as_with_one(step, undisturbed, tmp_path):
    """Their shares come out of the whole state, and the whole one out of their shares, to the last bit."""
    cfg = resumable(undisturbed, tmp_path, step)
    given = dict(
        data_dir=cfg.data_dir, log_dir=cfg.log_dir, dtype=cfg.dtype, resume=True, save_every=2, **BASE
    )
    results = finish(tmp_path, start(tmp_path, *[given | dict(keep=99, save_again=True)] * 2))
    assert [code for code, *_ in results] == [0, 0], results
    saved = {int(path.stem[-6:]): torch.load(path) for path in tmp_path.glob("*.pt")}
    before = torch.load(undisturbed.checkpoints[step])
    assert same_bits(saved[step]["model"], before["model"]) and same_bits(
        saved[step]["optimizer"], before["optimizer"]
    )
    assert_close_ends(saved[STEPS], torch.load(undisturbed.checkpoints[STEPS]))
    # and back: one process goes on from what two saved, before and after the untie step
    for back in (UNTIED - 2, UNTIED):
        folder = tmp_path / str(back)
        folder.mkdir()
        shutil.copy(next(tmp_path.glob(f"*.step{back:06d}.pt")), folder)
        run = RecordedRun(replace(cfg, log_dir=str(folder)))
        run.fit()
        expected = [entry for entry in undisturbed.losses if entry[1] >= back + (entry[0] == "training")]
        assert [entry[:2] for entry in run.losses] == [entry[:2] for entry in expected]
        assert [entry[2] for entry in run.losses] == pytest.approx([entry[2] for entry in expected], abs=2e-3)


def test_processes_that_find_different_checkpoints_say_so(tiny_data, tmp_path):
    """Several nodes whose log folders are not the same: going on would mix two runs."""
    save_at(a_run(tiny_data, tmp_path / "node0"), 6)
    given = dict(data_dir=str(tiny_data), resume=True, **BASE)
    processes = start(tmp_path, *[given | {"log_dir": str(tmp_path / f"node{n}")} for n in range(2)])
    for code, _, err in finish(tmp_path, processes):
        assert code == 2 and "different checkpoints" in err, err
    assert not (tmp_path / "node1").exists()


# ---- what lies on disk


def a_run(tiny_data, tmp_path, **changes) -> RecordedRun:
    return RecordedRun(tiny(data_dir=str(tiny_data), log_dir=str(tmp_path), **BASE | changes))


def save_now(run: tg.Trainer) -> None:
    run.log.begin()
    run.clock.start()
    run.save()
    run.clock.stop()


def save_at(run: tg.Trainer, step: int) -> Path:
    run.steps_done = step
    save_now(run)
    return Path(run.cfg.log_dir) / f"{run.log.run_id}.step{step:06d}.pt"


def step_found(cfg: tg.Config, passed_over: list[str] | None = None) -> int | None:
    """The step of what --resume would go on from; passed_over gets what it says of the others."""
    content, _ = tg.newest_checkpoint(cfg, [] if passed_over is None else passed_over)
    return content and content["step"]


def test_two_are_kept_and_a_reader_never_sees_a_half_one(tiny_data, tmp_path):
    run, over, loaded, broken = a_run(tiny_data, tmp_path), threading.Event(), [], []

    def read():
        while not over.is_set():
            for path in tmp_path.glob("*.pt"):
                try:
                    loaded.append(torch.load(path)["step"])
                except FileNotFoundError:  # rotated away meanwhile
                    pass
                except Exception as error:  # noqa: BLE001
                    broken.append((path.name, error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        step = 0
        while len(set(loaded)) <= 5 and not broken and step < 2000:  # as long as this machine's reader needs
            step += 2
            save_at(run, step)
            kept = sorted(int(path.stem[-6:]) for path in tmp_path.glob("*.pt"))
            assert kept == [step - 2, step][2 - min(step // 2, 2) :]
    finally:
        over.set()
        reader.join()
    assert not broken and len(set(loaded)) > 5


def test_what_a_killed_process_left_half_written_is_ignored_and_cleared_away(tiny_data, tmp_path):
    run = a_run(tiny_data, tmp_path)
    good = save_at(run, 4)
    left = tmp_path / f".{good.name.replace('step000004', 'step000006')}.part"
    left.write_bytes(good.read_bytes()[:1000])
    assert step_found(run.cfg) == 4
    save_at(run, 8)
    assert not left.exists()


DAMAGE = {
    "empty": lambda whole: b"",
    "a tenth": lambda whole: whole[: len(whole) // 10],
    "a byte short": lambda whole: whole[:-1],
    "garbage": lambda whole: os.urandom(5000),
    "a hole": lambda whole: whole[: len(whole) // 2] + bytes(4096) + whole[len(whole) // 2 + 4096 :],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_file_is_skipped_with_a_word(damage, tiny_data, tmp_path, capsys):
    run = a_run(tiny_data, tmp_path)
    for state in run.optimizer.state.values():  # zeros would not mind the hole
        state["momentum_buffer"].normal_()
        state["second_moment"].normal_()
    older, newest = save_at(run, 4), save_at(run, 6)
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    capsys.readouterr()
    assert step_found(run.cfg) == 4
    with pytest.raises(tg.UserError, match="muon_lr was"):  # the older one is refused: that line is enough
        RecordedRun(replace(run.cfg, resume=True, muon_lr=0.01))
    assert capsys.readouterr().err == ""
    older.write_bytes(b"")
    resumed = RecordedRun(replace(run.cfg, resume=True))  # no whole one: from the start, with a word
    output = capsys.readouterr()
    assert resumed.steps_done == 0 and f"resume: no checkpoint in {tmp_path}" in output.out
    for path in (newest, older):
        assert re.search(rf"resume: {path} is not whole \(\w+\)", output.err)


def test_a_file_that_is_no_checkpoint_of_ours_is_skipped(tiny_data, tmp_path):
    run = a_run(tiny_data, tmp_path)
    save_at(run, 4)
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.step000009.pt")
    passed_over = []
    assert step_found(run.cfg, passed_over) == 4
    assert len(passed_over) == 1 and "other.step000009.pt" in passed_over[0]


def test_after_going_back_the_new_ones_are_kept_and_not_the_damaged(tiny_data, tmp_path):
    """What has just been saved stays, though it stands at a lower step than the damaged ones."""
    run = a_run(tiny_data, tmp_path)
    for step in (10, 12):
        save_at(run, step).write_bytes(b"damaged")
    assert save_at(run, 2).exists() and save_at(run, 4).exists()
    assert step_found(run.cfg) == 4


def kept_steps(folder: Path) -> list[int]:
    return sorted(tg.step_of(path) for path in folder.glob("*.pt"))


def test_the_newest_is_told_by_what_files_say_and_never_by_their_times(tiny_data, tmp_path, monkeypatch):
    """The clock is set back before each save, and what was saved before looks as if it had changed since."""
    run, clock, far_ahead = a_run(tiny_data, tmp_path), time.time(), time.time() + 1e6
    for step in (2, 4, 6, 8):
        clock -= 3600
        monkeypatch.setattr(time, "time", lambda now=clock: now)
        path = save_at(run, step)
        assert path.exists()
        os.utime(path, (far_ahead - step, far_ahead - step))
    assert kept_steps(tmp_path) == [6, 8] and step_found(run.cfg) == 8
    names = [
        f"{run.log.run_id}.step000099.pt",
        f"{run.log.run_id}.step000006.mine.pt",
        "backup.step000098.pt",
    ]
    copies = [shutil.copy(tmp_path / f"{run.log.run_id}.step000006.pt", tmp_path / name) for name in names]
    assert step_found(run.cfg) == 8, "it believed a copy's name"
    assert save_at(run, 10).exists() and save_at(run, 12).exists()
    assert all(Path(path).exists() for path in copies), "files that the run did not write"
    assert [step for step in kept_steps(tmp_path) if 0 <= step < 98] == [10, 12] and step_found(run.cfg) == 12
    monkeypatch.setattr(time, "time", lambda: clock + 60)  # another run, whose times of change are the past
    other = save_at(a_run(tiny_data, tmp_path), 4)
    os.utime(other, (0, 0))
    assert step_found(run.cfg) == 4


class Trap:
    """What a pickle can do to who loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_is_not_run(tiny_data, tmp_path):
    run = a_run(tiny_data, tmp_path)
    path = save_at(run, 4)
    torch.save(torch.load(path) | {"trap": Trap(tmp_path / "sprung")}, path)
    passed_over = []
    assert step_found(run.cfg, passed_over) is None and "UnpicklingError" in passed_over[0]
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap itself does not work"


def test_no_secret_of_the_environment_is_kept(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    save_at(a_run(tiny_data, tmp_path), 4)
    assert len(list(tmp_path.iterdir())) == 2 and not any(
        b"hf_secret" in path.read_bytes() for path in tmp_path.iterdir()
    )


# ---- another configuration


@pytest.mark.parametrize(
    "name, value",
    [
        ("muon_lr", 0.5),
        ("num_steps", 14),
        ("seed", 1),
        ("skips", "......"),
        ("key_offset", False),
        ("dtype", "bfloat16"),
        ("micro_batches", 4),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_by_name(
    name, value, tiny_data, tmp_path, monkeypatch, capsys
):
    run = a_run(tiny_data, tmp_path)
    save_at(run, 4)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cfg = replace(run.cfg, resume=True, **{name: value})
    monkeypatch.setattr(tg, "parse_config", lambda argv: (cfg, {}))
    capsys.readouterr()
    code, error = tg.main(), capsys.readouterr().err
    assert code == 2 and len(error.splitlines()) == 1
    assert f"--{name} was {getattr(run.cfg, name)}, is {value}" in error and error.count(" was ") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # not even a line in the log


def test_a_field_that_came_after_a_checkpoint_stood_at_its_default(tiny_data, tmp_path):
    """What a newer train_gpt.py can be asked for was not asked for then; another value is refused."""
    run = a_run(tiny_data, tmp_path)
    path = save_at(run, 4)
    content = torch.load(path)
    config = json.loads(content["config"])
    for name in ("yarn_limit", "gate_beta2"):
        assert config.pop(name) == getattr(tg.Config(), name)
    torch.save(content | {"config": json.dumps(config)}, path)
    env = tg.DistEnv(0, 1, torch.device("cpu"))
    assert tg.find_checkpoint(run.cfg, env)["step"] == 4
    with pytest.raises(tg.UserError, match="--gate_beta2 was 0.99, is 0.9[;)]"):
        tg.find_checkpoint(replace(run.cfg, gate_beta2=0.9), env)


def test_a_checkpoint_of_before_o_and_the_loss_changed_is_refused(tiny_data, tmp_path, monkeypatch, capsys):
    """It has no format in it. Its shapes would fit, and the run would go on with o turned over."""
    run = a_run(tiny_data, tmp_path)
    path = save_at(run, 4)
    content = torch.load(path)
    assert content.pop("format") == tg.CHECKPOINT_FORMAT
    torch.save(content, path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(tg, "parse_config", lambda argv: (replace(run.cfg, resume=True), {}))
    capsys.readouterr()
    code, error = tg.main(), capsys.readouterr().err
    assert code == 2 and len(error.splitlines()) == 1
    assert f"{path}: a checkpoint of another train_gpt.py" in error and "--log_dir" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- a checkpoint that somebody has changed

STEP = 6  # at which the run stands whose checkpoint is changed


def with_tensor(part: str, name: str, change):
    """A checkpoint's change: one tensor is another."""

    def changed(content: dict) -> None:
        tensors, *keys = content[part], *name.split()
        for key in keys[:-1]:
            tensors = tensors[key]
        old = tensors.get(keys[-1])
        tensors[keys[-1]] = change(old if old is None else old.clone())

    return changed


def setting(**values):
    def changed(content: dict) -> None:
        content.update(values)

    return changed


def without(name: str):
    def changed(content: dict) -> None:
        del content[name]

    return changed


CHANGES = {
    "a run id that leads elsewhere": setting(run_id="../../x"),
    "an absolute run id": setting(run_id="/tmp/x"),
    "a run id of two lines": setting(run_id="a\nb"),
    "a run id that is too long": setting(run_id="a" * 300),
    "no config": without("config"),
    "a config that is no JSON": setting(config="{"),
    "a config nested too deep": setting(config="[" * 100_000),
    "a config that is a list": setting(config="[1, 2]"),
    "a config that is a list of pairs": setting(config='[["preset", "cpu"]]'),
    "no weights": without("model"),
    "no average": without("average"),
    "a step that is a word": setting(step="six"),
    "a step that is a truth value": setting(step=True),
    "no step yet": setting(step=0),
    "a step before the first": setting(step=-2),
    "a step behind the last": setting(step=STEPS + 1),
    "a clock that is no number": setting(clock=float("nan")),
    "fewer than no tokens": setting(tokens_seen=-1),
    "an average that is no number": setting(average=float("inf")),
    "a place in no shard": setting(loader=(10**6, 0)),
    "a place in no document": setting(loader=(0, 10**9)),
    "a place before the first": setting(loader=(0, -1)),
    "a place of three numbers": setting(loader=(0, 0, 0)),
    "a random state of another size": setting(rng=torch.zeros(3, dtype=torch.uint8)),
    "a random state of noise": setting(rng=torch.full((5056,), 255, dtype=torch.uint8)),
    "a line for the log": setting(torch="2\nstep:13/13 val_loss:0.1"),
    "a tensor too many": with_tensor("model", "more", lambda t: torch.ones(1)),
    "a weight of another shape": with_tensor("model", "embed", lambda t: t[:-1]),
    "a weight of another type": with_tensor("model", "embed", lambda t: t.double()),
    "a weight that is a number": with_tensor("model", "embed", lambda t: 1.0),
    "a sparse weight": with_tensor("model", "embed", lambda t: t.to_sparse()),
    "a weight without memory": with_tensor("model", "embed", lambda t: t.to("meta")),
    "a weight that is not finite": with_tensor(
        "model", "mlp", lambda t: t.index_fill_(0, torch.tensor(0), torch.nan)
    ),
    "a state that would be spread": with_tensor("optimizer", "mlp momentum_buffer", lambda t: t[:1, :1, :1]),
    "a state that is not finite": with_tensor("optimizer", "mlp second_moment", lambda t: t.fill_(torch.inf)),
    "live weights of another shape": with_tensor("live", "embed", lambda t: t[:-1]),
    "no live weights": without("live"),
    "a window of another step": with_tensor("model", "long_window", lambda t: t.fill_(7)),
    "an optimizer of lists": setting(optimizer={"mlp": [1]}),
}


@pytest.fixture(scope="module")
def saved_run(tiny_data, tmp_path_factory):
    """A run that stands at STEP, its checkpoint's content, and its log."""
    folder = tmp_path_factory.mktemp("saved")
    run = a_run(tiny_data, folder, save_every=STEP, num_steps=STEPS)
    run.dies_at = STEP
    with pytest.raises(Killed):
        run.fit()
    [path], [log] = folder.glob("*.pt"), folder.glob("*.txt")
    return SimpleNamespace(cfg=replace(run.cfg, resume=True), path=path, log=log)


def all_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended(cfg: tg.Config, monkeypatch, capsys) -> tuple[int, str]:
    """The program on this configuration -> exit code, standard error."""
    monkeypatch.setattr(tg, "parse_config", lambda argv: (cfg, {}))
    capsys.readouterr()
    return tg.main(), capsys.readouterr().err


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_checkpoint_is_refused_by_its_name(name, saved_run, tmp_path, monkeypatch, capsys):
    """Whole files, that torch loads; nothing is written for them, neither here nor elsewhere."""
    folder = tmp_path / "a" / "logs"
    folder.mkdir(parents=True)
    path = folder / saved_run.path.name
    content = torch.load(saved_run.path)
    CHANGES[name](content)
    torch.save(content, path)
    shutil.copy(saved_run.log, folder)
    before = all_files(tmp_path)
    code, error = ended(replace(saved_run.cfg, log_dir=str(folder)), monkeypatch, capsys)
    assert code == 2 and len(error.splitlines()) == 1, error
    assert error.startswith(f"train_gpt.py: error: {path}: "), error
    assert all_files(tmp_path) == before


def test_the_checkpoint_that_those_changes_start_from_is_accepted(saved_run, tmp_path):
    shutil.copy(saved_run.path, tmp_path)
    run = RecordedRun(replace(saved_run.cfg, log_dir=str(tmp_path)))
    assert run.steps_done == STEP
    run.log.close()


def test_two_processes_do_not_go_on_with_one_run(saved_run, tmp_path, monkeypatch, capsys):
    for path in (saved_run.path, saved_run.log):
        shutil.copy(path, tmp_path)
    cfg = replace(saved_run.cfg, log_dir=str(tmp_path))
    first = RecordedRun(cfg)
    before = all_files(tmp_path)
    code, error = ended(cfg, monkeypatch, capsys)
    assert code == 2 and len(error.splitlines()) == 1, error
    assert f"{first.log.path}: another process goes on with this run" in error
    assert all_files(tmp_path) == before
    first.fit()
    assert len([line for line in events_of(tmp_path) if line.startswith("resumed: from")]) == 1
    again = RecordedRun(cfg)  # now that the first has ended
    assert again.steps_done == STEPS
    again.log.close()


def test_a_log_says_what_changed_since_the_checkpoint(saved_run, tmp_path, monkeypatch):
    for path in (saved_run.path, saved_run.log):
        shutil.copy(path, tmp_path)
    before, hardware = tg.source_hash(), torch.load(saved_run.path)["hardware"]
    monkeypatch.setattr(tg, "SOURCE", tg.SOURCE + "# edited\n")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(tg.Cpu, "name", lambda machine: "Another CPU")
    run = RecordedRun(replace(saved_run.cfg, log_dir=str(tmp_path)))
    run.log.close()
    changes = [line for line in events_of(tmp_path) if line.startswith("resumed:")]
    assert changes[1] == f"resumed: source changed, sha256 was {before}, is {tg.source_hash()}"
    assert changes[2].startswith("resumed: torch changed, was 2.") and changes[2].endswith(", is 9.9.9")
    assert changes[3].startswith(f"resumed: hardware changed, was {hardware}, is Another CPU; 1 process(es)")


def test_what_auto_came_to_on_the_machine_that_saved_counts(tiny_data, tmp_path, monkeypatch):
    """Else weights would lose their low bits, or gain some, on a machine of another kind."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    run = a_run(tiny_data, tmp_path, dtype="auto")
    save_at(run, 4)
    env = tg.DistEnv(rank=0, world_size=1, device=torch.device("cpu"))
    assert tg.find_checkpoint(replace(run.cfg, dtype="bfloat16"), env)["step"] == 4
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(tg.UserError, match="--dtype was bfloat16, is float32"):
        tg.find_checkpoint(run.cfg, env)


# ---- a full disk


def test_a_checkpoint_that_does_not_fit_leaves_the_last_good_one(undisturbed, tmp_path, monkeypatch):
    """A limit on the size of files stands for the full disk: writing fails half-way, as there."""

    class Run(RecordedRun):
        def train_step(self, step):
            if step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
            return super().train_step(step)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = Run(replace(undisturbed.cfg, log_dir=str(tmp_path)))
    try:
        run.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same_state(state_of(run), undisturbed.state)  # the run went on
    assert sorted(int(path.stem[-6:]) for path in tmp_path.glob("*.pt")) == [2, 4] and not list(
        tmp_path.glob(".*")
    )
    assert step_found(run.cfg) == 4
    failures = [line for line in events_of(tmp_path) if "NOT saved" in line]
    assert [
        re.match(r"checkpoint: NOT saved at step (\d+), the last good one stays", line)[1]
        for line in failures
    ] == ["6", "8", "10", "12", "13"]
    assert all(line.endswith("File too large)") for line in failures), failures


@pytest.mark.slow
def test_a_disk_that_is_really_full(tiny_data, tmp_path):
    """A file system of 12 MiB of its own: two checkpoints of 4.6 MiB fit, the third does not."""
    if (
        not shutil.which("unshare")
        or run_command(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path]).returncode
    ):
        pytest.skip("no mounting here")
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    given = dict(data_dir=str(tiny_data), log_dir=str(disk), save_every=2) | BASE | dict(ema_rate=0.0)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from test_checkpoints import program; "
        f"program({given}, {{}}, {str(tmp_path / 'process')!r})"
    )
    mount = f"mount -t tmpfs -o size=12m tmpfs {disk}"
    script = f'{mount} && {sys.executable} -c "$0"; code=$?; cp -r {disk} {out}; exit $code'
    result = run_command(["unshare", "-rm", "sh", "-c", script, code])
    assert result.returncode == 0, result.stderr
    events = events_of(out)
    assert re.match(rf"step:{STEPS}/{STEPS} val_loss:", events[-1])
    failures = [line for line in events if "NOT saved at step" in line]
    assert len(failures) == 5 and "No space left on device" in failures[0], events
    assert sorted(torch.load(path)["step"] for path in out.glob("*.pt")) == [2, 4] and not list(
        out.glob(".*")
    )


def test_a_log_that_cannot_be_written_does_not_end_the_run(tiny_data, tmp_path, capsys):
    run = a_run(tiny_data, tmp_path, num_steps=2)
    run.log.begin()
    run.log.file.close()
    run.log.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115, the run closes it
    run.fit()
    output = capsys.readouterr()
    assert (
        "step:2/2 val_loss:" in output.out
        and "log: a line could not be written (No space left on device)" in output.err
    )


# ---- signals

SIGNALS = {  # name: (signals to each process, --save_on_stop, exit codes)
    "sigterm": ([signal.SIGTERM], False, [143]),
    "ctrl-c": ([signal.SIGINT], False, [130]),
    "sigterm, saved": ([signal.SIGTERM], True, [143]),
    "ctrl-c, saved": ([signal.SIGINT], True, [130]),
    "two processes, ctrl-c": ([signal.SIGINT, signal.SIGINT], False, [130, 130]),
    "two processes, one is told, saved": ([signal.SIGTERM, None], True, [143, 130]),
}


@pytest.fixture(scope="module")
def signalled(tiny_data, tmp_path_factory):
    """{name: (folder, the processes' results, seconds from signal to end)}; all at once: they mostly wait."""
    started, told, ended = {}, {}, {}
    for name, (signals, save, _) in SIGNALS.items():
        folder = tmp_path_factory.mktemp("signalled")
        given = dict(data_dir=str(tiny_data), log_dir=str(folder), save_on_stop=save, pause=0.5, **BASE)
        started[name] = folder, start(folder, *[given] * len(signals))
    while len(ended) < len(SIGNALS):
        for name, (folder, processes) in started.items():
            if name in told:
                if name not in ended and all(process.exitcode is not None for process in processes):
                    ended[name] = folder, finish(folder, processes), time.monotonic() - told[name]
            elif any(re.search("^step:3/", log.read_text(), re.MULTILINE) for log in folder.glob("*.txt")):
                for process, number in zip(processes, SIGNALS[name][0], strict=True):
                    os.kill(process.pid, number or 0)
                told[name] = time.monotonic()
            else:
                assert processes[0].exitcode is None, finish(folder, processes)
        time.sleep(0.02)
    return ended


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_the_run_with_a_whole_log(name, signalled):
    (folder, results, seconds), (signals, _, codes) = signalled[name], SIGNALS[name]
    assert [code for code, *_ in results] == codes, results
    assert not any("Traceback" in err for *_, err in results), results
    assert seconds < HANGS
    events = events_of(folder)
    word = re.match(
        rf"interrupted: (\d+) of {STEPS} steps done, train_time:\d+ms \({signals[0].name}\)", events[-1]
    )
    assert word and results[0][1].splitlines()[-1] == events[-1], events
    assert 3 <= int(word[1]) < STEPS, "the signal came too late for this test"


SAVING = [name for name, (_, save, _) in SIGNALS.items() if save]


@pytest.mark.parametrize(
    "name", [SAVING[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SAVING[1:])]
)
def test_a_signal_saves_if_asked_to_and_the_resumed_run_ends_alike(name, signalled, tiny_data, tmp_path):
    folder, results, _ = signalled[name]
    events, [path] = events_of(folder), folder.glob("*.pt")
    saved = torch.load(path)
    assert saved["step"] % 2 == 0 and events[-2] == f"checkpoint: {path}"
    assert events[-1].startswith(f"interrupted: {saved['step']} of")
    whole = a_run(tiny_data, tmp_path)
    whole.fit()
    resumed = RecordedRun(replace(whole.cfg, log_dir=str(folder), resume=True))
    resumed.fit()
    if len(results) == 1:
        assert_same_state(state_of(resumed), state_of(whole))
    assert resumed.losses[-1][2] == pytest.approx(whole.losses[-1][2], abs=0 if len(results) == 1 else 2e-3)


@pytest.mark.parametrize("name", [name for name, (_, save, _) in SIGNALS.items() if not save])
def test_without_the_flag_a_signal_saves_nothing(name, signalled):
    assert not list(signalled[name][0].glob("*.pt"))


def test_a_signal_while_nothing_new_is_there_to_save_ends_the_run_at_once(tiny_data, tmp_path):
    """In the warm-up, which may take minutes, a supervisor would kill what does not leave."""
    run = a_run(tiny_data, tmp_path, save_on_stop=True)
    run.signals.may_save = lambda: run.steps_done > run.began_at
    with pytest.raises(tg.Stopped, match="SIGTERM"):
        run.signals.on_signal(signal.SIGTERM, None)
    run.steps_done = 1
    run.signals.on_signal(signal.SIGTERM, None)  # remembered
    run.signals.on_signal(signal.SIGTERM, None)  # torchrun's, behind the terminal's: one wish
    run.signals.heard_at -= 3
    with pytest.raises(tg.Stopped):  # later: somebody does not want to wait
        run.signals.on_signal(signal.SIGINT, None)
    run.signals.leaving, run.steps_done = True, run.began_at
    try:
        run.signals.on_signal(signal.SIGINT, None)
    except tg.Stopped:  # pytest would take it for a Ctrl-C of its own
        pytest.fail("on its way out already, the log was being ended")


# ---- processes that die

NAN = tg.RunFailed("the training loss is nan")


@pytest.mark.parametrize(
    "error, heard, line",
    [
        (tg.Stopped("SIGINT"), "SIGINT", "interrupted: 3 of 13 steps done, train_time:0ms (SIGINT)"),
        (
            RuntimeError("connection closed"),
            "SIGTERM",
            "interrupted: 3 of 13 steps done, train_time:0ms (SIGTERM)",
        ),
        (RuntimeError("connection closed"), None, "failed: connection closed"),
        (NAN, "SIGTERM", "failed: the training loss is nan"),
    ],
)
def test_what_ended_a_run_is_told_apart(error, heard, line, tiny_data, tmp_path, monkeypatch):
    """A process among four. torchrun sends SIGTERM also when another has died; who hears it first is gone."""

    class Run(RecordedRun):
        def __init__(self, cfg, overrides):
            super().__init__(cfg)
            self.env = tg.DistEnv(rank=0, world_size=4, device=self.env.device)

        def fit(self):
            self.steps_done, self.signals.name = 3, heard
            raise error

    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(tg, "Trainer", Run)
    stopped = line.startswith("interrupted")
    with pytest.raises(tg.Stopped if stopped else (tg.RunFailed, RuntimeError)) as raised:
        tg.train(tiny(data_dir=str(tiny_data), log_dir=str(tmp_path), **BASE), {})
    assert events_of(tmp_path)[-1].startswith(line)
    assert bool(waited) == isinstance(error, RuntimeError)  # a lost connection: torchrun names the dead
    assert not stopped or str(raised.value) == heard  # its exit code depends on it


@pytest.mark.parametrize("words, lost", [("Timed out waiting 1000ms for recv", True), ("shape [2]", False)])
def test_who_is_lost_while_processes_start_is_no_bug(words, lost, monkeypatch):
    """One counts, the others wait for it: longer than --rank_timeout, or for ever."""

    def trainer(cfg, overrides):
        raise RuntimeError(words)

    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(tg, "Trainer", trainer)
    with pytest.raises((RuntimeError, tg.RunFailed), match=words.split("[")[0]) as raised:
        tg.train(tiny(), {})
    assert isinstance(raised.value, tg.RunFailed) == lost == bool(waited)
    assert not lost or "--rank_timeout is too short" in str(raised.value)


# ---- losses that go wrong


def disturb(run: tg.Trainer, step: int, change) -> None:
    """Calls change(model) before a step."""
    inner = run.train_step

    def train_step(number):
        if number == step:
            with torch.no_grad():
                change(run.model)
        return inner(number)

    run.train_step = train_step


@pytest.mark.parametrize("name", ["mlp", "value_embed_0", "resid_scale"])
def test_a_loss_that_is_not_a_number_is_named_with_step_and_group(name, tiny_data, tmp_path):
    run = a_run(tiny_data, tmp_path)
    disturb(run, 4, lambda model: getattr(model, name).fill_(float("nan")))
    with pytest.raises(tg.RunFailed, match=rf"the training loss is nan at step 5 \(.*\b{name}\b"):
        run.fit()


def test_a_spike_is_named_with_step_and_group_and_the_run_goes_on(tiny_data, tmp_path):
    run = a_run(tiny_data, tmp_path)
    disturb(run, 6, lambda model: model.lm_head.mul_(-5))
    run.fit()
    events = events_of(tmp_path)
    spikes = [line for line in events if line.startswith("spike:")]
    assert re.match(
        r"spike: train_loss \d+\.\d+ at step 7, \d\.\d+ before; "
        r"grown most since the last validation: lm_head, from norm \S+ to \S+",
        spikes[0],
    ), spikes
    assert events[events.index(spikes[0]) - 1].startswith("step:7/"), "there was one before"


def test_a_quiet_run_has_no_spikes(undisturbed):
    assert not any(line.startswith("spike:") for line in undisturbed.events)


# ---- the fault program


@pytest.mark.slow
def test_two_runs_are_killed_at_a_random_moment_and_resumed(corpus_dir):
    """One process, then one of two; tests/programs/faults.py is the whole of it."""
    command = [sys.executable, "-m", "tests.programs.faults"]
    result = run_command([*command, "--kills", 2, "--ranks", "1,2", "--steps", 2])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 killed runs ended bit for bit" in result.stdout
