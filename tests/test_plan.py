"""The plan's counts against what the real model, optimizer and collectives do; its errors; its times."""

import functools
import json
import sys
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, assert_user_error, run_command, tiny
from test_ranks import join, world  # noqa: F401, a fixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg
from cli import UserError
from data.prepare import tokens_needed
from evals import plan as planning

# Attention of every kind: paired or not, with and without value embedding; a layer without any.
CFG = tiny(
    windows="ssl-l",
    paired_heads="pp...",
    value_embeds=".01.2",
    skips=".a..a",
    backout="..b..",
    micro_batches=4,
    dtype="bfloat16",
)
KERNELS = dict(attention=tg.triton_attention, mlp=tg.triton_mlp, prepare_qkv=tg.triton_prepare_qkv)
NO_GATES = dict(smear_chunk="", skip_chunk="", attn_chunk="", ve_chunk="")


def stage(cfg: tg.Config, world_size: int, index: int = 0, gpu: str = "H100") -> dict:
    ends = [0, *tg.Schedule(cfg).ends]
    return planning.planned_stage(cfg, gpu, world_size, ends[index], ends[index + 1])


# FLOPs


def test_flops_of_each_part_are_those_of_a_real_step():
    """Projections, MLP, head: what torch counts; attention: the visible share of its reference."""
    cfg, found = replace(CFG, **NO_GATES, dtype="float32"), Counter()

    def counting(part, f):
        def run(*args, **named):
            with FlopCounterMode(display=False) as counter:
                result = f(*args, **named)
            found[part] += counter.get_total_flops()
            return result

        return run

    def attention(q, k, v, first_key, window, scale):
        visible = int((torch.arange(len(q)) - first_key + 1).sum())
        found["visible"] += 2 * 2 * visible * q.size(1) * q.size(2)
        found["all"] += 2 * 2 * len(q) ** 2 * q.size(1) * q.size(2)
        return tg.reference_attention(q, k, v, first_key, scale)

    model = tg.GPT(cfg, kernels=tg.plain_kernels(attention=attention))
    pieces = dict(project_qkv="projections", project_output="projections", mlp_block="MLP", head_chunk="head")
    for name, part in pieces.items():
        setattr(model, name, counting(part, getattr(model, name)))
    # As long as TINY_STAGES allow.
    tokens = torch.from_numpy(np.where(np.arange(128) % 96 == 0, cfg.bos_id, 7))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, torch.ones(2), cfg.stages[0].windows).backward()
    planned = stage(cfg, world_size=2)  # two sequences a rank
    # The head's backward is in its forward.
    expected = {
        "projections": 3 * found["projections"],
        "MLP": 3 * found["MLP"],
        "head": found["head"],
        "attention": 3 * found["visible"],
    }
    for part, flops in expected.items():
        assert round(planned[f"TFLOP {part}"] * 1e12) == 2 * flops, part
    assert counter.get_total_flops() == sum(expected.values()) + 3 * (found["all"] - found["visible"])


# Memory


SWITCHES = dict(exclusive=True, mudd_layers=2)


@pytest.mark.parametrize("switches", [SWITCHES, pytest.param({}, marks=pytest.mark.slow)], ids=str)
def test_kept_activations_are_those_of_the_compiled_gpu_model(monkeypatch, switches):
    """What torch.compile saves around the file's kernels, on meta tensors. float32, of gates, is little."""
    cfg, T = replace(CFG, max_predict=1, value_embeds=".0..1", **switches), 96  # all kinds of layer
    whole = functools.partial(
        torch.compile, dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition"
    )
    kernels = tg.plain_kernels(**KERNELS, compile=whole)
    monkeypatch.setitem(tg.HEAD_CHUNK, "meta", T)
    with torch.device("meta"):
        model, ids = tg.GPT(cfg, torch.bfloat16, kernels), torch.empty(T, dtype=torch.int64)
        model.head_chunk = tg.head_chunk
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def note(t):
        if t.dtype == torch.bfloat16 and t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(ids, ids, torch.empty(1, device="meta"), cfg.stages[0].windows)
    scaled = 2 * 4 * len(model.qkvo) * cfg.model_dim**2  # q's, k's, v's and o's weights, times their scalar
    assert loss.is_meta
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert found == 2 * T * planning.kept_values(cfg) + model.lm_head.nbytes + scaled


class Alive(TorchDispatchMode):
    """Bytes of the bfloat16 tensors that have been made inside and still exist, each storage once, without
    the model's own."""

    def __init__(self, model: tg.GPT):
        super().__init__()
        self.sizes, self.own = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16:
                storage = t.untyped_storage()
                if storage._cdata not in self.own | self.sizes.keys():
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return result


@pytest.mark.parametrize("value_embeds", [".01.2", ".01.."])
@pytest.mark.parametrize("paired_heads", ["pp...", "pp..p"])
@pytest.mark.parametrize("switches", [{}, SWITCHES], ids=str)
def test_activations_of_a_validation_are_those_that_still_exist_at_its_peak(
    value_embeds, paired_heads, switches, monkeypatch
):
    """Counted when a piece of the model is done; what only it holds meanwhile comes on top."""
    cfg, T, found = replace(CFG, value_embeds=value_embeds, paired_heads=paired_heads, **switches), 96, []
    kernels = tg.plain_kernels(**KERNELS)
    monkeypatch.setitem(tg.HEAD_CHUNK, "meta", T)
    with torch.device("meta"):
        model, ids = tg.GPT(cfg, torch.bfloat16, kernels), torch.empty(T, dtype=torch.int64)
    alive, stream = Alive(model), 2 * cfg.model_dim * T

    def noting(piece, inside):
        def run(*args):
            result = piece(*args)
            found.append(sum(alive.sizes.values()) + stream * inside(*args))
            return result

        return run

    turned = noting(model.attend, lambda qkv, value, where, *_: 3 + where.paired)  # q, k, v; y
    model.attend, model.project_output = turned, noting(model.project_output, lambda *_: 1)  # y gated
    model.mlp_block = noting(model.mlp_block, lambda *_: 1 + cfg.mlp_ratio)  # its input, relu^2
    model.head_chunk = lambda *args, **named: (torch.zeros((), device="meta"), None, None)
    with torch.no_grad(), alive:
        model(ids, ids, torch.empty(1, device="meta"), cfg.stages[0].windows, False)
    assert len(found) == 3 * 4 + 1
    assert max(found) == 2 * T * planning.validation_values(cfg)


def states_on_a_gpu(optimizer: tg.Optimizer) -> int:
    """Bytes. On a CPU mantissa_lo is the whole float32 value, on a GPU the half that bfloat16 lacks."""
    return sum(
        t.nbytes // (2 if key == "mantissa_lo" and t.dtype == torch.float32 else 1)
        for state in optimizer.state.values()
        for key, t in state.items()
    )


def test_memory_of_one_rank_is_that_of_real_tensors():
    model = tg.GPT(CFG, torch.bfloat16)
    optimizer = tg.Optimizer(CFG, model, tg.DistEnv(0, 1, torch.device("cpu")))
    planned = planning.planned_memory(CFG, world_size=1)
    assert planned["weights"] == planned["gradients"] == sum(p.nbytes for p in model.parameters())
    assert planned["optimizer states"] == states_on_a_gpu(optimizer)


def test_whole_presets_need_what_their_gpus_have():
    need = {
        (name, ranks): sum(planning.planned_memory(tg.PRESETS[name], ranks).values())
        for name, ranks in (("short", 1), ("short", 8), ("medium", 8), ("one-gpu", 1))
    }
    assert max(need.values()) < 80e9 and need["one-gpu", 1] < 24e9 < need["medium", 8]
    assert need["short", 8] < need["short", 1] and need["one-gpu", 1] < need["short", 1]


def test_a_validation_of_one_gpu_holds_more_than_its_training_steps():
    """12,288 tokens in training, 262,144 in a validation."""
    one_gpu = tg.PRESETS["one-gpu"]
    validating = 2 * 262144 * planning.validation_values(one_gpu)
    assert validating > 2 * 12288 * planning.kept_values(one_gpu)
    assert planning.planned_memory(one_gpu, 1)["activations"] == validating
    shorter = planning.planned_memory(replace(one_gpu, val_seq_len=8192), 1)["activations"]
    assert shorter == 2 * 12288 * planning.kept_values(one_gpu) + 2 * 768 * 50304


# Several ranks


def bytes_sent(untie_share: float) -> dict:
    """What this rank sends in two steps, and what it holds; not what a collective keeps on the rank."""
    env, sent = join(), Counter()

    def counting(name, nbytes):
        real = getattr(dist, name)

        def run(*args, **kwargs):
            sent[name] += nbytes(*args)
            return real(*args, **kwargs)

        return run

    def scattered(_, x, theirs=None, ours=None):
        return x.nbytes - (x.nbytes // env.world_size if ours is None else ours[env.rank] * x[:1].nbytes)

    # A ring's.
    real = {
        "all_to_all_single": scattered,
        "all_gather_single": lambda _, own: own.nbytes * (env.world_size - 1),
        "all_reduce": lambda x: 2 * x.nbytes * (env.world_size - 1) / env.world_size,
    }
    cfg = replace(CFG, untie_share=untie_share)
    model = tg.GPT(cfg, torch.bfloat16)
    optimizer = tg.Optimizer(cfg, model, env)
    # Of two steps.
    share, tokens = (
        len(model.bigram_embed) // env.world_size,
        2 * cfg.stages[0].batch_tokens // env.world_size,
    )
    # None twice, of each rank as many.
    rows = np.arange(env.world_size)[:, None] * share + np.arange(tokens // env.world_size)
    with pytest.MonkeyPatch.context() as patch:
        for name, nbytes in real.items():
            patch.setattr(dist, name, counting(name, nbytes))
        with FlopCounterMode(display=False) as flops:
            for step, touched in enumerate(np.split(rows.ravel(), 2)):
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                optimizer.sparse_grad.exchange_indices(touched, last=step == 1)
                optimizer.step(step, lr_mul=1.0, momentum=0.9, untie=False)
    counts = 8 * (env.world_size - 1)  # how many rows will come, which the plan leaves out
    return {
        "sent": round(sum(sent.values()) - counts),
        "flops": flops.get_total_flops(),
        "states": states_on_a_gpu(optimizer),
    }


@pytest.mark.parametrize("size, untie_share", [(2, 1.0), pytest.param(4, 0.0, marks=pytest.mark.slow)])
def test_bytes_and_flops_of_a_rank_are_those_of_real_processes(world, size, untie_share):  # noqa: F811
    cfg = replace(CFG, untie_share=untie_share)
    planned, memory = stage(cfg, size), planning.planned_memory(cfg, size)
    for found in world.run(size, bytes_sent, untie_share):
        assert round(2 * planned["GB sent at most"] * 1e9) == found["sent"]
        assert round(2 * planned["TFLOP optimizer"] * 1e12) == found["flops"]
        assert memory["optimizer states"] == found["states"]


# Time


@pytest.mark.parametrize("gpu", planning.GPUS)
def test_times_follow_from_the_counts_and_the_data_sheet(gpu):
    spec = planning.GPUS[gpu]
    bf16, fp8, bandwidth, link = spec.bf16, spec.fp8, spec.bandwidth, spec.link
    for cfg, ranks in ((tg.PRESETS["short"], 8), (tg.PRESETS["one-gpu"], 1), (CFG, 4)):
        column = stage(cfg, ranks, gpu=gpu)
        model = {part: column[f"TFLOP {part}"] for part in ("projections", "MLP", "head", "attention")}
        precise = model["attention"] + column["TFLOP optimizer"]
        quick = sum(model.values()) - model["attention"]
        for dtype, rate in (("bf16", bf16), ("FP8", fp8 or bf16)):
            limits = {
                "products": quick / rate + precise / bf16,
                "memory": column["GB moved at least"] / bandwidth / 1e3,
                "link": column["GB sent at most"] / link,
            }
            bound = max(limits, key=limits.get)
            assert column[f"ms floor in {dtype}"] == f"{1e3 * limits[bound]:.2f} {bound}"
            assert column[f"s floor in {dtype}"] == pytest.approx(column["steps"] * limits[bound])
        floor, fast, slow = (
            column[f"s {what} bf16"] / column["steps"] for what in ("floor in", "at 60 % of", "at 40 % of")
        )
        assert column["s floor in FP8"] <= column["s floor in bf16"] and floor <= fast <= slow
        assert (fast, slow) == pytest.approx(
            [max(floor, sum(model.values()) / share / bf16) for share in (0.6, 0.4)]
        )
    assert column["ms floor in bf16"].endswith("link") and fast == slow == floor, (
        "a tiny model waits for its messages"
    )


def test_more_micro_batches_move_more_memory():
    """Each reads the matrices twice and writes all gradients; activations are as many."""
    one, two = (
        stage(replace(tg.PRESETS["short"], micro_batches=n), 1)["GB moved at least"] * 1e9 for n in (8, 16)
    )
    banks = 2 * (10 * 4 * 768**2 + 11 * 2 * 4 * 768**2 + 768 * 50304)
    gradients = planning.planned_memory(tg.PRESETS["short"], 1)["gradients"]
    assert two - one == pytest.approx(8 * (2 * banks + gradients), rel=1e-9)


# The command


def test_the_table_has_a_column_a_stage_and_counts_all_parameters(capsys):
    planning.main(["short", "8xH100"])
    sizes, peak, *table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    numbers = [int(word.strip(":,").replace(",", "")) for word in sizes if word[0].isdigit()]
    with torch.device("meta"):
        assert (
            numbers[0] == sum(numbers[1:]) == sum(p.numel() for p in tg.GPT(tg.PRESETS["short"]).parameters())
        )
    assert peak[:4] == ["peak", "memory", peak[2], "GB"] and "fits:" in peak
    rows = {tuple(line[:-4]): line[-4:] for line in table}
    assert rows[("steps",)] == ["502", "503", "502", "40"]
    assert table[-1][:4] == ["1,547", "steps,", f"{tokens_needed(tg.PRESETS['short']):,}", "tokens:"]


@pytest.mark.parametrize("order", ["8xB300", "H100x8", "0xH100", "", "8x", "x", "H100 "])
def test_an_unknown_gpu_is_refused_with_the_known_ones(order):
    with pytest.raises(UserError, match="H100, H200, A100, L40S, RTX4090, RTX5090"):
        planning.main(["short", order])


def test_the_command_ends_with_one_line_and_exit_code_2_on_an_error():
    done = run_command([sys.executable, "-m", "evals.plan", "short", "3xH100"])
    assert_user_error(done, "--micro_batches 8", "3 GPUs")


@pytest.mark.parametrize("order", ["RTX4090", "1xrtx4090", "1 x RTX4090"])
def test_one_gpu_can_be_written_in_several_ways(order, capsys):
    planning.print_plan(CFG, *planning.read_order(order))
    assert capsys.readouterr().out.startswith("cpu on 1 x RTX4090: 165.2 TFLOP/s in bf16")


# ---- from 1 to 64 GPUs


def test_more_gpus_take_less_until_communication_rules(capsys):
    planning.main(["short", "H100", "--scaling"])
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert "46 % of bf16's peak" in head and names.split()[:2] == ["GPUs", "nodes"]
    found = {int(row.split()[0]): [float(value) for value in row.split()[1:5]] for row in rows}
    assert list(found) == [1, 2, 4, 8, 16, 32, 64]
    for count, (nodes, micro_batches, hidden, exposed) in found.items():
        assert nodes == max(1, count // 8) and micro_batches == max(8, count)
        assert found[1][2] / count * 0.999 <= hidden <= exposed
    assert found[1][2] == found[1][3], "one GPU sends nothing"
    assert found[8][3] < 1.05 * found[8][2] and found[64][3] > 1.2 * found[64][2]
    said = " ".join((ROOT / "docs/presets.md").read_text().split())
    one, eight, two_nodes = found[1][2:], found[8][2:], found[16][2:]
    assert f"{one[0]} s on one, {eight[0]} to {eight[1]} s on eight" in said
    assert f"{two_nodes[0]} to {two_nodes[1]} s on two nodes of eight" in said


def test_one_h100_takes_what_records_gpu_says():
    rows = json.loads((ROOT / "records/gpu/h100-80gb-hbm3/joined.json").read_text())["short"]["rows"]
    ms = [row["step_ms"] for row in rows if "step_ms" in row]
    assert len(ms) == len(tg.PRESETS["short"].stages), ms
    parts = zip(ms, tg.Schedule(tg.PRESETS["short"]).spans, strict=True)
    measured = sum((end - begin) * step / 1000 for step, (begin, end) in parts)
    hidden, _ = planning.run_seconds(tg.PRESETS["short"], "H100", 1)
    assert hidden == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("order, word", [("8xH100", "--scaling takes a card"), ("H101", "H101")])
def test_what_scaling_does_not_take(order, word):
    with pytest.raises(UserError, match=word):
        planning.main(["short", order, "--scaling"])
