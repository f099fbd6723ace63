"""The GPU path on a real GPU: what operators compute and take, what a step takes, whether it trains.

    python -m tests.programs.gpu_proof --out FOLDER                             about eight minutes
    python -m tests.programs.gpu_proof --out FOLDER --sections machine operators
    python -m tests.programs.gpu_proof --out FOLDER --sections short --more="--join 1 --fp8_mlp"

Prints a row for every figure as soon as it is known, and keeps them all in FOLDER/proof.json. A section is a
process of its own with a time limit, since a fault of the GPU ends the process that made it: it is a row
that says FAIL, and the next section goes on. Exit code 1 if any row says FAIL.

    machine     what the GPU does at best: copies, matrix products, launches from a graph
    operators   each operator against float64 or float32, against plain PyTorch's error, twice for the same
                bits; milliseconds, and how many times as fast as compiled plain PyTorch
    PRESET      short, one-gpu, short-next, medium: start-up, memory, graphs against calls, milliseconds by
                stage and by kind of kernel, validation
    train       the preset short on the embedded corpus, all kernels against plain PyTorch; a small float32
                model on the GPU against the CPU

--quick takes small sizes: it shows that the program runs, for the null device of tests/null_device.py, where
nothing is computed and no row means anything: NULL stands on each.
"""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train_gpt as tg
from cli import arguments, command, need
from data.shards import write_shard
from tests.null_device import write_vocabulary
from tests.programs.same_losses import EVERY_FEATURE

ROOT = Path(__file__).resolve().parents[2]
# Seconds.
LIMITS = {
    "machine": 60,
    "operators": 150,
    "short": 260,
    "one-gpu": 260,
    "short-next": 260,
    "medium": 300,
    "train": 300,
}
DEFAULT = ("machine", "operators", "short", "train")
PUBLIC_MS = {131072: 245, 262144: 448, 393216: 657}  # the record of 2026-01-24 on one H100, tokens a step: ms
UNFIT = re.compile(r"\((fp8|kernel): ")  # in the log's line on operators: a version that fails or is wrong
DEVICE = "cuda"
H100_PEAK = 989e12  # FLOP/s of dense bfloat16, the datasheet's


def main(argv: list[str]) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for proof.json and the runs' output")
    parser.add_argument("--sections", nargs="+", choices=LIMITS, default=DEFAULT, metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="small sizes, for the null device")
    parser.add_argument(
        "--more", type=shlex.split, default=[], metavar="FLAGS", help="further flags of presets, as one text"
    )
    parser.add_argument("--inside", choices=LIMITS, help="this process is the section")
    args = parser.parse_args(argv)
    if args.inside:
        rows = Rows(args.out / f"{args.inside}.jsonl", is_null())
        try:
            run_section(args.inside, rows, args.quick, args.more)
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    need(torch.cuda.is_available(), "no CUDA GPU here; tests/null_device.py is the proof without one")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for section in args.sections:
        flags = ["--out", str(args.out), "--inside", section]
        flags += [f"--more={shlex.join(args.more)}"] + (["--quick"] if args.quick else [])
        own = [sys.executable, "-m", "tests.programs.gpu_proof", *flags]
        failed += supervise(section, own, args.out, LIMITS[section])
    print(f"{failed} rows FAIL" if failed else "no row FAILs")
    return int(failed > 0)


def supervise(section: str, process: list[str], out: Path, limit: float) -> int:
    """Runs a section in a process, adds its rows to proof.json -> how many of them failed."""
    began, own_rows = time.time(), out / f"{section}.jsonl"
    own_rows.unlink(missing_ok=True)
    child = subprocess.Popen(process, cwd=ROOT, start_new_session=True)
    try:
        code = child.wait(timeout=limit)
        end = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        end = f"killed after {limit} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if end:
        Rows(own_rows).add(section, "the section itself", ok=False, why=end)
    rows = [json.loads(line) for line in own_rows.read_text().splitlines()] if own_rows.exists() else []
    own_rows.unlink(missing_ok=True)
    everything = out / "proof.json"
    proof = json.loads(everything.read_text()) if everything.exists() else {}
    proof[section] = {"seconds": round(time.time() - began, 1), "rows": rows}
    everything.write_text(json.dumps(proof, indent=1) + "\n")
    return sum(row["ok"] is False for row in rows) + (not rows)


class Rows:
    """Rows of a section: printed and kept as soon as they are known."""

    def __init__(self, path: Path, null: bool = False):
        self.path, self.null = path, null

    def add(self, section: str, name: str, ok: bool | None = None, **figures: object) -> None:
        """ok: whether a check passed; None: nothing to check."""
        verdict = {None: "", True: "ok", False: "FAIL"}[ok]
        if self.null:
            verdict = "NULL"
        shown = "  ".join(f"{key} {show(value)}" for key, value in figures.items())
        print(f"{section:10} {name:34} {verdict:5} {shown}", flush=True)
        row = {"name": name, "ok": None if self.null else ok, **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def is_null() -> bool:
    return torch.cuda.is_available() and "NULL" in torch.cuda.get_device_name()


def run_section(section: str, rows: Rows, quick: bool, more: list[str]) -> None:
    """more: flags of a preset."""
    add = partial(rows.add, section)
    if section == "machine":
        machine(add, quick)
    elif section == "operators":
        operators(add, quick)
    elif section == "train":
        train(add, rows.path.parent, quick)
    else:
        preset(add, section, more)


# What the machine can do.


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Of one call on the device, the median, after three more."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return max(float(np.median(times[3:])), 1e-6)


def machine(add: Callable, quick: bool) -> None:
    import triton

    gpu = torch.cuda.get_device_properties(0)
    add("GPU", model=gpu.name, GiB=gpu.total_memory / 2**30, multiprocessors=gpu.multi_processor_count)
    python = sys.version.split()[0]
    add(
        "software", python=python, torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda
    )
    size = 2**24 if quick else 2**32
    a, b = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    add("copy", TB_s=2 * size / milliseconds(lambda: b.copy_(a)) / 1e9)
    a = b = None
    n = 512 if quick else 8192
    x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    add("bfloat16 product", TFLOP_s=2 * n**3 / milliseconds(lambda: x @ y) / 1e9)
    one = torch.ones((), device="cuda")
    x8, y8 = tg.to_fp8(x, 1.0), tg.to_fp8(y, 1.0).t().contiguous().t()
    product = partial(torch._scaled_mm, x8, y8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    add("FP8 product", TFLOP_s=2 * n**3 / milliseconds(product) / 1e9)
    tiny, nodes, graph = torch.zeros(8, device="cuda"), 1000, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(nodes):
            tiny.add_(1)
    add("launches", us_from_a_graph=1e3 * milliseconds(graph.replay) / nodes)
    gaps = milliseconds(lambda: [tiny.add_(1) for _ in range(nodes)])
    add("launches", us_by_calls=1e3 * gaps / nodes)


# Operators: right, and how fast.


def poison() -> None:
    """Free memory holds NaN: what an operator does not write shows."""
    held = [torch.full((2**27,), float("nan"), dtype=torch.bfloat16, device=DEVICE) for _ in range(8)]
    del held


def results(operator: Callable, inputs: list, leaves: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Outputs, and gradients by the first `leaves` inputs for a random gradient of the first output."""
    given = []
    for value in inputs:
        if isinstance(value, Tensor):
            value = value.to(dtype if value.dtype == torch.bfloat16 else value.dtype, copy=True)
        given.append(value)
    wanted = [value.requires_grad_() for value in given[:leaves]]
    output = operator(*given)
    outputs = [output] if isinstance(output, Tensor) else [part for part in output if part is not None]
    if wanted:
        rng = torch.Generator(DEVICE).manual_seed(seed)
        upstream = torch.randn(outputs[0].shape, device=DEVICE, generator=rng).to(outputs[0].dtype)
        outputs.extend(torch.autograd.grad(outputs[0], wanted, upstream))
    return [output.detach() for output in outputs]


def relative_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest of the outputs' errors, each over its norm; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(ours, exact, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def compare(
    add: Callable,
    name: str,
    fast: Callable,
    plain: Callable,
    make: Callable[[torch.Generator], list],
    leaves: int = 0,
    dtype: torch.dtype = torch.float32,
    exact: Callable | None = None,
    tolerance: float = 5e-3,
) -> None:
    """fast against the exact operator in a higher dtype; plain's own error beside it. Fresh inputs."""
    if is_null():
        dtype = torch.float32  # its libraries know no float64
    rng = torch.Generator(DEVICE).manual_seed(int.from_bytes(os.urandom(4), "little"))
    inputs = make(rng)
    exactly = results(exact or plain, inputs, leaves, dtype, seed=1)
    poison()
    ours = results(fast, inputs, leaves, torch.bfloat16, seed=1)
    poison()
    again = results(fast, inputs, leaves, torch.bfloat16, seed=1)
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    error = relative_error(ours, exactly)
    plain_error = relative_error(results(plain, inputs, leaves, torch.bfloat16, seed=1), exactly)
    ok = same and error <= max(tolerance, 1.5 * plain_error)
    add(name, ok=ok, error=error, plain_error=plain_error, same_bits=str(same))


def random(rng: torch.Generator, *size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size, device=DEVICE, generator=rng) * scale).bfloat16()


def documents(rng: torch.Generator, T: int) -> Tensor:
    """(T,) where each token's document starts: lengths are log-normal, about 600 tokens."""
    seed = int(torch.randint(2**31, (1,), device=DEVICE, generator=rng))
    return torch.from_numpy(document_starts(np.random.default_rng(seed), T)).to(DEVICE)


def document_starts(rng: np.random.Generator, T: int) -> np.ndarray:
    ends = rng.lognormal(6, 1, T // 16 + 16).astype(np.int64).clip(16).cumsum()
    starts = np.concatenate(([0], ends[ends < T]))
    is_first = np.zeros(T, dtype=np.int64)
    is_first[starts] = starts
    return np.maximum.accumulate(is_first)


def first_keys(starts: Tensor, window: int, paired: bool) -> Tensor:
    if paired:
        starts = 2 * starts.repeat_interleave(2)
    return torch.maximum(starts, torch.arange(len(starts), device=DEVICE) - window + 1)


def exact_attention(q, k, v, first_key, window, scale) -> Tensor:
    """reference_attention, without float32 in between."""
    key = torch.arange(len(k), device=k.device)
    visible = (key >= first_key[:, None]) & (key <= key[:, None])
    weights = torch.einsum("qhd,khd->hqk", q * scale, k).masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def exact_head(x, head, targets, weights, cap, with_grad, fp8=False) -> tuple:
    loss, dz = tg.cross_entropy(x @ head, targets, weights.to(x.dtype), cap)
    return loss, dz @ head.T, x.T @ dz


def forward_and_backward(operator: Callable, inputs: list, leaves: int) -> tuple[Callable, Callable]:
    """-> two calls, of the forward pass alone and of both."""
    wanted = [inputs[i].requires_grad_() for i in range(leaves)]

    def forward() -> Tensor:
        with torch.no_grad():
            return operator(*inputs)

    def both() -> object:
        output = operator(*inputs)
        return torch.autograd.grad(output, wanted, output)

    return forward, both


def operators(add: Callable, quick: bool) -> None:
    cfg = tg.PRESETS["short"]
    attention_rows(add, cfg, quick)
    prepare_rows(add, cfg, quick)
    mlp_rows(add, cfg, quick)
    head_rows(add, cfg, quick)
    matrix_rows(add, cfg, quick)
    table_rows(add, cfg, quick)


def compiled(operator: Callable) -> Callable:
    torch._dynamo.config.recompile_limit = 64
    torch.compiler.assume_constant_result(tg.compute_capability)  # as choose_versions does
    return torch.compile(operator, dynamic=False)


def attention_rows(add: Callable, cfg: tg.Config, quick: bool) -> None:
    H, d = cfg.num_heads, cfg.head_dim
    scale = torch.tensor(0.1, device=DEVICE)

    def make(T: int, window: int, paired: bool, rng: torch.Generator) -> list:
        places, heads = (2 * T, H // 2) if paired else (T, H)
        q, k, v = (random(rng, places, heads, d) for _ in range(3))
        unit = [t / t.float().square().mean(-1, keepdim=True).sqrt() for t in (q, k)]
        first_key = first_keys(documents(rng, T), window, paired)
        return [*(t.bfloat16() for t in unit), v, first_key, window, scale]

    small = 256 if quick else 2048
    compare(
        add,
        f"attention, T {small}, float64",
        tg.triton_attention,
        tg.banded_attention,
        partial(make, small, 384, False),
        leaves=3,
        dtype=torch.float64,
        exact=exact_attention,
    )
    shapes = [(small, 128, True)] if quick else []
    if not quick:
        for stage in cfg.stages:
            T, (short, long) = stage.batch_tokens // cfg.micro_batches, stage.windows
            shapes += [(T, short, True), (T, short, False), (T, long, False)]
    for T, window, paired in shapes:
        name = f"attention{' paired' if paired else ''}, T {T}, window {window}"
        compare(
            add, name, tg.triton_attention, tg.banded_attention, partial(make, T, window, paired), leaves=3
        )
        inputs = make(T, window, paired, torch.Generator(DEVICE).manual_seed(1))
        visible = torch.arange(len(inputs[0]), device=DEVICE) - inputs[3] + 1
        flops = 4 * d * inputs[0].size(1) * int(visible.sum())
        forward, both = forward_and_backward(tg.triton_attention, inputs, 3)
        ms, ms_both = milliseconds(forward), milliseconds(both)
        times = dict(forward_ms=ms, TFLOP_s=flops / ms / 1e9, backward_ms=ms_both - ms)
        times["backward_TFLOP_s"] = 2.5 * flops / max(ms_both - ms, 1e-6) / 1e9
        _, plain_both = forward_and_backward(tg.banded_attention, inputs, 3)
        add(name, **times, times_plain=milliseconds(plain_both, 3) / ms_both)


def prepare_rows(add: Callable, cfg: tg.Config, quick: bool) -> None:
    """From the product of q, k and v to attention, with a value embedding."""
    H, d = cfg.num_heads, cfg.head_dim

    def make(T: int, rng: torch.Generator) -> list:
        first = torch.arange(T, device=DEVICE)
        angles = torch.rand(2 * T, d // 4, device=DEVICE, generator=rng) * 6
        return [
            random(rng, T, 3, H, d),
            random(rng, T, H, d),
            documents(rng, T) == first,
            angles.cos(),
            angles.sin(),
        ]

    fast, plain = (partial(tg.prepared, prepare, cfg) for prepare in (tg.triton_prepare_qkv, tg.prepare_qkv))
    T = 512 if quick else 49152
    compare(add, f"q, k, v made ready, T {T}", fast, plain, partial(make, T), leaves=2)
    inputs = make(T, torch.Generator(DEVICE).manual_seed(1))
    for name, paired, offset in (("paired", True, False), ("long", False, True)):
        qkv, value, is_first, *angles = inputs
        places = 2 * T if paired else T
        given = [qkv, value, is_first, *(t[:places] for t in angles), paired, offset, True]
        times = {}
        for version, prepare in (("ms", tg.triton_prepare_qkv), ("plain_ms", compiled(tg.prepare_qkv))):
            leaves = [given[i].requires_grad_() for i in range(2)]

            def both(prepare: Callable = prepare, given: list = given, leaves: list = leaves) -> object:
                outputs = prepare(*given)
                return torch.autograd.grad(outputs, leaves, [t.detach() for t in outputs])

            times[version] = milliseconds(both)
        add(f"q, k, v made ready, {name}, T {T}", **times, GB_s=15 * value.nbytes / times["ms"] / 1e6)


def mlp_rows(add: Callable, cfg: tg.Config, quick: bool) -> None:
    D, W = cfg.model_dim, cfg.mlp_ratio * cfg.model_dim
    fp8_mlp = partial(tg.triton_mlp, fp8=True)

    def make(T: int, rng: torch.Generator) -> list:
        up, down = (random(rng, W, D, scale=D**-0.5) for _ in range(2))
        return [random(rng, T, D), up, down, "relu2"]

    for T, dtype in ((512, torch.float64), (512 if quick else 49152, torch.float32)):
        name = f"relu2 MLP, T {T}, {'float64' if dtype == torch.float64 else 'float32'}"
        compare(add, name, tg.triton_mlp, tg.mlp, partial(make, T), leaves=3, dtype=dtype)
        name = name.replace("MLP", "MLP in FP8")
        compare(add, name, fp8_mlp, tg.mlp, partial(make, T), leaves=3, dtype=dtype, tolerance=0.12)
    inputs = make(512 if quick else 49152, torch.Generator(DEVICE).manual_seed(1))
    forward, both = forward_and_backward(tg.triton_mlp, inputs, 3)
    _, plain_both = forward_and_backward(compiled(tg.mlp), inputs, 3)
    flops, ms, ms_both = 4 * len(inputs[0]) * D * W, milliseconds(forward), milliseconds(both)
    _, fp8_both = forward_and_backward(compiled(fp8_mlp), inputs, 3)
    first = milliseconds(lambda: tg.relu2_product(inputs[0], inputs[1], None))
    product = milliseconds(lambda: inputs[0].detach() @ inputs[1].detach().T)
    add(
        f"relu2 MLP, T {len(inputs[0])}",
        forward_ms=ms,
        TFLOP_s=flops / ms / 1e9,
        both_ms=ms_both,
        both_TFLOP_s=3 * flops / ms_both / 1e9,
        kernel_ms=first,
        bare_product_ms=product,
        fp8_both_ms=milliseconds(fp8_both),
        times_plain=milliseconds(plain_both) / ms_both,
    )


def head_rows(add: Callable, cfg: tg.Config, quick: bool) -> None:
    D, V = cfg.model_dim, 1024 if quick else cfg.vocab_rows
    cap = (cfg.softcap, cfg.softcap_shift, cfg.softcap_width)

    def make(fp8: bool, c: int, rng: torch.Generator) -> list:
        """The head as it is when it has learned: likely targets, so that errors elsewhere weigh."""
        x, head = random(rng, c, D), random(rng, D, V, scale=6 * D**-0.5)
        likely = (x.float() @ head.float()).topk(2, dim=-1).indices
        return [x, head, likely, torch.full((c, 2), 0.5 / c, device=DEVICE), cap, True, fp8]

    plain = partial(tg.head_chunk)
    for fp8, tolerance in ((False, 1e-2), (True, 8e-2)):
        kind = "FP8" if fp8 else "bfloat16"
        name = f"head and loss, {kind}, float64"
        exact, fast = exact_head, tg.triton_head_chunk
        compare(add, name, fast, plain, partial(make, fp8, 512), 0, torch.float64, exact, tolerance)
        inputs = make(fp8, 512 if quick else 16384, torch.Generator(DEVICE).manual_seed(1))
        c, ms = len(inputs[0]), milliseconds(lambda inputs=inputs: tg.triton_head_chunk(*inputs))
        without = milliseconds(lambda inputs=inputs: tg.triton_head_chunk(*inputs[:5], False, inputs[6]))
        add(
            f"head and loss, {kind}, {c} tokens",
            ms=ms,
            TFLOP_s=6 * c * D * V / ms / 1e9,
            loss_alone_ms=without,
        )
    plain_ms = milliseconds(partial(compiled(tg.head_chunk), *inputs), 3)
    z = inputs[0] @ inputs[1]
    ms = milliseconds(lambda: tg.cross_entropy_(z, inputs[2], inputs[3], list(cap), True))
    add("cross-entropy alone", ms=ms, GB_s=3 * z.nbytes / ms / 1e6, plain_head_ms=plain_ms)


def matrix_rows(add: Callable, cfg: tg.Config, quick: bool) -> None:
    D = 128 if quick else cfg.model_dim
    for n, rows, depth in ((40, D, D), (22, D, 4 * D)):
        name = f"symmetric product, {n} x {rows} x {depth}"

        def make(rng: torch.Generator, n: int = n, rows: int = rows, depth: int = depth) -> list:
            return [random(rng, n, rows, depth)]

        compare(add, name, tg.triton_symmetric_product, tg.symmetric_product, make, dtype=torch.float64)
        x = make(torch.Generator(DEVICE).manual_seed(1))[0]
        ms, bare = (
            milliseconds(lambda x=x: tg.triton_symmetric_product(x)),
            milliseconds(lambda x=x: x @ x.mT),
        )
        polar = {}
        for version in (tg.triton_symmetric_product, tg.symmetric_product):
            orthogonalise = compiled(partial(tg.polar_express, symmetric_product=version))
            kind = "ours" if version is tg.triton_symmetric_product else "cuBLAS"
            polar[f"polar_ms_{kind}"] = milliseconds(lambda f=orthogonalise, x=x: f(x))
        add(name, ms=ms, TFLOP_s=2 * n * rows**2 * depth / ms / 1e9, bare_product_ms=bare, **polar)
    V = 1024 if quick else cfg.vocab_rows
    rng = torch.Generator(DEVICE).manual_seed(1)
    embed, head = random(rng, V, D), random(rng, D, V)
    for add_to in (True, False):
        expected = embed + head.T if add_to else head.T
        to = embed.clone()
        tg.triton_transpose_(to, head, add_to)
        ms = milliseconds(lambda to=to, add_to=add_to: tg.triton_transpose_(to, head, add_to))
        bare = milliseconds(lambda to=to, add_to=add_to: tg.transpose_(to, head, add_to))
        figures = dict(ms=ms, GB_s=(2 + add_to) * to.nbytes / ms / 1e6, times_plain=bare / ms)
        to.copy_(embed)
        tg.triton_transpose_(to, head, add_to)
        add(f"transpose, {'added' if add_to else 'copied'}", ok=torch.equal(to, expected), **figures)


def table_rows(add: Callable, cfg: tg.Config, quick: bool) -> None:
    """Adam, NorMuon and the gradient of a lookup, at the model's largest."""
    D, R = cfg.model_dim, 1024 if quick else cfg.bigram_rows * cfg.vocab_rows
    rng = torch.Generator(DEVICE).manual_seed(1)
    p, grad, low = random(rng, R, D), random(rng, R, D), torch.zeros(R, D, dtype=torch.int16, device=DEVICE)
    m, v = (torch.zeros(R, D, device=DEVICE) for _ in range(2))
    steps, lr = torch.ones((), device=DEVICE), torch.tensor(1e-3, device=DEVICE)
    adam = partial(compiled(tg.adam_), lr=lr, wd=0.1, betas=(0.9, 0.95), eps=1e-10, steps=steps)
    moved = p.clone()
    tg.adam_(p, low, grad, m, v, lr=lr, wd=0.1, betas=(0.9, 0.95), eps=1e-10, steps=steps)
    low.zero_(), m.zero_(), v.zero_()
    adam(moved, low, grad, m, v)
    equal = float((moved != p).float().mean())
    ms = milliseconds(lambda: adam(moved, low, grad, m, v))
    add("Adam, bigram table", ok=equal < 1e-3, ms=ms, GB_s=R * D * 26 / ms / 1e6, different=equal)
    moved = m = v = low = grad = None
    T = 1024 if quick else 49152
    rows = torch.randint(R, (T,), device=DEVICE, generator=rng)
    table, upstream = p.requires_grad_(), random(rng, T, D)

    def lookup() -> object:
        return torch.autograd.grad(torch.nn.functional.embedding(rows, table), table, upstream)

    ms = milliseconds(lookup)
    add(
        "lookup and its dense gradient", ms=ms, zeroing_alone_ms=milliseconds(lambda: torch.zeros_like(table))
    )
    bank = random(rng, 22, 4 * D, D, scale=D**-0.5)
    low = torch.zeros_like(bank, dtype=torch.int16)
    m = torch.zeros(bank.shape, device=DEVICE)
    muon = partial(
        compiled(tg.normuon_),
        lr=lr,
        wd=0.1,
        momentum=torch.tensor(0.9, device=DEVICE),
        beta2=0.95,
        matrix_lrs=torch.ones(22, 1, 1, device=DEVICE),
        symmetric_product=tg.triton_symmetric_product,
    )
    grads = random(rng, *bank.shape)
    ms = milliseconds(lambda: muon(bank, low, grads, m, m.mean(-1, keepdim=True)))
    add("NorMuon, MLP matrices", ms=ms, finite=str(bool(bank.isfinite().all())))


# A preset's steps.


def preset(add: Callable, name: str, more: list[str]) -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        stages = len(tg.PRESETS[name].stages)
        flags = ["--preset", name, "--num_steps", str(2 * stages), "--extension_share", str(1 / stages)]
        flags += ["--data_dir", folder, "--log_dir", folder, "--val_every", "0"]
        flags += ["--val_tokens", str(2 * 2**18), *more]
        cfg, overrides = tg.parse_config(flags)
        if is_null():  # no result can be right
            tg.differs_from_plain = lambda *arguments: ""
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = tg.Trainer(cfg, overrides)
        note = trainer.model.kernels.note
        add("operators", ok=not UNFIT.search(note), seconds=time.perf_counter() - began, chosen=note)
        tg.warm_up(trainer)
        torch.cuda.synchronize()
        figures = dict(seconds=time.perf_counter() - began, graphs=len(trainer.graphs.captured))
        add("start-up", ok=len(trainer.graphs.captured) >= 6, **figures, **memory())
        graphs_and_calls(add, trainer)
        add("memory after all steps", **memory())
        stage_rows(add, trainer)
        kernel_rows(add, trainer)
        tokens, targets = trainer.validation.sequence(0)
        windows = trainer.schedule.val_windows(cfg.num_steps)
        ms = milliseconds(lambda: trainer.evaluate(tokens, targets, windows), 3)
        add(f"validation, {len(tokens)} tokens", ms=ms, seconds_for_all=40 * ms / 1e3)
        trainer.close(failed=False)


def make_data(folder: Path) -> None:
    """Shards in FineWeb's shape: documents of log-normal length, frequent and rare tokens."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16_000_000), ("val", 2 * 2**18 + 1)):
        tokens = (rng.zipf(1.2, count) % 50256).astype(np.uint16)
        starts = document_starts(rng, count)
        tokens[starts == np.arange(count)] = 50256
        write_shard(folder / f"made_{split}_000000.bin", tokens)
    write_vocabulary(folder, 50256, 256)


def memory() -> dict[str, float]:
    return {
        "GiB": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_GiB": torch.cuda.max_memory_reserved() / 2**30,
    }


def graphs_and_calls(add: Callable, trainer: tg.Trainer) -> None:
    """All steps from graphs, then from the same start by calls: losses and every parameter are the same."""
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    live = [*trainer.model.parameters(), *trainer.model.buffers(), *states]
    start, tied = [t.detach().cpu().clone() for t in live], trainer.optimizer.tied
    losses, ends, times = {}, {}, {}
    graphs = trainer.graphs
    for kind, runner in (("graphs", graphs), ("calls", tg.NoGraphs())):
        with torch.no_grad():
            for t, value in zip(live, start, strict=True):
                t.copy_(value)
        trainer.optimizer.tied, trainer.graphs = tied, runner
        trainer.loader.open(0)
        trainer.batches = tg.Prefetcher(trainer.loader, trainer.schedule, trainer.env, None)
        losses[kind], times[kind] = all_steps(trainer)
        ends[kind] = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}
        trainer.batches.close()
    trainer.graphs = graphs
    difference, worst = 0.0, "none"
    for name, p in ends["graphs"].items():
        gap = float((p.float() - ends["calls"][name].float()).abs().max())
        if not gap <= difference:
            difference, worst = gap, name
    equal = difference == 0 and losses["graphs"] == losses["calls"]
    add("graphs against calls", ok=equal, largest_difference=difference, parameter=worst)
    finite = bool(np.isfinite(losses["graphs"]).all())
    add("losses", ok=finite and losses["graphs"][-1] < losses["graphs"][0], losses=str(losses["graphs"]))
    for kind, ms in times.items():
        add(f"a step's wall time, {kind}", ms=str([round(t) for t in ms]))


def all_steps(trainer: tg.Trainer) -> tuple[list[float], list[float]]:
    """-> losses, milliseconds."""
    losses, times = [], []
    for step in range(trainer.cfg.num_steps):
        trainer.model.set_long_window(trainer.schedule.windows(step)[1])
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = trainer.train_step(step)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
        losses.append(round(float(result[0]), 5))
    return losses, times


def step_kinds(trainer: tg.Trainer) -> list[tuple]:
    """Keys of graphs of gradients, by size; those of the optimizer's are pairs of booleans."""
    return sorted(key for key in trainer.graphs.captured if not isinstance(key[0], bool))


def stage_rows(add: Callable, trainer: tg.Trainer) -> None:
    """The device's time of each kind of step, from graphs: gradients, and an average update of both kinds."""
    cfg, graphs = trainer.cfg, trainer.graphs
    updates = {}
    for adam_turn in (False, True):
        for tied in (False, True):
            if (adam_turn, tied) in graphs.captured:
                ms = updates[adam_turn, tied] = milliseconds(partial(graphs.run, (adam_turn, tied), None), 5)
                add(f"update, Adam {adam_turn}, tied {tied}", ms=ms)
    update = (updates[False, False] + updates[True, False]) / 2
    for kind in step_kinds(trainer):
        length, windows, candidates = kind
        ms = milliseconds(partial(graphs.run, kind, None), 5)
        sequences = [tuple(t.cpu() for t in pair) for pair in trainer.machine.inputs[length]]
        flops = sum(tg.step_flops(cfg, sequences, windows, candidates).values())
        tokens = length * len(sequences)
        add(
            f"{tokens} tokens, windows {windows}" + (f", softmax over {candidates}" if candidates else ""),
            step_ms=ms + update,
            gradients_ms=ms,
            tokens_s=tokens / (ms + update) * 1e3,
            TFLOP=flops / 1e12,
            of_989=flops / (ms + update) * 1e3 / H100_PEAK,
            public_ms=PUBLIC_MS.get(tokens, 0) if cfg.model_dim == 768 else 0,
        )


KERNELS = {  # the first pattern that a kernel's name holds says what it is
    "attention": r"attention_",
    "prepare": r"prepare_",
    "relu2": r"relu2_kernel",
    "cross-entropy": r"cross_entropy_kernel|logit_gradient_kernel|target_gradient_kernel",
    "symmetric": r"symmetric_kernel",
    "transposes": r"transpose_kernel",
    "Inductor's": r"^triton_",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitK",
    "copies, fills": r"[Mm]emcpy|[Mm]emset|FillFunctor|copy",
    "lookups, sorts": r"_rows_kernel|embedding|index|[Ss]ort|scan|cum",
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, kernel)), "other")


def kernel_rows(add: Callable, trainer: tg.Trainer) -> None:
    """The profiler's times of one replay, by kind and by kernel."""
    kinds = step_kinds(trainer)
    for key in (kinds[0], kinds[-1], (False, False), (True, False)):
        kernels = profiled(partial(trainer.graphs.run, key, None))
        by_kind: Counter = Counter()
        for name, (ms, _) in kernels.items():
            by_kind[kind_of(name)] += ms
        total = sum(by_kind.values())
        shown = {kind.replace(" ", "_"): round(ms, 2) for kind, ms in by_kind.most_common()}
        add(f"kernels of {key}", ms=total, nodes=sum(n for _, n in kernels.values()), **shown)
        if key == kinds[-1] or key == (True, False):
            for name, (ms, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:60]:
                add(f"  of {key}", ms=ms, times=count, kernel=name[:110])


def profiled(work: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """name -> (milliseconds, how often)."""
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    found: dict[str, tuple[float, int]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms, count = found.get(event.name, (0.0, 0))
            found[event.name] = ms + event.device_time / 1e3, count + 1
    return found


# Training.


def train(add: Callable, out: Path, quick: bool) -> None:
    small_model(add)
    steps = "8" if quick else "40"
    shards = out / "corpus"  # without its table of bytes, which is of a smaller vocabulary
    shards.mkdir(exist_ok=True)
    for shard in (ROOT / "data" / "corpus").glob("*.bin"):
        if not (shards / shard.name).exists():
            (shards / shard.name).symlink_to(shard)
    flags = ["--preset", "short", "--num_steps", steps, "--data_dir", str(shards), "--bos_id", "4095"]
    flags += ["--epochs", "9", "--val_tokens", "163840", "--val_seq_len", "163840", "--val_every", "0"]
    runs = {
        "kernels": [],
        "bfloat16 head": ["--no-fp8_head"],
        "plain PyTorch": ["--reference", "--no-graphs"],
    }
    losses = {}
    for name, more in runs.items():
        began = time.perf_counter()
        with (out / f"train_{name.replace(' ', '_')}.txt").open("w") as file:
            command_line = [sys.executable, "train_gpt.py", *flags, *more, "--log_dir", str(out / "logs")]
            code = subprocess.run(command_line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        text = Path(file.name).read_text()
        losses[name] = [float(x) for x in re.findall(r"train_loss:([\d.]+)", text)]
        last = re.findall(r"val_loss:([\d.]+) train_time:(\d+)ms", text)
        ok = code == 0 and bool(last)
        end = dict(val_loss=last[-1][0], train_ms=int(last[-1][1])) if last else {}
        add(f"short, {steps} steps, {name}", ok=ok, seconds=time.perf_counter() - began, **end)
        if ok and name != "kernels":
            gap = np.abs(np.array(losses[name]) / np.array(losses["kernels"]) - 1)
            add(f"kernels against {name}", ok=bool(gap.max() < 0.01), largest_gap=gap.max(), mean=gap.mean())


def small_model(add: Callable) -> None:
    """float32, plain PyTorch, the same on the GPU as on the CPU."""
    torch.set_num_threads(min(4, torch.get_num_threads()))  # more wait for each other, where others run, too
    curves = {}
    for device in ("cpu", "cuda"):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            flags = [*EVERY_FEATURE, "--device", device, "--dtype", "float32", "--log_dir", folder]
            cfg, _ = tg.parse_config([*flags, "--no-bigram_by_row", "--no-warmup", "--no-graphs"])
            trainer = tg.Trainer(cfg, {})
            kernels = replace(trainer.model.kernels, muon_dtype=torch.float32)
            trainer.optimizer.kernels = kernels
            curves[device] = [float(trainer.train_step(step)[0]) for step in range(cfg.num_steps)]
            trainer.close(failed=False)
    gap = max(abs(a / b - 1) for a, b in zip(curves["cuda"], curves["cpu"], strict=True))
    add("a small float32 model, GPU and CPU", ok=gap < 1e-3, largest_gap=gap, last_loss=curves["cuda"][-1])


if __name__ == "__main__":
    sys.exit(command(main))
