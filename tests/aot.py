"""
Triton kernels compiled for any NVIDIA GPU on a machine without one, and what came out: registers, spills,
shared memory, tensor cores, TMA.

    with aot.record(90) as launches:    # every kernel[grid](...) inside is compiled for sm_90, not launched
        attention(*tensors_on_meta)     # the wrapper itself: alignments are what a launch would have
    print(aot.header(), *map(aot.row, launches), sep="\\n")

or one kernel: aot.compile_jit(kernel, torch.bfloat16, 1024, grid=(1,), cc=90, BLOCK=128); a dtype stands
for a pointer.
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import contextlib  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction, MockTensor  # noqa: E402

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def use_torchs_ptxas(torch_folder: Path) -> None:
    """A CUDA build of torch brings a ptxas of its own, with which Inductor compiles, and Triton in the same
    process from then on. So that the figures here are of what a GPU would get, and ptxas knows the PTX that
    it is asked about: that one from the start. An own TRITON_PTXAS_PATH stays."""
    # The wheel's; where 2.11 looks.
    for path in (
        torch_folder / "bin/ptxas",
        torch_folder / "_inductor/bin/ptxas",
    ):
        if os.access(path, os.X_OK) and not os.environ.get("TRITON_PTXAS_PATH"):
            os.environ["TRITON_PTXAS_PATH"] = str(path)


use_torchs_ptxas(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Limits:
    """Of one architecture: shared memory in bytes that a block can ask for, and what a multiprocessor has."""

    block_shared: int
    threads: int
    shared: int
    blocks: int
    multiprocessors: int
    registers: int = 65536


LIMITS = {
    80: Limits(166912, 2048, 167936, 32, 108),
    86: Limits(101376, 1536, 102400, 16, 132),
    89: Limits(101376, 1536, 102400, 24, 142),
    90: Limits(232448, 2048, 233472, 32, 132),
    100: Limits(232448, 2048, 233472, 32, 148),
    120: Limits(101376, 1536, 102400, 24, 170),
}


class FakeUtils:
    def get_device_properties(self, _device) -> dict[str, int]:
        limits = LIMITS[driver.active.cc]
        return {
            "max_shared_mem": limits.block_shared,
            "multiprocessor_count": limits.multiprocessors,
            "max_num_regs": limits.registers,
            "warpSize": 32,
            "sm_clock_rate": 1755000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, *_):
        raise RuntimeError("no GPU: this kernel would have been launched")


class FakeCudaDriver(DriverBase):
    """Answers what Triton asks before a launch."""

    def __init__(self, cc: int = 90):
        self.cc, self.utils = cc, FakeUtils()

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self) -> int:
        return self.cc  # Triton keeps compiled kernels by device: one cache an architecture

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device) -> int:
        return 0

    def get_device_capability(self, device=0) -> tuple[int, int]:
        return self.cc // 10, self.cc % 10

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_empty_cache_for_benchmark(self):
        raise RuntimeError("no GPU")

    def clear_cache(self, cache) -> None:
        pass

    def get_benchmarker(self):
        return lambda fn, **named: (fn(), [1.0, 1.0, 1.0])[1]

    def launcher_cls(self, *_, **__):
        raise RuntimeError("no GPU")


def install(cc: int = 90) -> None:
    driver.set_active(FakeCudaDriver(cc))


class T(MockTensor):
    """A pointer to dtype: T(torch.bfloat16), or T("bf16"); aligned=False: its address cannot be divided
    by 16.
    """

    def __init__(self, dtype, shape: tuple[int, ...] = (1,), aligned: bool = True):
        super().__init__(dtype)
        self.shape, self.address = shape, 0 if aligned else 2

    def data_ptr(self) -> int:
        return self.address


def as_arg(x):
    """A tensor without memory (meta, fake) or a dtype as a pointer; a GPU's allocator aligns every
    storage.
    """
    if isinstance(x, torch.Tensor) and not (type(x) is torch.Tensor and x.device.type == "cpu"):
        return T(x.dtype, tuple(x.shape), aligned=int(x.storage_offset()) * x.element_size() % 16 == 0)
    return T(x) if isinstance(x, torch.dtype) else x


@dataclass
class Result:
    """One compiled kernel; sizes in bytes."""

    name: str
    cc: int
    warps: int
    stages: int
    regs: int  # a thread
    spill_st: int
    spill_ld: int
    stack: int
    smem: int
    static_smem: int
    tmem: int
    counts: dict[str, int]  # of the instructions in PATS
    ctas_per_sm: int
    fits: bool  # on cc: at least one block at a time
    secs: float  # to compile
    kernel: object
    signature: dict
    attrs: dict
    constexprs: dict
    grid: object = None
    warnings: list[str] = field(default_factory=list)


PATS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "tma_ld": r"cp\.async\.bulk\.tensor\.\dd\.shared",
    "tma_st": r"cp\.async\.bulk\.tensor\.\dd\.global",
    "cpasync": r"cp\.async\.c[ag]",
    "ldmat": r"ldmatrix",
    "stmat": r"stmatrix",
    "ldg128": r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64",
    "atom": r"\b(atom|red)\.global",
    "mbar": r"mbarrier\.try_wait",
    "setmaxnreg": r"setmaxnreg",
}


def ptxas_for(cc: int) -> str:
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return get_ptxas(cc).path
    except (ImportError, AttributeError, TypeError):  # older than 3.8
        given = os.environ.get("TRITON_PTXAS_PATH")
        return str(BIN / "ptxas-blackwell") if cc >= 100 else given or str(BIN / "ptxas")


def ptxas_v(ptx: str, cc: int, fmad: bool = True, extra: tuple[str, ...] | list[str] = ()) -> str:
    """What `ptxas -v` says of this source, by the ptxas that Triton uses for cc. RuntimeError holds its
    complaint."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "k.ptx")
        source.write_text(ptx)
        flags = ["-v", "-lineinfo", *([] if fmad else ["--fmad=false"]), *extra]
        flags.append(f"--gpu-name=sm_{cc}{'a' if cc >= 90 else ''}")
        command = [ptxas_for(cc), *flags, str(source), "-o", str(Path(folder, "k.o"))]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stderr


def res_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
        ).stdout


def analyse(kernel, cc: int, seconds: float = 0.0, grid=None) -> Result:
    """kernel: a triton.compiler.CompiledKernel. A figure that cannot be had is -1."""
    ptx, meta, limits = kernel.asm["ptx"], kernel.metadata, LIMITS[cc]
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", res_usage(kernel.asm["cubin"]))
    regs, stack, static_smem, _ = map(int, usage.groups()) if usage else (-1, -1, -1, -1)
    same_flags = ["--regAllocOptLevel=2"] if triton.__version__ >= "3.9" else []  # as Triton gives
    told = ptxas_v(ptx, cc, fmad=getattr(meta, "enable_fp_fusion", True), extra=same_flags)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    spill_st, spill_ld = map(int, spills.groups()) if spills else (-1, -1)
    threads = meta.num_warps * 32
    by_regs = limits.registers // (max(regs, 1) * threads) if regs > 0 else 0
    by_smem = limits.shared // (meta.shared + 1024) if meta.shared else 99
    ctas = min(by_regs, by_smem, limits.threads // threads, limits.blocks)
    lines = [line.strip() for line in told.splitlines()]
    warnings = [line for line in lines if "Potential Performance Loss" in line or "warning" in line.lower()]
    return Result(
        meta.name,
        cc,
        meta.num_warps,
        meta.num_stages,
        regs,
        spill_st,
        spill_ld,
        stack,
        meta.shared,
        static_smem,
        getattr(meta, "tmem_size", 0) or 0,
        {name: len(re.findall(p, ptx)) for name, p in PATS.items()},
        ctas,
        meta.shared <= limits.block_shared and ctas >= 1,
        seconds,
        kernel,
        dict(kernel.src.signature),
        dict(kernel.src.attrs),
        dict(kernel.src.constants),
        grid,
        warnings,
    )


def jit_function(fn) -> JITFunction:
    """Without the autotuner or heuristics around it."""
    while not isinstance(fn, JITFunction):
        fn = fn.fn
    return fn


def compile_jit(fn, *args, grid=(1,), cc: int | None = None, **named) -> Result:
    """With the specialisation (divisible by 16, equal to 1, dtypes) that a launch with these arguments
    would get.
    """
    if cc is not None:
        install(cc)
    fn, began = jit_function(fn), time.time()
    fn.device_caches.clear()
    kernel = JITFunction.run(
        fn, *map(as_arg, args), grid=grid, warmup=True, **{n: as_arg(v) for n, v in named.items()}
    )
    return analyse(kernel, driver.active.cc, time.time() - began, grid)


def compile_ast(
    fn, signature: dict, constexprs: dict, attrs: dict | None = None, cc: int = 90, **options
) -> Result:
    """Everything said explicitly, as triton.compile takes it."""
    began = time.time()
    source = ASTSource(jit_function(fn), signature, constexprs, attrs)
    return analyse(
        triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options), cc, time.time() - began
    )


@contextlib.contextmanager
def record(cc: int = 90) -> Iterator[list[Result]]:
    """Inside, kernel[grid](...) compiles for cc and is recorded, not launched."""
    recorded, launch = [], JITFunction.run
    install(cc)

    def run(self, *args, grid, warmup, **named):
        began = time.time()
        kernel = launch(
            self, *map(as_arg, args), grid=grid, warmup=True, **{n: as_arg(v) for n, v in named.items()}
        )
        if callable(grid):
            bound = self.signature.bind_partial(
                *args, **{n: v for n, v in named.items() if n in self.signature.parameters}
            )
            bound.apply_defaults()
            grid = grid(dict(bound.arguments))
        recorded.append(analyse(kernel, cc, time.time() - began, grid))
        return kernel

    JITFunction.run = run
    try:
        yield recorded
    finally:
        JITFunction.run = launch


def header() -> str:
    return f"{'kernel':44s} cc  w st regs spillB  smemB tmem occ fits counts"


def row(r: Result) -> str:
    counts = " ".join(f"{name}={count}" for name, count in r.counts.items() if count)
    told = "".join(f"\n      ptxas: {warning[:220]}" for warning in r.warnings)
    return (
        f"{r.name:44s} {r.cc:<3d} {r.warps} {r.stages}  {r.regs:<4d} {r.spill_st:<6d} {r.smem:<6d} "
        f"{r.tmem:<4d} {r.ctas_per_sm:<3d} {r.fits!s:5s} {counts}  [{r.secs:.1f}s] grid={r.grid}{told}"
    )
