"""The tools that stand in for a GPU: they find what they are for, and are quiet where nothing is."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command

triton = pytest.importorskip("triton", reason="Triton is not installed (it is made for Linux)")

import aot  # noqa: E402
import inductor_stats  # noqa: E402
import interpreter  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

BF16, FP8S = torch.bfloat16, (torch.float8_e4m3fn, torch.float8_e5m2)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# the interpreter; its kernels run in one process of their own, first as Triton has it, then repaired


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    tl.store(c + place, tl.dot(tl.load(a + place), tl.load(b + place)))


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + N + i, a * b)
    tl.store(out + 2 * N + i, tl.maximum(a, b))
    tl.store(out + 3 * N + i, tl.where(a < b, a, b))
    tl.store(out + 4 * N + i, tl.zeros_like(a) + tl.max(b, axis=0))
    tl.store(out + 5 * N + i, tl.fma(a, b, a))


@triton.jit
def atomic_kernel(x, total, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(total + i, tl.load(x + i))


def dot_error(dtype: torch.dtype, N: int = 32) -> float:
    """Relative error of tl.dot, against the product of the same values in float32."""
    a, b = (numbers(N, N, seed=seed).to(dtype) for seed in (1, 2))
    c = torch.empty(N, N)
    dot_kernel[(1,)](a, b, c, N)
    right = a.float() @ b.float()
    return float((c - right).norm() / right.norm())


def wrong_casts(source: torch.dtype, target: torch.dtype) -> int:
    """How many of 1024 values do not become what torch makes of them, ties and carries among them."""
    special = torch.tensor([1.99999, 1.00390625, 1.01171875, 0.0, -0.0, 300.0, 1e-3, -3.9999])
    x = torch.cat((numbers(1016) * 8, special)).to(source)
    y = torch.empty(1024, dtype=target)
    cast_kernel[(1,)](x, y, 1024)
    return int((y.float() != x.to(target).float()).sum())


def wrong_arithmetic() -> list[int]:
    """By operation, how many of 64 bfloat16 results are not float32's, rounded."""
    x, y = numbers(64, seed=3).to(BF16), numbers(64, seed=4).to(BF16)
    out = torch.empty(6, 64, dtype=BF16)
    arithmetic_kernel[(1,)](x, y, out, 64)
    fma = (x.float() * y.float() + x.float()).to(BF16)
    right = torch.stack((x + y, x * y, torch.maximum(x, y), torch.minimum(x, y), y.max().expand(64), fma))
    return (out != right).sum(dim=1).tolist()


def wrong_atomic_sums() -> int:
    """Of 64, after two programs."""
    x, total = numbers(64, seed=5).to(BF16), numbers(64, seed=6).to(BF16)
    right = total + x + x
    atomic_kernel[(2,)](x, total, 64)
    return int((total != right).sum())


def measure(f, *arguments) -> object:
    try:
        return f(*arguments)
    except Exception as error:  # noqa: BLE001, the interpreter as it is may also refuse
        return f"{type(error).__name__}: {error}"


def measurements() -> dict[str, object]:
    casts = [
        (torch.float32, BF16),
        (BF16, torch.float32),
        (torch.float16, BF16),
        *((source, fp8) for fp8 in FP8S for source in (torch.float32, BF16)),
    ]
    return (
        {"arithmetic": measure(wrong_arithmetic), "atomic": measure(wrong_atomic_sums)}
        | {f"dot {dtype}": measure(dot_error, dtype) for dtype in (torch.float32, torch.float16, BF16, *FP8S)}
        | {f"cast {source} {target}": measure(wrong_casts, source, target) for source, target in casts}
    )


@pytest.fixture(scope="module")
def measured() -> tuple[dict, dict]:
    """What each kernel gave before and after the repair."""
    code = (
        "import json, interpreter, test_gpu_tools as t\n"
        "before = t.measurements(); interpreter.apply(); print(json.dumps([before, t.measurements()]))\n"
    )
    return tuple(json.loads(interpreter.interpreted(code, repair=False).splitlines()[-1]))


NEEDED = {
    "arithmetic",
    "atomic",
    "dot torch.bfloat16",
    "cast torch.float32 torch.bfloat16",
    "cast torch.float16 torch.bfloat16",
    *(f"cast {source} {fp8}" for source in (torch.float32, BF16) for fp8 in FP8S),
}


def test_the_repaired_interpreter_computes_what_torch_computes(measured):
    for name, value in measured[1].items():
        if name.startswith("dot"):
            assert value < 1e-5, (name, value)
        else:
            assert value == ([0] * 6 if name == "arithmetic" else 0), (name, value)


def test_the_interpreter_as_triton_has_it_is_wrong_where_the_repair_repairs(measured):
    """Fails when a new Triton computes one of these right: then that part of interpreter.py can go."""
    right = {
        name
        for name, value in measured[0].items()
        if not isinstance(value, str) and sum(np.atleast_1d(value)) < 1e-5
    }
    assert measured[0].keys() - right == NEEDED
    assert measured[0]["dot torch.bfloat16"] > 1 and min(measured[0]["arithmetic"][:2]) > 0


def test_bfloat16_rounds_to_nearest_even():
    x = torch.tensor(
        [1.0, 1.00390625, 1.01171875, -1.00390625, 3.3895314e38, 3.4e38, float("inf"), 1e-40, 0.0]
    )
    bits = torch.from_numpy(interpreter.f32_to_bf16(x.numpy()).copy()).view(BF16)
    assert torch.equal(bits, x.to(BF16)), (bits, x.to(BF16))
    assert np.isnan(interpreter.bf16_to_f32(interpreter.f32_to_bf16(np.float32([np.nan]))))[0]


def test_what_fails_in_the_interpreter_fails_here_with_its_message():
    with pytest.raises(AssertionError, match="(?s)exit code 1.*the planted reason"):
        interpreter.interpreted("raise ValueError('the planted reason')", repair=False)


# the sanitizer


@triton.jit
def reach_kernel(x, y, n, SHIFT: tl.constexpr, MASKED: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + i + SHIFT, mask=i + SHIFT < n if MASKED else i >= 0, other=0.0)
    tl.store(y + i, value, mask=i < n)


@triton.jit
def race_kernel(x, y, KIND: tl.constexpr, N: tl.constexpr):
    program, i = tl.program_id(0), tl.arange(0, N)
    value = tl.load(x + i)
    if KIND == "same place":
        tl.store(y + i, value)
    elif KIND == "next one's":
        tl.store(y + program * N + i, value + tl.load(y + (program + 1) * N + i))
    elif KIND == "atomic":
        tl.atomic_add(y + i, value)
    else:
        tl.store(y + program * N + i, value)


def sanitized(kernel, *arguments) -> str:
    """What the sanitizer says of a launch of four programs."""
    import sanitizer

    sanitizer.apply()
    try:
        kernel[(4,)](*arguments)
    except Exception as error:  # noqa: BLE001, the interpreter wraps it
        return str(error)
    return ""


def sanitizer_findings() -> dict[str, str]:
    n = 50
    x, y = torch.ones(n), torch.zeros(n)
    found = {
        f"reach {shift} {masked}": sanitized(reach_kernel, x, y, n, shift, masked, 16)
        for shift, masked in ((0, True), (9, True), (0, False), (-1, True))
    }
    races = {
        kind: sanitized(race_kernel, torch.ones(16), torch.zeros(80), kind, 16)
        for kind in ("same place", "next one's", "atomic", "own place")
    }
    low = [torch.ones(n, dtype=BF16) for n in (16, 80)]
    return found | races | {"atomic, bfloat16": sanitized(race_kernel, *low, "atomic", 16)}


def test_the_sanitizer_finds_what_is_planted_and_nothing_else():
    code = "import json, test_gpu_tools as t; print(json.dumps(t.sanitizer_findings()))"
    found = json.loads(interpreter.interpreted(code).splitlines()[-1])
    clean = {"reach 0 True", "reach 9 True", "atomic", "atomic, bfloat16", "own place"}
    assert {name for name, message in found.items() if not message} == clean, found
    assert "out-of-bounds load in program (3, 0, 0): 14 lanes" in found["reach 0 False"]  # 64 read, 50 there
    assert "out-of-bounds load in program (0, 0, 0): 1 lanes" in found["reach -1 True"]
    assert "overwrites byte 0 written by program #0" in found["same place"]
    assert "read by another program" in found["next one's"]


# ahead-of-time compilation


@pytest.fixture
def torch_with_ptxas(tmp_path) -> Path:
    """A folder as a CUDA build of torch has it, with a ptxas that says of every source that it spills 7
    bytes."""
    ptxas = tmp_path / "torch" / "bin" / "ptxas"
    ptxas.parent.mkdir(parents=True)
    told = "release 13.0, V13.0.48\\n7 bytes spill stores, 7 bytes spill loads"
    ptxas.write_text(f'#!/bin/sh\necho "Cuda compilation tools, {told}" | tee /dev/stderr\n')
    ptxas.chmod(0o755)
    return ptxas.parent.parent


@pytest.mark.parametrize("tool", ["aot", pytest.param("inductor_stats", marks=pytest.mark.slow)])
@pytest.mark.parametrize("own", ["", pytest.param("/somewhere/ptxas", marks=pytest.mark.slow)])
def test_the_tools_ask_the_ptxas_that_torch_brings(torch_with_ptxas, tool, own):
    """From their import on, as Inductor does; but not where somebody has chosen another."""
    code = (
        f"import os, torch; torch.__file__ = {str(torch_with_ptxas / '__init__.py')!r}; import {tool}, aot\n"
        "print(os.environ['TRITON_PTXAS_PATH'])\n"
        "print('7 bytes spill stores' in aot.ptxas_v('.version 9.0', 80))"
    )
    tests = str(Path(__file__).parent)
    done = run_command([sys.executable, "-c", code], PYTHONPATH=tests, TRITON_PTXAS_PATH=own)
    path, *asked = done.stdout.splitlines()
    assert path == own or (path == str(torch_with_ptxas / "bin/ptxas") and asked == ["True"]), done.stderr


@triton.jit
def spill_kernel(x, y, N: tl.constexpr):
    """Each thread of a warp holds N values until it knows their sum."""
    i = tl.arange(0, 32)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(x + i).to(tl.float32)
    tl.store(y + i, value * tl.sum(value, axis=1)[:, None])


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """a and b by TMA, their product by wgmma."""
    tl.store(
        c + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tl.dot(a.load([0, 0]), b.load([0, 0]))
    )


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    """The folder that the kernels of `compiled` are kept in, as Triton does it."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def compiled(kernels) -> dict[str, aot.Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(kernels))
        with aot.record(90) as launches:
            cast_kernel[(1,)](meta(1024), meta(1024, dtype=torch.float32), 1024)
            spill_kernel[lambda options: (options["N"] // 16,)](
                meta(32, 64), meta(32, 64), 64, num_warps=1, maxnreg=32
            )
            operands = [TensorDescriptor(meta(64, 64), [64, 64], [64, 1], [64, 64]) for _ in range(2)]
            product_kernel[(1,)](*operands, meta(64, 64, dtype=torch.float32), 64, 64, 64)
    return {result.name: result for result in launches}


def test_spills_are_seen_where_they_are(compiled):
    plain, spilling = compiled["cast_kernel"], compiled["spill_kernel"]
    assert plain.spill_st == plain.spill_ld == 0 < plain.regs < 64, aot.row(plain)
    assert spilling.spill_st > 0 and spilling.spill_ld > 0 and spilling.regs <= 32, aot.row(spilling)
    assert spilling.grid == (4,) and plain.grid == (1,) and plain.fits and plain.cc == 90


def test_tensor_cores_and_tma_are_seen_where_they_are(compiled):
    product, plain = compiled["product_kernel"], compiled["cast_kernel"]
    assert product.counts["wgmma"] > 0 and product.counts["tma_ld"] == 2, aot.row(product)
    assert product.smem >= 2 * 64 * 64 * BF16.itemsize, aot.row(product)
    assert not plain.counts["wgmma"] and not plain.counts["tma_ld"], aot.row(plain)
    assert "wgmma=" in aot.row(product) and "wgmma" not in aot.row(plain)


def test_alignment_is_what_a_launch_would_have(compiled):
    wide = compiled["cast_kernel"]
    narrow = aot.compile_jit(
        cast_kernel, aot.T(BF16, aligned=False), meta(1025, dtype=torch.float32)[1:], 1024, cc=90
    )
    assert wide.counts["ldg128"] > 0 and narrow.counts["ldg128"] == 0, (aot.row(wide), aot.row(narrow))


def test_shared_memory_that_an_architecture_lacks_does_not_fit():
    fits = {}
    for cc in (86, 90):
        signature = {"x": "*bf16", "y": "*fp32", "N": "constexpr"}
        result = aot.compile_ast(cast_kernel, signature, {"N": 1024}, cc=cc)
        result.kernel.metadata = result.kernel.metadata._replace(shared=120_000)
        fits[cc] = aot.analyse(result.kernel, cc).fits
    assert fits == {86: False, 90: True}


def test_the_statistics_of_a_cache_are_those_of_its_kernels(compiled, kernels, capsys):
    stats = inductor_stats.stats([kernels])
    assert stats[0].name == "spill_kernel"  # the one that spills most stands first
    for k in stats:
        result = compiled[k.name]
        assert (k.cc, k.warps, k.stages, k.regs, k.smem) == (
            90,
            result.warps,
            result.stages,
            result.regs,
            result.smem,
        )
        assert (k.spill > 0, k.wgmma) == (result.spill_st > 0, result.counts["wgmma"])
    assert {k.name for k in stats} == compiled.keys()
    assert inductor_stats.main([str(kernels)]) == 0
    assert capsys.readouterr().out.startswith("3 kernels; spilling: 1\nspill_kernel")
    for ptx in kernels.rglob("spill_kernel.ptx"):
        ptx.unlink()
    assert {k.name: k.spill for k in inductor_stats.stats([kernels])}["spill_kernel"] == -1


@pytest.mark.parametrize("folders", [[], ["no_such_folder"]])
def test_statistics_of_no_folder_are_an_error(folders, capsys):
    assert inductor_stats.main(folders) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and (folders or ["no argument"])[0] in told
