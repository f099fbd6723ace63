"""What the tests share: a small configuration, shards of made-up text, a way to run commands."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # as a cluster's launcher leaves them
    os.environ.pop(name, None)
CLEAN_ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # before anything is imported that changes it

# A shell's background job ignores SIGINT, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch  # noqa: E402

import train_gpt as tg  # noqa: E402
from data.shards import write_shard  # noqa: E402
from tests.null_device import write_vocabulary  # noqa: E402

torch.set_num_threads(1)  # sizes here are tiny: two threads mostly wait for each other

TINY_STAGES = (
    tg.Stage(
        until=0.5,
        batch_tokens=512,
        windows=(16, 48),
        max_doc_len=96,
        lr_mul=1.0,
        predict=((1.0, 1.0), (0.5, 0.0)),
    ),
    tg.Stage(until=2.0, batch_tokens=512, windows=(16, 64), max_doc_len=96, lr_mul=1.2),
)


# What is on in short-next, or in no preset.
LATER_SWITCHES = dict(
    exclusive=True, mudd_layers=1, muon_heads=2, ema_rate=0.3, prefix_weight=0.25, sampled_vocab=128, ngrams=3
)


def tiny(**changes) -> tg.Config:
    """The cpu preset with every feature on, at sizes that run in milliseconds, eagerly and in float32."""
    base = replace(
        tg.PRESETS["cpu"],
        windows="sslssl",
        paired_heads="p...p.",
        value_embeds=".01.23",
        skips=".a..a.",
        backout="...b..",
        vocab_size=256,
        bos_id=255,
        model_dim=64,
        head_dim=16,
        extra_inputs=1,
        stages=TINY_STAGES,
        num_steps=8,
        val_tokens=512,
        val_seq_len=256,
        final_long_window=64,
        dtype="float32",
        compile=False,
        save_every=0,
        mlp_ratio=4,
        momentum_min=0.85,
        momentum_max=0.95,
        ngrams=2,
        bigram_rows=5,
        bigram_lr=75.0,
        bigram_by_row=False,
        bigram_signs=0,
        softmax_scale=0.1,
        mudd_layers=0,
        x0_lr=5.0,
        adam_every=2,
        softcap=23.0,
        untie_share=2 / 3,
        embed_std=0.005,
        spectral=0.0,
        ngram_start=0.0,
        copy_start=False,
    )
    return replace(base, **changes)


def made_up_text(count: int, vocab_size: int = 256, seed: int = 0) -> np.ndarray:
    """(count,) token ids with something to learn: each is the last plus a small step; documents near 64."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 4, count).cumsum() % (vocab_size - 1)
    tokens[rng.random(count) < 1 / 64] = vocab_size - 1
    tokens[0] = vocab_size - 1
    return tokens


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with two training shards and one for validation, in tiny()'s vocabulary."""
    folder = tmp_path_factory.mktemp("tiny_data")
    write_shard(folder / "x_train_000000.bin", made_up_text(12_000, seed=1))
    write_shard(folder / "x_train_000001.bin", made_up_text(12_000, seed=2))
    write_shard(folder / "x_val_000000.bin", made_up_text(4_000, seed=3))
    write_vocabulary(folder, 255, 128)
    return folder


@pytest.fixture(scope="session")
def corpus_dir() -> Path:
    """The embedded corpus, made by its own command the first time."""
    made = run_command([sys.executable, "-m", "data.corpus"])
    assert made.returncode == 0, made.stderr
    return ROOT / "data" / "corpus"


def run_command(
    command: list, cwd: Path = ROOT, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=CLEAN_ENV | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def group_environments(size: int) -> list[dict[str, str]]:
    """What a launcher gives each of `size` processes of one machine; the port is free now."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    group = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
    return [{name: str(value) for name, value in one.items()} for one in group]


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """One line on stderr that holds the words, no traceback, exit code 2."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), (words, result.stderr)
