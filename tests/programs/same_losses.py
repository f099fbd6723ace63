"""Whether two versions of train_gpt.py give the same losses, to the last digit that the log prints.

    python -m tests.programs.same_losses OLD.py NEW.py [--quick] [--only CASE...]

Each file trains on the embedded corpus: 60 steps of the preset cpu, and 24 steps of a small model with every
feature on, with one and with two processes, with bigrams by Adam and by its form that counts by row. All
`step:` lines are compared without what depends on the time. Exit code 1 if a line differs. --quick leaves out
the preset, which compiles.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

EVERY_FEATURE = shlex.split("""
    --preset cpu --windows sslssl --paired_heads p...p. --value_embeds .01.23 --skips .a..a. --backout ...b..
    --extra_inputs 1 --model_dim 64 --head_dim 16 --bigram_rows 5 --softcap 23 --spectral 0 --embed_std 0.005
    --untie_share 0.5 --adam_every 2 --num_steps 24 --extension_share 0.1 --micro_batches 2 --batch_mul 0.5
    --val_every 8 --val_tokens 8192 --val_seq_len 4096 --save_every 0 --no-compile
""")

CASES = {
    "every feature on": (1, [*EVERY_FEATURE, "--no-bigram_by_row"]),
    "every feature on, bigrams by row": (1, [*EVERY_FEATURE, "--bigram_by_row"]),
    "every feature on, two processes": (2, [*EVERY_FEATURE, "--no-bigram_by_row"]),
    "every feature on, bigrams by row, two processes": (2, [*EVERY_FEATURE, "--bigram_by_row"]),
    "every feature on, bfloat16": (1, [*EVERY_FEATURE, "--dtype", "bfloat16"]),
    "preset cpu": (1, shlex.split("--preset cpu --num_steps 60 --val_every 30 --save_every 0")),
}


def losses(train_gpt: Path, processes: int, flags: list[str]) -> list[str]:
    """The `step:` lines of a run, without times and rates."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), train_gpt.resolve(), *flags]
        command += ["--data_dir", ROOT / "data" / "corpus", "--log_dir", folder]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)
        if done.returncode != 0:
            raise RuntimeError(f"{train_gpt}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        lines = re.findall(r"^step:.*", done.stdout, re.MULTILINE)
    return [re.sub(r" (train_time|step_avg|tokens_per_second|mfu|val_bpb):\S+", "", line) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--quick", action="store_true", help="without the preset cpu, which compiles")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    failed = False
    for name, (processes, flags) in CASES.items():
        if name not in args.only or args.quick and name == "preset cpu":
            continue
        old, new = losses(args.old, processes, flags), losses(args.new, processes, flags)
        different = [pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]]
        equal = not different and len(old) == len(new)
        failed = failed or not equal
        print(
            f"{name}: {len(old)} lines, {'all equal' if equal else f'{len(different)} differ'}; {new[-1]}",
            flush=True,
        )
        for before, after in different[:3]:
            print(f"    {before}\n    {after}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
