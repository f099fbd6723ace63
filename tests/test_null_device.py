"""What of null_device.py works without a CUDA build: its arguments, its reasons to skip, its figures and
its table.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

import null_device as nd
import pytest
import torch
from conftest import ROOT
from null_device import Case

import train_gpt as tg


def step_of(launched: int = 0, replayed: int = 0, replays: int = 0, **more: int) -> dict[str, int]:
    known = {"launched kernel": launched, "replayed kernel": replayed, "replays": replays}
    return dict.fromkeys(nd.COUNTS, 0) | known | more


def outcome(steps: list[dict], began: float = 100.0, started: float = 160.0, **syncs: int) -> dict:
    return {
        "allocated": 3 * 2**29,
        "reserved": 2**31,
        "began": began,
        "started": started,
        "steps": steps,
        "syncs": syncs,
        "fallbacks": [],
    }


def test_every_case_by_default_and_one_gpu_alone():
    cases = nd.cases(nd.parse([]))
    assert cases[:4] == [
        Case("short", 1, True),
        Case("short", 1, False),
        Case("short", 4, True),
        Case("short", 4, False),
    ]
    assert [case for case in cases if case.preset == "one-gpu"] == [
        Case("one-gpu", 1, True),
        Case("one-gpu", 1, False),
    ]
    assert len(cases) == len(set(cases)) == 10


def test_a_few_cases():
    assert nd.cases(nd.parse(["--presets", "medium", "--ranks", "8", "2", "--graphs", "off"])) == [
        Case("medium", 2, False),
        Case("medium", 8, False),
    ]
    assert nd.cases(nd.parse(["--presets", "one-gpu", "--ranks", "4"])) == []
    [case] = nd.cases(
        nd.parse(["--presets", "one-gpu", "--graphs", "on", "--more=--exclusive --ema_rate 0.05"])
    )
    assert case.more == ("--exclusive", "--ema_rate", "0.05")


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--presets", "cpu"], "cpu"),
        (["--ranks", "3"], "3"),
        (["--graph", "on"], "--graph"),
        (["--train_gpt", "no_such.py"], "no_such.py"),
    ],
)
def test_wrong_arguments_are_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        nd.main(flags)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and word in told and len(told.splitlines()) == 1, told


def test_no_case_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        nd.main(["--presets", "one-gpu", "--ranks", "4"])
    assert stopped.value.code == 2 and "one-gpu" in capsys.readouterr().err


def test_without_a_cuda_build_the_program_says_so_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert nd.main(["--presets", "short"]) == 0
    reason = f"torch {torch.__version__} is not a CUDA build; the top of this file says how to install one"
    assert capsys.readouterr().out == f"null_device.py: skipped: {reason}\n"


def test_each_thing_that_is_missing_has_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no gcc" in nd.skip_reason()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(nd, "header_folders", lambda: [tmp_path])
    for name in ("cuda_runtime_api.h", "crt/host_defines.h", "nv/target", "nccl.h"):
        assert name in nd.skip_reason()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert nd.skip_reason() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux" in nd.skip_reason()


def config(preset: str, *flags: str) -> tg.Config:
    """What the program runs a preset with, on one rank."""
    flags = (*nd.steps_of(preset), "--val_tokens", str(2 * nd.VAL_SEQ_LEN), *flags)
    return tg.parse_config(["--preset", preset, *flags])[0]


def test_every_preset_for_gpus_is_run_but_the_older_form_of_medium():
    assert {name for name, cfg in tg.PRESETS.items() if cfg.device == "cuda"} == {*nd.PRESETS, "medium-2025"}


@pytest.mark.parametrize("preset", nd.PRESETS)
def test_the_steps_meet_every_stage_and_the_untie_step(preset):
    cfg = config(preset)
    schedule = tg.Schedule(cfg)
    met = Counter(schedule.stage_index(step) for step in range(cfg.num_steps))
    assert met == dict.fromkeys(range(len(cfg.stages)), 2)  # an even and an odd step each
    assert schedule.untie_step < cfg.num_steps - 1  # and steps after it
    assert cfg.val_seq_len == nd.VAL_SEQ_LEN and cfg.val_every < cfg.num_steps


def test_the_data_lasts_for_every_run(tmp_path):
    nd.make_data(tmp_path / "data", 2 * nd.VAL_SEQ_LEN)
    for preset in nd.PRESETS:
        cfg = config(preset, "--data_dir", str(tmp_path / "data"))
        tg.Loader(cfg).check_enough(tg.Schedule(cfg))
        assert tg.Validation(cfg).count == 2


# the rules of capture, in the null device's own library


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> ctypes.CDLL:
    """nullcudart.c, compiled with as much of CUDA's header as it names: this test needs no CUDA."""
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc to build the null device with")
    library, source = tmp_path_factory.mktemp("null") / "libnullcudart.so", nd.TESTS / "nullgpu"
    flags = ["-shared", "-fPIC", "-Wl,-Bsymbolic", f"-I{source / 'testing'}", "-lpthread", "-ldl"]
    subprocess.run(["gcc", source / "nullcudart.c", *flags, "-o", library], check=True)
    return ctypes.CDLL(str(library))


ERRORS = re.findall(
    r"^  (cuda(?:Success|Error\w+))", (nd.TESTS / "nullgpu/testing/cuda_runtime_api.h").read_text(), re.M
)


class Capture:
    """Streams 0, 1 and 2 of CUDA, two of our own, an event; calls by name, which give the name of their
    error."""

    def __init__(self, runtime: ctypes.CDLL):
        self.runtime, self.graph = runtime, ctypes.c_void_p()
        self.streams = [*map(ctypes.c_void_p, range(3)), ctypes.c_void_p(), ctypes.c_void_p()]
        for stream in self.streams[3:]:
            self("cudaStreamCreate", ctypes.byref(stream))
        self.event = ctypes.c_void_p()
        self("cudaEventCreate", ctypes.byref(self.event))

    def __call__(self, name: str, *args) -> str:
        return ERRORS[getattr(self.runtime, name)(*args)]

    def begin(self) -> None:
        assert self("cudaStreamBeginCapture", self.streams[3], 1) == "cudaSuccess"

    def wait(self, stream: int, recorded_on: int) -> str:
        """The stream waits for what another has recorded."""
        assert self("cudaEventRecord", self.event, self.streams[recorded_on]) == "cudaSuccess"
        return self("cudaStreamWaitEvent", self.streams[stream], self.event, 0)

    def end(self) -> str:
        return self("cudaStreamEndCapture", self.streams[3], ctypes.byref(self.graph))


def test_a_capture_takes_in_a_stream_that_waits_for_it(runtime):
    capture = Capture(runtime)
    capture.begin()
    assert capture.wait(4, recorded_on=3) == capture.wait(3, recorded_on=4) == "cudaSuccess"
    assert capture.wait(0, recorded_on=1) == "cudaSuccess"  # neither has to do with it
    assert capture.end() == "cudaSuccess" and capture.graph.value
    assert capture.wait(0, recorded_on=3) == "cudaSuccess"  # it is over


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_default_stream_cannot_join_a_capture_and_ends_it(runtime, stream):
    capture = Capture(runtime)
    capture.begin()
    assert capture.wait(stream, recorded_on=3) == "cudaErrorStreamCaptureImplicit"
    assert capture.end() == "cudaErrorStreamCaptureInvalidated" and not capture.graph.value
    capture.begin()  # the next one is as good as ever
    assert capture.end() == "cudaSuccess" and capture.graph.value


@pytest.mark.parametrize("call", ["cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"])
def test_a_host_that_waits_during_a_capture_ends_it(runtime, call):
    capture = Capture(runtime)
    capture.begin()
    capture("cudaEventRecord", capture.event, capture.streams[3])
    waits_for = {"cudaStreamSynchronize": capture.streams[3], "cudaEventSynchronize": capture.event}
    args = [waits_for[call]] if call in waits_for else []
    assert capture(call, *args) == "cudaErrorStreamCaptureUnsupported"
    assert capture.end() == "cudaErrorStreamCaptureInvalidated" and not capture.graph.value
    assert capture("cudaDeviceSynchronize") == "cudaSuccess"


def test_the_counters_have_the_order_of_the_c_source():
    header = (nd.TESTS / "nullgpu" / "counts.h").read_text()
    order = re.search(r"enum \{ (.*) \};", header)[1].lower().split(", ")
    assert order == [*nd.KINDS, "kinds"]
    filled = re.findall(
        r"out\[2 \* KINDS(?: \+ \d)?\] = (\w+)", (nd.TESTS / "nullgpu" / "nullcudart.c").read_text()
    )
    assert tuple(filled) == nd.COUNTS[2 * len(nd.KINDS) :]


def test_figures_of_a_run_with_graphs():
    steps = [step_of(launched=2, replayed=998, replays=2, **{"launched copy": 7}) for _ in range(4)]
    f = nd.figures(outcome(steps, started=400.0), outcome(steps), kernels=9, spilling=1)
    assert (f.allocated, f.reserved, f.cold, f.warm, f.kernels, f.spilling) == (1.5, 2.0, 300.0, 60.0, 9, 1)
    # A replay is a launch; copies are no work.
    assert (f.work, f.launches, f.replayed) == (
        1000.0,
        4.0,
        0.998,
    )


def test_figures_without_graphs_and_with_all_kinds_of_work():
    f = nd.figures(None, outcome([step_of(10, **{"launched blas": 20, "launched nccl": 30})]), 0, 0)
    assert (f.work, f.launches, f.replayed, f.cold) == (60.0, 60.0, 0.0, None)


def test_a_row_of_the_table():
    f = nd.figures(
        outcome([], started=400.0), outcome([step_of(500, 500, 1)], **{"10: a": 3, "20: b": 1}), 1234, 5
    )
    expected = "| short | 4 | on | 1.5 | 2.0 | 1234 | 5 | 300 | 60 | 1,000 | 501 | 50.0 % | 4 |"
    assert nd.row(Case("short", 4, True), f) == expected
    assert (
        nd.row(Case("short", 4, False), nd.figures(None, outcome([step_of(1)]), 1, 0)).split(" | ")[7] == ""
    )
    assert nd.line(nd.HEAD).count("|") == nd.row(Case("short", 4, True), f).count("|")


def test_the_table_goes_between_the_markers_and_keeps_other_cases(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{nd.BEGIN}\n{nd.END}\nafter\n")
    head = [nd.line(nd.HEAD), nd.line(("---",) * len(nd.HEAD))]

    def rows(*cases: tuple) -> list[str]:
        return [nd.line(cells) for cells in cases]

    nd.write_table(
        readme, head + rows(("medium", 1, "on", "a"), ("short", 4, "off", "b"), ("short", 4, "on", "c"))
    )
    nd.write_table(
        readme, head + rows(("one-gpu", 1, "on", "d"), ("short", 4, "off", "new"), ("short", 1, "on", "e"))
    )
    table = head + rows(
        ("short", 1, "on", "e"),
        ("short", 4, "on", "c"),
        ("short", 4, "off", "new"),
        ("medium", 1, "on", "a"),
        ("one-gpu", 1, "on", "d"),
    )
    assert readme.read_text() == "\n".join(["before", nd.BEGIN, *table, nd.END, "after\n"])
    readme.write_text("no place")
    with pytest.raises(SystemExit):
        nd.write_table(readme, head)
    assert readme.read_text() == "no place"


def test_the_readme_has_a_place_for_the_table():
    text = (nd.TESTS / "README.md").read_text()
    assert text.index(nd.BEGIN) < text.index(nd.END)


def test_a_wait_is_named_by_the_line_of_the_program(tmp_path, capsys):
    path = tmp_path / "train_gpt.py"
    path.write_text("def read(warn):\n    pass\n    warn()     # as .item() does\n")
    watch, program = nd.Watch(path), {}
    exec(compile(path.read_text(), str(path), "exec"), program)
    told = "called a synchronizing CUDA operation (function warn_or_error_on_sync)"
    for _ in range(2):
        program["read"](lambda: watch.warning(UserWarning(told), UserWarning, "torch/x.py", 7))
    watch.warning(UserWarning(told), UserWarning, "torch/x.py", 7)
    assert watch.syncs == {"3: warn()     # as .item() does": 2, "torch/x.py:7": 1}
    watch.warning(UserWarning("something else"), UserWarning, "torch/x.py", 7)
    assert "something else" in capsys.readouterr().err and sum(watch.syncs.values()) == 3


def test_steps_are_counted_one_by_one_and_only_they_must_not_wait(monkeypatch):
    modes, state = [], Counter()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(nd, "counts", lambda: Counter({"launched kernel": state["k"]}))
    watch, before = nd.Watch(ROOT / "train_gpt.py"), time.time()
    step = watch.step(lambda run, n: (state.update(k=n), modes.append("step"), run)[2])
    assert step("run", 5) == "run" and step("run", 8) == "run"
    assert [s["launched kernel"] for s in watch.steps] == [5, 8]
    assert modes == ["warn", "step", "default"] * 2 and before <= watch.started <= time.time()
    modes.clear()
    report = watch.report(lambda progress, lag: modes.append("report"))
    report("progress", 0), report("progress", 1)
    assert modes == ["report", "warn", "report", "default"]


def test_what_fell_back_is_found_in_the_log():
    log = [
        "operators: attention=kernel (3.10 times as long plain), mlp=plain (kernel: OutOfResources)",
        "graphs: no graph of (16384, (128, 384)) (operation not permitted)",
        "compile: torch.compile failed: no compiler",
    ]
    good = [
        "operators: attention=kernel (3.10 times as long plain), mlp=plain (1.20 times as long kernel)",
        "compile: torch.compile",
        "step:1/8 train_loss:0.0000",
    ]
    assert nd.fallbacks("\n".join([good[0], *log, *good[1:]])) == log


def test_waits_and_fallbacks_fail_the_program(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(nd, "skip_reason", lambda: None)
    for syncs, fell_back, code in (
        ({}, [], 0),
        ({"10: x.item()": 8}, [], 1),
        ({}, ["graphs: no graph of 1"], 1),
    ):
        f = nd.figures(None, outcome([step_of(1)], **syncs) | {"fallbacks": fell_back}, 0, 0)
        monkeypatch.setattr(nd, "measure", lambda *_, f=f: iter([(Case("short", 1, True), f)]))
        assert nd.main(["--presets", "short", "--ranks", "1", "--folder", str(tmp_path)]) == code
        told = capsys.readouterr().out
        assert all(word in told for word in ("| short | 1 | on |", *syncs, *fell_back))


def test_only_what_was_not_compiled_before_runs_twice(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed (it is made for Linux)")
    runs: list[Case] = []

    def run(case, train_gpt, folder, cache):
        cache.mkdir(exist_ok=True)
        runs.append(case)
        return outcome([step_of(1)], started=100.0 + len(runs))

    monkeypatch.setattr(nd, "run", run)
    monkeypatch.setattr(nd, "build_once", lambda folder: None)
    cases = nd.cases(nd.parse(["--presets", "short"]))
    measured = list(nd.measure(cases, ROOT / "train_gpt.py", tmp_path))
    assert runs == [cases[0], *cases[:2], cases[2], *cases[2:]]
    assert [case for case, _ in measured] == cases and [f.kernels for _, f in measured] == [0] * 4
    assert [(f.cold, f.warm) for _, f in measured] == [(1.0, 2.0), (None, 3.0), (None, 5.0), (None, 6.0)]
    assert list(nd.measure(cases, ROOT / "train_gpt.py", tmp_path))[0][1].cold is None and len(runs) == 10


def test_a_run_that_fails_shows_its_end(tmp_path, monkeypatch):
    """The command is real, the program is not train_gpt.py."""
    program = tmp_path / "train_gpt.py"
    program.write_text("raise SystemExit('the planted reason')")
    monkeypatch.setattr(nd, "environment", lambda *_: None)
    with pytest.raises(RuntimeError, match="(?s)short.*the planted reason"):
        nd.run(Case("short", 1, True), program, tmp_path, tmp_path / "cache")
