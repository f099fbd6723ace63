"""The program as a user meets it: commands, logs, errors, interruptions; and that it learns."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLEAN_ENV, ROOT, assert_user_error, run_command, tiny
from test_model import PLAIN, plain_loss, randomise

import train_gpt as tg
from tests.programs import step_time

FILE = ROOT / "train_gpt.py"
SMALL = shlex.split("""
    --preset cpu --no-compile --no-warmup --model_dim 32 --head_dim 16 --val_seq_len 1024 --val_tokens 2048
    --windows ssl --paired_heads p.. --value_embeds .01 --skips a.a --backout .b. --spectral 0
    --batch_mul 0.25
""")  # seconds, not minutes


def train_small(cwd, *flags, file=FILE, **env):
    result = run_command([sys.executable, file, *SMALL, *flags], cwd=cwd, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def the_log(folder) -> tuple[str, str, list[str]]:
    """Source, header and event lines of the one log in a folder."""
    [path] = folder.glob("*.txt")
    source, header, events = path.read_text().split("\n" + tg.Log.SEPARATOR + "\n")
    return source + "\n", header, events.splitlines()


# ---- a run and its log


def test_a_log_yields_the_source_and_the_source_the_same_losses(tmp_path, corpus_dir):
    """And the form of the log, which holds no secrets."""
    source, losses = FILE.read_text(), []
    for name in ("original", "ripped"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train_gpt.py").write_text(source)  # alone in a folder: it needs nothing of the project
        out = train_small(
            folder,
            *("--data_dir", corpus_dir, "--num_steps", 3, "--val_every", 2, "--log_dir", "elsewhere"),
            file="train_gpt.py",
            HF_TOKEN="hf_secret",
        )
        source, header, events = the_log(folder / "elsewhere")
        losses.append([re.findall(r"(?:val|train)_loss:(\S+)", line) for line in events])
        assert json.loads(re.search(r"overrides:(.*)", header)[1])["num_steps"] == 3
        assert json.loads(re.search(r"config:(.*)", header)[1])["model_dim"] == 32
        assert out.rstrip().splitlines()[-1] == events[-1]
        assert "hf_secret" not in next((folder / "elsewhere").glob("*.txt")).read_text()
    assert source == FILE.read_text()
    assert losses[0] == losses[1] and len(sum(losses[0], [])) == 3 + 3
    check_form(header, events)


def check_form(header: str, events: list[str]) -> None:
    """Of a run of three steps with validations at 0, 2 and 3."""
    steps = [line for line in events if line.startswith("step:")]
    assert [re.match(r"step:(\d+)/3 (val_loss)?", line).groups() for line in steps] == [
        ("0", "val_loss"),
        ("1", None),
        ("2", None),
        ("2", "val_loss"),
        ("3", None),
        ("3", "val_loss"),
    ]
    for line in steps:
        assert re.match(
            r"step:\d+/3 (val_loss:\d+\.\d{4} )?train_time:\d+ms step_avg:\d+\.\d\dms \S", line
        ), line
    assert re.search(r"val_bpb:\d\.\d{4} tokens:6144$", steps[-1]) and steps[-1] == events[-1]
    assert re.search(r"tokens_per_second:\d+ mfu:0\.\d{3}$", steps[1])
    scalars = dict(
        re.match(r"scalars:(\w+) (.*)", line).groups() for line in events if line.startswith("scalars:")
    )
    assert len(json.loads(scalars["resid_scale"])) == 3 and {
        "x0_scale",
        "bigram_scale",
        "skip_scale",
        "backout_scale",
    } <= set(scalars)
    assert any(re.match(r"peak_memory:\d+MiB tokens:6144", line) for line in events)
    assert all(
        word in header
        for word in ("versions:", "hardware:", "precision:", "matrix ceiling:", "source_sha256:")
    )


def tiny_run(tiny_data, tmp_path, **changes) -> tg.Trainer:
    return tg.Trainer(tiny(data_dir=str(tiny_data), log_dir=str(tmp_path), **changes), {})


def test_warm_up_leaves_no_trace(tiny_data, tmp_path):
    """Losses to the last bit, with tied and untied steps and Adam's and Muon's states behind them."""
    finals = []
    for warmup in (False, True):
        run = tiny_run(tiny_data, tmp_path, num_steps=10)
        if warmup:
            tg.warm_up(run)
        finals.append((run.fit(), [p.detach().clone() for p in run.model.parameters()]))
    assert finals[0][0] == finals[1][0]
    assert all(torch.equal(a, b) for a, b in zip(finals[0][1], finals[1][1], strict=True))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_what_is_validated_is_the_moving_average(tiny_data, tmp_path, dtype):
    """By hand, over tied and untied steps; what trains on are the weights themselves."""
    losses = []
    for rate in (0.0, 0.25):
        run = tiny_run(tiny_data, tmp_path, num_steps=6, ema_rate=rate, dtype=dtype)
        live = {name: p for name, p in run.model.named_parameters() if name != "embed"}
        states = run.optimizer.state
        mean = {name: p.detach().double() for name, p in live.items()}
        losses.append([])
        for step in range(6):
            losses[-1].append(float(run.train_step(step)[0]))
            for name, p in live.items():
                twice = 1 if run.optimizer.is_muon(name) else 2 * run.optimizer.adam_turn(step)
                exact = tg.fp32_weight(p.detach(), states[name].get("mantissa_lo"))  # of all, or of matrices
                mean[name] += twice * rate * (exact.view(p.shape).double() - mean[name])
            with run.optimizer.averaged():
                for name, p in live.items():
                    expected = mean[name] if rate else p.double()
                    torch.testing.assert_close(p.double(), expected, rtol=2**-7, atol=1e-5)
                if run.optimizer.tied:
                    assert torch.equal(run.model.embed, run.model.lm_head.T)
    assert losses[0] == losses[1]


def test_the_clock_stands_still_during_validation(tiny_data, tmp_path, monkeypatch):
    run = tiny_run(tiny_data, tmp_path, num_steps=2, val_every=1)
    evaluate = run.evaluate

    def slow_evaluate(*args):
        time.sleep(0.2)
        return evaluate(*args)

    monkeypatch.setattr(run, "evaluate", slow_evaluate)  # twice in each of three validations
    began = time.perf_counter()
    run.fit()
    assert time.perf_counter() - began > 1.2 > 3 * 0.3 + run.clock.seconds() / 1e6
    assert run.clock.seconds() < time.perf_counter() - began - 1.2 + 0.05


def test_micro_batches_add_up_to_the_whole_step(tiny_data, tmp_path):
    """Two of 256 tokens are one of 512: the loss is the mean, the gradient that of the sum. Each begins with
    a document."""
    one_token = (tg.Stage(until=2.0, batch_tokens=512, windows=(16, 48), max_doc_len=96, lr_mul=1.0),)
    two = tiny_run(tiny_data, tmp_path, micro_batches=2, stages=one_token)
    parts = list(two.loader.load_batches(two.cfg.stages[0]))
    one = tiny_run(tiny_data, tmp_path, micro_batches=1, stages=one_token)
    whole = [tuple(map(torch.cat, zip(*parts, strict=True)))]
    for run, batches in ((two, parts), (one, whole)):
        randomise(run.model)
        run.step_scalars[0] = 1.0  # the weight of the next token's loss
        run.accumulate_gradients(batches, (16, 48))
    assert len(parts) == 2 and float(two.result[0]) == pytest.approx(float(one.result[0]), rel=1e-6)
    mean = one.model(*whole[0], torch.ones(1), (16, 48))
    assert float(one.result[0]) == pytest.approx(mean.item(), rel=1e-6)
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        [grad] = torch.autograd.grad(mean, p, retain_graph=True)
        for summed in (p.grad, q.grad):  # over an eighth of a step's 512 tokens, as docs/model.md says
            assert (summed - 64 * grad).norm() < 1e-4 * summed.norm(), name


@pytest.mark.parametrize("join", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_joined_micro_batches_give_the_losses_of_single_ones(monkeypatch, tiny_data, tmp_path, join):
    """Through both stages: several next tokens, of which none is asked for over a joint; every feature on."""
    monkeypatch.setattr(tg, "multiplies_bfloat16", lambda device: False)  # or Muon's products round more
    losses, ends = [], []
    for together in (1, join):
        run = tiny_run(tiny_data, tmp_path / str(together), micro_batches=4, join=together)
        losses.append([float(run.train_step(step)[0]) for step in range(run.cfg.num_steps)])
        ends.append({name: p.detach() for name, p in run.model.named_parameters()})
        run.close(failed=False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, p in ends[0].items():
        assert (p - ends[1][name]).norm() <= 2e-3 * p.norm(), name


def test_the_loss_on_joined_sequences_is_the_mean_of_theirs():
    rng = torch.Generator().manual_seed(0)
    x, head = torch.randn(24, 8, generator=rng), torch.randn(8, 32, generator=rng)
    targets, weights = torch.randint(32, (24,), generator=rng), torch.tensor([1.0, 0.5, 0.25])
    parts = zip(x.split(8), targets.split(8), strict=True)
    single = [tg.head_loss(a, head, b, weights, (23.0, 5.0, 7.5)) for a, b in parts]
    joined = tg.head_loss(x, head, targets, weights, (23.0, 5.0, 7.5), joined=3)
    assert float(joined) == pytest.approx(float(sum(single)) / 3, rel=1e-6)


@pytest.mark.parametrize("length", [1024, 1536, 100])
def test_joined_sequences_are_sampled_as_single_ones_are(length):
    """A draw follows from its chunk of targets: no chunk is to go over a joint."""
    rng = torch.Generator().manual_seed(0)
    x, head = torch.randn(3 * length, 8, generator=rng), torch.randn(8, 2048, generator=rng)
    targets, weights = torch.randint(2048, (3 * length,), generator=rng), torch.tensor([1.0])
    leaves = [x.requires_grad_(), head.requires_grad_()]
    parts = zip(x.split(length), targets.split(length), strict=True)
    single = [tg.head_loss(a, head, b, weights, (23.0, 5.0, 7.5), candidates=1536) for a, b in parts]
    joined = tg.head_loss(x, head, targets, weights, (23.0, 5.0, 7.5), joined=3, candidates=1536)
    assert joined.item() == pytest.approx(sum(single).item() / 3, rel=1e-6)
    expected = torch.autograd.grad(sum(single) / 3, leaves)
    for found, grad in zip(torch.autograd.grad(joined, leaves), expected, strict=True):
        torch.testing.assert_close(found, grad)


@pytest.mark.parametrize(
    "preset, gib, world_size, joined",
    [
        ("one-gpu", 24, 1, 1),
        ("one-gpu", 48, 1, 4),
        ("one-gpu", 80, 1, 8),
        ("one-gpu", 141, 1, 16),
        ("short", 80, 1, 2),
        ("short", 80, 4, 2),
        ("short", 80, 8, 1),
        ("medium", 80, 1, 1),
        ("cpu", 24, 1, 1),
    ],
)
def test_how_many_are_joined_by_a_gpus_memory(preset, gib, world_size, joined):
    machine = SimpleNamespace(dtype=torch.bfloat16, total_memory=lambda: int(gib * 0.98 * 2**30))
    assert tg.joined_by_memory(tg.PRESETS[preset], machine, world_size) == joined
    plain = replace(tg.PRESETS[preset], reference=True)  # attention's softmax is kept then
    assert tg.joined_by_memory(plain, machine, world_size) == 1


@pytest.mark.parametrize(
    "attention, asked_for, joined", [("kernel", 0, 4), ("plain", 0, 1), ("kernel", 2, 2), ("plain", 2, 2)]
)
def test_what_plain_attention_would_keep_is_not_joined(
    tiny_data, tmp_path, monkeypatch, attention, asked_for, joined
):
    """Whyever it is plain: --reference, --dtype, --operators, or a kernel that is wrong on this GPU."""
    chosen = {"kernel": tg.triton_attention, "plain": tg.banded_attention}[attention]
    monkeypatch.setattr(tg, "joined_by_memory", lambda *facts: 4)
    choose = tg.Cpu.choose_kernels
    monkeypatch.setattr(tg.Cpu, "choose_kernels", lambda *a: replace(choose(*a), attention=chosen))
    run = tiny_run(tiny_data, tmp_path, micro_batches=4, join=asked_for)
    assert run.joined == run.model.cfg.join == joined
    run.close(failed=False)


# A document with a few tokens that stand nowhere else, among others that fill the step.
RARE = [255, 201, 7, 202, 8, 203, 9, 204, 7, 205, 8, 206]


def step_with_the_rare_document(size: int, micro_batches: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """So many micro-batches of `size` tokens each, of documents of 12; the rare one is the second of the
    last."""
    rng, batches = np.random.default_rng(size + micro_batches), []
    for n in range(micro_batches):
        tokens = rng.integers(0, 200, size + 1)
        tokens[::12] = 255
        if n == micro_batches - 1:
            tokens[12:24] = RARE
        batches.append(tg.split_targets(tokens))
    return batches


def rare_updates(cfg: tg.Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """In float64, of the rows of the rare tokens in each table: the gradient of the rare document's own
    losses, summed, over 8; and where they start."""
    model = randomise(tg.GPT(cfg), std=0.3)
    P = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    tokens, targets = torch.tensor(RARE), torch.tensor([*RARE[1:], 255])
    freqs = torch.tensor([1024 ** (-j / 3) for j in range(4)]).double()
    loss = plain_loss(P, model.bigram_sign.double(), tokens, targets, [1.0], (9, 33), freqs, 1.0)
    (len(RARE) * loss / 8).backward()
    rare = [token for token in RARE if 200 < token < 255]
    tables = [f"value_embed_{k}" for k in "012"] + ["input_embed_0", "input_embed_1"]
    return {name: P[name].grad[rare] for name in tables}, {name: P[name].detach()[rare] for name in tables}


@pytest.mark.parametrize("size, micro_batches", [(48, 1), (240, 1), (96, 4), (48, 8)])
def test_eps_weighs_the_same_on_a_row_that_is_touched_once_however_large_the_step(
    size, micro_batches, tiny_data, tmp_path
):
    """Adam's first update of it is lr g / (|g| + eps), g the gradient of a summed loss; eps is chosen as
    large as g."""
    stage = tg.Stage(2.0, size * micro_batches, (9, 33), 96, 1.0)
    cfg = dict(**PLAIN, stages=(stage,), micro_batches=micro_batches, num_steps=1, adam_every=1, adam_wd=0.0)
    cfg |= dict(adam_lr=0.008, untie_share=0.0, val_seq_len=256)
    gradients, begin = rare_updates(tiny(**cfg))
    eps = float(torch.cat([g.flatten() for g in gradients.values()]).abs().median())
    run = tiny_run(tiny_data, tmp_path, **cfg, adam_eps=eps)
    randomise(run.model, std=0.3)
    run.loader.load_batches = lambda *args: iter(step_with_the_rare_document(size, micro_batches))
    run.train_step(0)
    rare = [token for token in RARE if 200 < token < 255]
    for name, g in gradients.items():
        expected = -0.008 * 75 * g / (g.abs() + eps)
        moved = run.model.get_parameter(name).detach()[rare].double() - begin[name]
        assert (moved - expected).norm() < 1e-4 * expected.norm(), name


# What attention turns by, and multiplies with, at each step of `short`: 32 frequencies, and the scale of the
# softmax. YaRN, in Python's floats, at the three changes of the long window.
SHORT_WINDOWS = {0: 384, 502: 896, 1005: 1408, 1507: 1664}
SHORT_SCALES = {0: 0.1, 502: 0.1169459572, 1005: 0.1275175238, 1507: 0.1317779884}


def short_frequencies() -> dict[int, list[float]]:
    """By the step from which on they hold."""
    freqs, found, before = [1024 ** (-j / 31) for j in range(32)], {}, None
    for step, window in SHORT_WINDOWS.items():
        if before:
            turns = [before * f / (2 * math.pi) for f in freqs]  # rotations within the old window
            kept = [min(max((r - 1) / 31, 0), 1) for r in turns]
            freqs = [
                f * (before / window + m * (1 - before / window)) for f, m in zip(freqs, kept, strict=True)
            ]
        found[step], before = freqs, window
    return found


def test_angles_and_scale_of_short_change_at_three_steps_and_not_at_the_last_validation(
    tiny_data, tmp_path, monkeypatch
):
    """`short`'s steps, windows and head width in a run that computes nothing, with its validations."""
    short = tg.PRESETS["short"]
    stages = tuple(replace(stage, batch_tokens=8) for stage in short.stages)
    names = (
        "num_steps extension_share head_dim softmax_scale final_long_window val_every yarn_limit rotary_share"
    )
    cfg = dict(stages=stages, micro_batches=1, model_dim=512, epochs=99, paired_heads="......")
    cfg |= {name: getattr(short, name) for name in names.split()}
    run, calls, seen, validated = tiny_run(tiny_data, tmp_path, **cfg), [], {}, {}
    set_long_window = run.model.set_long_window

    def state() -> tuple[float, list[float]]:
        return float(run.model.softmax_scale), run.model.rotary_freqs.tolist()

    def train_step(step):
        seen[step], run.steps_done = (run.schedule.windows(step), *state()), step + 1
        return torch.tensor([1.0, 0.0])

    def validate(step):
        validated[step] = (run.schedule.val_windows(step), *state())
        return 1.0

    def remember(window):
        calls.append((run.steps_done, window))
        set_long_window(window)

    run.model.set_long_window = remember
    monkeypatch.setattr(run, "train_step", train_step)
    monkeypatch.setattr(run, "validate", validate)
    run.fit()
    assert calls == [(502, 896), (1005, 1408), (1507, 1664)]
    frequencies = short_frequencies()
    for step in (*range(1547), 1547):
        begin = max(change for change in SHORT_WINDOWS if change <= step)
        for windows, scale, freqs in [found[step] for found in (seen, validated) if step in found]:
            assert windows[1] == (SHORT_WINDOWS[begin] if step < 1547 else 2560)
            assert scale == pytest.approx(SHORT_SCALES[begin], rel=1e-6)
            assert freqs == pytest.approx(frequencies[begin], rel=1e-6)
    assert list(validated) == [0, 250, 500, 750, 1000, 1250, 1500, 1547] and len(seen) == 1547
    assert validated[1547][1] == pytest.approx(0.13178, abs=5e-6)  # with the windows of `short`, not 0.14313


def test_yarn_of_medium_stops_at_13_blocks():
    """The long window grows ten times in training; the angles change with the first three."""
    medium = tg.PRESETS["medium"]
    schedule, model = tg.Schedule(medium), tg.GPT(tiny(stages=medium.stages, micro_batches=512))
    changed, before, window = [], model.rotary_freqs.clone(), int(model.long_window)
    for step in range(medium.num_steps):
        if schedule.windows(step)[1] != window:
            window = schedule.windows(step)[1]
            model.set_long_window(window)
            changed.append((step, not torch.equal(model.rotary_freqs, before)))
            before = model.rotary_freqs.clone()
    steps = [392, 784, 1175, 1567, 1959, 2350, 2742, 3134]
    assert changed == list(zip(steps, [True] * 3 + [False] * 5, strict=True))
    expected = math.prod(0.2 * math.log(b / a) + 1 for a, b in ((3, 7), (7, 11), (11, 13)))
    assert float(model.softmax_scale / medium.softmax_scale) == pytest.approx(expected, rel=1e-6)


# ---- what ends a run early


def test_help_explains_the_flags(tmp_path):
    result = run_command([sys.executable, FILE, "--help"], cwd=tmp_path)
    assert result.returncode == 0 and "torchrun" in result.stdout
    assert re.search(r"--skips str\s+a letter's first place sends its output", result.stdout)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--learning_rate", 1], ["--learning_rate"]),
        (["--num_steps", "many"], ["--num_steps", "many"]),
        (["--preset", "huge"], ["--preset", "huge"]),
        (["--skips", "b"], ["--skips", "'b'"]),
        (["--windows", "sslss"], ["--paired_heads", "--windows"]),
        (["--data_dir", "/nowhere"], ["/nowhere", "run.sh"]),
        (["--num_steps", 5000], ["--num_steps 5000", "too few tokens"]),
        (["--val_tokens", 16384000], ["--val_tokens"]),
        (["--preset", "short"], ["--device cpu"]),
        (["--log_dir", "/proc/nowhere"], ["--log_dir"]),
    ],
)
def test_a_users_error_is_one_line_and_leaves_nothing_behind(
    flags, words, tmp_path, corpus_dir, monkeypatch, capsys
):
    """The next test is the command itself."""
    if flags[0] == "--preset" and flags[1] == "short" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    data = [] if "--data_dir" in flags or "short" in flags else ["--data_dir", corpus_dir]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(FILE), *map(str, [*data, *flags])])
    code, printed = tg.main(), capsys.readouterr()
    assert_user_error(subprocess.CompletedProcess(sys.argv, code, printed.out, printed.err), *words)
    assert not list(tmp_path.iterdir())


def test_a_cut_shard_is_named(tmp_path, corpus_dir):
    for name in ("corpus_train_000000.bin", "corpus_val_000000.bin"):
        (tmp_path / name).write_bytes((corpus_dir / name).read_bytes()[:-1000])
    result = run_command([sys.executable, FILE, *SMALL, "--data_dir", tmp_path], cwd=tmp_path)
    assert_user_error(result, "corpus_train_000000.bin", "promises")
    assert not (tmp_path / "logs").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, corpus_dir):
    explosive = ["--muon_lr", 10, "--muon_wd", 1000]  # the largest allowed: decay multiplies by -100,000
    result = run_command(
        [sys.executable, FILE, *SMALL, "--data_dir", corpus_dir, "--num_steps", 30, *explosive],
        cwd=tmp_path,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"failed: the (training|validation) loss is (nan|inf) at step \d", result.stderr), (
        result.stderr
    )
    events = the_log(tmp_path / "logs")[2]
    assert events[-1].startswith("failed: the") and events[-2].startswith("step:")


@pytest.mark.slow
def test_ctrl_c_ends_the_run_with_a_whole_log(tmp_path, corpus_dir):
    process = subprocess.Popen(
        [sys.executable, str(FILE), *map(str, SMALL), "--data_dir", str(corpus_dir)],
        cwd=tmp_path,
        env=CLEAN_ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = 0
    for line in process.stdout:
        seen += "train_loss:" in line
        if seen == 2:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in err
    events = the_log(tmp_path / "logs")[2]
    trained = [line for line in events if "train_loss:" in line]
    assert len(trained) >= 2 and re.match(r"interrupted: \d+ of \d+ steps done", events[-1])


# ---- what the surroundings can do


@pytest.fixture
def program(tiny_data, tmp_path, monkeypatch, capfd):
    """Calls the program, in this process, on a tiny configuration -> exit code, what it printed."""
    monkeypatch.setattr(tg, "matrix_ceiling", lambda *_: 1e9)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(**changes) -> tuple[int, str, str]:
        cfg = tiny(data_dir=str(tiny_data), **{"log_dir": str(tmp_path / "logs"), "num_steps": 2} | changes)
        monkeypatch.setattr(tg, "parse_config", lambda argv: (cfg, {}))
        code, printed = tg.main(), capfd.readouterr()
        return code, printed.out, printed.err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "first"}, "RANK='first'"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "3"}, "RANK=3 and WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "0 processes"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, but not all"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "no way to"),
        ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE='many'"),
    ],
)
def test_variables_of_torchrun_without_torchrun_are_one_line(
    environment, words, program, tmp_path, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, error = program(micro_batches=2, rank_timeout=1.0)
    assert code == 2 and len(error.splitlines()) == 1 and words in error, error
    assert not list(tmp_path.iterdir())


def awkward_folder(kind: str, tmp_path) -> str:
    """A name for a folder under which nothing can be read or written."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to("circle")
    names = {
        "empty": "",
        "with a NUL": "a\0b",
        "too long": str(tmp_path / ("n" * 300)),
        "a file": str(tmp_path / "file"),
        "below a file": str(tmp_path / "file" / "below"),
        "links in a circle": str(tmp_path / "circle"),
        "not writable": "/proc/nowhere",
    }
    return names[kind]


FOLDERS = ["empty", "with a NUL", "too long", "a file", "below a file", "links in a circle", "not writable"]


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resumed"])
@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("flag", ["--log_dir", "--data_dir"])
def test_a_folder_that_is_none_is_one_line(flag, kind, resume, tmp_path, corpus_dir, monkeypatch, capsys):
    folder = awkward_folder(kind, tmp_path)
    before = sorted(tmp_path.iterdir())
    others = {"--log_dir": str(tmp_path / "logs"), "--data_dir": str(corpus_dir)} | {flag: folder}
    flags = [f"{name}={value}" for name, value in others.items()]
    monkeypatch.setattr(sys, "argv", [str(FILE), *SMALL, "--num_steps", "1", *flags, *resume])
    code, printed = tg.main(), capsys.readouterr()
    assert code == 2 and len(printed.err.splitlines()) == 1, printed.err
    assert f"train_gpt.py: error: {flag} " in printed.err
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "mine"


def test_a_bug_of_ours_is_one_line_that_names_a_file_with_the_traceback(program, tmp_path, monkeypatch):
    def wrong(*_):
        raise ZeroDivisionError("of\nours")

    monkeypatch.setattr(tg.Trainer, "train_step", wrong)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, _, error = program()
    assert code == 1 and len(error.splitlines()) == 1 and "ZeroDivisionError: of ours" in error, error
    [report] = tmp_path.glob("traceback-*.txt")
    assert str(report) in error and "in wrong" in report.read_text()
    assert the_log(tmp_path / "logs")[2][-1] == "failed: of ours"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_leaves_no_log(number, code, program, tmp_path, monkeypatch):
    seen = []

    def warm_up(trainer):
        seen.extend((tmp_path / "logs").glob("*.txt"))
        os.kill(os.getpid(), number)
        time.sleep(60)  # long enough: the signal ends it

    monkeypatch.setattr(tg, "warm_up", warm_up)
    ended, _, error = program(warmup=True)
    assert ended == code and error == ""
    assert len(seen) == 1 and not list((tmp_path / "logs").iterdir())


def test_what_is_known_before_the_signals_are_heard_waits(tiny_data, tmp_path):
    """Until then a signal ends the process on the spot, and a log would stay behind."""
    run = tiny_run(tiny_data, tmp_path, resume=True)
    assert not list(tmp_path.iterdir())
    run.log.begin()
    _, header, events = the_log(tmp_path)
    assert "hardware:" in header and events == [f"resume: no checkpoint in {tmp_path}, starting at step 0"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_importing_ends_the_program(number, code, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(FILE), *SMALL], cwd=tmp_path, env=CLEAN_ENV, stderr=subprocess.PIPE, text=True
    )
    status, caught = Path(f"/proc/{process.pid}/status"), 0
    if not status.exists():
        process.kill()
        pytest.skip("no /proc here")
    while not caught >> (signal.SIGTERM - 1) & 1:  # the first lines of the file have not run yet
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and error == "" and not list(tmp_path.iterdir())


STREAMS = {
    "a reader that leaves": "{ %s; echo $? > code; } | head -1 > head",
    "a full disk": "%s > /dev/full; echo $? > code",
    "no input, no output, no errors": "%s >&- <&- 2>&-; echo $? > code",
}


TINY = shlex.split("""
    --vocab_size 256 --bos_id 255 --spectral 0 --bigram_rows 1 --batch_mul 0.125
    --val_tokens 512 --val_seq_len 256
""")


@pytest.fixture(scope="module")
def muted(tmp_path_factory, tiny_data):
    """A folder for each of STREAMS, in which a run has ended whose output nobody takes; all at once."""
    folder = tmp_path_factory.mktemp("muted")
    flags = [*SMALL, *TINY, "--num_steps", "2", "--data_dir", str(tiny_data)]
    command = shlex.join([sys.executable, str(FILE), *flags])
    processes = []
    for name, script in STREAMS.items():
        (folder / name).mkdir()
        processes.append(subprocess.Popen(["bash", "-c", script % command], cwd=folder / name, env=CLEAN_ENV))
    for process in processes:
        process.wait(240)
    return folder


@pytest.mark.parametrize("name", STREAMS)
def test_a_run_whose_output_nobody_takes_goes_on(name, muted):
    assert (muted / name / "code").read_text() == "0\n"
    events = the_log(muted / name / "logs")[2]
    assert re.match(r"step:2/2 val_loss:", events[-1])
    assert len([line for line in events if "train_loss:" in line]) == 2


# ---- run.sh


@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_run_sh_works_from_any_folder_and_does_nothing_twice(tmp_path, corpus_dir, twice):
    env = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{CLEAN_ENV['PATH']}"}
    run = [ROOT / "run.sh", *SMALL, "--num_steps", 1, "--log_dir", tmp_path / "logs"]
    result = run_command(run, cwd=tmp_path, **env)
    assert result.returncode == 0, result.stderr
    assert re.match(r"step:1/1 val_loss:", result.stdout.splitlines()[-1])
    assert json.loads(re.search(r"overrides:(.*)", the_log(tmp_path / "logs")[1])[1])["num_steps"] == 1
    if twice:  # one line on stderr: what is there is not made again
        assert_user_error(run_command([*run, "--num_stepz", 1], cwd=tmp_path, **env), "--num_stepz")


# ---- it learns


def ngram_losses(train: np.ndarray, val: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """Nats a token on val of a unigram and of a bigram model of train.

    The bigram discounts counts and backs off to the unigram.
    """
    unigram = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    seen, kinds = (
        np.bincount(train[:-1], minlength=vocab_size),
        np.bincount(pairs // vocab_size, minlength=vocab_size),
    )
    wanted = val[:-1] * vocab_size + val[1:]
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    before, discount = val[:-1], 0.75
    backoff = np.where(seen[before] > 0, discount * kinds[before] / np.maximum(seen[before], 1), 1.0)
    bigram = np.maximum(count - discount, 0) / np.maximum(seen[before], 1) + backoff * unigram[val[1:]]
    return float(-np.log(unigram[val[1:]]).mean()), float(-np.log(bigram).mean())


def test_the_bigram_model_is_a_fair_one():
    """Its probabilities add up to one over the vocabulary, and it finds structure where there is some."""
    train = np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 0])
    total = sum(math.exp(-ngram_losses(train, np.array([1, token]), 4)[1]) for token in range(4))
    assert total == pytest.approx(1.0)
    unigram, bigram = ngram_losses(train, train, 4)
    assert bigram < unigram


@pytest.mark.slow
def test_it_learns_more_than_bigrams(tmp_path, corpus_dir):
    """On held-out text, after the same training tokens as the n-gram models."""
    stage = replace(tg.PRESETS["cpu"].stages[-1], batch_tokens=1024, max_doc_len=512, windows=(64, 256))
    cfg = replace(
        tg.PRESETS["cpu"],
        stages=(stage,),
        num_steps=150,
        model_dim=128,
        head_dim=32,
        windows="sl",
        paired_heads="p.",
        value_embeds="01",
        skips="..",
        backout="..",
        dtype="float32",
        val_every=0,
        val_tokens=16384,
        val_seq_len=1024,
        final_long_window=256,
        momentum_warmup=20,
        data_dir=str(corpus_dir),
        log_dir=str(tmp_path),
        compile=False,
    )
    run = tg.Trainer(cfg, {})
    seen, load_batches = [], run.loader.load_batches

    def remembering(*args):
        for tokens, targets in load_batches(*args):
            seen.append(tokens.numpy())
            yield tokens, targets

    run.loader.load_batches = remembering
    loss = run.fit()
    unigram, bigram = ngram_losses(
        np.concatenate(seen), run.validation.tokens.astype(np.int64), cfg.vocab_size
    )
    assert loss < bigram - 0.05 and bigram < unigram - 0.5, (loss, bigram, unigram)


# ---- where the time goes


def event(name: str, start: float, end: float, own: float) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), self_cpu_time_total=own
    )


def test_time_of_a_step_by_phase_and_kind():
    events = [
        event("forward", 0, 100, 5),
        event("aten::mm", 10, 40, 30),
        event("## Call CompiledFxGraph abc ##", 50, 70, 20),
        event("aten::copy_", 60, 61, 1),
        event("aten::bmm", 120, 150, 30),
        event("optimizer", 200, 300, 2),
        event("aten::mul", 210, 220, 10),
        event("aten::baddbmm", 299, 305, 6),
        event("aten::mm", 310, 330, 20),
    ]
    found = step_time.by_phase_and_kind(events, steps=2)
    assert found == pytest.approx(
        {
            ("forward", "matrix products"): 0.015,
            ("forward", "compiled loops"): 0.01,
            ("forward", "other operators"): 0.0005,
            ("backward", "matrix products"): 0.025,
            ("optimizer", "other operators"): 0.005,
            ("optimizer", "matrix products"): 0.003,
        }
    )


@pytest.mark.slow
def test_where_the_time_of_a_small_run_goes(corpus_dir):
    result = run_command(
        [sys.executable, "-m", "tests.programs.step_time", "--steps", 2, *SMALL, "--dtype", "float32"]
    )
    assert result.returncode == 0, result.stderr
    table = {
        line[:18].strip(): [float(ms) for ms in line[18:].split()] for line in result.stdout.splitlines()[-4:]
    }
    assert list(table) == ["matrix products", "compiled loops", "other operators", "sum"]
    for phase in range(3):
        assert (
            table["matrix products"][phase] > 0
            and table["other operators"][phase] > 0 == table["compiled loops"][phase]
        )
    assert table["sum"][3] == pytest.approx(
        sum(row[3] for name, row in table.items() if name != "sum"), abs=0.2
    )
    assert_user_error(
        run_command([sys.executable, "-m", "tests.programs.step_time", "--steps", 3, "--adam_every", 2]),
        "--steps 3",
    )
    assert_user_error(
        run_command([sys.executable, "-m", "tests.programs.step_time", "--stage", 4]), "--stage 4"
    )
