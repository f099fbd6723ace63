"""The table of hypotheses, the runner (order, interruptions, failures), one real run from command to plot."""

import dataclasses
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CLEAN_ENV, ROOT, tiny

import train_gpt as tg
from cli import UserError
from records import ablate, hypotheses, plot, reader, record

# Stands in for Python and train_gpt.py: takes flags, notes its start, writes a log.
# A file `mode` beside it spoils a run.
FAKE = """
import os, pathlib, sys, time
flags = dict(word[2:].partition("=")[::2] for word in sys.argv[2:])
here, steps = pathlib.Path(__file__).parent, int(flags["num_steps"])
name = f"{flags.get('muon_lr', 'base')}-{flags['seed']}"
mode = (here / "mode").read_text().split(":") if (here / "mode").exists() else ["", ""]
mode = mode[0] if mode[1] == name else ""
with open(here / "starts", "a") as file:
    file.write(f"{name} {os.getpid()}\\n")
if (here / "together").exists():  # each waits until so many have begun
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    (here / "together" / name).write_text(f"{cores} {os.environ['OMP_NUM_THREADS']}")
    while len(os.listdir(here / "together")) < 2:
        time.sleep(0.02)
if mode == "refuse":
    print("train_gpt.py: error: --data_dir x: nothing there", file=sys.stderr); sys.exit(2)
place = pathlib.Path(flags["log_dir"]); place.mkdir(exist_ok=True)
with open(place / "run.txt", "w", buffering=1) as log:
    def say(line):
        log.write(line + "\\n"); print(line, flush=True)
    for step in range(steps + 1):
        if mode == "hang" and step == 2:
            (here / "hanging").touch(); time.sleep(60)
        if mode == "diverge" and step == 2:
            log.write("failed: the training loss is nan at step 2\\n"); sys.exit(1)
        loss = 9 - step - float(flags.get("muon_lr", 0)) + int(flags["seed"]) / 100
        say(f"step:{step}/{steps} val_loss:{loss:.4f} train_time:{step}ms")
"""


@pytest.fixture
def fake(tmp_path) -> Path:
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "train_gpt.py").write_text("print('never run')\n")
    return tmp_path


def jobs(
    folder: Path, seeds: int = 2, names: tuple[str, ...] = ("base", "0.5"), steps: int = 3
) -> list[ablate.Job]:
    flags = {
        name: (f"--num_steps={steps}", *([] if name == "base" else [f"--muon_lr={name}"])) for name in names
    }
    return [
        ablate.Job(name, seed, (*flags[name], f"--seed={seed}"), steps, folder / "out")
        for seed in range(seeds)
        for name in names
    ]


def run(folder: Path, at_once: int = 1, **changes) -> None:
    (folder / "out").mkdir(exist_ok=True)
    ablate.run_all(
        jobs(folder, **changes),
        [sys.executable, str(folder / "fake.py")],
        folder / "train_gpt.py",
        folder / "out",
        ablate.core_shares(at_once),
    )


def need_two_cores() -> None:
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no processes")
def test_several_at_once_have_cores_of_their_own(fake):
    need_two_cores()
    (fake / "together").mkdir()
    run(fake, at_once=2, seeds=1)
    found = [path.read_text().split() for path in (fake / "together").iterdir()]
    pinned = [set(cores.split(",")) for cores, _ in found]
    assert not pinned[0] & pinned[1] and [int(threads) for _, threads in found] == list(map(len, pinned))
    assert len(list((fake / "out").glob("*/seed0.txt"))) == 2


def test_the_first_failure_of_several_ends_the_others_and_a_later_call_goes_on(fake):
    """Well before the minute that the other one would hang."""
    need_two_cores()
    (fake / "mode").write_text("refuse:0.5-0")
    (fake / "fake.py").write_text(FAKE.replace('mode == "hang"', 'name == "base-0"'))
    begun = time.monotonic()
    with pytest.raises(UserError, match="0.5, seed 0, ended with code 2"):
        run(fake, at_once=2, seeds=1)
    assert time.monotonic() - begun < 50 and not list((fake / "out").glob("*/seed0.txt"))
    (fake / "fake.py").write_text(FAKE)
    (fake / "mode").unlink()
    run(fake, at_once=2, seeds=1)
    assert len(list((fake / "out").glob("*/seed0.txt"))) == 2


def test_cores_are_split_and_never_shared(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 5, 9}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    assert ablate.core_shares(1) == [set()]
    assert ablate.core_shares(2) == [{0, 2, 9}, {1, 5}]
    with pytest.raises(UserError, match="--jobs 6: there are 5 cores"):
        ablate.core_shares(6)


def starts(folder: Path) -> Counter:
    return Counter(line.split()[0] for line in (folder / "starts").read_text().splitlines())


# ---- hypotheses


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_every_hypothesis_is_a_valid_configuration_of_every_preset(preset):
    known = {field.name for field in tg.fields(tg.Config)}
    for one in hypotheses.HYPOTHESES:
        flags = {name: value for name, value in hypotheses.flags_on(one, preset).items() if name in known}
        cfg = replace(tg.PRESETS[preset], **flags)
        tg.check_config(cfg)
        layers = {"003": 16, "004": 16, "cpu": 4}.get(one.seed, 11)
        assert len(cfg.windows) == layers, one.name
        assert cfg.model_dim == tg.PRESETS[preset].model_dim
        assert set(one.needs) == set(one.flags) - known


def test_no_two_hypotheses_are_the_same():
    names = [one.name for one in hypotheses.HYPOTHESES]
    assert len(set(names)) == len(names)
    seen = {}
    for one in hypotheses.HYPOTHESES:
        key = (
            one.seed,
            str(sorted((hypotheses.BASELINES[one.seed].flags | one.flags).items())),
            one.steps,
            one.edits,
        )
        assert key not in seen, f"{one.name} and {seen[key]}"
        seen[key] = one.name


def test_the_seeds_configurations_are_all_there():
    """Counted in the seeds' own text; layouts of seed 003 as tables and places."""
    by_seed = Counter(one.seed for one in hypotheses.HYPOTHESES)
    assert by_seed == {"000": 24, "001": 6, "002": 8, "003": 23, "004": 5, "bigram": 5, "cpu": 50}
    layouts = {one.name: hypotheses.flags_on(one, "short") for one in hypotheses.find(["003"])}
    for tables in range(3, 9):
        layout = layouts[f"003-{tables}"]["value_embeds"]
        names = "01234567"[:tables]
        assert layout[-tables:] == names
        assert layout[:tables] == names[:7] + "." * (tables - 7)  # layer 7 has no attention
    for place in (0, 1, 2, 13, 14, 15):
        left = "".join("." if i == place else name for i, name in enumerate("012..........012"))
        assert layouts[f"003-no-{place}"]["value_embeds"] == left
    assert [
        hypotheses.flags_on(one, "medium").get("extra_inputs", 1) for one in hypotheses.find(["004"])
    ] == [0, 1, 2, 3, 4]


def test_steps_are_the_seeds_or_in_proportion():
    [one] = hypotheses.find(["000-1535"])
    steps = {
        preset: hypotheses.flags_on(one, preset, base).get("num_steps", tg.PRESETS[preset].num_steps)
        for preset, base in (("short", None), ("cpu", None), ("medium", 3110))
    }
    assert steps == {"short": 1535, "cpu": round(tg.PRESETS["cpu"].num_steps * 1535 / 1555), "medium": 3070}


def test_names_and_beginnings():
    assert [one.name for one in hypotheses.find(["004-x01", "004"])] == [
        f"004-x0{n}" for n in (1, 0, 2, 3, 4)
    ]
    assert len(hypotheses.find(["003-no"])) == 13
    for name in ("00", "005", "003-no-"[:4] + "x", ""):
        with pytest.raises(UserError, match="no such hypothesis"):
            hypotheses.find([name])


def test_a_missing_switch_is_one_clear_line(monkeypatch, tmp_path, capsys):
    future = hypotheses.h("000-future", "wants more than there is", no_such_switch=True)
    monkeypatch.setattr(hypotheses, "HYPOTHESES", (hypotheses.HYPOTHESES[0], future))
    with pytest.raises(UserError, match="^000-future: train_gpt.py has no flag --no_such_switch yet$"):
        ablate.plan(["000-future"], "cpu", range(1), tmp_path, None, [])
    assert [job.name for job in ablate.plan(["000"], "cpu", range(1), tmp_path, None, [])] == ["000-H0"]
    assert "no_such_switch yet; left out" in capsys.readouterr().err
    ablate.main(["--list"])
    assert re.search(
        r"000-future +short +wants more than there is +--no_such_switch +--no_such_switch\n",
        capsys.readouterr().out,
    )


def test_a_dry_run_prints_no_character_that_a_terminal_obeys(capsys, tmp_path):
    launch = "'a\x1b[31m' -m x"
    ablate.main(
        ["000-H0", "--on", "cpu", "--dry_run", "--out", str(tmp_path), "--seeds", "1", "--launch", launch]
    )
    assert capsys.readouterr().out.startswith(r"$'a\x1b\x5b31m' -m x train_gpt.py --preset=cpu ")


# ---- hypotheses that are edits of train_gpt.py


@pytest.fixture
def edited(tmp_path):
    """name of a hypothesis -> train_gpt.py with its edits, imported."""

    def load(name: str):
        path = tmp_path / f"edited_{len(list(tmp_path.iterdir()))}.py"
        [one] = hypotheses.find([name])
        source = hypotheses.source_of(one, (ROOT / "train_gpt.py").read_text())
        # Operators of its own, not train_gpt's.
        path.write_text(source.replace('"train_gpt::', f'"{path.stem}::'))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in [name for name in sys.modules if name.startswith("edited_")]:
        del sys.modules[name]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_every_edit_fits():
    source = (ROOT / "train_gpt.py").read_text()
    names = [one.name for one in hypotheses.HYPOTHESES if one.edits]
    assert len(names) == 8 and all(
        compile(hypotheses.source_of(one, source), one.name, "exec") for one in hypotheses.find(names)
    )
    with pytest.raises(
        UserError, match="000-H3: its edit of train_gpt.py does not fit any more, at 'return F"
    ):
        hypotheses.source_of(hypotheses.find(["000-H3"])[0], source.replace("rms_norm", "layer_norm"))


def test_the_edit_that_centres_norms(edited):
    x = random(5, 16) + 3
    known = torch.nn.functional.layer_norm(x, (16,), eps=1e-7)
    torch.testing.assert_close(edited("000-H3").norm(x), known, rtol=1e-4, atol=1e-4)


def test_the_edit_that_narrows_q_and_k(edited):
    """48 of 64 dimensions are as they would be with no others, through rotary; the rest is nothing."""
    qkv, angles = random(5, 3, 2, 64), random(5, 16)
    is_first = torch.zeros(5, dtype=torch.bool)
    given = [is_first, angles.cos(), angles.sin(), False, False, True]
    kept = torch.arange(64) % 16 < 12
    q, k, v = edited("cpu-narrow-qk").prepare_qkv(qkv, None, *given)
    first = torch.arange(16) % 8 < 6  # of the angles, of adjacent pairs
    given[1:3] = angles[:, first].cos(), angles[:, first].sin()
    narrow = tg.prepare_qkv(qkv[..., kept], None, *given)
    for wide, known in zip((q, k), narrow, strict=False):
        torch.testing.assert_close(wide[..., kept], known)
        assert not wide[..., ~kept].any()
    assert torch.equal(v, qkv[:, 2])


def test_the_edit_that_centres_attention(edited):
    q, k, v = random(3, 24, 2, 16).unbind(0)
    is_first = torch.zeros(24, dtype=torch.bool)
    is_first[[0, 10]] = True
    starts = torch.tensor([0] * 10 + [10] * 14)
    positions = tg.Positions(
        is_first,
        first_key=torch.maximum(starts, torch.arange(24) - 7),
        cos=torch.ones(24, 4),
        sin=torch.zeros(24, 4),
        softmax_scale=torch.tensor(0.25),
        window=8,
        paired=False,
        key_offset=False,
    )
    qkv = torch.stack((q, k, v), dim=1)
    args = (qkv, None, positions, False, tg.prepare_qkv, tg.banded_attention)
    mean = torch.stack([v[positions.first_key[i] : i + 1].mean(0) for i in range(24)])
    torch.testing.assert_close(
        edited("000-centred-attention").attend(*args), tg.attend(*args) - mean, rtol=1e-4, atol=1e-4
    )


def test_the_edit_that_leaves_out_rare_tokens(edited):
    """Rare tokens' rows do not matter any more, common ones' do."""
    module, rows = edited("000-six-common"), {}
    model = module.GPT(module.Config(**vars(tiny())))
    tokens = torch.arange(256).flip(0)
    with torch.no_grad():
        model.value_embed_0[:] = 1
        for name, changed in (("before", slice(0)), ("rare", slice(205, 256)), ("common", slice(0, 205))):
            model.value_embed_0[changed] *= 50
            rows[name] = model.hidden(tokens, (16, 64))
    assert torch.equal(rows["before"], rows["rare"]) and not torch.equal(rows["rare"], rows["common"])


def test_the_edits_of_weight_decay(edited):
    decay = {name: edited(name).GPT(tiny()).specs["value_embed_0"].wd for name in ("000-wd-2.5", "000-wd-0")}
    assert decay == {"000-wd-2.5": 2.5, "000-wd-0": 0.0} and tg.GPT(tiny()).specs["value_embed_0"].wd == 5.0


def edited_config(module, data: Path, folder: Path, **changes):
    """tiny() as the edited file's own Config."""
    cfg = tiny(data_dir=str(data), log_dir=str(folder / "logs"), warmup=False, **changes)
    return module.Config(**vars(cfg))


EDITED = [one.name for one in hypotheses.HYPOTHESES if one.edits]


@pytest.mark.parametrize("name", EDITED)
def test_every_edit_trains_two_steps_and_changes_what_comes_out(
    edited, tiny_data, tmp_path, monkeypatch, name
):
    module = edited(name)
    losses = []
    for program in (tg, module):
        monkeypatch.setattr(program, "matrix_ceiling", lambda *args: 1e9)  # half a second
        cfg = edited_config(program, tiny_data, tmp_path, num_steps=2, adam_every=1, softmax_scale=1.0)
        losses.append(program.train(cfg, {}))
    assert all(map(math.isfinite, losses)) and losses[0] != losses[1], losses


def test_the_edit_that_clips_logits(edited, tiny_data, tmp_path, monkeypatch):
    """Logits may be as large as 16 * 0.1. Once clipped, those of the next steps are hardly above tau, 1."""
    module, tops = edited("000-qk-clip-1"), []
    trainer = module.Trainer(
        edited_config(module, tiny_data, tmp_path, softmax_scale=0.1, yarn_limit=0, num_steps=4), {}
    )
    step = trainer.train_step

    def noting(number: int):
        result = step(number)
        tops.append(trainer.model.top_logit.max().item())
        return result

    monkeypatch.setattr(trainer, "train_step", noting)
    trainer.fit()
    trainer.close(failed=False)
    factor = trainer.model.qk_factor.squeeze(-1)
    assert factor.shape == (6, 4) and 0.7 < factor.min() < 0.95
    assert tops[0] > 1.3 and all(top < 1.1 for top in tops[1:]), tops


# ---- order and flags


def test_seeds_are_interleaved_and_each_round_begins_with_another(tmp_path):
    plan = ablate.plan(["001-H0", "001-gates", "001-1825"], "cpu", range(4), tmp_path, 100, ["--no-compile"])
    assert [(job.name, job.seed) for job in plan[:6]] == [
        ("001-H0", 0),
        ("001-gates", 0),
        ("001-1825", 0),
        ("001-gates", 1),
        ("001-1825", 1),
        ("001-H0", 1),
    ]
    assert [job.name for job in plan[6:]] == [
        "001-1825",
        "001-H0",
        "001-gates",
        "001-H0",
        "001-gates",
        "001-1825",
    ]
    assert plan[0].flags[0] == "--preset=cpu" and plan[0].flags[-2:] == ("--no-compile", "--seed=0")
    assert [plan[n].steps for n in (0, 2)] == [100, 99]
    cfg, _ = tg.parse_config(list(plan[1].flags))
    assert (cfg.skip_chunk, cfg.value_embeds, cfg.windows, cfg.compile) == (
        "6:18",
        ".12.....012",
        "ssslss-sssl",
        False,
    )


def test_shorter_runs_keep_the_shape_of_momentum(tmp_path):
    """--num_steps stretches momentum's warm-up and cooldown; a flag of the user's own wins."""
    preset = tg.PRESETS["cpu"]
    share = preset.momentum_warmup / preset.num_steps, preset.momentum_cooldown / preset.num_steps
    for job in ablate.plan(["cpu-H0", "cpu-80", "cpu-110"], "cpu", range(7, 8), tmp_path, 100, []):
        cfg, _ = tg.parse_config(list(job.flags))
        assert cfg.num_steps == job.steps == {"cpu-H0": 100, "cpu-80": 80, "cpu-110": 110}[job.name]
        warm = (cfg.momentum_warmup, cfg.momentum_cooldown)
        assert warm == tuple(round(part * job.steps) for part in share) and cfg.seed == 7
    (job,) = ablate.plan(["cpu-H0"], "cpu", range(1), tmp_path, None, [])
    assert tg.parse_config(list(job.flags))[0] == replace(preset, seed=0)
    (job,) = ablate.plan(["cpu-H0"], "cpu", range(1), tmp_path, 100, ["--momentum_warmup=9"])
    assert tg.parse_config(list(job.flags))[0].momentum_warmup == 9


def test_flags_are_refused_before_anything_runs(tmp_path):
    for more, words in (
        (["--muon_lr=-1"], "--muon_lr"),
        (["--nonsense"], "unrecognized"),
        (["--num_steps=0"], "must lie between 1"),
    ):
        with pytest.raises(UserError, match=words):
            ablate.plan(["001-H0"], "cpu", range(1), tmp_path, None, more)
    assert list(tmp_path.iterdir()) == []


# ---- running, with a stand-in for train_gpt.py


def test_all_runs_are_made_once_and_compared(fake, capsys):
    run(fake)
    assert starts(fake) == {"base-0": 1, "base-1": 1, "0.5-0": 1, "0.5-1": 1}
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "4 runs, 0 of them done" and out[1:] == [
        "base seed 0: 6.0000 after 0.0 s",
        "0.5 seed 0: 5.5000 after 0.0 s",
        "base seed 1: 6.0100 after 0.0 s",
        "0.5 seed 1: 5.5100 after 0.0 s",
    ]
    table = ablate.compare(jobs(fake), fake / "out", 6.0)
    assert table.splitlines()[3].split()[:2] == ["0.5", "2"] and "-0.5000" in table.splitlines()[3]
    parts = [(fake / "out" / f"{name}.txt").read_text().strip() for name in ("table", "pairs")]
    assert table == "\n\n".join(parts)
    assert (fake / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "losses = [5.5, 5.51]" in (fake / "out" / "numbers.txt").read_text()
    assert "p by seed Holm" in (fake / "out" / "pairs.txt").read_text()
    assert (fake / "out" / "table.csv").exists() and (fake / "out" / "table.md").exists()
    run(fake, seeds=3, names=("base", "0.5", "0.7"))  # more of both: only those are run
    assert starts(fake) == {f"{name}-{seed}": 1 for name in ("base", "0.5", "0.7") for seed in range(3)}


def test_a_killed_runner_loses_and_repeats_nothing(fake):
    (fake / "mode").write_text("hang:0.5-0")
    code = (
        "import sys\nfrom pathlib import Path\nfrom records import ablate\n"
        "flags = {'base': ('--num_steps=3',), '0.5': ('--num_steps=3', '--muon_lr=0.5')}\n"
        f"here = Path({str(fake)!r}); out = here / 'out'; out.mkdir(exist_ok=True)\n"
        "jobs = [ablate.Job(name, seed, (*flags[name], f'--seed={seed}'), 3, out)\n"
        "        for seed in range(2) for name in flags]\n"
        "ablate.run_all(jobs, [sys.executable, str(here / 'fake.py')], here / 'train_gpt.py', out)\n"
    )
    command = [sys.executable, "-c", code]
    runner = subprocess.Popen(command, env=CLEAN_ENV, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (fake / "hanging").exists():
        assert runner.poll() is None
        time.sleep(0.02)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    (fake / "mode").unlink()
    began = time.monotonic()
    run(fake)  # the run that hung had the lock, for a minute: it must have been ended, too
    assert (
        starts(fake) == {"base-0": 1, "0.5-0": 2, "base-1": 1, "0.5-1": 1} and time.monotonic() - began < 20
    )
    assert [ablate.describe(job).split()[3] for job in jobs(fake)] == ["6.0000", "5.5000", "6.0100", "5.5100"]
    assert list((fake / "out" / ".running").iterdir()) == []


def test_a_whole_log_that_was_not_moved_is_not_run_again(fake):
    run(fake)
    first = jobs(fake)[0]
    first.folder.mkdir(parents=True)
    first.log.rename(first.folder / "run.txt")
    run(fake)
    assert starts(fake)["base-0"] == 1 and first.log.exists() and not first.folder.exists()
    first.folder.mkdir()
    (first.folder / "run.txt").write_text("step:0/3 val_loss:9.0 train_time:0ms\n")  # half a run
    first.log.unlink()
    run(fake)
    assert starts(fake)["base-0"] == 2


def test_a_diverged_run_is_a_result(fake, capsys):
    (fake / "mode").write_text("diverge:0.5-1")
    run(fake)
    assert "0.5 seed 1: no result, failed: the training loss is nan at step 2" in capsys.readouterr().out
    run(fake)
    assert starts(fake)["0.5-1"] == 1
    table = ablate.compare(jobs(fake), fake / "out", None)
    assert table.splitlines()[3].split()[:4] == ["0.5", "1", "of", "2"]  # left out of the mean, with a word
    assert "failed: the training loss is nan at step 2" in table
    assert "0.5: seed1 left out, it stops at step 1 of 3" in capsys.readouterr().err


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_table_of_fewer_names_or_seeds_keeps_the_others_runs(fake):
    run(fake)
    whole = ablate.compare(jobs(fake), fake / "out", None)
    fewer = ablate.compare(jobs(fake, seeds=1, names=("0.5",)), fake / "out", None)
    for table, order in ((whole, ["base", "0.5"]), (fewer, ["0.5", "base"])):
        assert [line.split()[:2] for line in table.splitlines()[2:4]] == [[name, "2"] for name in order]
    assert (fake / "out" / "numbers.txt").read_text().index("0.5:") == 0


def test_the_first_name_is_the_baseline_whichever_the_first_seeds_round_began_with(fake):
    names = ["cpu-no-smear", "cpu-H0", "cpu-no-skip"]
    planned = ablate.plan(names, "cpu", [400, 401], fake, None, [])
    assert planned[0].name == "cpu-H0" and {job.name: job.place for job in planned} == {
        name: place for place, name in enumerate(names)
    }
    run(fake)
    rotated = [dataclasses.replace(job, place=job.name != "base") for job in reversed(jobs(fake))]
    table = ablate.compare(rotated, fake / "out", None)
    assert [line.split()[0] for line in table.splitlines()[2:4]] == ["base", "0.5"]


def test_tables_that_no_ablation_made_stay(fake):
    out = fake / "out"
    out.mkdir()
    (out / "numbers.txt").write_text("mine")
    with pytest.raises(UserError, match="no ablation ran there"):
        ablate.compare(jobs(fake), out, None)
    with pytest.raises(UserError, match="numbers.txt: is there, and no ablation made it"):
        run(fake)
    assert written(out) == {"numbers.txt": b"mine"} and not (fake / "starts").exists()


def test_a_table_of_names_without_a_finished_run_replaces_nothing(fake):
    run(fake, names=("base",))
    ablate.compare(jobs(fake, names=("base",)), fake / "out", None)
    before = written(fake / "out")
    with pytest.raises(UserError, match="no finished run of 0.5 there"):
        ablate.compare(jobs(fake, names=("0.5",)), fake / "out", None)
    assert written(fake / "out") == before and "table.txt" in before


def test_an_error_that_the_next_run_would_have_too_ends_it(fake):
    (fake / "mode").write_text("refuse:0.5-0")
    with pytest.raises(
        UserError, match="0.5, seed 0, ended with code 2: train_gpt.py: error: --data_dir x: noth"
    ):
        run(fake)
    assert starts(fake) == {"base-0": 1, "0.5-0": 1}


def test_one_folder_holds_what_can_be_compared(fake):
    run(fake)
    with pytest.raises(UserError, match="base ran there with --num_steps=3; use another --out"):
        run(fake, steps=4)
    (fake / "train_gpt.py").write_text("changed\n")
    with pytest.raises(UserError, match="train_gpt.py has changed since its first run"):
        run(fake)
    (fake / "train_gpt.py").write_text("print('never run')\n")
    with pytest.raises(UserError, match="base ran there with .*source"):
        again = [replace(job, edited="other\n") for job in jobs(fake)]
        ablate.run_all(again, ["false"], fake / "train_gpt.py", fake / "out")
    (fake / "out" / "plan.json").write_text("{")
    with pytest.raises(UserError, match="plan.json: damaged"):
        run(fake)
    assert sum(starts(fake).values()) == 4


# ---- the command


def test_the_command_from_a_real_run_to_its_plot_and_its_rules(tmp_path, tiny_data, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads wait for each other on a busy machine
    flags = [
        "--no-compile",
        "--no-warmup",
        "--data_dir",
        tiny_data,
        "--vocab_size",
        256,
        "--bos_id",
        255,
        "--model_dim",
        64,
        "--head_dim",
        16,
        "--micro_batches",
        8,
        "--val_tokens",
        512,
        "--val_seq_len",
        256,
        "--val_every",
        0,
        "--dtype",
        "float32",
    ]
    ablate.main(
        [
            "002-untied",
            "--seeds",
            "1",
            "--num_steps",
            "1",
            "--out",
            str(tmp_path / "out"),
            "--",
            *map(str, flags),
        ]
    )
    out = capsys.readouterr().out
    assert re.search(r"^002-untied +1 +\d", out, re.MULTILINE) and "002-untied seed 0: " in out
    [one] = reader.read_paths([tmp_path / "out"])
    assert (
        one.source == (ROOT / "train_gpt.py").read_text().rstrip("\n")
        and one.preset == "cpu"
        and one.planned == 1
    )
    assert one.config["value_embeds"] == ".01.....345" == one.overrides["value_embeds"]
    assert len(one.scalars["resid_scale"]) == 11
    assert len(one.curve("train_loss")[0]) == 1 and reader.result(one)[0].seconds > 0
    plot.main(["scalars", str(tmp_path / "out" / "002-untied"), "--out", str(tmp_path / "x.png")])
    assert (
        record.main(
            [
                "package",
                "--track",
                "cpu",
                "--name",
                "X",
                "--this",
                str(tmp_path / "out"),
                "--target",
                "99",
                "--records",
                str(tmp_path),
            ]
        )
        == 1
    )
    out = capsys.readouterr().out
    assert (
        "rule 1  ok" in out
        and "rule 3  ok" in out
        and "rule 5  fail  seed0: overrides" in out
        and "source" not in out
    )


def test_what_a_user_gets_wrong(tmp_path):
    for argv, words in (
        ([], "give names"),
        (["005-H0", "--out", "x"], "005-H0: no such hypothesis"),
        (["001-H0"], "give names"),
        (["001-H0", "--out", "x", "--seeds", "0"], "--seeds: '0': give a whole number from 1"),
        (["001-H0", "--out", "x", "--on", "tpu"], "choose from short"),
        (["001-H0", "--out", "/dev/null/x"], "no folder can be made"),
        (["001-H0", "--out", str(tmp_path / "x"), "--table"], "not there"),
    ):
        with pytest.raises(UserError, match=words):
            ablate.main(argv)
