"""A new per-layer parameter is its row and its use: train_gpt.py with two edits trains and resumes."""

import difflib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, group_environments, run_command

SOURCE = (ROOT / "train_gpt.py").read_text()

# A gate on each layer's MLP: a weight for each dimension of the stream, 1 where it starts.
ROW = '        ParamSpec("attn_gate",'
NEW_ROW = '        ParamSpec("mlp_gain", (D,), layers=every, init=constant(1), fp32=True, lr=10.0),\n'
USE = "            x = self.mlp_block(x, up, down, self.cfg.activation, self.kernels.mlp)\n"
NEW_USE = "            x = x * w.mlp_gain.to(x.dtype)\n"

STEPS = 4
FLAGS = """
    --preset cpu --windows ssl --paired_heads p.. --value_embeds .01 --skips a.a --backout .b. --model_dim 32
    --head_dim 16 --vocab_size 256 --bos_id 255 --bigram_rows 1 --bigram_signs 0 --no-bigram_by_row
    --spectral 0 --untie_share 0.5 --adam_every 2 --batch_mul 0.0625 --micro_batches 2 --val_tokens 512
    --val_seq_len 256 --val_every 0 --dtype float32 --no-compile --save_every 2
"""


def with_gain() -> str:
    """train_gpt.py with the row and the use."""
    edited = SOURCE
    for before, after in ((ROW, NEW_ROW + ROW), (USE, USE + NEW_USE)):
        assert edited.count(before) == 1, (
            f"{before!r} has moved: put the row and the use where they belong now"
        )
        edited = edited.replace(before, after)
    return edited


def train(file: Path, processes: int, num_steps: int, log_dir: Path, data: Path) -> list[str]:
    """The `step:` lines of a run that goes on from what is in log_dir, without what depends on the time."""
    command = [sys.executable, file, *FLAGS.split(), "--resume"]
    command += ["--num_steps", num_steps, "--data_dir", data, "--log_dir", log_dir]
    group = group_environments(processes)
    with ThreadPoolExecutor() as pool:  # as torchrun starts them
        done = list(pool.map(lambda environment: run_command(command, cwd=file.parent, **environment), group))
    assert all(each.returncode == 0 for each in done), [each.stderr[-3000:] for each in done]
    lines = re.findall(r"^step:.*", done[0].stdout, re.MULTILINE)
    return [re.sub(r" (train_time|step_avg|tokens_per_second|mfu|val_bpb):\S+", "", line) for line in lines]


def checkpoint(log_dir: Path, step: int) -> dict:
    (path,) = log_dir.glob(f"*.step{step:06d}.pt")
    return torch.load(path, weights_only=True)


def test_two_lines_are_all_that_changes():
    difference = difflib.ndiff(SOURCE.splitlines(), with_gain().splitlines())
    changed = [line for line in difference if line[0] in "+-"]
    assert changed == [f"+ {NEW_ROW.rstrip()}", f"+ {NEW_USE.rstrip()}"]


def assert_gain_moved(log_dir: Path) -> None:
    """It is in the checkpoints, and every layer's row moved before the first and between them."""
    before, after = (
        checkpoint(log_dir, 2)["model"]["mlp_gain"],
        checkpoint(log_dir, STEPS)["model"]["mlp_gain"],
    )
    assert before.shape == after.shape == (3, 32)
    assert (before != 1).any(dim=1).all() and (after != before).any(dim=1).all()
    state = checkpoint(log_dir, STEPS)["optimizer"]["mlp_gain"]
    assert state["momentum_buffer"].any() and state["second_moment"].any()


@pytest.mark.parametrize("first, then", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_gate_by_two_edits_trains_and_resumes_on_one_and_two_processes(first, then, tiny_data, tmp_path):
    """Some processes train to the end; others go on from their middle checkpoint, to the same end."""
    file = tmp_path / "train_gpt.py"
    file.write_text(with_gain())
    whole = train(file, first, STEPS, tmp_path, tiny_data)
    assert_gain_moved(tmp_path)
    models = [checkpoint(tmp_path, STEPS)["model"]]
    (last,) = tmp_path.glob(f"*.step{STEPS:06d}.pt")
    last.unlink()
    resumed = train(file, then, STEPS, tmp_path, tiny_data)
    (log,) = tmp_path.glob("*.txt")
    assert "resumed: from step 2" in log.read_text()
    assert len(whole) == STEPS + 1 and resumed == whole[2:], "it goes on as if nothing had been"
    assert_gain_moved(tmp_path)
    models.append(checkpoint(tmp_path, STEPS)["model"])
    torch.testing.assert_close(models[0]["mlp_gain"], models[1]["mlp_gain"], rtol=1e-4, atol=1e-6)
    for name, value in models[0].items():
        ours, theirs = value.double(), models[1][name].double()
        # Adam divides by a gradient's size, which may be next to nothing
        assert (ours - theirs).norm() <= 1e-2 * ours.norm(), name
