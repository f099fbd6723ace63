"""Which version of an operator runs: right ones only, of those the fastest, or the one that was asked for."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import tiny

import train_gpt as tg

ALONE = tg.DistEnv(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch):
    monkeypatch.setattr(tg, "compute_capability", lambda: 90)


def double(x, up, down, activation):
    return 2 * tg.mlp(x, up, down, activation)


def raises(*arguments):
    raise RuntimeError("no such instruction\nsecond line")


def equal(x, up, down, activation):
    return tg.mlp(x, up, down, activation)


def choose(monkeypatch, fast, times=(), pins=None, fp8=None, **changes) -> tg.Kernels:
    """Of the MLP, whose versions take `times`, the plain one's last."""
    cfg = tiny(**changes)
    trials = tg.operator_trials(cfg, ALONE)
    taken = iter(times)
    monkeypatch.setattr(tg, "milliseconds", lambda *arguments: next(taken))
    trial = replace(trials["mlp"], fast=({"fp8": fp8} if fp8 else {}) | {"kernel": fast})
    return tg.choose_versions(cfg, ALONE, tg.plain_kernels(), {"mlp": trial}, pins or {})


@pytest.mark.parametrize(
    "times, version, note",
    [
        ((1.0, 3.0), "kernel", "mlp=kernel (3.00 times as long plain)"),
        ((3.0, 1.0), "plain", "mlp=plain (3.00 times as long kernel)"),
        ((1.01, 1.0), "kernel", "mlp=kernel (0.99 times as long plain)"),  # no clear winner
        ((1.0, math.inf), "kernel", "mlp=kernel (inf times as long plain)"),  # plain did not fit
    ],
)
def test_the_fastest_right_version_runs(monkeypatch, times, version, note):
    kernels = choose(monkeypatch, equal, times, warmup=True)
    assert kernels.mlp is (equal if version == "kernel" else tg.mlp)
    assert (kernels.versions, kernels.note) == (f"mlp={version}", note)


@pytest.mark.parametrize(
    "wrong, reason",
    [(double, "relative error 1"), (raises, "RuntimeError: no such instruction")],
)
def test_a_wrong_version_never_runs_even_if_it_is_asked_for(monkeypatch, wrong, reason):
    for pins in ({}, {"mlp": "kernel"}):
        kernels = choose(monkeypatch, wrong, pins=pins, warmup=True)
        assert kernels.mlp is tg.mlp
        assert kernels.note == f"mlp=plain (kernel: {reason})"


def test_each_wrong_version_has_its_reason(monkeypatch):
    note = choose(monkeypatch, double, fp8=raises, warmup=True).note
    assert note == "mlp=plain (fp8: RuntimeError: no such instruction; kernel: relative error 1)"


def test_no_rank_takes_what_is_wrong_on_another(monkeypatch):
    """Times add up over ranks: here a second one, on which the kernel is wrong or plain is slow."""
    trial = tg.operator_trials(tiny(), ALONE)["mlp"]
    for elsewhere, version in (([math.inf, 0.0], "plain"), ([1.0, 9.0], "kernel"), ([5.0, 1.0], "plain")):
        env = tg.DistEnv(rank=0, world_size=2, device=ALONE.device)
        monkeypatch.setattr(env, "all_reduce", lambda x, more=elsewhere: lambda: x + torch.tensor(more))
        monkeypatch.setattr(tg, "milliseconds", lambda *arguments: 2.0)
        assert tg.fastest(env, {"kernel": equal, "plain": tg.mlp}, trial, lambda f: f)[0] == version
        assert tg.fastest(env, {"plain": tg.mlp}, trial, lambda f: f) == ("plain", "")


def test_a_pinned_version_is_not_measured(monkeypatch):
    for version in ("kernel", "plain"):
        kernels = choose(monkeypatch, equal, pins={"mlp": version}, warmup=True)
        assert kernels.note == f"mlp={version} (as asked for)"
    assert choose(monkeypatch, equal, warmup=False).note == "mlp=kernel"


def test_every_operator_has_a_trial_whose_arguments_fit():
    """Both sizes of arguments are such as the plain version takes."""
    cfg = tiny()
    plain, trials = tg.plain_kernels(), tg.operator_trials(cfg, ALONE)
    assert list(trials) == list(tg.OPERATORS)
    for name, trial in trials.items():
        assert set(trial.fast) <= set(tg.OPERATORS[name])
        trial.shows(getattr(plain, name))(*trial.small)
        (trial.timed or trial.shows)(getattr(plain, name))(*trial.large())


@pytest.mark.parametrize(
    "text", ["mlp", "mlp=", "look_up=fp8", "mlps=plain", "mlp=plain;look_up=plain", "=", "\0"]
)
def test_unknown_versions_are_refused(text):
    with pytest.raises(tg.UserError, match=r"^--operators .*head_chunk=fp8\|kernel\|plain"):
        tg.parse_config(["--preset", "cpu", "--operators", text])


def test_a_checkpoints_versions_are_taken_and_garbage_in_it_is_not():
    text = "mlp=plain,head_chunk=kernel"
    pins = {"mlp": "plain", "head_chunk": "kernel"}
    assert tg.read_operators(text) == pins
    assert tg.operators_of({"config": json.dumps({"operators": text})}) == pins
    for config in ({}, {"operators": "mlp=../../x"}, {"operators": 7}, {"operators": None}):
        assert tg.operators_of({"config": json.dumps(config)}) == {}
    assert tg.operators_of(None) == {}


def gpu_that_chose(monkeypatch, reference: bool) -> tuple[tg.Gpu, tg.Kernels]:
    """Without a GPU: what it takes where our attention is right, or with --reference."""
    monkeypatch.setattr(tg, "compile_failure", lambda cfg, device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    fast = dict(attention=tg.triton_attention, prepare_qkv=tg.triton_prepare_qkv)
    monkeypatch.setattr(tg, "choose_versions", lambda cfg, env, kernels, *rest: replace(kernels, **fast))
    monkeypatch.setattr(tg, "operator_trials", lambda cfg, env: {})
    gpu = object.__new__(tg.Gpu)
    gpu.device, gpu.dtype = torch.device("cpu"), torch.bfloat16
    return gpu, gpu.choose_kernels(replace(tg.PRESETS["short"], reference=reference), None, {})


@pytest.mark.parametrize("reference", [True, False])
def test_layers_with_plain_attention_are_compiled_in_pieces(monkeypatch, reference):
    """As a whole they are hundreds of operators, at which the compiler works for many minutes."""
    _, kernels = gpu_that_chose(monkeypatch, reference)
    assert (kernels.compile_layers is None) == reference == (not kernels.compile_small)
    if not reference:
        assert kernels.attention is tg.triton_attention and kernels.prepare_qkv is tg.triton_prepare_qkv
        return
    assert kernels.attention.func is tg.banded_attention and kernels.prepare_qkv is not tg.prepare_qkv
    softmax, gradient = kernels.attention.keywords["softmax"]
    scores = torch.randn(2, 1, 4, 6)
    first_key, query, key = torch.zeros(2, 1, 4, 1), torch.arange(4.0).view(1, 1, 4, 1), torch.arange(6.0)
    torch.testing.assert_close(
        softmax(scores, first_key, query, key, torch.float32),
        tg.masked_softmax(scores, first_key, query, key, torch.float32),
    )


@pytest.mark.parametrize("reference, compiled", [(True, False), (False, True)])
def test_a_long_validation_is_compiled_where_attention_is_a_kernel(monkeypatch, reference, compiled):
    """Plain attention takes a long sequence in hundreds of pieces, each of which the compiler unrolls."""
    gpu, calls = gpu_that_chose(monkeypatch, reference)[0], []

    @partial(torch.compile, backend=lambda graph, inputs: calls.append(1) or graph.forward)
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with tg.validating(gpu):
        twice(torch.ones(3))
    assert bool(calls) == compiled
