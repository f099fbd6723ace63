"""
train_gpt.py at its full size on "an H100", without a GPU: a driver that does nothing, under CUDA torch.

    python tests/null_device.py           # presets of tracks for GPUs, 1 and 4 ranks, with and without graphs
    python tests/null_device.py --presets short --ranks 1 --graphs on
    python tests/null_device.py --presets short --ranks 1 --more="--exclusive --mudd_layers 3"
    python tests/null_device.py --write             # the rows go into the table of tests/README.md

What is real: torch.compile, Inductor, Triton and ptxas for sm_90, the rules of CUDA-graph capture, torch's
allocator with 79 GiB, the processes of several ranks, and every call that would reach the GPU, which is
counted. What is not: kernels do nothing, in no time, so no loss, time or choice of an autotuner means
anything. Two steps of each stage, the untie step among them, and validations between them and at the end, two
sequences a rank. A call that makes the host wait for the device inside a step is a failure (exit code 1),
named by its line; so is an operator without its kernel, or work that cannot be captured.

Needs Linux, a C compiler, and a Python with a CUDA build of torch and its headers; without, it says so and
ends with 0:

    pip install torch==2.13.0 numpy nvidia-cuda-crt nvidia-cuda-cccl        # from PyPI, some gigabytes
"""

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
BEGIN, END = "<!-- null device: begin -->", "<!-- null device: end -->"
STAGES = {"short": 4, "medium": 13, "one-gpu": 4, "short-next": 4}  # of each preset, the extension among them
PRESETS = tuple(STAGES)
DEFAULT = ("short", "medium", "one-gpu")
VAL_SEQ_LEN = 262_144  # of all of them
TRAIN_TOKENS, BOS, DOCUMENT = 13_000_000, 50256, 400

KINDS = ("kernel", "blas", "nccl", "copy")  # in the order of nullgpu/counts.h
COUNTS = (
    *(f"launched {kind}" for kind in KINDS),
    *(f"replayed {kind}" for kind in KINDS),
    "captures",
    "replays",
    "waits",
    "pageable",
)


@dataclass(frozen=True)
class Case:
    preset: str
    ranks: int
    graphs: bool
    more: tuple[str, ...] = ()  # further flags


@dataclass(frozen=True)
class Figures:
    """Of one case, of its first rank."""

    allocated: float  # GiB, the most at a time: by tensors
    reserved: float  # GiB, the most at a time: by torch's allocator, graphs' own pools included
    kernels: int  # in the caches of this preset so far
    spilling: int
    cold: float | None  # seconds from the program's start to the first step, nothing compiled before
    warm: float  # the same, everything cached
    launches: float  # a step, on average: by the host, a graph's replay counting as one
    work: float  # a step: kernels, matrix products and collectives that would run
    replayed: float  # share of work that comes from graphs
    syncs: dict[str, int]  # lines of train_gpt.py at which a step waited for the device, how often
    fallbacks: list[str]  # lines of the log that say that something else ran instead


def steps_of(preset: str) -> list[str]:
    """Flags for two steps in each stage, of which the last is the extension; validation after every fourth
    and the last."""
    count = STAGES[preset]
    return ["--num_steps", str(2 * count), "--extension_share", str(1 / count), "--val_every", "4"]


# what this machine lacks


def skip_reason() -> str | None:
    if not sys.platform.startswith("linux"):
        return "the null device needs Linux"
    import torch

    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build; the top of this file says how to install one"
    if not shutil.which("gcc"):
        return "there is no gcc to build the null device with"
    for name in ("cuda_runtime_api.h", "crt/host_defines.h", "nv/target", "nccl.h"):
        if not any((folder / name).exists() for folder in header_folders()):
            return f"CUDA's header {name} is not there; the top of this file says how to install it"
    return None


def header_folders() -> list[Path]:
    import torch

    wheels = Path(torch.__file__).parent.parent / "nvidia"
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    toolkits = [*sorted(wheels.glob("cu[0-9]*/include")), cuda]
    return [*toolkits, *(path / "cccl" for path in toolkits), wheels / "nccl" / "include"]


# the device and its data

LIBRARIES = {
    "libnullcudart.so": ("nullcudart.c", "-lpthread", "-ldl"),
    "libnullmath.so": ("nullmath.c",),
    "libcuda.so.1": ("libcuda_stub.c", "-Wl,-soname,libcuda.so.1", "-ldl"),
    "libnvidia-ml.so.1": ("nvml_stub.c", "-Wl,-soname,libnvidia-ml.so.1"),
}


def build(folder: Path) -> None:
    include = [f"-I{path}" for path in header_folders() if path.is_dir()]
    for library, (source, *flags) in LIBRARIES.items():
        command = [
            "gcc",
            "-O1",
            "-shared",
            "-fPIC",
            *include,
            "-o",
            folder / library,
            TESTS / "nullgpu" / source,
            *flags,
        ]
        subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


def make_data(folder: Path, val_tokens: int) -> None:
    """Shards of random tokens in FineWeb's shape."""
    sys.path.insert(0, str(TESTS.parent))
    from data.shards import write_shard

    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", TRAIN_TOKENS), ("val", val_tokens + 1)):
        tokens = rng.integers(0, BOS, count)
        tokens[rng.random(count) < 1 / DOCUMENT] = BOS
        tokens[0] = BOS
        write_shard(folder / f"null_{name}_000000.bin", tokens)
    write_vocabulary(folder, BOS, 256)


def write_vocabulary(folder: Path, size: int, singles: int) -> None:
    """vocab.tiktoken of so many tokens: single bytes, then pairs, of which each begins with a single one."""
    from data.shards import VOCAB, save_vocab

    pairs = ((i % singles, (i + i // singles + 1) % singles) for i in range(size - singles))
    tokens = [bytes([i]) for i in range(singles)] + [bytes(pair) for pair in pairs]
    assert len(set(tokens)) == size, f"{size=}: {singles=} have only {len(set(tokens))} tokens"
    save_vocab(folder / VOCAB, {token: rank for rank, token in enumerate(tokens)})


def environment(libraries: Path, cache: Path, ranks: int) -> dict[str, str]:
    preload = [str(libraries / name) for name in ("libnullcudart.so", "libnullmath.so")]
    return os.environ | {
        "LD_PRELOAD": " ".join(preload),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(libraries), os.environ.get("LD_LIBRARY_PATH")])),
        "NULLGPU_COUNT": str(ranks),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }


# inside: the program itself, watched


def counts() -> Counter:
    figures = (ctypes.c_ulonglong * len(COUNTS))()
    ctypes.CDLL(None).nullgpu_counts(figures)
    return Counter(dict(zip(COUNTS, figures, strict=True)))


class Watch:
    """Around one process's run: what each step launches, and where it waits for the device."""

    def __init__(self, path: Path):
        self.path, self.steps, self.syncs, self.started = path, [], Counter(), None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """torch warns at each call that waits; the warning becomes the line of train_gpt.py that made it."""
        import torch

        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def warning(self, message, category, filename, lineno, file=None, line=None) -> None:
        if "synchronizing CUDA operation" not in str(message):
            print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr, end="")
            return
        own = [frame for frame in traceback.extract_stack() if frame.filename == str(self.path)]
        self.syncs[f"{own[-1].lineno}: {own[-1].line}" if own else f"{filename}:{lineno}"] += 1

    def step(self, train_step: Callable) -> Callable:
        def watched(trainer, step):
            self.started, before = self.started or time.time(), counts()
            with self.no_sync():
                result = train_step(trainer, step)
            self.steps.append({name: count - before[name] for name, count in counts().items()})
            return result

        return watched

    def report(self, report: Callable) -> Callable:
        def watched(progress, lag):
            if not lag:  # before a validation or a checkpoint: all may wait
                return report(progress, lag)
            with self.no_sync():
                return report(progress, lag)

        return watched


def run_both(differs_from_plain: Callable) -> Callable:
    """differs_from_plain, which fails for an operator that cannot run, but for no result."""

    def without_results(*arguments) -> str:
        wrong = differs_from_plain(*arguments)
        return "" if wrong.startswith("relative error") else wrong

    return without_results


def inside(path: Path, result: Path, flags: list[str]) -> None:
    """Runs train_gpt.py in this process, which has the null device, and leaves its figures in result,
    JSON.
    """
    spec = util.spec_from_file_location("train_gpt", path)
    tg = sys.modules["train_gpt"] = util.module_from_spec(spec)
    spec.loader.exec_module(tg)
    watch, sys.argv = Watch(path), [str(path), *flags]
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = watch.warning
    tg.Trainer.train_step = watch.step(tg.Trainer.train_step)
    tg.Progress.report = watch.report(tg.Progress.report)
    # Nothing is computed, so nothing can be right: results are not compared, losses not looked at.
    tg.differs_from_plain = run_both(tg.differs_from_plain)
    tg.Progress.require_finite = lambda progress, loss, kind, step: loss
    exit_code = tg.main()
    if exit_code:
        sys.exit(exit_code)
    import torch

    if os.environ.get("RANK", "0") == "0":
        result.write_text(
            json.dumps(
                {
                    "allocated": torch.cuda.max_memory_allocated(),
                    "reserved": torch.cuda.max_memory_reserved(),
                    "started": watch.started,
                    "steps": watch.steps,
                    "syncs": watch.syncs,
                }
            )
        )


# outside: the cases


def run(case: Case, train_gpt: Path, folder: Path, cache: Path) -> dict:
    """Starts the ranks of a case and waits for them -> what `inside` wrote. RuntimeError holds the end of
    their output.
    """
    result, graphs = folder / "result.json", "--graphs" if case.graphs else "--no-graphs"
    log = folder / f"{case.preset}.{case.ranks}{graphs}.txt"
    result.unlink(missing_ok=True)
    flags = [
        "--preset",
        case.preset,
        *steps_of(case.preset),
        "--val_tokens",
        str(2 * VAL_SEQ_LEN * case.ranks),
        "--data_dir",
        str(folder / "data"),
        "--log_dir",
        str(folder / "logs"),
        graphs,
        *case.more,
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
    python = [sys.executable, *(torchrun if case.ranks > 1 else [])]
    began = time.time()
    with log.open("w") as output:
        done = subprocess.run(
            [*python, __file__, "--inside", str(train_gpt), str(result), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(folder / "lib", cache, case.ranks),
        )
    if done.returncode or not result.exists():
        raise RuntimeError(f"{case}: exit code {done.returncode}\n{log.read_text()[-4000:]}")
    return json.loads(result.read_text()) | {"began": began, "fallbacks": fallbacks(log.read_text())}


def fallbacks(log: str) -> list[str]:
    """What train_gpt.py says of an operator without its kernel, of work without a graph, of compilation
    that failed.
    """
    pattern = re.compile(r"operators: .*\((fp8|kernel): |graphs: no graph|compile: torch.compile failed")
    return [line for line in log.splitlines() if pattern.match(line)]


def figures(first: dict | None, second: dict, kernels: int, spilling: int) -> Figures:
    """first: of a run with nothing compiled before, second: of one with everything cached."""
    total = Counter()
    for step in second["steps"]:
        total.update(step)
    launched, replayed = (
        sum(total[f"{how} {kind}"] for kind in KINDS[:-1]) for how in ("launched", "replayed")
    )
    n = len(second["steps"])
    return Figures(
        second["allocated"] / 2**30,
        second["reserved"] / 2**30,
        kernels,
        spilling,
        first and first["started"] - first["began"],
        second["started"] - second["began"],
        (launched + total["replays"]) / n,
        (launched + replayed) / n,
        replayed / (launched + replayed),
        second["syncs"],
        second["fallbacks"],
    )


HEAD = (
    "preset",
    "ranks",
    "graphs",
    "GiB",
    "reserved",
    "kernels",
    "that spill",
    "s to step 1, cold",
    "cached",
    "work a step",
    "launches a step",
    "replayed",
    "waits in steps",
)


def line(cells: tuple) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def row(case: Case, f: Figures) -> str:
    return line(
        (
            case.preset,
            case.ranks,
            "on" if case.graphs else "off",
            f"{f.allocated:.1f}",
            f"{f.reserved:.1f}",
            f.kernels,
            f.spilling,
            "" if f.cold is None else f"{f.cold:.0f}",
            f"{f.warm:.0f}",
            f"{f.work:,.0f}",
            f"{f.launches:,.0f}",
            f"{100 * f.replayed:.1f} %",
            sum(f.syncs.values()),
        )
    )


def case_of(row: str) -> tuple[int, int, bool]:
    """Of a row of the table, in the order in which rows stand."""
    preset, ranks, graphs = row.strip("| ").split(" | ")[:3]
    return PRESETS.index(preset), int(ranks), graphs == "off"


def write_table(readme: Path, lines: list[str]) -> None:
    """lines: head, rule, rows. Between the markers; rows of other cases stay there. An error without
    markers.
    """
    whole = readme.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1:
        fail(f"{readme}: needs one line {BEGIN} and one {END} for the table to stand between")
    before, rest = whole.split(BEGIN)
    old, after = rest.split(END)
    rows = {case_of(row): row for row in [*old.strip().splitlines()[2:], *lines[2:]]}
    table = [*lines[:2], *(rows[case] for case in sorted(rows))]
    readme.write_text("\n".join([f"{before}{BEGIN}", *table, f"{END}{after}"]))


def fail(message: str) -> None:
    print(f"null_device.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="null_device.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=DEFAULT)
    parser.add_argument(
        "--ranks", nargs="+", type=int, choices=(1, 2, 4, 8), default=(1, 4), help="one-gpu always has 1"
    )
    parser.add_argument("--graphs", nargs="+", choices=("on", "off"), default=("on", "off"))
    parser.add_argument("--train_gpt", type=Path, default=TESTS.parent / "train_gpt.py", metavar="FILE")
    parser.add_argument("--folder", type=Path, help="keeps caches and output there, else nowhere")
    parser.add_argument(
        "--write", action="store_true", help="puts the rows into the table of tests/README.md"
    )
    about = "further flags of train_gpt.py, such as '--exclusive --mudd_layers 3'"
    parser.add_argument("--more", type=shlex.split, default=[], metavar="FLAGS", help=about)
    args = parser.parse_args(argv)
    if args.more and args.write:
        parser.error("--more: the table has rows of presets alone, leave out --write")
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """One rank with graphs first: it is the one that finds nothing compiled."""
    wanted = [
        Case(preset, ranks, graphs == "on", tuple(args.more))
        for preset in args.presets
        for ranks in sorted(args.ranks)
        for graphs in sorted(args.graphs, reverse=True)
    ]
    return [case for case in dict.fromkeys(wanted) if case.preset != "one-gpu" or case.ranks == 1]


def measure(wanted: list[Case], train_gpt: Path, folder: Path) -> Iterator[tuple[Case, Figures]]:
    """Of a preset and number of ranks the first case runs twice: the optimizer's share is compiled for
    each number anew.
    """
    import inductor_stats

    build_once(folder)
    for case in wanted:
        cache = folder / f"cache-{case.preset}"
        fresh, complete, first = not cache.exists(), cache / f"compiled-for-{case.ranks}", None
        if not complete.exists():
            first = run(case, train_gpt, folder, cache)
            complete.touch()
        second = run(case, train_gpt, folder, cache)
        compiled = inductor_stats.stats([cache])
        yield (
            case,
            figures(
                first if fresh else None, second, len(compiled), sum(kernel.spill > 0 for kernel in compiled)
            ),
        )


def build_once(folder: Path) -> None:
    if not (folder / "lib" / "libcuda.so").exists():
        (folder / "lib").mkdir()
        build(folder / "lib")
    if not (folder / "data").exists():
        make_data(folder / "data", 2 * VAL_SEQ_LEN * 8)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--inside"]:
        inside(Path(argv[1]), Path(argv[2]), argv[3:])
        return 0
    args = parse(argv)
    if not args.train_gpt.is_file():
        fail(f"--train_gpt {args.train_gpt}: there is no such file")
    if not cases(args):
        fail("--presets one-gpu runs with --ranks 1 only")
    if reason := skip_reason():
        print(f"null_device.py: skipped: {reason}")
        return 0
    lines, failed = [line(HEAD), line(("---",) * len(HEAD))], False
    print(*lines, sep="\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for case, f in measure(cases(args), args.train_gpt.resolve(), folder):
            lines.append(row(case, f))
            print(lines[-1], flush=True)
            told = [
                f"a step waits for the device, {times} times: {args.train_gpt.name}:{place}"
                for place, times in f.syncs.items()
            ] + f.fallbacks
            failed |= bool(told)
            print(*[f"    {problem}\n" for problem in told], sep="", end="", flush=True)
    if args.write:
        write_table(TESTS / "README.md", lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
