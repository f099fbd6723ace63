"""
Registers, spills, shared memory and tensor cores of every kernel in folders that Inductor or Triton cached
kernels in.

    python tests/inductor_stats.py CACHE_DIR...     # TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR of the run
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import aot


@dataclass(frozen=True)
class Kernel:
    """spill and smem in bytes; spill -1: the cache has no PTX, so ptxas could not be asked."""

    name: str
    cc: int
    warps: int
    stages: int
    regs: int
    spill: int
    smem: int
    wgmma: int
    mma: int
    serialized: bool  # ptxas had to put waits between wgmma instructions


def stats(folders: list[str | Path]) -> list[Kernel]:
    """Every compiled kernel under the folders, those that spill most first."""
    cubins = [
        cubin
        for folder in folders
        for cubin in Path(folder).rglob("*.cubin")
        if cubin.with_suffix(".json").exists()
    ]
    return sorted(map(kernel_of, cubins), key=lambda k: (-k.spill, -k.regs, k.name))


def kernel_of(cubin: Path) -> Kernel:
    meta, ptx = json.loads(cubin.with_suffix(".json").read_text()), cubin.with_suffix(".ptx")
    cc, source = meta["target"]["arch"], ptx.read_text() if ptx.exists() else ""
    regs, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", aot.res_usage(cubin.read_bytes())).groups())
    wgmma, mma = len(re.findall("wgmma.mma_async", source)), len(re.findall("mma.sync", source))
    told = aot.ptxas_v(source, cc) if source and (stack or wgmma) else ""  # spills live on the stack
    spills = re.search(r"(\d+) bytes spill stores", told)
    spill = int(spills[1]) if spills else -1 if stack else 0
    return Kernel(
        meta["name"],
        cc,
        meta["num_warps"],
        meta["num_stages"],
        regs,
        spill,
        meta["shared"],
        wgmma,
        mma,
        "serialized" in told,
    )


def main(folders: list[str]) -> int:
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing or not folders:
        wrong = missing[0] if missing else "no argument"
        print(f"inductor_stats.py: error: {wrong}: name folders that kernels are cached in", file=sys.stderr)
        return 2
    kernels = stats(folders)
    print(f"{len(kernels)} kernels; spilling: {sum(k.spill > 0 for k in kernels)}")
    for k in kernels[:40]:
        print(
            f"{k.name[:70]:70s} sm_{k.cc} w{k.warps} s{k.stages} regs {k.regs} spill {k.spill} smem {k.smem} "
            f"wgmma {k.wgmma} mma {k.mma}{'  WGMMA-SERIALIZED' if k.serialized else ''}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
