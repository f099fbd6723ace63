"""What a run does with signals, streams and files that are not as it expects them."""

import io
import json
import math
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_STAGES, tiny

import train_gpt as tg

ONE_PROCESS = tg.DistEnv(0, 1, torch.device("cpu"))


# ----- Signals


def test_a_signal_two_seconds_after_the_first_ends_the_run_at_once(monkeypatch):
    """However many came between: somebody who presses Ctrl-C every second is heard too."""
    signals, now = tg.StopSignals(tiny(save_on_stop=True)), [100.0]
    signals.may_save = lambda: True
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for seconds in (0.0, 0.01, 1.0, 1.9):  # torchrun's comes twice
        now[0] = 100.0 + seconds
        signals.on_signal(signal.SIGTERM, None)
    now[0] = 102.5
    with pytest.raises(tg.Stopped, match="SIGINT"):
        signals.on_signal(signal.SIGINT, None)


# ----- Memory


def test_a_full_memory_is_said_and_is_no_bug(monkeypatch, capfd):
    def allocate(*_) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(tg, "train", allocate)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--preset", "cpu"])
    assert tg.main() == 1
    assert capfd.readouterr().err.startswith("train_gpt.py: failed: this machine's memory is full")


# ----- Which checkpoints are deleted


def test_only_superseded_checkpoints_of_the_run_are_deleted(tmp_path):
    others = [
        "run.step000001.best.pt",
        "run.step000001-copy.pt",
        "run.stepfinal.pt",
        "run.step7.pt",
        "x.step000001.pt",
    ]
    for name in others:
        (tmp_path / name).write_text("somebody's")
    for step in (1, 2, 3, 9):
        tg.save_checkpoint(tmp_path / tg.checkpoint_name("run", step), {"step": step})
    tg.save_checkpoint(tmp_path / tg.checkpoint_name("run", 4), {"step": 4})  # went on from 3: 9 was damaged
    kept = {path.name for path in tmp_path.iterdir()}
    # what stands at a later step was not this run's: it stays until the run comes there
    assert kept == {*others, "run.step000003.pt", "run.step000004.pt", "run.step000009.pt"}


def test_a_checkpoint_is_saved_though_an_old_one_cannot_be_deleted(tmp_path):
    for step in (1, 2):
        (tmp_path / tg.checkpoint_name("run", step)).mkdir()
    (tmp_path / ".run.step000001.pt.part").mkdir()
    path = tmp_path / tg.checkpoint_name("run", 3)
    tg.save_checkpoint(path, {"step": 3})
    assert torch.load(path) == {"step": 3}


# ----- Errors without a message


def fail(*args, **kwargs):
    raise AssertionError


def test_an_error_without_a_message_is_named_by_its_kind(monkeypatch):
    assert tg.first_line(AssertionError()) == "AssertionError"
    assert tg.first_line(RuntimeError("\n one\ntwo")) == "one"
    device = torch.device("cpu")
    wrong = tg.differs_from_plain(torch.sin, fail, [torch.ones(2)], 0, device, tolerance=0.1)
    assert wrong == "AssertionError: AssertionError"
    monkeypatch.setattr(torch, "compile", fail)
    assert tg.compile_failure(tiny(compile=True), device) == "torch.compile failed: AssertionError"


# ----- Characters that a stream lacks


def test_a_line_that_cannot_be_encoded_does_not_silence_the_rest(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    tg.say("log: größe/\udcff")
    tg.say("step:1/2")
    assert raw.getvalue().decode("ascii").splitlines() == ["log: gr\\xf6\\xdfe/\\udcff", "step:1/2"]


def test_a_log_takes_any_path(tmp_path):
    log = tg.Log(tiny(log_dir=str(tmp_path)), ONE_PROCESS)
    log.begin()
    log.write("checkpoint: größe/\udcff")
    log.begin()
    assert log.path.read_text(encoding="utf-8") == "checkpoint: größe/\\udcff\n"


def test_a_log_whose_last_line_is_half_goes_on_in_a_new_line(tmp_path):
    (tmp_path / "run.txt").write_text("step:1/8 train_loss:3.1\nstep:2/8 train_lo")
    log = tg.Log(tiny(log_dir=str(tmp_path)), ONE_PROCESS, {"run_id": "run"})
    log.write("resumed: from step 1")
    assert log.path.read_text().splitlines()[1:] == ["step:2/8 train_lo", "resumed: from step 1"]


# ----- The end of a run that fails


@pytest.mark.parametrize(
    "error", [tg.UserError("x.bin:\ngone"), AssertionError(), OSError("x.bin: gone")], ids=repr
)
def test_the_log_says_why_a_run_ended(tiny_data, tmp_path, monkeypatch, error):
    def fail_in_a_step(trainer, step):
        raise error

    monkeypatch.setattr(tg.Trainer, "train_step", fail_in_a_step)
    monkeypatch.setattr(tg.StopSignals, "install", lambda signals, may_save: None)
    cfg = tiny(data_dir=str(tiny_data), log_dir=str(tmp_path), warmup=False, val_every=0)
    with pytest.raises(type(error)):
        tg.train(cfg, {})
    (log,) = tmp_path.glob("*.txt")
    why = "AssertionError" if isinstance(error, AssertionError) else "x.bin: gone"
    assert log.read_text().splitlines()[-1] == f"failed: {why}"


def test_a_full_gpu_is_no_bug_and_names_the_flag(monkeypatch, capsys):
    def fill(cfg, overrides):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(tg, "train", fill)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--preset", "cpu"])
    assert tg.main() == 1
    told = capsys.readouterr().err
    assert "2.00 GiB" in told and "--micro_batches" in told and len(told.splitlines()) == 1


# ----- Files of others


@pytest.mark.parametrize("kind", ["archive", "half an archive", "objects", "text", "too large"])
def test_what_is_no_array_of_bytes_a_token_is_an_error_that_names_the_file(tmp_path, kind):
    path, cfg = tmp_path / "token_bytes.npy", tiny()
    with path.open("wb") as file:
        if kind == "archive":
            np.savez(file, a=np.zeros(256, dtype=np.uint16))
        elif kind == "half an archive":
            file.write(b"PK\x03\x04 and no more")
        elif kind == "objects":
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        elif kind == "text":
            file.write(b"1 2 3")
        else:
            header = {"descr": "<u2", "fortran_order": False, "shape": (2**50,)}
            np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(tg.UserError, match="token_bytes.npy"):
        tg.read_token_bytes(tmp_path, cfg)


def test_a_place_behind_the_last_document_is_an_error_that_names_the_shard(tiny_data):
    loader = tg.Loader(tiny(data_dir=str(tiny_data)))
    documents = len(loader.starts)
    loader.open(1, 0)
    loader.open(0, documents)  # where a step may end
    with pytest.raises(tg.UserError, match="x_train_000000.bin"):
        loader.open(0, documents + 1)


# ----- Checkpoints of others


def saved_content(cfg: tg.Config, model: tg.GPT, optimizer: tg.Optimizer) -> dict:
    states = {}
    for name, state in optimizer.state.items():
        states[name] = {key: optimizer.whole_state(name, key).clone() for key in state}
    return dict(
        format=tg.CHECKPOINT_FORMAT,
        config=json.dumps(tg.settings(cfg)),
        run_id="run",
        source_sha256="0",
        torch="2",
        hardware="none",
        saved_at=1.0,
        step=2,
        model={name: t.clone() for name, t in model.state_dict().items()},
        optimizer=states,
        tied=True,
        loader=(0, 3),
        clock=1.0,
        tokens_seen=1024,
        flops=10,
        average=5.0,
        rng=torch.get_rng_state(),
    )


CHANGES = {
    "a clock that is no time": dict(clock=math.nan),
    "a clock before the start": dict(clock=-1.0),
    "tokens that are fewer than none": dict(tokens_seen=-1),
    "a random state that is too short": dict(rng=torch.zeros(8, dtype=torch.uint8)),
    "a random state of floats": dict(rng=torch.zeros(8)),
    "a step past the end": dict(step=9),
    "a run id that is a path": dict(run_id="../run"),
    "a place of one number": dict(loader=(3,)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_with_a_number_that_cannot_be_is_refused(tmp_path, change):
    cfg = tiny()
    model = tg.GPT(cfg)
    content = saved_content(cfg, model, tg.Optimizer(cfg, model, ONE_PROCESS))
    path = tmp_path / "run.step000002.pt"
    content["file"] = path
    tg.check_checkpoint(content, cfg)
    with pytest.raises(tg.UserError, match="run.step000002.pt"):
        tg.check_checkpoint(content | CHANGES[change], cfg)


def test_tensors_that_are_not_the_models_or_the_optimizers_are_refused():
    cfg = tiny(bigram_by_row=True)
    kernels = tg.plain_kernels(new_mantissa=tg.new_float32_copy)
    model = tg.GPT(cfg, torch.bfloat16, kernels)
    optimizer = tg.Optimizer(cfg, model, ONE_PROCESS)
    content = saved_content(cfg, model, optimizer) | {"file": "run.step000002.pt"}
    tg.check_tensors(content, model, optimizer)
    for part, name, key, value in (
        ("optimizer", "qkvo", "momentum_buffer", torch.zeros(1)),  # would be spread over all
        ("optimizer", "bigram_embed", "moves", torch.zeros(3, 1)),
        ("optimizer", "embed", "second_moment", "text"),
        ("optimizer", "embed", "second_moment", torch.zeros(256, 64).to_sparse()),
        ("optimizer", "embed", "second_moment", torch.full((256, 64), math.inf)),
        ("optimizer", "embed", None, 3),
        ("model", "qkvo", None, torch.zeros(1)),
        ("model", "o_scale", None, torch.full((6,), math.nan)),
    ):
        state = {**content[part][name], key: value} if key is not None else value
        changed = content | {part: {**content[part], name: state}}
        with pytest.raises(tg.UserError, match="run.step000002.pt"):
            tg.check_tensors(changed, model, optimizer)


# ----- Sizes that no memory holds


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_dim": 2**14, "head_dim": 64, "mlp_ratio": 64}, "--model_dim 16384"),
        ({"bigram_rows": 1000, "vocab_size": 2**16, "model_dim": 1024}, "--bigram_rows 1000"),
        ({"stages": (replace(TINY_STAGES[0], batch_tokens=2**32),)}, "a micro-batch 49,152.0"),
    ],
)
def test_what_no_memory_holds_is_refused_before_anything_is_written(tmp_path, tiny_data, changes, named):
    cfg = tiny(data_dir=str(tiny_data), log_dir=str(tmp_path / "logs"), **changes)
    with pytest.raises(tg.UserError) as refused:
        tg.Trainer(cfg, {})
    assert named in str(refused.value) and "GiB" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_what_a_run_needs_at_least_is_less_than_it_takes(preset):
    """short's 22.4 GiB and medium's 44.6 (records/gpu, the null device) hold all of it."""
    cfg = tg.PRESETS[preset]
    least = sum(tg.least_memory(cfg, torch.bfloat16, 1).values()) / 2**30
    assert 0 < least < {"short": 22, "medium": 44, "one-gpu": 11}.get(preset, 44), least
