"""train_gpt.py: train a small GPT on FineWeb to a fixed validation loss, as fast as the machine can.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                   the record run, preset short
    torchrun --standalone --nproc_per_node=8 train_gpt.py --preset medium   the larger model, target 2.92
    python train_gpt.py --preset one-gpu                                    one GPU with 24 GB
    python train_gpt.py --preset cpu --num_steps 20                         no GPU; Config's fields are flags

Parts 1 to 6, read from top to bottom, are the whole system. The appendices are how it is made fast, and safe.

    part                 to change ...                              edit
    1  Config            a size, a layer's features, a schedule     Config, PRESETS (or pass a flag)
    2  Model             the network                                layer_table (a row), GPT.hidden (its use)
    3  Optimizer         an update rule, what ranks share           normuon_, adam_, Optimizer
    4  Data              nothing: the token stream is fixed         Loader
    5  Schedule          learning rate, momentum, windows           Schedule
    6  Trainer           the loop                                   Trainer.fit
    A  Operators         how a formula is computed                  the plain version, then the kernel
    B  Ranks, batches    how processes share, how batches arrive    DistEnv, SparseGradient, Prefetcher
    C  Log, checkpoints  what a run says and leaves behind          Log, Progress, Checkpoints
    D  Machine, GPU      dtype, warm-up, graphs, choice of kernels  Gpu, choose_versions, CudaGraphs
    E  CPU               attention in bands, and what a CPU needs   Cpu, banded_attention
    F  Counts            what a run starts from                     Counts, spectral_start

Ideas are credited where they live: "seed 000" to "seed 004" are the reports that this project grew from, and
numbers like 2505.16932 are arXiv ids. docs/model.md has the whole model in formulas.
"""

import os
import signal

# The imports take seconds; until there is something to save, a signal ends the run.
if __name__ == "__main__":
    for number, exit_code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        signal.signal(number, lambda *_, code=exit_code: os._exit(code))
    # Threads that wait for another sleep soon: spinning, they keep it from the core that it needs. Not at
    # once: they wait some microseconds many hundred times a step, and to wake takes longer.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import base64
import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import platform
import re
import resource
import shutil
import sys
import time
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton for this system, so no GPU either: kernels are read, never run
    triton = SimpleNamespace(jit=lambda f: f)
    tl = SimpleNamespace(constexpr=lambda value: value)
    TensorDescriptor = None

# Read before anything slow, so that the log holds what really ran.
SOURCE = Path(__file__).read_text(encoding="utf-8")


class UserError(Exception):
    """Something a user can put right, exit code 2. One line: the file, flag or value, and what to do."""


class RunFailed(Exception):
    """A run that cannot go on though nothing was asked for wrongly, such as a loss of NaN. Exit code 1."""


def need(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


# ===== 1. Config: what a run is. A record is a preset with no overrides. =====


@dataclass(frozen=True)
class Layer:
    """One row of the topology table: what is special about this layer."""

    window: str  # "short" | "long" | "none": none = no attention here
    paired: bool  # heads 2j and 2j+1 see each other's keys
    value_embed: str | None  # name of the table that is added to v
    skip_from: int | None  # the earlier layer whose output comes in here
    skip_sender: bool  # a later layer takes this layer's output in
    backout: bool  # this layer's output is subtracted at the end

    @property
    def attends(self) -> bool:
        return self.window != "none"


@dataclass(frozen=True)
class Stage:
    """One row of the schedule table."""

    until: float  # ends at this share of the scheduled steps; the last row runs to the end
    batch_tokens: int  # per optimizer step, all ranks and micro-batches together
    windows: tuple[int, int]  # (short, long), tokens; of a paired layer half as many
    max_doc_len: int  # documents are cut there, tokens
    lr_mul: float  # multiplies muon_lr and adam_lr
    predict: tuple[tuple[float, float], ...] = ((1.0, 1.0),)  # weight of each next token: (at start, at end)


# The February 2026 form of the 8xH100 short track; the last row is the extension after the scheduled steps.
SHORT_STAGES = (
    Stage(1 / 3, 131072, (128, 384), 2048, 1.00, predict=((1.0, 1.0), (0.5, 0.5), (0.25, 0.0))),
    Stage(2 / 3, 262144, (384, 896), 2048, 1.52, predict=((1.0, 1.0), (0.5, 0.0))),  # 1.52 = (16 / 8)**0.6
    Stage(1.0, 393216, (640, 1408), 2048, 1.73),  # 1.73 = (24 / 8)**0.5
    Stage(2.0, 393216, (768, 1664), 2048, 1.73),
)


def flag(
    default: Any, about: str, low: float | None = None, high: float | None = None, choices: str = ""
) -> Any:
    """A field of Config: default, line in --help, and its lowest and highest value, or its choices."""
    return field(
        default=default, metadata={"about": about, "low": low, "high": high, "choices": choices.split()}
    )


@dataclass(frozen=True)
class Config:
    """Every scalar field is a flag. The defaults are the preset `short`, with seed 000's value embeddings."""

    preset: str = "short"
    # Topology: a character a layer. topology() reads these five as a table with a row a layer.
    windows: str = flag("ssslss-sssl", "s short, l long, - no attention (give it after =: --windows=-l)")
    paired_heads: str = flag("p.p..p...p.", "p: heads 2j and 2j+1 see each other's keys; . not")
    value_embeds: str = flag(".01.....234", ". none, else a table's name; twice the same shares it (U-Net)")
    skips: str = flag("...a..a....", "a letter's first place sends its output, its second receives it")
    backout: str = flag(".......b...", "b: this layer's output is subtracted at the end (nowhere: off)")
    stages: tuple[Stage, ...] = SHORT_STAGES
    # Sizes
    vocab_size: int = flag(50257, "GPT-2's; tables have rows up to the next multiple of 128", 2, 2**16)
    bos_id: int = flag(50256, "the token that begins every document", 0, 2**16 - 1)
    model_dim: int = flag(768, "width of the residual stream", 4, 2**14)
    head_dim: int = flag(128, "width of a head; model_dim is a multiple of it", 4, 1024)
    mlp_ratio: int = flag(4, "width of the MLP's hidden layer, in model_dim", 1, 64)
    extra_inputs: int = flag(0, "further input embeddings, seed 004", 0, 16)
    bigram_rows: int = flag(5, "rows of the bigram table, in vocabularies; 0: no table", 0, 1000)
    bigram_lr: float = flag(75.0, "of its rows, times adam_lr", 0, 1e4)
    bigram_momentum: float = flag(0.75, "beta1 of its Adam", 0, 0.9999)
    bigram_by_row: bool = flag(False, "no momentum, and each of its rows counts its own steps")
    bigram_signs: int = flag(0, "rows of the sign table (8192 in later records); 0: no sign trick", 0, 2**20)
    ngrams: int = flag(2, "longest n-grams with rows in the bigram table, tokens; 3: triples, too", 2, 4)
    # Gates on chunks of the residual stream, seed 001
    smear_chunk: str = flag("0:12", "first:last dimensions that the smear gate reads; '': no smear")
    skip_chunk: str = flag("6:18", "of the skip gate; '': the skip keeps its scalar")
    attn_chunk: str = flag("18:30", "of the attention gate; '': y passes whole")
    ve_chunk: str = flag("18:24", "of the value embedding's gate; '': it passes whole")
    ve_own_dims: int = flag(
        6, "dimensions of the value embedding that its gate reads too, seed 000", 0, 2**14
    )
    # Attention and head
    key_offset: bool = flag(True, "long layers: the stationary half of k comes from the token before")
    qk_norm: bool = flag(True, "q and k are normed per head")
    rotary_share: float = flag(0.5, "of each head's dimensions; the rest is stationary", 0, 1)
    rotary_base: float = flag(1024.0, "slowest wavelength over the fastest", 1, 1e9)
    yarn_limit: int = flag(
        1664, "tokens: rotary stretches with the long window up to there; 0: never", 0, 2**20
    )
    softmax_scale: float = flag(0.1, "of attention's scores, before YaRN", 1e-6, 100)
    exclusive: bool = flag(False, "attention gives up a learned share of its part along a token's own value")
    mudd_layers: int = flag(0, "last layers that take in all earlier outputs, as the stream says", 0, 1000)
    final_long_window: int = flag(2560, "of the last validation, tokens; only the mask widens", 1, 2**20)
    activation: str = flag("relu2", "of the MLP", choices="relu2 gelu")
    softcap: float = flag(23.0, "logits end in (0, softcap); 0: no cap", 0, 1e4)
    softcap_shift: float = flag(5.0, "softcap * sigmoid((logits + softcap_shift) / softcap_width)", -1e4, 1e4)
    softcap_width: float = flag(7.5, "see softcap_shift", 1e-3, 1e4)
    # Initial values
    embed_std: float = flag(0.005, "of embed, and of lm_head, its transpose", 0, 100)
    spectral: float = flag(0.0, "smoothing of counts from which embed and lm_head start; 0: random", 0, 1e6)
    ngram_start: float = flag(0.0, "with --spectral: scale of the bigram table's start; 0: zeros", 0, 1e4)
    value_embed_std: float = flag(0.01, "seed 000; 0 before", 0, 100)
    input_embed_std: float = flag(1.0, "of the further input embeddings", 0, 100)
    matrix_std: float = flag(0.5, "of the MLP's first matrix, over sqrt(model_dim); the second: 0", 0, 100)
    qkv_std: float = flag(0.5, "of q, k and v, over sqrt(model_dim)", 0, 100)
    o_std: float = flag(0.5, "of o, over sqrt(model_dim)", 0, 100)
    copy_start: bool = flag(False, "with key_offset: long layers start out reading what followed a token")
    copy_values: float = flag(
        0.0, "with --copy_start, --spectral: how loudly they say what they read", 0, 1e4
    )
    resid_scale: float = flag(1.1, "of the stream, before every layer", -100, 100)
    # Schedule
    num_steps: int = flag(1547, "steps of the run", 1, 10**7)
    extension_share: float = flag(0.026, "of num_steps: constant settings at the end (40 of 1547)", 0, 1)
    cooldown_share: float = flag(0.55, "of the schedule: the learning rate falls on a line to final_lr", 0, 1)
    final_lr: float = flag(0.1, "times muon_lr and adam_lr, at the end", 0, 10)
    untie_share: float = flag(2 / 3, "of the schedule: embed and lm_head are one until then; 1: always", 0, 1)
    max_predict: int = flag(3, "next tokens that a stage may ask for; 1: no multi-token prediction", 1, 16)
    prefix_weight: float = flag(
        0.0, "first weight of a loss on the next token's longest beginning that is a token; ends at 0", 0, 10
    )
    sampled_vocab: int = flag(0, "tokens that a step's softmax is over, a multiple of 128; 0: all", 0, 10**6)
    sampled_share: float = flag(0.93, "of the schedule that --sampled_vocab holds for; then all", 0, 1)
    ema_rate: float = flag(0.0, "a step's share in the mean of weights that is validated; 0: no mean", 0, 0.5)
    # NorMuon
    matrix_optimizer: str = flag("normuon", "adamw: Adam for matrices too", choices="normuon adamw")
    muon_lr: float = flag(0.023, "learning rate of matrices, times the stage's lr_mul", 0, 10)
    muon_wd: float = flag(1.2, "weight decay of matrices", 0, 1000)
    muon_beta2: float = flag(0.95, "of the second moment", 0, 0.9999)
    muon_heads: int = flag(
        0, "heads of q and of k that Muon orthogonalises together; 0: all of a layer", 0, 4096
    )
    momentum_min: float = flag(0.85, "Muon's momentum at the start and at the end", 0, 0.9999)
    momentum_max: float = flag(0.95, "Muon's momentum between", 0, 0.9999)
    momentum_warmup: int = flag(300, "steps from min to max", 0, 10**7)
    momentum_cooldown: int = flag(50, "last steps, back to min", 0, 10**7)
    # Adam
    adam_lr: float = flag(
        0.008, "learning rate of all else, times lr_mul and the parameter's own factor", 0, 10
    )
    adam_every: int = flag(2, "steps, whose gradients add up, between Adam's; Muon moves on each", 1, 1000)
    adam_wd: float = flag(0.005, "weight decay", 0, 1000)
    adam_eps: float = flag(1e-10, "beside gradients of the loss summed over 1/8 of a step's tokens", 1e-30, 1)
    scalar_lr: float = flag(5.0, "times adam_lr: of the learned scalars; 0: they stay as they start", 0, 1000)
    x0_lr: float = flag(5.0, "times adam_lr: of the scalars of x0 and of further input embeddings", 0, 1000)
    skip_gate_lr: float = flag(0.05, "times adam_lr", 0, 1000)
    embed_beta1: float = flag(0.5, "of embed and lm_head", 0, 0.9999)
    table_beta1: float = flag(0.75, "of value embeddings and further input embeddings", 0, 0.9999)
    x0_beta1: float = flag(0.65, "of the scalars of x0 and of further input embeddings", 0, 0.9999)
    gate_beta1: float = flag(0.9, "of gates", 0, 0.9999)
    gate_beta2: float = flag(0.99, "of gates", 0, 0.9999)
    # Data and evaluation
    data_dir: str = flag("data/fineweb10B", "folder of *_train_*.bin and *_val_*.bin")
    epochs: int = flag(1, "times that the training shards may be read, at most", 1, 10**4)
    batch_mul: float = flag(1.0, "times every stage's tokens a step", 1e-6, 1e3)
    micro_batches: int = flag(8, "of a step; the ranks share them and compute the same", 1, 2**12)
    join: int = flag(0, "micro-batches in one pass, to the same losses; 0: as many as a GPU holds", 0, 2**12)
    val_tokens: int = flag(10485760, "fixed, or losses could not be compared", 1, 2**31)
    val_seq_len: int = flag(262144, "a validation sequence; documents are cut at its ends", 1, 2**24)
    val_every: int = flag(250, "steps; 0: only at the end", 0, 10**7)
    # Machine
    device: str = flag("cuda", "where the model trains", choices="cuda cpu")
    dtype: str = flag(
        "auto", "auto: bfloat16 where the hardware multiplies it", choices="auto bfloat16 float32"
    )
    compile: bool = flag(True, "torch.compile")
    fp8_head: bool = flag(True, "GPU: the head's products are FP8's while training")
    fp8_mlp: bool = flag(False, "GPU: the MLP's forward products are FP8's while training")
    reference: bool = flag(False, "GPU: no kernels of this file, plain PyTorch in their place, as in float32")
    operators: str = flag("", "GPU: versions to take, like mlp=plain,head_chunk=fp8; else the fastest")
    graphs: bool = flag(True, "GPU: replay each kind of step from CUDA graphs, captured in the warm-up")
    warmup: bool = flag(True, "compile and run each stage on dummy data before the clock starts")
    rank_timeout: float = flag(300.0, "seconds that a process waits for the others", 1, 86400)
    save_every: int = flag(0, "steps between checkpoints, and one at the end; 0: none", 0, 10**7)
    save_on_stop: bool = flag(False, "SIGTERM and Ctrl-C save a checkpoint before they end the run")
    resume: bool = flag(False, "go on from the newest whole checkpoint under log_dir, if there is one")
    log_dir: str = flag("logs", "folder of logs and checkpoints")
    seed: int = flag(0, "of the initial values", 0, 2**63 - 1)

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def rotary_pairs(self) -> int:
        """Of a head's dimensions: those that turn, two by two."""
        return int(self.head_dim * self.rotary_share) // 2

    @property
    def vocab_rows(self) -> int:
        return -(-self.vocab_size // 128) * 128

    @property
    def scheduled_steps(self) -> int:
        return self.num_steps - round(self.extension_share * self.num_steps)


SHORT = Config()

# What later public records added, by their authors' runs on eight H100s, as far as it is here: documents are
# shorter at first, the learning rate ends higher, and five switches.
SHORT_NEXT = replace(
    SHORT,
    preset="short-next",
    stages=(replace(SHORT_STAGES[0], max_doc_len=896), *SHORT_STAGES[1:]),
    final_lr=0.15,
    bigram_signs=8192,
    exclusive=True,
    mudd_layers=1,
    muon_heads=2,
    ema_rate=0.02,
    prefix_weight=0.25,
    sampled_vocab=16384,
)


def medium_stages() -> tuple[Stage, ...]:
    """Twelfths of 4,700 scheduled steps, each from its first whole step, then 40 at the final settings."""
    long_blocks = (3, 7, 11, 13, 15, 17, 19, 21, 23, 23, 23, 23, 23)
    batch_tokens = [131072, 262144, 393216] + 10 * [524288]
    lr_muls = [1.0, 1.52, 1.73] + 10 * [2.0]
    predict = [((1.0, 1.0), (0.5, 0.5), (0.25, 0.0)), ((1.0, 1.0), (0.5, 0.0))] + 11 * [((1.0, 1.0),)]
    stages = []
    for i, blocks in enumerate(long_blocks):
        until = math.ceil(4700 * (i + 1) / 12) / 4700 if i < 12 else 2.0
        windows = (128 * min(11, blocks // 2), 128 * blocks)
        stages.append(Stage(until, batch_tokens[i], windows, 4096, lr_muls[i], predict[i]))
    return tuple(stages)


# The medium track's public record of 2025-12-31; what is left out of it, and why, is in docs/model.md.
MEDIUM = replace(
    SHORT,
    preset="medium",
    windows="lssslsssssslsssl",
    paired_heads="................",
    value_embeds="01234......01234",
    skips="..c.b.a..abc....",
    backout="...........b....",
    stages=medium_stages(),
    model_dim=1024,
    extra_inputs=1,
    bigram_rows=0,
    smear_chunk="0:16",
    skip_chunk="0:16",
    attn_chunk="0:16",
    ve_chunk="0:16",
    ve_own_dims=0,
    final_long_window=27 * 128,
    value_embed_std=0.0,
    qkv_std=1.0,
    o_std=0.0,
    resid_scale=1.05,
    num_steps=4740,
    extension_share=40 / 4740,
    cooldown_share=0.7,
    untie_share=1 / 6,
    muon_lr=0.015,
    adam_lr=0.004,
    adam_eps=1e-8,
    scalar_lr=10.0,
    skip_gate_lr=0.01,
    embed_beta1=0.8,
    table_beta1=0.8,
    x0_beta1=0.8,
    gate_beta1=0.8,
    gate_beta2=0.95,
    fp8_head=False,
)

# The medium track as it stood in 2025, on which seeds 003 and 004 build.
MEDIUM_2025 = replace(
    SHORT,
    preset="medium-2025",
    windows="ssslsss-ssslsssl",
    paired_heads="................",
    value_embeds="012..........012",
    skips="..c.b.a..abc....",
    backout="..........b.....",
    model_dim=1024,
    num_steps=6000,
    extra_inputs=1,
)

# Two CPU cores and the embedded corpus, a minute instead of GPUs: what makes `short` in four thin layers, and
# dense connections into the last one. Its losses compare only with its own.
CPU = replace(
    SHORT,
    preset="cpu",
    windows="slsl",
    paired_heads="p..p",
    value_embeds="01.0",
    skips="a..a",
    backout="..b.",
    stages=(
        Stage(0.15, batch_tokens=3072, windows=(128, 256), max_doc_len=1024, lr_mul=1.0),
        Stage(0.35, batch_tokens=6144, windows=(128, 256), max_doc_len=1024, lr_mul=1.0),
        Stage(1.0, batch_tokens=9216, windows=(128, 384), max_doc_len=1024, lr_mul=1.0),
    ),
    vocab_size=4096,
    bos_id=4095,
    model_dim=128,
    head_dim=64,
    mlp_ratio=1,
    ngrams=3,
    bigram_rows=160,
    bigram_lr=30.0,
    bigram_by_row=True,
    bigram_signs=8192,
    softmax_scale=0.125,
    mudd_layers=1,
    softcap=0.0,
    final_long_window=512,
    embed_std=0.15,
    spectral=800.0,
    ngram_start=16.0,
    copy_start=True,
    copy_values=40.0,
    untie_share=0.0,
    num_steps=163,
    extension_share=0.0,
    final_lr=0.15,
    muon_lr=0.034,
    momentum_min=0.75,
    momentum_max=0.9,
    momentum_warmup=98,
    momentum_cooldown=33,
    adam_lr=0.012,
    adam_every=1,
    x0_lr=10.0,
    data_dir="data/corpus",
    micro_batches=1,
    val_tokens=262144,
    val_seq_len=32768,
    val_every=250,
    device="cpu",
    save_every=1000,  # at the end: something to sample from
)

# What the cpu track is measured against: a plain GPT-2 (with rotary) of its depth and width, by AdamW.
CPU_ADAMW = replace(
    CPU,
    preset="cpu-adamw",
    windows="llll",
    paired_heads="....",
    value_embeds="....",
    skips="....",
    backout="....",
    mlp_ratio=4,
    bigram_rows=0,
    smear_chunk="",
    attn_chunk="",
    key_offset=False,
    qk_norm=False,
    rotary_share=1.0,
    softmax_scale=1 / 8,
    mudd_layers=0,
    activation="gelu",
    embed_std=0.02,
    spectral=0.0,
    ngram_start=0.0,
    copy_start=False,
    copy_values=0.0,
    matrix_std=0.64,
    qkv_std=0.64,
    o_std=0.64,
    resid_scale=1.0,
    matrix_optimizer="adamw",
    num_steps=4400,
    epochs=16,
    final_lr=0.0,
    untie_share=1.0,
    stages=(Stage(1.0, batch_tokens=4096, windows=(512, 512), max_doc_len=1024, lr_mul=1.0),),
    adam_lr=4e-3,
    adam_wd=1 / 6,  # 0.1 times the rate, as Adam's decay follows its square and a table's is 150 times that
    scalar_lr=0.0,
    x0_lr=0.0,
    embed_beta1=0.9,
    val_every=1100,
)

PRESETS = {
    "short": SHORT,
    "short-next": SHORT_NEXT,
    "medium": MEDIUM,
    "medium-2025": MEDIUM_2025,
    # The short model on one GPU with 24 GB: the same steps in four times as many micro-batches.
    "one-gpu": replace(SHORT, preset="one-gpu", micro_batches=32),
    "cpu": CPU,
    "cpu-adamw": CPU_ADAMW,
}


def topology(cfg: Config) -> tuple[Layer, ...]:
    """The five strings as rows. UserError names the string and the layer that do not fit."""
    check_topology(cfg)
    names = {"s": "short", "l": "long", "-": "none"}
    layers = []
    for i, window in enumerate(cfg.windows):
        table, skip = cfg.value_embeds[i], cfg.skips[i]
        sender, receiver = cfg.skips.index(skip), cfg.skips.rindex(skip)
        layer = Layer(
            window=names[window],
            paired=cfg.paired_heads[i] == "p",
            value_embed=None if table == "." else table,
            skip_from=sender if skip != "." and i == receiver else None,
            skip_sender=skip != "." and i == sender,
            backout=cfg.backout[i] == "b",
        )
        layers.append(layer)
    return tuple(layers)


def check_topology(cfg: Config) -> None:
    need(cfg.windows, "--windows '': a model has at least one layer")
    need(len(cfg.windows) <= 1000, f"--windows: {len(cfg.windows)} layers; use at most 1000")
    for name in ("paired_heads", "value_embeds", "skips", "backout"):
        text = getattr(cfg, name)
        counts = f"{len(text)} layers, --windows {len(cfg.windows)}"
        need(len(text) == len(cfg.windows), f"--{name} {text!r} describes {counts}")
    marks = {
        "windows": ("sl-", "s short, l long, - none"),
        "paired_heads": ("p.", "p or ."),
        "backout": ("b.", "b or ."),
    }
    for name, (allowed, legend) in marks.items():
        for i, mark in enumerate(getattr(cfg, name)):
            need(mark in allowed, f"--{name}: layer {i} is {mark!r}; use {legend}")
    for i, table in enumerate(cfg.value_embeds):
        attends = cfg.windows[i] != "-"
        need(table == "." or attends, f"--value_embeds: layer {i} has no attention to add table {table!r} to")
        named = table.isascii() and table.isalnum()
        need(table == "." or named, f"--value_embeds: {table!r}: use letters and digits")
    for skip in cfg.skips:
        twice = skip == "." or cfg.skips.count(skip) == 2
        need(twice, f"--skips: {skip!r} must stand twice, for sender and receiver")
    need(cfg.backout.count("b") <= 1, f"--backout {cfg.backout!r}: at most one layer")


GATE_CHUNKS = ("smear_chunk", "skip_chunk", "attn_chunk", "ve_chunk")


def read_chunk(cfg: Config, name: str) -> slice | None:
    """A gate's "first:last" as a slice of the model's dimensions; None: no gate."""
    text = getattr(cfg, name)
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    rule = f"give first:last with 0 <= first < last <= model_dim {cfg.model_dim}, or '' for no gate"
    need(first < last <= cfg.model_dim, f"--{name} {text!r}: {rule}")
    return slice(first, last)


def check_config(cfg: Config) -> None:
    """UserError names the first value that no run can have."""
    for f in fields(Config):
        value, about = getattr(cfg, f.name), f.metadata
        if about.get("low") is not None:
            low, high = about["low"], about["high"]
            need(low <= value <= high, f"--{f.name} {value}: must lie between {low} and {high}")
        if about.get("choices"):
            need(value in about["choices"], f"--{f.name} {value}: choose from {' '.join(about['choices'])}")
    for name in ("data_dir", "log_dir"):
        folder = getattr(cfg, name)
        need(folder and "\0" not in folder, f"--{name} {folder!r}: name a folder (. is this one)")
    topology(cfg)
    for name in GATE_CHUNKS:
        read_chunk(cfg, name)
    layers = len(cfg.windows)
    need(cfg.mudd_layers <= layers, f"--mudd_layers {cfg.mudd_layers}: there are {layers} layers")
    read_operators(cfg.operators)
    check_sizes(cfg)
    check_steps(cfg)


def check_sizes(cfg: Config) -> None:
    halves = cfg.head_dim % 4 == 0
    need(halves, f"--head_dim {cfg.head_dim}: must be a multiple of 4 (rotary turns pairs in half of it)")
    fits = cfg.model_dim % cfg.head_dim == 0
    need(fits, f"--model_dim {cfg.model_dim}: must be a multiple of --head_dim {cfg.head_dim}")
    groups = not cfg.muon_heads or cfg.num_heads % cfg.muon_heads == 0
    need(groups, f"--muon_heads {cfg.muon_heads}: must divide the {cfg.num_heads} heads of a layer")
    paired = "p" in cfg.paired_heads
    advice = "change --model_dim or --head_dim, or use only dots"
    even = cfg.num_heads % 2 == 0
    need(not paired or even, f"--paired_heads: {cfg.num_heads} heads cannot be paired; {advice}")
    own = cfg.ve_own_dims <= cfg.model_dim
    need(own, f"--ve_own_dims {cfg.ve_own_dims}: must lie between 0 and --model_dim {cfg.model_dim}")
    inside = cfg.bos_id < cfg.vocab_size
    need(inside, f"--bos_id {cfg.bos_id}: must lie in the vocabulary, --vocab_size {cfg.vocab_size}")
    whole = cfg.sampled_vocab % 128 == 0
    need(whole, f"--sampled_vocab {cfg.sampled_vocab}: must be a multiple of 128")
    if cfg.spectral:
        needs = f"--spectral {cfg.spectral}: needs"
        need(cfg.spectral >= 1e-3, f"--spectral {cfg.spectral}: give 0, or 0.001 and more")
        need(cfg.untie_share == 0, f"{needs} --untie_share 0: embed and lm_head start as two")
        need(
            cfg.model_dim <= cfg.vocab_size, f"{needs} a --model_dim of at most --vocab_size {cfg.vocab_size}"
        )


def check_steps(cfg: Config) -> None:
    share, steps = cfg.extension_share, f"--num_steps {cfg.num_steps}"
    need(cfg.scheduled_steps >= 1, f"--extension_share {share}: leaves no scheduled step of {steps}")
    low, high = cfg.momentum_min, cfg.momentum_max
    need(low <= high, f"--momentum_min {low}: must not be above --momentum_max {high}")
    whole = not cfg.join or cfg.micro_batches % cfg.join == 0
    need(whole, f"--join {cfg.join}: must divide --micro_batches {cfg.micro_batches}")
    whole = cfg.val_tokens % cfg.val_seq_len == 0
    need(whole, f"--val_tokens {cfg.val_tokens}: must be a multiple of --val_seq_len {cfg.val_seq_len}")
    share = cfg.ema_rate * cfg.adam_every  # of what Adam moves, whose mean moves as rarely
    need(share <= 1, f"--ema_rate {cfg.ema_rate}: times --adam_every {cfg.adam_every} must not be above 1")
    for stage in cfg.stages:
        tokens, by = stage.batch_tokens, f" with --batch_mul {cfg.batch_mul}" if cfg.batch_mul != 1 else ""
        need(tokens > 0, f"--batch_mul {cfg.batch_mul}: leaves no token of a step")
        shared = tokens % cfg.micro_batches == 0
        need(shared, f"--micro_batches {cfg.micro_batches}: must divide the {tokens} tokens of a step{by}")


def flag_parser() -> argparse.ArgumentParser:
    """--preset NAME, and --field VALUE for any scalar field of Config."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        allow_abbrev=False,
        description=(__doc__ or "").partition("\n\nParts")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The presets' values: PRESETS, near the top of train_gpt.py.",
    )

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    parser.error = refuse
    default = "short" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=PRESETS, default=default, help="what to run (here: %(default)s)")
    for f in fields(Config):
        name, about = f"--{f.name}", f.metadata.get("about", "").replace("%", "%%")
        if f.metadata.get("low") is not None:
            about += f" [{f.metadata['low']} to {f.metadata['high']}]"
        if f.metadata.get("choices"):
            about += f" [{', '.join(f.metadata['choices'])}]"
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=about)
        elif f.type in (int, float, str) and f.name != "preset":
            parser.add_argument(name, type=f.type, metavar=f.type.__name__, help=about)
    return parser


def parse_config(argv: list[str]) -> tuple[Config, dict]:
    """-> the run's configuration, and what differs from its preset: a record has no overrides."""
    for word in argv:  # argparse of Python 3.11 takes --flag=-- for a flag without a value
        need(not re.fullmatch(r"--\w+=--", word), f"{word}: -- is no value (--help lists the flags)")
    given = {name: value for name, value in vars(flag_parser().parse_args(argv)).items() if value is not None}
    base = PRESETS[given.pop("preset")]
    overrides = {name: value for name, value in given.items() if value != getattr(base, name)}
    cfg = replace(base, **overrides)
    need(1e-6 <= cfg.batch_mul <= 1e3, f"--batch_mul {cfg.batch_mul}: must lie between 1e-06 and 1000.0")
    stages = [replace(stage, batch_tokens=round(cfg.batch_mul * stage.batch_tokens)) for stage in cfg.stages]
    cfg = replace(cfg, stages=tuple(stages))
    check_config(cfg)
    return cfg, overrides


# ===== 2. Model: each parameter is a row of a table, with its shape, its start and how it is optimized. =====

Init = Callable[[Tensor, torch.Generator], object]  # fills a tensor in place


@dataclass(frozen=True)
class ParamSpec:
    """A parameter: all that model, optimizer, ranks, checkpoint and log need to know of it."""

    name: str
    shape: tuple[int, ...]  # of one layer's share of it, if layers own it; else of the whole
    init: Init
    layers: tuple[int, ...] | None = None  # which layers own a row of it; None: it belongs to the model
    optimizer: str = "adam"  # "muon": matrices, a layer's share is (k, rows, columns) | "adam"
    sharded: bool = False  # ranks share its update: reduce-scatter and all-gather, not all-reduce
    fp32: bool = False  # kept in float32, whatever the model's dtype
    lr: float = 1.0  # multiplies the optimizer's learning rate
    wd: float = 0.0  # multiplies the optimizer's weight decay
    betas: tuple[float, float] = (0.9, 0.99)  # Adam's
    matrix_lrs: tuple[float, ...] = ()  # muon: multiplies the learning rate of each of the k matrices

    @property
    def full_shape(self) -> tuple[int, ...]:
        return self.shape if self.layers is None else (len(self.layers), *self.shape)


def normal(std: float) -> Init:
    return lambda p, rng: p.normal_(std=std, generator=rng) if std else p.zero_()


def constant(value: float) -> Init:
    return lambda p, rng: p.fill_(value)


def uniform(*stds: float) -> Init:
    """For (n, k, rows, columns): the standard deviation of each of the k matrices."""
    bound = 3**0.5 * torch.tensor(stds, device="cpu").view(-1, 1, 1)
    return lambda p, rng: p.uniform_(-1, 1, generator=rng).mul_(bound)


def parameter_table(cfg: Config) -> list[ParamSpec]:
    """All parameters. A row whose size is 0, by what a preset switches off, is None in the model."""
    return [*embedding_table(cfg), *layer_table(cfg), *scalar_table(cfg)]


def value_tables(cfg: Config) -> list[str]:
    """Names of the value embeddings."""
    return sorted(set(cfg.value_embeds) - {"."})


def embedding_table(cfg: Config) -> list[ParamSpec]:
    """Rows a token: tables (V, D), whose updates ranks share."""
    V, D = cfg.vocab_rows, cfg.model_dim
    embed = dict(init=normal(cfg.embed_std), sharded=True, betas=(cfg.embed_beta1, 0.95), wd=150.0)
    table = dict(sharded=True, betas=(cfg.table_beta1, 0.95), lr=75.0, wd=5.0)
    bigram = table | dict(betas=(cfg.bigram_momentum, 0.95), lr=cfg.bigram_lr)
    inputs = [f"input_embed_{k}" for k in range(cfg.extra_inputs)]
    values = [f"value_embed_{name}" for name in value_tables(cfg)]
    return [
        ParamSpec("embed", (V, D), **embed),
        ParamSpec("lm_head", (D, V), **embed),  # so that its gradient x.T @ dlogits needs no transpose
        *[ParamSpec(name, (V, D), init=normal(cfg.input_embed_std), **table) for name in inputs],
        *[ParamSpec(name, (V, D), init=normal(cfg.value_embed_std), **table) for name in values],
        ParamSpec("bigram_embed", (cfg.bigram_rows * V, D), init=constant(0), **bigram),
    ]


def layer_table(cfg: Config) -> list[ParamSpec]:
    """Matrices and gates. To add one: a row here, and its use as w.NAME in GPT.hidden or what that calls.

    A gate on a chunk of the stream also needs NAME_chunk in Config, and its name in GATE_CHUNKS.
    """
    D, H = cfg.model_dim, cfg.num_heads
    layers = topology(cfg)
    every = tuple(range(len(layers)))
    attending = tuple(i for i in every if layers[i].attends)
    valued = tuple(i for i in every if layers[i].value_embed is not None)
    skipping = tuple(i for i in every if layers[i].skip_from is not None)
    mudd = tuple(i for i in every if i >= len(every) - cfg.mudd_layers)

    def width(name: str, own: int = 0) -> int:
        """Dimensions that a gate reads; 0: there is no gate."""
        chunk = read_chunk(cfg, name)
        return chunk.stop - chunk.start + own if chunk else 0

    if cfg.matrix_optimizer == "normuon":
        matrix = dict(optimizer="muon", sharded=True, wd=1.0)
    else:
        matrix = dict(optimizer="adam", sharded=True, wd=150.0)
    std = D**-0.5
    qkvo = uniform(cfg.qkv_std * std, cfg.qkv_std * std, cfg.qkv_std * std, cfg.o_std * std)
    mlp = uniform(cfg.matrix_std * std, 0.0)  # the MLP begins as nothing added
    # Rates: as in the record.
    gate = dict(init=constant(0), fp32=True, betas=(cfg.gate_beta1, cfg.gate_beta2))
    ve_width = width("ve_chunk", cfg.ve_own_dims)
    return [
        ParamSpec("qkvo", (4, D, D), layers=attending, init=qkvo, matrix_lrs=(1, 1, 1, 1), **matrix),
        ParamSpec("mlp", (2, cfg.mlp_ratio * D, D), layers=every, init=mlp, matrix_lrs=(1, 2), **matrix),
        ParamSpec("attn_gate", (H, width("attn_chunk")), layers=attending, wd=1.0, **gate),
        ParamSpec("ve_gate", (H, ve_width), layers=valued, wd=1.0, **gate),
        ParamSpec("smear_gate", (1, width("smear_chunk")), lr=0.01, **gate),
        ParamSpec("skip_gate", (1, width("skip_chunk")), layers=skipping, lr=cfg.skip_gate_lr, **gate),
        ParamSpec("mudd_up", (MUDD_WIDTH, D), layers=mudd, **(gate | dict(init=normal(0.5 * std)))),
        ParamSpec("mudd_down", (len(layers), MUDD_WIDTH), layers=mudd, **gate),  # a row a source, some unused
    ]


def scalar_table(cfg: Config) -> list[ParamSpec]:
    """Learned scalars, most of them one a layer; their names end in _scale, by which the log finds them."""
    layers = topology(cfg)
    every = tuple(range(len(layers)))
    attending = tuple(i for i in every if layers[i].attends)
    skipping = tuple(i for i in every if layers[i].skip_from is not None)
    lone = tuple(i for i in attending if cfg.exclusive and not layers[i].paired)  # as in the record
    scalar = dict(lr=cfg.scalar_lr, fp32=True)
    x0 = dict(init=constant(0), lr=cfg.x0_lr, fp32=True, betas=(cfg.x0_beta1, 0.95))
    smears, backouts = int(bool(cfg.smear_chunk)), cfg.backout.count("b")
    return [
        ParamSpec("smear_scale", (smears,), init=constant(0), **scalar),
        ParamSpec("skip_scale", (), layers=skipping, init=constant(-1.5), **scalar),
        ParamSpec("qkv_scale", (), layers=attending, init=constant(0.5), **scalar),
        ParamSpec("o_scale", (), layers=attending, init=constant(1.0), **scalar),
        ParamSpec("exclusive_scale", (cfg.num_heads,), layers=lone, init=constant(0), **scalar),
        ParamSpec("resid_scale", (), layers=every, init=constant(cfg.resid_scale), **scalar),
        ParamSpec("x0_scale", (), layers=every, **x0),
        ParamSpec("input_scale", (cfg.extra_inputs,), layers=every, **x0),
        ParamSpec("bigram_scale", (), layers=every if cfg.bigram_rows else (), init=constant(0.1), **scalar),
        ParamSpec("backout_scale", (backouts,), init=constant(0.5), **scalar),
    ]


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed stream of tokens begin. They never see each other (previous_token)."""

    is_first: Tensor  # (T,) whether a token is the first of its document
    starts: Tensor  # (T,) where that document starts

    @staticmethod
    def find(tokens: Tensor, bos_id: int) -> "Documents":
        position = torch.arange(len(tokens), device=tokens.device)
        is_first = (tokens == bos_id) | (position == 0)
        return Documents(is_first, torch.where(is_first, position, 0).cummax(0).values)


@dataclass(frozen=True)
class Positions:
    """What a layer's attention needs besides q, k and v: where tokens stand, and which keys they see.

    A paired layer has two places a token (see pair), others one.
    """

    is_first: Tensor  # (T,) whether a token is the first of its document
    first_key: Tensor  # (places,): place i sees keys first_key[i] .. i
    window: int | None  # i - first_key[i] < window; None where the kernel has no use for it
    cos: Tensor  # (places, half), rotary's
    sin: Tensor
    softmax_scale: Tensor  # ()
    paired: bool
    key_offset: bool


class LayerWeights:
    """A layer's rows of the parameters that layers own, by name; None where it has none."""


class GPT(nn.Module):
    """tokens (T,), one packed stream of documents -> the mean loss.

    dtype: of matrices and tables; gates and scalars are float32. kernels: None is plain_kernels().
    """

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32, kernels: "Kernels | None" = None):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.layers = topology(cfg)
        self.kernels = kernels or plain_kernels()
        self.specs: dict[str, ParamSpec] = {}
        self.layer_params: list[ParamSpec] = []
        for spec in parameter_table(cfg):
            self.add_parameter(spec)
        with torch.no_grad():
            self.lm_head.copy_(self.embed.T)  # tied until the untie step
        if cfg.copy_start and cfg.key_offset:
            self.start_copying()
        self.add_buffers()
        self.chunks = {name: read_chunk(cfg, name) for name in GATE_CHUNKS}
        compiled, piece = self.kernels.compile, self.kernels.compile
        if self.kernels.compile_layers:  # what a stream's gradient gathers is added in passing
            self.run_layers, piece = self.kernels.compile_layers(self.run_layers), lambda f: f
        small = piece if self.kernels.compile_small else lambda f: f
        # Layers are alike: each of these compiles once, and serves all of them.
        self.smear, self.norm, self.mix, self.skip = map(small, (smear, norm, mix, skip))
        self.project_qkv, self.gate_value = small(project_qkv), small(gate_value)
        self.attend, self.project_output = small(attend), small(project_output)
        self.exclude, self.mudd = small(exclude), small(mudd)
        self.mlp_block, self.head_chunk = piece(mlp_block), compiled(self.kernels.head_chunk)

    def add_parameter(self, spec: ParamSpec) -> None:
        """Each parameter draws from a generator of its own: a switch elsewhere does not change its start."""
        if spec.layers is not None:
            self.layer_params.append(spec)
        if math.prod(spec.full_shape) == 0:
            return self.register_parameter(spec.name, None)
        value = torch.empty(spec.full_shape)
        if not value.is_meta:
            seed = zlib.crc32(f"{self.cfg.seed} {spec.name}".encode())
            spec.init(value, torch.Generator().manual_seed(seed))
        dtype = torch.float32 if spec.fp32 else self.dtype
        self.register_parameter(spec.name, nn.Parameter(value.to(dtype)))
        self.specs[spec.name] = spec

    @torch.no_grad()
    def start_copying(self) -> None:
        """Long layers' keys start as their queries, in the half of a head that key_offset takes from before.

        So a token attends to what followed the same token: an induction head (2209.11895) to begin with.
        """
        still = 2 * self.cfg.rotary_pairs
        attending = [layer for layer in self.layers if layer.attends]
        for n, layer in enumerate(attending):
            if layer.window == "long":
                q, k = self.qkvo[n, :2].unflatten(1, (self.cfg.num_heads, self.cfg.head_dim))
                k[:, still:] = q[:, still:]

    def add_buffers(self) -> None:
        cfg = self.cfg
        half = cfg.rotary_pairs
        powers = torch.arange(half, dtype=torch.float32) / max(half - 1, 1)
        self.register_buffer("rotary_freqs", cfg.rotary_base**-powers)  # (half,), radians a token
        self.register_buffer("softmax_scale", torch.tensor(cfg.softmax_scale))
        self.register_buffer("long_window", torch.tensor(cfg.stages[0].windows[1]))
        together = max(1, cfg.join)
        longest = max(cfg.val_seq_len, together * most_tokens(cfg))
        positions = longest * (2 if any(layer.paired for layer in self.layers) else 1)
        self.register_buffer("rotary_cos", torch.empty(positions, half), persistent=False)
        self.register_buffer("rotary_sin", torch.empty(positions, half), persistent=False)
        if cfg.bigram_rows and cfg.bigram_signs:
            signs = torch.empty(cfg.bigram_signs, cfg.model_dim)
            if not signs.is_meta:  # fixed: not a matter of the run's seed
                fixed = torch.Generator().manual_seed(0)
                signs = torch.randint(0, 2, signs.shape, generator=fixed) * 2 - 1
            self.register_buffer("bigram_sign", signs.to(self.dtype), persistent=False)
        self.register_buffer("prefixes", None, persistent=False)  # what read_prefixes gives, to train with it
        self.update_rotary()

    @torch.no_grad()
    def update_rotary(self) -> None:
        """cos and sin of all positions, from the frequencies."""
        positions = torch.arange(len(self.rotary_cos), device=self.rotary_freqs.device)
        angles = torch.outer(positions, self.rotary_freqs)
        self.rotary_cos.copy_(angles.cos())
        self.rotary_sin.copy_(angles.sin())

    @torch.no_grad()
    def set_long_window(self, window: int) -> None:
        """A change of the long window in training; validation alone may look further without.

        YaRN (2309.00071): up to yarn_limit slow frequencies stretch with the window, those that turn over 32
        times in it stay, and the softmax scale grows.
        """
        before = int(self.long_window)
        if window != before and window <= self.cfg.yarn_limit:
            freqs, factor = yarn(self.rotary_freqs, before, window)
            self.rotary_freqs.copy_(freqs)
            self.softmax_scale.mul_(factor)
            self.update_rotary()
        self.long_window.fill_(window)

    def layer_weights(self) -> list[LayerWeights]:
        """Of each layer."""
        weights = [LayerWeights() for _ in self.layers]
        for w in weights:
            for spec in self.layer_params:
                setattr(w, spec.name, None)
        for spec in self.layer_params:
            whole = getattr(self, spec.name)
            if whole is not None:
                for layer, row in zip(spec.layers, whole.unbind(0), strict=True):
                    setattr(weights[layer], spec.name, row)
        return weights

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        windows: tuple[int, int],
        learn: bool = True,
        joined: int = 1,
        candidates: int = 0,
    ) -> Tensor:
        """-> the mean loss, nats a token.

        tokens, targets: (T,) ids. loss_weights: (n,), of the losses on the next n tokens; while training with
        prefixes the last is of the loss on the next one's. windows: short and long, tokens. learn: with its
        gradient. joined: sequences of equal length, each of which begins with a document, that the T tokens
        are. candidates: of the softmax, see sample_vocab; 0: the whole vocabulary.
        """
        x = self.hidden(tokens, windows)
        cap = (self.cfg.softcap, self.cfg.softcap_shift, self.cfg.softcap_width)
        prefixes = self.prefixes if learn else None
        head = self.lm_head, targets, loss_weights, cap, self.head_chunk
        return head_loss(x, *head, learn, joined, prefixes, candidates)

    def hidden(self, tokens: Tensor, windows: tuple[int, int]) -> Tensor:
        """tokens (T,) -> what the head reads, (T, D)."""
        docs = Documents.find(tokens, self.cfg.bos_id)
        look_up, order = self.kernels.look_up, self.row_order(tokens)
        values = {}  # (T, D) of each value embedding
        for name in value_tables(self.cfg):
            values[name] = look_up(getattr(self, f"value_embed_{name}"), tokens, order)
        positions = {}  # of each kind of layer
        for layer in self.layers:
            if layer.attends and (layer.window, layer.paired) not in positions:
                positions[layer.window, layer.paired] = self.positions(layer, docs, windows)
        extras = self.extra_streams(tokens, docs, order)
        # The first argument has no name here: a validation holds it no longer than the layers do.
        return self.run_layers(look_up(self.embed, tokens, order), extras, values, docs.is_first, positions)

    def run_layers(
        self,
        x: Tensor,
        extras: list[Tensor],
        values: dict[str, Tensor],
        is_first: Tensor,
        positions: dict[tuple[str, bool], Positions],
    ) -> Tensor:
        """Token embeddings x (T, D) -> what the head reads, (T, D). values, extras: looked up, (T, D)."""
        x = x0 = self.smear(x, is_first, self.smear_scale, self.smear_gate, self.chunks["smear_chunk"])
        outputs: list[Tensor | None] = []  # of the layers so far, where something later asks for them
        for layer, w in zip(self.layers, self.layer_weights(), strict=True):
            if layer.skip_from is not None:  # before the mix: resid_scale holds for it too
                x = self.skip(
                    x, outputs[layer.skip_from], x0, w.skip_scale, w.skip_gate, self.chunks["skip_chunk"]
                )
            if w.mudd_up is not None:
                x = self.mudd(x, [x0, *outputs], w.mudd_up, w.mudd_down)
            x = self.mix([x, x0, *extras], mix_scales(w))
            if layer.attends:
                value, where = values.get(layer.value_embed), positions[layer.window, layer.paired]
                x = self.attention(x, w, value, where)
            up, down = w.mlp.unbind(0)
            x = self.mlp_block(x, up, down, self.cfg.activation, self.kernels.mlp)
            kept = layer.skip_sender or layer.backout or self.cfg.mudd_layers
            outputs.append(x if kept else None)
        for layer, output in zip(self.layers, outputs, strict=True):
            if layer.backout:  # what only the middle needed goes out
                x = x - self.backout_scale[0] * output
        return self.norm(x)

    def row_order(self, rows: Tensor) -> "RowOrder | None":
        """What the gradients of all lookups of the same rows share."""
        return RowOrder.of(rows) if self.kernels.sorted_lookups and torch.is_grad_enabled() else None

    def extra_streams(self, tokens: Tensor, docs: Documents, order: "RowOrder | None" = None) -> list[Tensor]:
        """What is added to the stream before every layer besides x0: input embeddings (seed 004), bigrams."""
        tables = [getattr(self, f"input_embed_{k}") for k in range(self.cfg.extra_inputs)]
        streams = [self.norm(self.kernels.look_up(table, tokens, order)) for table in tables]
        if self.bigram_embed is not None:
            streams.append(self.bigrams(tokens, docs))
        return streams

    def bigrams(self, tokens: Tensor, docs: Documents) -> Tensor:
        """-> (T, D), a row for each pair of neighbours, by hash; signs tell apart pairs that share a row.

        Further rows for triples, ..: as far as ngrams says.
        """
        num_rows, sparse = len(self.bigram_embed), self.kernels.sparse_bigram_grad
        total = None
        for rows, key in ngram_rows(tokens, docs.is_first, num_rows, self.cfg.ngrams):
            x = self.kernels.look_up(self.bigram_embed, rows, self.row_order(rows), sparse)
            if self.cfg.bigram_signs:
                x = x * self.bigram_sign[key.remainder(self.cfg.bigram_signs)]
            total = x if total is None else total + x
        return total

    def positions(self, layer: Layer, docs: Documents, windows: tuple[int, int]) -> Positions:
        """Of a kind of layer."""
        is_long = layer.window == "long"
        window = windows[1] if is_long else windows[0]  # tokens; of a paired layer places
        starts = docs.starts
        if layer.paired:
            starts = 2 * starts.repeat_interleave(2)
        places = len(starts)
        place = torch.arange(places, device=starts.device)
        return Positions(
            docs.is_first,
            first_key=torch.maximum(starts, place - window + 1),
            window=window if self.kernels.reads_window else None,
            cos=self.rotary_cos[:places],
            sin=self.rotary_sin[:places],
            softmax_scale=self.softmax_scale,
            paired=layer.paired,
            key_offset=self.cfg.key_offset and is_long,
        )

    def attention(self, x: Tensor, w: LayerWeights, value: Tensor | None, positions: Positions) -> Tensor:
        """x (T, D) plus what each token reads from those before it in its document, within the window."""
        cfg = self.cfg
        n = self.norm(x)
        qkv = self.project_qkv(n, w.qkvo, w.qkv_scale, cfg.head_dim)  # (T, 3, H, d)
        if value is not None:
            value = value.unflatten(1, qkv.shape[2:])
            value = self.gate_value(n, value, w.ve_gate, self.chunks["ve_chunk"], cfg.ve_own_dims)
        y = self.attend(qkv, value, positions, cfg.qk_norm, self.kernels.prepare_qkv, self.kernels.attention)
        if w.exclusive_scale is not None:
            v = qkv[:, 2] if value is None else qkv[:, 2] + value
            y = self.exclude(y, v, w.exclusive_scale)
        return self.project_output(x, y, n, w.qkvo, w.o_scale, w.attn_gate, self.chunks["attn_chunk"])


def smear(x: Tensor, is_first: Tensor, scale: Tensor | None, w: Tensor | None, chunk: slice | None) -> Tensor:
    """Token embeddings x (T, D) with a gated share of the embedding before, normed."""
    if w is None:
        return norm(x)
    share = scale * gate(x[:, chunk], w)  # (T, 1)
    return norm(x + share.to(x.dtype) * previous_token(x, is_first))


def mix_scales(w: LayerWeights) -> list[Tensor]:
    """A layer's scales of the streams that mix adds: x, x0, further input embeddings, bigrams."""
    scales = [w.resid_scale, w.x0_scale]
    if w.input_scale is not None:
        scales.extend(w.input_scale.unbind(0))
    if w.bigram_scale is not None:
        scales.append(w.bigram_scale)
    return scales


def mix(streams: list[Tensor], scales: list[Tensor]) -> Tensor:
    """The weighted sum with which every layer begins; a scale () for each stream (T, D)."""
    assert len(streams) == len(scales), f"{len(streams)} streams, {len(scales)} scales"
    mixed = scales[0] * streams[0]
    for scale, stream in zip(scales[1:], streams[1:], strict=True):
        mixed = mixed + scale * stream
    return mixed


def skip(x: Tensor, sent: Tensor, x0: Tensor, scale: Tensor, w: Tensor | None, chunk: slice | None) -> Tensor:
    """x plus a gated share of an earlier layer's output, sent (T, D). U-Net."""
    share = torch.sigmoid(scale)
    if w is not None:
        share = share * 2 * gate(x0[:, chunk], w)  # (T, 1)
    return x + share.to(x.dtype) * sent


def project_qkv(n: Tensor, qkvo: Tensor, scale: Tensor, head_dim: int) -> Tensor:
    """n (T, D) the normed stream, qkvo (4, D, D), of which each row is an output -> q, k, v: (T, 3, H, d)."""
    return F.linear(n, scale * qkvo[:3].flatten(0, 1)).view(len(n), 3, -1, head_dim)


def gate_value(n: Tensor, value: Tensor, w: Tensor | None, chunk: slice | None, own_dims: int) -> Tensor:
    """A value embedding (T, H, d) times its gate, reading chunks of n (T, D) and of itself (seed 000)."""
    if w is None:
        return value
    z = torch.cat((n[:, chunk], value.flatten(1)[:, :own_dims]), dim=-1)
    return (2 * gate(z, w)).to(value.dtype)[..., None] * value


def attend(
    qkv: Tensor,
    value: Tensor | None,
    positions: Positions,
    qk_norm: bool,
    prepare_qkv: Callable,
    attention: Callable,
) -> Tensor:
    """qkv (T, 3, H, d) -> (T, H, d): the mean of the values that a token sees, by softmax(scale q . k)."""
    p = positions
    q, k, v = prepare_qkv(qkv, value, p.is_first, p.cos, p.sin, p.paired, p.key_offset, qk_norm)
    y = attention(q, k, v, p.first_key, p.window, p.softmax_scale)
    return unpair(y) if p.paired else y


def prepare_qkv(
    qkv: Tensor,
    value: Tensor | None,
    is_first: Tensor,
    cos: Tensor,
    sin: Tensor,
    paired: bool,
    key_offset: bool,
    qk_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (T, 3, H, d), and value (T, H, d), which is added to v -> q, k, v as attention takes them.

    (T, H, d) each, paired (2T, H/2, d). Only the key offset looks elsewhere.
    """
    q, k, v = qkv.unbind(1)
    v = v if value is None else v + value
    if qk_norm:
        q, k = norm(q), norm(k)
    if key_offset:  # one layer finds "what followed this?"
        still = k[..., 2 * cos.size(-1) :]  # what rotary leaves alone
        shifted = torch.where(is_first[:, None, None], still, previous_token(still, is_first))
        k = torch.cat((k[..., : 2 * cos.size(-1)], shifted), dim=-1)
    if paired:
        q, k, v = pair(q), pair(k), pair(v)
    return rotary(q, cos, sin), rotary(k, cos, sin), v


def exclude(y: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """Heads' outputs y (T, H, d) less a share, scale (H,), of their part along the token's own value v.

    Exclusive self attention, 2603.09078: what a token says of itself is in the stream anyway.
    """
    v = norm(v.float())
    along = (y.float() * v).mean(dim=-1, keepdim=True)  # v's mean square is 1
    return y - (scale[:, None] * along * v).to(y.dtype)


def project_output(
    x: Tensor, y: Tensor, n: Tensor, qkvo: Tensor, scale: Tensor, w: Tensor | None, chunk: slice | None
) -> Tensor:
    """x (T, D) plus the heads' outputs y (T, H, d), each gated by what the normed stream n says, times o."""
    if w is not None:
        y = y * gate(n[:, chunk], w).to(y.dtype)[..., None]
    return x + F.linear(y.flatten(1), scale * qkvo[3])


MUDD_WIDTH = 32  # of the hidden layer that weighs earlier outputs


def mudd(x: Tensor, sources: list[Tensor], up: Tensor, down: Tensor) -> Tensor:
    """x (T, D) plus earlier streams (T, D), each weighed by what the stream says at that token.

    Multiway dynamic dense connections, 2502.12170, into the residual stream alone. up (MUDD_WIDTH, D),
    down (at least a row a source, MUDD_WIDTH).
    """
    weights = F.linear(F.gelu(F.linear(norm(x).float(), up)), down[: len(sources)])  # (T, sources)
    for weight, source in zip(weights.to(x.dtype).unbind(1), sources, strict=True):
        x = x + weight[:, None] * source
    return x


def mlp_block(x: Tensor, up: Tensor, down: Tensor, activation: str, mlp: Callable) -> Tensor:
    """x (T, D) plus the MLP of the normed stream."""
    return x + mlp(norm(x), up, down, activation)


def norm(x: Tensor) -> Tensor:
    """x over its root mean square, along the last dimension."""
    return F.rms_norm(x, (x.size(-1),))


def gate(x: Tensor, w: Tensor) -> Tensor:
    """x (T, c), w (gates, c) -> sigmoid(w . x) (T, gates), 1/2 at first. Value and skip gates double it."""
    return torch.sigmoid(F.linear(x.float(), w))


def previous_token(x: Tensor, is_first: Tensor) -> Tensor:
    """x (T, ...) of the token before; 0 for the first token of a document."""
    shifted = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    return shifted.masked_fill(is_first.view(-1, *[1] * (x.dim() - 1)), 0)


NGRAM_HASH = (36313, 27191, 51749, 44617)  # of a token, of the one before, ..


def ngram_rows(tokens: Tensor, is_first: Tensor, num_rows: int, longest: int) -> list[tuple[Tensor, Tensor]]:
    """tokens (T,) -> of pairs, of triples, ..: rows of the bigram table and keys of signs, (T,) int32 each.

    What ends with a token is at its place; a document's first token has the last row.
    """
    token = key = tokens.to(torch.int32)
    hashed = NGRAM_HASH[0] * token  # wraps: the hash is defined on 32 bits
    found = []
    for factor in NGRAM_HASH[1:longest]:
        token = previous_token(token, is_first)
        hashed, key = hashed ^ (factor * token), key ^ token
        rows = torch.where(is_first, num_rows - 1, hashed.remainder(num_rows - 1))
        found.append((rows, key))
    return found


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, d); cos, sin (T, half): turns the first 2 half dimensions in adjacent pairs, not the rest."""
    cos, sin = cos[:, None], sin[:, None]
    turning, still = x.split((2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)), dim=-1)
    a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((turned, still), dim=-1)


def yarn(freqs: Tensor, before: int, after: int) -> tuple[Tensor, float]:
    """The long window changes, in tokens -> new frequencies, factor of the softmax scale. 2309.00071"""
    rotations = before * freqs / (2 * math.pi)
    ramp = ((rotations - 1) / 31).clamp(0, 1)
    ratio = before / after
    return freqs * (ratio + ramp * (1 - ratio)), 0.2 * math.log(after / before) + 1


def pair(x: Tensor) -> Tensor:
    """(T, H, d) -> (2T, H/2, d): token t of heads 2j and 2j+1 at positions 2t and 2t+1."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1)


def unpair(x: Tensor) -> Tensor:
    """(2T, H/2, d) -> (T, H, d), the reverse of pair."""
    return x.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2)


# ===== 3. Optimizer: NorMuon for matrices, Adam for the rest, as the parameter table says. =====


class Optimizer:
    """NorMuon and Adam over a model's parameters, for 1 to N ranks; embedding and head are tied, then untied.

    A replicated parameter is all-reduced and updated on every rank. A sharded one counts in rows of a table
    or matrices, padded so that ranks divide them: gradients reduce-scatter, each rank updates its shard, and
    all gather the result.
    """

    def __init__(self, cfg: Config, model: GPT, env: "DistEnv"):
        self.cfg, self.env, self.specs, self.kernels = cfg, env, model.specs, model.kernels
        self.params = dict(model.named_parameters())
        self.tied = cfg.untie_share > 0
        self.state = {name: self.new_state(name) for name in self.params}
        self.matrix_lrs = {name: self.new_matrix_lrs(name) for name in self.params if self.is_muon(name)}
        self.by_heads = {name: self.new_by_heads(name) for name in self.matrix_lrs}
        self.step_scalars = torch.zeros(3, device=env.device)  # on the device, where a graph reads them
        self.lr_mul, self.momentum, self.adam_steps = self.step_scalars.unbind()
        self.sparse_grad = None
        if "bigram_embed" in self.params and env.world_size > 1:
            num_rows, timeout = len(self.params["bigram_embed"]), timedelta(seconds=cfg.rank_timeout)
            self.sparse_grad = SparseGradient(env, num_rows, timeout)

    def is_muon(self, name: str) -> bool:
        return self.specs[name].optimizer == "muon"

    def padded_rows(self, name: str, t: Tensor) -> Tensor:
        """A parameter, its gradient or its state as (rows or matrices, ...); a view if nothing is padded."""
        if self.is_muon(name):
            t = t.flatten(0, -3)
        missing = -len(t) % self.env.world_size if self.specs[name].sharded else 0
        if missing == 0:
            return t
        no_padding = [0] * (2 * t.dim() - 1)
        return F.pad(t, (*no_padding, missing))

    def local_shard(self, name: str, rows: Tensor) -> Tensor:
        """Of padded_rows what this rank updates, a view."""
        if not self.specs[name].sharded:
            return rows
        return rows.chunk(self.env.world_size)[self.env.rank]

    def new_state(self, name: str) -> dict[str, Tensor]:
        """What is remembered of this rank's shard, float32. mantissa_lo: see fp32_weight."""
        p = self.local_shard(name, self.padded_rows(name, self.params[name].detach()))
        zeros = partial(torch.zeros_like, dtype=torch.float32)
        if name == "bigram_embed" and self.cfg.bigram_by_row:  # see adam_rows_
            state = {"second_moment": zeros(p[:, :1]), "moves": zeros(p[:, :1])}
        elif self.is_muon(name):
            buffer = zeros(p)
            second_moment = buffer.mean(dim=averaged_dim(p), keepdim=True)
            state = {"momentum_buffer": buffer, "second_moment": second_moment}
        else:
            state = {"momentum_buffer": zeros(p), "second_moment": zeros(p)}
        if p.dtype == torch.bfloat16:
            state["mantissa_lo"] = self.kernels.new_mantissa(p)
        if self.cfg.ema_rate:
            state["mean"] = p.float().clone()
        return state

    def forget(self, name: str) -> None:
        """A parameter has new values: its state is as at the start, in the same memory; steps count on."""
        for key, value in self.new_state(name).items():
            self.state[name][key].copy_(value)

    def new_matrix_lrs(self, name: str) -> Tensor:
        """(matrices, 1, 1): what multiplies the learning rate of each matrix in this rank's shard."""
        p, spec = self.params[name], self.specs[name]
        tall = max(1, p.size(-2) / p.size(-1)) ** 0.5  # Muon's: an update of a tall matrix is larger
        lrs = torch.full((*p.shape[:2], 1, 1), tall, device=p.device)
        for k, factor in enumerate(spec.matrix_lrs):
            lrs[:, k] *= factor
        return self.local_shard(name, self.padded_rows(name, lrs))

    def new_by_heads(self, name: str) -> "ByHeads | None":
        """Which matrices of this rank's shard are q's and k's, if those are split by groups of heads."""
        cfg = self.cfg
        if name != "qkvo" or cfg.muon_heads in (0, cfg.num_heads):
            return None
        is_split = torch.zeros(*self.params[name].shape[:2], 1, 1, device="cpu")
        is_split[:, :2] = 1
        is_split = self.local_shard(name, self.padded_rows(name, is_split)).flatten() > 0
        places = (kind.nonzero()[:, 0].to(self.env.device) for kind in (is_split, ~is_split))
        return ByHeads(*places, rows=cfg.muon_heads * cfg.head_dim)

    def adam_turn(self, step: int) -> bool:
        """Adam moves on the last of every adam_every steps, on the gradients of them all."""
        return (step + 1) % self.cfg.adam_every == 0

    @torch.no_grad()
    def step(
        self,
        step: int,
        lr_mul: float,
        momentum: float,
        untie: bool,
        run_update: Callable[[bool], None] | None = None,
    ) -> None:
        """Muon's matrices move on every step, Adam's parameters on its turns.

        run_update: plays self.update(adam_turn) back from a CUDA graph, without exchanges of uneven size.
        """
        adam_turn = self.adam_turn(step)
        adam_steps = (step + 1) // self.cfg.adam_every
        copy_to_device(torch.tensor([lr_mul, momentum, adam_steps]), self.step_scalars)
        wait_for_bigrams = None
        if self.sparse_grad is not None and adam_turn:
            grad = self.padded_rows("bigram_embed", self.params["bigram_embed"].grad)
            wait_for_bigrams = self.sparse_grad.reduce_scatter(grad)
        (run_update or self.update)(adam_turn)
        if wait_for_bigrams is not None:
            wait_for_gather = self.update_param("bigram_embed", wait_for_bigrams())
            wait_for_gather()
            self.clear_grad("bigram_embed")
        if untie and self.tied:
            assert adam_turn, f"untied on step {step}, on which Adam does not move"
            self.untie()

    def untie(self) -> None:
        """The embedding goes its own way, with a copy of the head's memory."""
        self.tied = False
        for key in self.state["lm_head"]:
            self.load_state("embed", key, self.whole_state("lm_head", key).T)

    @torch.no_grad()
    def update(self, adam_turn: bool) -> None:
        """All that is the same on every step of a kind: reductions, updates, gathers."""
        names = [name for name in self.params if self.is_muon(name) or adam_turn]
        if self.sparse_grad is not None and adam_turn:
            names.remove("bigram_embed")
        missing = [name for name in names if self.params[name].grad is None]
        assert not missing, f"no gradient: {missing}"
        if adam_turn and self.tied:  # one Adam step on the head, for both
            names.remove("embed")
            self.kernels.transpose_(self.params["lm_head"].grad, self.params["embed"].grad, add=True)
            self.clear_grad("embed")
        reductions = {}
        for name in names:  # every rank in the same order, all at once
            reduce = self.env.reduce_scatter if self.specs[name].sharded else self.env.all_reduce
            reductions[name] = reduce(self.padded_rows(name, self.params[name].grad))
        gathers = []
        for name in sorted(names, key=self.update_order):
            wait_for_grad = reductions[name]
            gathers.append(self.update_param(name, wait_for_grad()))
            self.clear_grad(name)
        for wait_for_gather in gathers:
            wait_for_gather()
        if adam_turn and self.tied:
            self.kernels.transpose_(self.params["embed"].detach(), self.params["lm_head"].detach(), add=False)

    def update_order(self, name: str) -> tuple[bool, int]:
        """Small ones first and matrices last, so that communication hides behind work."""
        return self.is_muon(name), self.params[name].numel()

    def clear_grad(self, name: str) -> None:
        """The gradient is used up. Where graphs write it, its memory stays."""
        if self.kernels.static_grads:
            self.params[name].grad.zero_()
        else:
            self.params[name].grad = None

    def update_param(self, name: str, grad: Tensor) -> Callable[[], None]:
        """Moves this rank's shard by its gradient, starts the gathering -> a function that waits for it."""
        cfg, spec, state = self.cfg, self.specs[name], self.state[name]
        rows = self.padded_rows(name, self.params[name])
        p, mantissa_lo = self.local_shard(name, rows), state.get("mantissa_lo")
        if spec.optimizer == "muon":
            self.kernels.normuon_(
                p,
                mantissa_lo,
                grad,
                state["momentum_buffer"],
                state["second_moment"],
                lr=cfg.muon_lr * self.lr_mul,
                wd=cfg.muon_wd * spec.wd,
                momentum=self.momentum,
                beta2=cfg.muon_beta2,
                matrix_lrs=self.matrix_lrs[name],
                by_heads=self.by_heads[name],
                symmetric_product=self.kernels.symmetric_product,
                dtype=self.kernels.muon_dtype,
            )
        else:
            rates = dict(lr=cfg.adam_lr * spec.lr * self.lr_mul, wd=cfg.adam_wd * spec.wd)
            rates |= dict(betas=spec.betas, eps=cfg.adam_eps)
            if "moves" in state:
                memory = state["second_moment"], state["moves"]
                self.kernels.adam_rows_(p, mantissa_lo, grad, *memory, **rates)
            else:
                memory = state["momentum_buffer"], state["second_moment"]
                self.kernels.adam_(p, mantissa_lo, grad, *memory, steps=self.adam_steps, **rates)
        if cfg.ema_rate:  # of all steps: what moves on every other one counts twice
            rate = cfg.ema_rate * (1 if spec.optimizer == "muon" else cfg.adam_every)
            state["mean"].lerp_(fp32_weight(p, mantissa_lo), rate)
        return self.all_gather_async(name, rows) if spec.sharded else lambda: None

    @contextlib.contextmanager
    def averaged(self) -> Iterator[dict[str, Tensor]]:
        """Within it the parameters are their moving averages, if there are any. All ranks must enter it.

        -> the weights that wait meanwhile, by name; none where there are no averages.
        """
        names = self.params if self.cfg.ema_rate else ()
        live = {name: self.params[name].detach().clone() for name in names}
        for name in names:
            if self.tied and name == "embed":
                mean = self.whole_state("lm_head", "mean").T
            else:
                mean = self.whole_state(name, "mean")
            self.params[name].data.copy_(mean.reshape(self.params[name].shape))
        try:
            yield live
        finally:
            for name, value in live.items():
                self.params[name].data.copy_(value)

    def all_gather_async(self, name: str, rows: Tensor) -> Callable[[], None]:
        """Every rank's shard into rows, and rows into the parameter, once the function has been called."""
        gather = self.env.all_gather(rows, self.local_shard(name, rows))
        param = self.params[name].flatten(0, -rows.dim())

        def wait() -> None:
            gather()
            if rows.data_ptr() != param.data_ptr():  # padded: a copy
                param.copy_(rows[: len(param)])

        return wait

    def whole_shape(self, name: str, key: str) -> torch.Size:
        """(rows or matrices, ...) of all ranks, without padding: the same for every number of ranks."""
        p = self.params[name]
        rows = math.prod(p.shape[:-2]) if self.is_muon(name) else len(p)
        return torch.Size((rows, *self.state[name][key].shape[1:]))

    def whole_state(self, name: str, key: str) -> Tensor:
        """The state of all ranks, of whole_shape. All must call it."""
        shard = self.state[name][key]
        if not self.specs[name].sharded or self.env.world_size == 1:
            return shard
        whole = shard.new_empty(len(shard) * self.env.world_size, *shard.shape[1:])
        wait = self.env.all_gather(whole.view(torch.uint8), shard.view(torch.uint8))  # gloo gathers no int16
        wait()
        return whole[: self.whole_shape(name, key)[0]]

    def load_state(self, name: str, key: str, whole: Tensor) -> None:
        """The reverse: this rank keeps its shard of what whole_state gave."""
        self.state[name][key].copy_(self.local_shard(name, self.padded_rows(name, whole)))


def averaged_dim(matrix: Tensor) -> int:
    """What to average over, to keep one value for each index of the longer side; of a square, each row."""
    return -1 if matrix.size(-2) >= matrix.size(-1) else -2


def symmetric_product(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha x x^T + beta x, x (n, rows, columns); beta needs x symmetric."""
    if beta == 0.0:
        return alpha * (x @ x.mT)
    return torch.baddbmm(x, x, x.mT, alpha=alpha, beta=beta)


POLAR_EXPRESS = (  # 2505.16932, its coefficients for five steps, safety 2e-2, cushion 2
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(
    grad: Tensor, symmetric_product: Callable = symmetric_product, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """grad (n, rows, columns) -> about U V^T of its singular value decomposition, in dtype."""
    x = grad.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # the Gram matrix on the shorter side
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = symmetric_product(x)
        polynomial = symmetric_product(gram, alpha=c, beta=b)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # rounds once
    return x.mT.contiguous() if tall else x


def normuon_(
    p: Tensor,
    mantissa_lo: Tensor | None,
    grad: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    lr: Tensor | float,
    wd: float,
    momentum: Tensor | float,
    beta2: float,
    matrix_lrs: Tensor,
    by_heads: "ByHeads | None" = None,
    symmetric_product: Callable = symmetric_product,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One NorMuon step (2510.05491) on matrices (n, rows, columns), in place; matrix_lrs (n, 1, 1)."""
    grad = grad.float()
    orthogonalise = partial(polar_express, symmetric_product=symmetric_product, dtype=dtype)
    if by_heads is not None:
        orthogonalise = partial(by_heads.orthogonalise, orthogonalise)
    update = normuon_direction(grad, momentum_buffer, second_moment, momentum, beta2, orthogonalise)
    weight = fp32_weight(p, mantissa_lo)
    agree = update * weight >= 0  # cautious weight decay, 2411.16085, as in the record: Adam's has > 0
    kept = 1 - wd * lr**2 * matrix_lrs * agree
    store_fp32_weight_(p, mantissa_lo, kept.mul_(weight).sub_(update.mul_(lr * matrix_lrs)))


@dataclass(frozen=True)
class ByHeads:
    """Of a bank of matrices those that are orthogonalised by groups of heads, q's and k's, and the others.

    As in public records after February 2026: what one head has to learn does not shrink another's update.
    """

    split: Tensor  # places in the bank
    whole: Tensor
    rows: int  # of a group of heads

    def orthogonalise(self, orthogonalise: Callable, x: Tensor) -> Tensor:
        """x (n, rows, columns)."""
        parts = []
        if len(self.split):
            groups = orthogonalise(x[self.split].unflatten(1, (-1, self.rows)).flatten(0, 1))
            parts.append((self.split, groups.unflatten(0, (len(self.split), -1)).flatten(1, 2)))
        if len(self.whole):
            parts.append((self.whole, orthogonalise(x[self.whole])))
        result = torch.empty_like(x, dtype=parts[0][1].dtype)
        for places, part in parts:
            result = result.index_copy(0, places, part)
        return result


def normuon_direction(
    grad: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    momentum: Tensor | float,
    beta2: float,
    orthogonalise: Callable = polar_express,
) -> Tensor:
    """Nesterov momentum, orthogonalised, rows (or columns) of equal size on average; the whole norm stays."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = orthogonalise(grad.lerp(momentum_buffer, momentum))
    dim = averaged_dim(update)
    squares = update.norm(dim=dim, keepdim=True, dtype=torch.float32).square()  # of each row (or column)
    second_moment.lerp_(squares / update.size(dim), 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    size = squares.sum(dim=(-2, -1), keepdim=True)
    scaled_size = (squares * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return update * (scale * (size / scaled_size.clamp_min(1e-20)).sqrt())


def adam_(
    p: Tensor,
    mantissa_lo: Tensor | None,
    grad: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    lr: Tensor | float,
    wd: float,
    betas: tuple[float, float],
    eps: float,
    steps: Tensor | int,
) -> None:
    """Adam's step number `steps` (from 1) with cautious weight decay, in place."""
    grad = grad.float()
    momentum_buffer.lerp_(grad, 1 - betas[0])
    second_moment.lerp_(grad.square(), 1 - betas[1])
    update = momentum_buffer / (second_moment / (1 - betas[1] ** steps)).sqrt_().add_(eps)
    decay_and_move_(p, mantissa_lo, update, lr, wd, step_size=lr / (1 - betas[0] ** steps))


def adam_rows_(
    p: Tensor,
    mantissa_lo: Tensor | None,
    grad: Tensor,
    second_moment: Tensor,
    moves: Tensor,
    *,
    lr: Tensor | float,
    wd: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam without momentum for a table of which a step touches few rows, in place.

    p, grad (rows, D); second_moment, moves (rows, 1): each row has one second moment, the mean over its
    values, and counts its own steps, those on which it has a gradient. By the count of all steps a row's
    first gradient would weigh 1 / sqrt(1 - beta2) times as much, and of its values the signs alone.
    """
    grad, beta2 = grad.float(), betas[1]
    square = grad.square().mean(dim=1, keepdim=True)
    moves.add_(square > 0)
    second_moment.lerp_(square, (1 - beta2) * (square > 0))
    update = grad / (second_moment / (1 - beta2 ** moves.clamp_min(1))).sqrt_().add_(eps)
    decay_and_move_(p, mantissa_lo, update, lr, wd, step_size=lr)


def decay_and_move_(
    p: Tensor,
    mantissa_lo: Tensor | None,
    update: Tensor,
    lr: Tensor | float,
    wd: float,
    step_size: Tensor | float,
) -> None:
    """p less step_size times the update, which is used up, after cautious weight decay."""
    weight = fp32_weight(p, mantissa_lo)
    # The decay follows the square of the rate, as in the record.
    kept = 1 - wd * lr**2 * (update * weight > 0)
    store_fp32_weight_(p, mantissa_lo, kept.mul_(weight).sub_(update.mul_(step_size)))


def fp32_weight(p: Tensor, mantissa_lo: Tensor | None) -> Tensor:
    """The float32 value of a parameter.

    A bfloat16 one keeps the 16 bits that it lacks in mantissa_lo, int16; what a CPU keeps in their place is
    the whole value, float32 (new_float32_copy).
    """
    if mantissa_lo is None:
        return p.float()
    if mantissa_lo.dtype == torch.float32:
        return mantissa_lo
    high = p.view(torch.int16).to(torch.int32) << 16
    return high.add_(mantissa_lo).view(torch.float32)


def store_fp32_weight_(p: Tensor, mantissa_lo: Tensor | None, value: Tensor) -> None:
    """The reverse. p is value rounded (cut, it would pull weights towards 0), mantissa_lo the signed rest."""
    if mantissa_lo is None or mantissa_lo.dtype == torch.float32:
        p.copy_(value)
        if mantissa_lo is not None:
            mantissa_lo.copy_(value)
        return
    bits = value.view(torch.int32)
    p.view(torch.int16).copy_((bits + 0x8000).bitwise_right_shift_(16))
    mantissa_lo.copy_(bits)  # its low half


# ===== 4. Data: .bin shards of uint16 tokens behind a 256-int32 header. Nothing is reordered or padded. =====

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 1024
FIRST_DOCUMENTS = 2**20  # a shard's first so many tokens hold a BOS


def read_shard(path: Path, vocab_size: int, bos_id: int) -> np.ndarray:
    """The tokens of a shard (n,), uint16, memory-mapped. UserError names the file and what is wrong in it."""
    again = "fetch or make it again"
    try:
        need(path.is_file(), f"{path}: not a file that can be read; {again}")
        size = path.stat().st_size
        need(size >= HEADER_BYTES, f"{path}: {size} bytes are less than a shard's header; {again}")
        header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
        need(header[0] == SHARD_MAGIC, f"{path}: not a token shard (magic {header[0]}, not {SHARD_MAGIC})")
        readable = f"this program reads version {SHARD_VERSION}"
        need(header[1] == SHARD_VERSION, f"{path}: shard version {header[1]}, {readable}")
        expected = HEADER_BYTES + 2 * int(header[2])
        need(size == expected, f"{path}: {size} bytes, but its header promises {expected}; {again}")
        need(header[2] > 0, f"{path}: holds no tokens; {again}")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {again}") from None
    highest, vocabulary = tokens.max(), f"the vocabulary, --vocab_size {vocab_size}"
    need(highest < vocab_size, f"{path}: token id {highest} is outside {vocabulary}")
    begins = (tokens[:FIRST_DOCUMENTS] == bos_id).any()
    need(begins, f"{path}: no document begins (--bos_id {bos_id}) in its first tokens")
    return tokens


def find_data(cfg: Config) -> Path:
    """--data_dir as given, or, where that is not there, beside this file (the presets' own folders)."""
    given = Path(cfg.data_dir)
    return given if os.path.isdir(given) else Path(__file__).resolve().parent / given


def find_shards(cfg: Config, split: str) -> list[Path]:
    """The files of a split, "train" or "val", in the order of their names."""
    try:
        files = sorted(find_data(cfg).glob(f"*_{split}_*.bin"))
    except OSError as error:
        raise UserError(f"--data_dir {cfg.data_dir}: cannot be read ({error.strerror})") from None
    advice = "./run.sh fetches or makes a preset's data"
    need(files, f"--data_dir {cfg.data_dir}: no *_{split}_*.bin there; {advice}")
    return files


class Loader:
    """Training sequences in a fixed order: micro-batch n of a step is the same for every number of ranks.

    A sequence starts at a BOS and is filled with whole documents, each cut at the stage's limit, the last one
    where the sequence is full; the next starts with the next document. The position is (file, document).
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.files = find_shards(cfg, "train") * cfg.epochs
        self.open(0)

    def open(self, file: int, document: int = 0) -> None:
        """Goes to a document of a file."""
        cfg = self.cfg
        shards = f"the {len(self.files)} training shards of --data_dir {cfg.data_dir}"
        advice = "get more, train less, or raise --epochs"
        need(file < len(self.files), f"--num_steps {cfg.num_steps}: too few tokens in {shards}; {advice}")
        self.tokens = read_shard(self.files[file], cfg.vocab_size, cfg.bos_id)
        self.starts = np.flatnonzero(self.tokens == cfg.bos_id)
        self.sizes = np.diff(self.starts, append=len(self.tokens))
        last, place = len(self.starts), f"document {document}, where a checkpoint stands"
        need(
            document <= last, f"{self.files[file]}: has {last} documents, not {place}; are these its shards?"
        )
        self.file, self.document = file, document
        self.max_doc_len, self.ends = 0, self.starts  # where documents end that are cut at max_doc_len

    def next_sequence(self, count: int, max_doc_len: int) -> list[np.ndarray]:
        """The next sequence of count tokens, as views of the shards."""
        pieces = []
        while count > 0:
            if self.document == len(self.starts):
                self.open(self.file + 1)
            if self.max_doc_len != max_doc_len:
                self.max_doc_len, self.ends = max_doc_len, np.minimum(self.sizes, max_doc_len).cumsum()
            done = self.ends[self.document - 1] if self.document else 0
            last = int(np.searchsorted(self.ends, done + count))
            stop = min(last + 1, len(self.starts))
            for document in range(self.document, stop):
                start, size = self.starts[document], min(self.sizes[document], max_doc_len, count)
                pieces.append(self.tokens[start : start + size])
                count -= size
            self.document = stop
        return pieces

    def load_batches(
        self, stage: Stage, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of one step: (tokens, targets), each (T,) int64."""
        size = stage.batch_tokens // self.cfg.micro_batches
        for n in range(self.cfg.micro_batches):
            pieces = self.next_sequence(size + 1, stage.max_doc_len)
            if n % world_size == rank:
                yield split_targets(np.concatenate(pieces))

    def check_enough(self, schedule: "Schedule") -> None:
        """UserError now, not hours later, if the run would outlast the data. Reads where documents begin."""
        walker = Loader(self.cfg)
        for step in range(self.cfg.num_steps):
            stage = schedule.stage(step)
            for _ in range(self.cfg.micro_batches):
                walker.next_sequence(stage.batch_tokens // self.cfg.micro_batches + 1, stage.max_doc_len)


def most_tokens(cfg: Config) -> int:
    """Of a micro-batch, in any stage."""
    return max(stage.batch_tokens for stage in cfg.stages) // cfg.micro_batches


def join_sequences(sequences: list[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, targets) of `count` after each other as one. Each begins with a BOS, so none sees another."""
    joined = []
    for first in range(0, len(sequences), count):
        tokens, targets = zip(*sequences[first : first + count], strict=True)
        joined.append((torch.cat(tokens), torch.cat(targets)))
    return joined


def split_targets(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """tokens (T + 1,) -> tokens (T,), and the token after each (T,)."""
    both = torch.from_numpy(tokens.astype(np.int64))
    return both[:-1], both[1:]


class Validation:
    """The first val_tokens targets of the validation stream as it is, in sequences of val_seq_len."""

    def __init__(self, cfg: Config):
        shards = [read_shard(path, cfg.vocab_size, cfg.bos_id) for path in find_shards(cfg, "val")]
        total = sum(map(len, shards))
        enough = total > cfg.val_tokens
        need(enough, f"--val_tokens {cfg.val_tokens}: --data_dir {cfg.data_dir} has {total}, needs one more")
        self.tokens = np.concatenate(shards)[: cfg.val_tokens + 1]
        self.seq_len, self.count = cfg.val_seq_len, cfg.val_tokens // cfg.val_seq_len
        bytes_of_token = read_token_bytes(find_data(cfg), cfg)
        self.bytes = None if bytes_of_token is None else int(bytes_of_token[self.tokens[1:]].sum())

    def sequence(self, n: int) -> tuple[Tensor, Tensor]:
        return split_targets(self.tokens[n * self.seq_len : (n + 1) * self.seq_len + 1])

    def bits_per_byte(self, loss: float) -> float | None:
        """loss in nats a token, the BOS targets included, over the bytes of the text (a BOS has none)."""
        return loss * (len(self.tokens) - 1) / (math.log(2) * self.bytes) if self.bytes else None


def read_token_bytes(folder: Path, cfg: Config) -> np.ndarray | None:
    """Bytes of text that each token stands for (vocab_size,), as data/ writes it beside shards, or None."""
    path, again = folder / "token_bytes.npy", "make the data again"
    if not path.exists():
        return None
    need(path.is_file(), f"{path}: not a file that can be read; {again}")
    try:
        counts = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # noqa: BLE001, a damaged header can fail in many ways
        raise UserError(f"{path}: not an array of NumPy ({type(error).__name__}); {again}") from None
    fits = counts.shape == (cfg.vocab_size,) and counts.dtype == np.uint16
    need(fits, f"{path}: {counts.dtype} {counts.shape}, not uint16 ({cfg.vocab_size},); {again}")
    return counts.astype(np.int64)


# ===== 5. Schedule: pure functions of the step, so that they can be printed and tested. =====


class Schedule:
    """What changes over the run, by step, from 0."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.ends = [round(stage.until * cfg.scheduled_steps) for stage in cfg.stages[:-1]]
        self.ends.append(cfg.num_steps)  # the first step after each stage

    @property
    def tokens(self) -> int:
        """That the run trains on."""
        total = begin = 0
        for stage, end in zip(self.cfg.stages, self.ends, strict=True):
            end = min(end, self.cfg.num_steps)
            total += max(end - begin, 0) * stage.batch_tokens
            begin = max(begin, end)
        return total

    def stage_index(self, step: int) -> int:
        for i, end in enumerate(self.ends):
            if step < end:
                return i
        return len(self.ends) - 1

    def stage(self, step: int) -> Stage:
        return self.cfg.stages[self.stage_index(step)]

    def windows(self, step: int) -> tuple[int, int]:
        """(short, long) that a step trains with, tokens."""
        return self.stage(step).windows

    def val_windows(self, step: int) -> tuple[int, int]:
        """(short, long) of a validation before a step; the last one, after all steps, looks further."""
        short, long = self.windows(step)
        return (short, self.cfg.final_long_window) if step >= self.cfg.num_steps else (short, long)

    def lr_mul(self, step: int) -> float:
        """The stage's multiplier; in the cooldown a line from it to final_lr. No cooldown_share: no line.

        A stage that begins in the cooldown has a line of its own, so the rate may rise: in `short` from 0.96
        to 1.09 at step 1005, as in the record. Weight decay goes with the square of this.
        """
        cfg, lr_mul = self.cfg, self.stage(step).lr_mul
        flat_steps = int(cfg.scheduled_steps * (1 - cfg.cooldown_share))
        if step < flat_steps or cfg.cooldown_share == 0:
            return lr_mul
        done = min(1.0, (step - flat_steps) / max(1, cfg.scheduled_steps - flat_steps))
        return (1 - done) * lr_mul + done * cfg.final_lr

    def momentum(self, step: int) -> float:
        """Muon's: up over the first steps, down over the last."""
        cfg = self.cfg
        rising = step / cfg.momentum_warmup if cfg.momentum_warmup else 1.0
        falling = (cfg.num_steps - step) / max(cfg.momentum_cooldown, 1)
        return cfg.momentum_min + (cfg.momentum_max - cfg.momentum_min) * min(1.0, rising, falling)

    def predict(self, step: int) -> tuple[float, ...]:
        """Weights of the losses on the next tokens, each on a line through its stage.

        With a prefix_weight that of the loss on the next token's prefix comes last.
        """
        cfg, i = self.cfg, self.stage_index(step)
        begin = self.ends[i - 1] if i else 0
        done = (step - begin) / max(self.ends[i] - begin, 1)
        weights = [start + done * (end - start) for start, end in cfg.stages[i].predict[: cfg.max_predict]]
        most = min(cfg.max_predict, max(len(stage.predict) for stage in cfg.stages))
        prefix = [cfg.prefix_weight * (1 - step / cfg.num_steps)] if cfg.prefix_weight else []
        # Always as many: one compiled graph for all stages.
        return (*weights, *[0.0] * (most - len(weights)), *prefix)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(begin, end) of each span of steps that are of a kind."""
        return list(pairwise(sorted({0, *self.ends, self.full_softmax_step})))

    @property
    def full_softmax_step(self) -> int:
        """The first step whose softmax is over the whole vocabulary."""
        cfg = self.cfg
        samples = 0 < cfg.sampled_vocab < cfg.vocab_rows
        return round(cfg.sampled_share * cfg.scheduled_steps) if samples else 0

    def candidates(self, step: int) -> int:
        """Tokens that a step's softmax is over; 0: all."""
        return self.cfg.sampled_vocab if step < self.full_softmax_step else 0

    @property
    def untie_step(self) -> int:
        """The step of Adam's after whose update embedding and head part; num_steps or more: never."""
        cfg = self.cfg
        if cfg.untie_share >= 1:
            return cfg.num_steps  # never
        step = math.ceil(cfg.untie_share * cfg.scheduled_steps)
        pending = (step + 1) % cfg.adam_every  # gradients that wait for Adam's next step
        return step if pending == 0 else step + cfg.adam_every - pending


# ===== 6. Trainer: the loop. What it calls, and what keeps it safe, is in the appendices. =====

# Gradients are of the loss summed over an eighth of a step's tokens, whatever its micro-batches: the record
# averages eight such sums, and its Adam's eps is ours.
LOSS_SHARES = 8


class Trainer:
    """One run, from its configuration to its last validation.

    What a user can get wrong is found before the log exists.
    """

    def __init__(self, cfg: Config, overrides: dict):
        self.cfg, self.schedule = cfg, Schedule(cfg)
        self.machine = Gpu(cfg) if cfg.device == "cuda" else Cpu(cfg)
        self.env = DistEnv.join(cfg, self.machine.device)
        check_memory(cfg, self.machine, self.env)
        self.loader, self.validation = Loader(cfg), Validation(cfg)
        if self.env.rank == 0:
            self.loader.check_enough(self.schedule)
        saved = find_checkpoint(cfg, self.env) if cfg.resume else None
        self.log = Log(cfg, self.env, saved)
        self.clock = Clock(self.machine)
        ceiling = self.machine.matrix_ceiling() * self.env.world_size  # measured before compilers start
        most = cfg.join or joined_by_memory(cfg, self.machine, self.env.world_size)
        kernels = self.machine.choose_kernels(replace(cfg, join=most), self.env, operators_of(saved))
        if kernels.attention is not triton_attention:  # plain: too much memory, as joined_by_memory says
            most = cfg.join or 1
        self.joined = most
        self.model = GPT(replace(cfg, join=self.joined), self.machine.dtype, kernels).to(self.env.device)
        if cfg.prefix_weight:
            self.model.prefixes = read_prefixes(cfg).to(self.env.device)
        self.counts = Counts(cfg, self.schedule, self.loader.tokens, self.env, self.machine.dtype)
        if saved:  # what counting took before is on the clock already
            self.counts.prepare(since=saved["step"])
        elif cfg.spectral:  # training time
            self.clock.start()
            self.counts.start_model(self.model)
            self.clock.stop()
        self.optimizer = Optimizer(cfg, self.model, self.env)
        facts = run_facts(self.machine, self.env, self.model, ceiling)
        self.log.header(cfg, overrides, facts)
        self.progress = Progress(cfg, self.log, self.clock, self.model, ceiling, self.machine.step_lag)
        self.checkpoints = Checkpoints(replace(cfg, operators=kernels.versions), self.log, facts)
        self.signals = StopSignals(cfg)
        self.graphs = self.machine.new_graphs(self.log)
        # What every step of a kind reads and writes in the same memory, so that a graph can be captured.
        num_weights = len(self.schedule.predict(0))
        # Loss weights, whether to stop.
        self.step_scalars = torch.zeros(num_weights + 1, device=self.env.device)
        self.result = torch.zeros(2, device=self.env.device)  # the step's loss; how many ranks want to stop
        self.steps_done = self.tokens_seen = self.flops = 0
        self.position = (0, 0)  # of the loader, after the last step
        if saved:
            self.restore(saved)
        elif cfg.resume:
            self.log.write(f"resume: no checkpoint in {cfg.log_dir}, starting at step 0")
        self.saved_step = self.steps_done if saved else None
        self.began_at = self.steps_done
        self.batches = Prefetcher(self.loader, self.schedule, self.env, self.optimizer.sparse_grad)

    def fit(self) -> float:
        """Trains and validates -> the last validation loss, nats a token."""
        cfg = self.cfg
        self.log.begin()
        long_window = int(self.model.long_window)
        self.clock.start()
        for step in range(self.steps_done, cfg.num_steps):
            window = self.schedule.windows(step)[1]
            if window != long_window:
                self.model.set_long_window(window)
                long_window = window
            if cfg.val_every and step % cfg.val_every == 0:
                self.validate(step)
            if step in self.counts.restarts:
                self.restart_table(step)
            result = self.train_step(step)  # moves the counters that are read below
            on_host = self.machine.copy_to_host(result)
            self.progress.add(self.steps_done, on_host, self.tokens_seen, self.flops)
            self.progress.report(self.machine.step_lag)
            if self.optimizer.adam_turn(step):  # no gradient waits for its other parts
                self.save_or_stop()
        if cfg.save_every and self.saved_step != cfg.num_steps:
            self.save()
        return self.validate(cfg.num_steps)

    def restart_table(self, step: int) -> None:
        """A part of the run begins whose text the bigram table may know; see Counts. Training time."""
        counted = self.counts.start_table(self.model, step)
        self.optimizer.forget("bigram_embed")
        self.log.write(f"bigram table: starts again at step {step}, from counts of {counted} tokens")

    def train_step(self, step: int) -> Tensor:
        """One step, always the preset's number of micro-batches over all ranks.

        -> (2,): its loss, multi-token terms included, and how many ranks were asked to stop: all must agree.
        """
        batch, sparse_grad = self.batches.get(step), self.optimizer.sparse_grad
        if sparse_grad is not None:
            sparse_grad.exchange_indices(batch.bigram_rows, last=self.optimizer.adam_turn(step))
        asked_to_stop = float(self.signals.name is not None)
        copy_to_device(torch.tensor([*self.schedule.predict(step), asked_to_stop]), self.step_scalars)
        joined = join_sequences(batch.sequences, self.joined)
        sequences, kind = self.machine.copy_batches(joined), self.step_kind(step)
        self.graphs.run(kind, lambda: self.accumulate_gradients(sequences, *kind[1:]))
        self.optimizer.step(
            step,
            self.schedule.lr_mul(step),
            self.schedule.momentum(step),
            untie=step == self.schedule.untie_step,
            run_update=self.run_update,
        )
        self.position = batch.position
        self.steps_done = step + 1
        self.tokens_seen += self.schedule.stage(step).batch_tokens
        self.flops += batch.flops * self.env.world_size
        wait = self.env.all_reduce(self.result.clone())
        return wait()

    def step_kind(self, step: int) -> "StepKind":
        """Steps of a kind are the same work, on other tokens."""
        length = self.joined * self.schedule.stage(step).batch_tokens // self.cfg.micro_batches
        return length, self.schedule.windows(step), self.schedule.candidates(step)

    def accumulate_gradients(
        self, sequences: list[tuple[Tensor, Tensor]], windows: tuple[int, int], candidates: int = 0
    ) -> None:
        """Forward and backward of these micro-batches: gradients add up, the loss goes to self.result."""
        loss_weights = self.step_scalars[:-1]
        self.result.copy_(F.pad(self.step_scalars[-1:], (1, 0)))
        for tokens, targets in sequences:
            loss = self.model(
                tokens, targets, loss_weights, windows, joined=self.joined, candidates=candidates
            )
            summed = len(tokens) / LOSS_SHARES * loss
            summed.backward()
            self.result[0] += loss.detach() * (self.joined / self.cfg.micro_batches)

    def run_update(self, adam_turn: bool) -> None:
        self.graphs.run((adam_turn, self.optimizer.tied), lambda: self.optimizer.update(adam_turn))

    def validate(self, step: int) -> float:
        """Plain cross-entropy, nats a token, over the whole validation stream; the clock stands still."""
        last = step == self.cfg.num_steps
        self.progress.report(lag=0)
        self.clock.stop()
        windows = self.schedule.val_windows(step)
        total = torch.zeros((), dtype=torch.float64, device=self.env.device)
        with self.optimizer.averaged():
            for n in range(self.env.rank, self.validation.count, self.env.world_size):
                total += self.evaluate(*self.validation.sequence(n), windows)
        wait = self.env.all_reduce(total)
        loss = self.progress.require_finite(float(wait()) / self.validation.count, "validation", step)
        self.progress.remember_norms()
        if last:
            self.progress.write_summary(self.tokens_seen, self.flops, self.machine.peak_memory())
        bits = self.validation.bits_per_byte(loss)
        bits_per_byte = f" val_bpb:{bits:.4f}" if bits is not None else ""
        self.progress.write_event(step, f"val_loss:{loss:.4f} ", f"{bits_per_byte} tokens:{self.tokens_seen}")
        if not last:
            self.clock.start()
        return loss

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor, windows: tuple[int, int]) -> Tensor:
        """One sequence's loss."""
        device = self.env.device
        plain_loss = torch.ones(1, device=device)
        with validating(self.machine):
            return self.model(tokens.to(device), targets.to(device), plain_loss, windows, learn=False)

    def save_or_stop(self) -> None:
        """After a step of Adam's: a checkpoint when one is due, the end when somebody asked for it."""
        cfg, stop = self.cfg, self.progress.stop_requested
        due = cfg.save_every and self.steps_done % cfg.save_every < cfg.adam_every
        if stop or due:
            self.save()
        if stop:
            raise Stopped(self.signals.name or "a signal to another process")

    def save(self) -> None:
        """Everything a resumed run needs, for any number of ranks. All ranks call it; the clock stops."""
        self.progress.report(lag=0)  # first: a loss that is not finite ends the run here
        self.clock.stop()
        keep = "cpu" if self.env.rank == 0 else "meta"  # only one process keeps what they all gather
        optimizer: dict[str, dict[str, Tensor]] = {}
        for name, state in self.optimizer.state.items():
            optimizer[name] = {key: self.optimizer.whole_state(name, key).to(keep) for key in state}
        with self.optimizer.averaged() as live:  # "model" is what a validation measures, "live" what goes on
            if self.env.rank == 0:
                self.checkpoints.write(
                    step=self.steps_done,
                    model=self.model.state_dict(),
                    live=live,
                    optimizer=optimizer,
                    tied=self.optimizer.tied,
                    loader=self.position,
                    clock=self.clock.total,
                    tokens_seen=self.tokens_seen,
                    flops=self.flops,
                    average=self.progress.average,
                    rng=torch.get_rng_state(),
                )
        self.saved_step = self.steps_done
        self.clock.start()

    def restore(self, saved: dict) -> None:
        """The reverse, of what check_checkpoint let through."""
        check_tensors(saved, self.model, self.optimizer)
        check_place(saved, self.schedule, self.loader)
        self.model.load_state_dict(saved["model"] | saved.get("live", {}))
        self.model.update_rotary()
        for name, state in saved["optimizer"].items():
            for key, whole in state.items():
                self.optimizer.load_state(name, key, whole.to(self.env.device))
        self.optimizer.tied, self.clock.total = saved["tied"], saved["clock"]
        self.steps_done, self.tokens_seen, self.flops = saved["step"], saved["tokens_seen"], saved["flops"]
        self.progress.average = saved["average"]
        self.progress.remember_norms()
        self.position = saved["loader"]
        self.loader.open(*self.position)
        torch.set_rng_state(saved["rng"])
        self.log.write(f"resumed: from step {self.steps_done} with {self.env.world_size} process(es)")
        self.checkpoints.write_changes(saved)

    def leave(self, error: BaseException) -> BaseException:
        """Writes into the log why the run ends early -> what to raise."""
        self.signals.leaving = True  # from here on a signal is only noted
        if isinstance(error, RuntimeError) and self.env.world_size > 1:
            time.sleep(2)  # torchrun must see first who died, and name it
            if self.signals.name:  # it did; or all were told to stop, and others left first
                error = Stopped(self.signals.name)
            elif LOST_CONNECTION.search(str(error)):
                error = lost_connection(error)
        milliseconds = 1e3 * self.clock.seconds()
        done = f"{self.steps_done} of {self.cfg.num_steps} steps done, train_time:{milliseconds:.0f}ms"
        if isinstance(error, Stopped):
            self.log.write(f"interrupted: {done} ({error})")
            if self.steps_done == 0:
                self.log.remove()
        else:
            self.log.write(f"failed: {one_line(str(error)).strip() or type(error).__name__}", echo=False)
        return error

    def close(self, failed: bool) -> None:
        self.signals.leaving = True
        self.graphs.clear()  # NCCL's end waits for graphs that hold collectives
        self.batches.close()
        self.log.close()
        self.env.close(failed)


def train(cfg: Config, overrides: dict) -> float:
    """One whole run; returns its final validation loss."""
    try:
        trainer = Trainer(cfg, overrides)
    except RuntimeError as error:  # while processes start together
        if not (dist.is_initialized() and LOST_CONNECTION.search(str(error))):
            raise
        time.sleep(2)  # torchrun must see first who died
        raise lost_connection(error) from error
    try:
        trainer.signals.install(may_save=lambda: trainer.steps_done > trainer.began_at)
        trainer.log.begin()
        if cfg.warmup:
            warm_up(trainer)
        return trainer.fit()
    except (Stopped, Exception) as error:
        reason = trainer.leave(error)
        if reason is error:
            raise
        raise reason from error
    finally:
        trainer.close(failed=sys.exc_info()[0] is not None)


def main() -> int:
    """-> the exit code: 1 a run that failed, or a bug; 2 what a user can put right; 128 + n for signal n."""
    open_standard_streams()
    try:
        cfg, overrides = parse_config(sys.argv[1:])
        train(cfg, overrides)
    except SystemExit:  # --help
        say("")  # if nobody reads it to its end, that shows here
    except UserError as error:
        return complain(f"error: {error}", 2)
    except RunFailed as error:
        return complain(f"failed: {error}", 1)
    except torch.OutOfMemoryError as error:
        advice = "raise --micro_batches: each is a part of the same step"
        return complain(f"failed: the GPU's memory is full ({first_line(error)}); {advice}", 1)
    except KeyboardInterrupt as error:
        return 143 if str(error) == "SIGTERM" else 130
    except Exception as error:
        if is_out_of_memory(error):
            return complain(
                "failed: this machine's memory is full; train a smaller model or on less a step", 1
            )
        return complain(describe_bug(error), 1)
    return 0


# ===== A. Operators: what each one computes, in plain PyTorch, then what runs in its place. =====


@dataclass(frozen=True)
class Kernels:
    """Which version of each operator runs: chosen once, by Gpu.choose_kernels (and choose_versions) or
    Cpu.choose_kernels, for model and optimizer.
    """

    # (q, k, v, first_key, window, scale) -> (T, H, d), see banded_attention. scale is a () tensor that YaRN
    # changes in place; T reaches 2 val_seq_len, so no mask of (T, T) fits.
    attention: Callable
    prepare_qkv: Callable
    mlp: Callable
    head_chunk: Callable
    symmetric_product: Callable
    transpose_: Callable
    look_up: Callable
    normuon_: Callable
    adam_: Callable
    adam_rows_: Callable
    new_mantissa: Callable[[Tensor], Tensor]  # a bfloat16 parameter -> what is kept beside it (fp32_weight)
    reads_window: bool = True  # attention asks for its window besides first_key, and is compiled for each
    compile: Callable = lambda f: f  # wraps each piece of the model
    compile_small: bool = True  # also the pieces that are cheap; attention then is compiled inside of them
    compile_layers: Callable | None = None  # wraps all layers at once, which are one piece then
    sorted_lookups: bool = False  # look_up needs a RowOrder
    static_grads: bool = False  # gradients keep their memory, since graphs write there
    sparse_bigram_grad: bool = False  # it holds nothing but the rows that a token touched
    muon_dtype: torch.dtype = torch.bfloat16  # of polar_express's products
    versions: str = ""  # what runs, as --operators takes it
    note: str = "all plain"  # the log's line on that


def plain_kernels(**changes: Any) -> Kernels:
    """Plain PyTorch: what tests and a CPU run, and what a GPU falls back to."""
    plain = Kernels(
        attention=banded_attention,
        prepare_qkv=prepare_qkv,
        mlp=mlp,
        head_chunk=head_chunk,
        symmetric_product=symmetric_product,
        transpose_=transpose_,
        look_up=look_up,
        normuon_=normuon_,
        adam_=adam_,
        adam_rows_=adam_rows_,
        new_mantissa=lambda p: torch.zeros_like(p, dtype=torch.int16),
    )
    return replace(plain, **changes)


# ----- Attention -----


def reference_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, scale: Tensor | float) -> Tensor:
    """The definition, for tests: query i sees keys first_key[i] .. i; q, k, v (T, H, d) -> (T, H, d)."""
    key = torch.arange(len(k), device=k.device)
    visible = (key >= first_key[:, None]) & (key <= key[:, None])  # (T, T)
    scores = torch.einsum("qhd,khd->hqk", q * scale, k).float()
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v)


# BLOCK_M queries, BLOCK_N keys, warps, stages, from a compute capability on; Hopper's were the fastest of 36.
ATTENTION_FORWARD = {80: (128, 64, 8, 2), 90: (64, 64, 4, 3), 120: (128, 64, 8, 2)}
ATTENTION_DQ = {80: (64, 64, 4, 2), 90: (64, 64, 4, 2), 120: (64, 64, 4, 2)}
ATTENTION_DKV = {80: (64, 64, 8, 2), 90: (32, 64, 4, 3), 120: (64, 64, 8, 2)}


def compute_capability() -> int:
    """What kernels are compiled for, 90 on an H100; Triton's interpreter passes for one."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


def config_for_arch(table: dict[int, tuple]) -> tuple:
    return table[max(capability for capability in table if capability <= compute_capability())]


def make_descriptor(x: Tensor, *block: int) -> "TensorDescriptor | tuple":
    """x for a kernel that moves such blocks, by TMA from 90 on; outside it reads 0 and writes nothing."""
    strides = x.stride()[:-1]
    aligned = all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in strides)
    if x.stride(-1) != 1 or x.data_ptr() % 16 or not aligned:
        x = x.contiguous()
    if compute_capability() >= 90:
        return TensorDescriptor.from_tensor(x, list(block))
    return x, tuple(x.shape), x.stride()


LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))  # exp(x) = exp2(x log2(e))


@triton.jit
def as_descriptor(x, BLOCK: tl.constexpr):
    """What make_descriptor gave, to load from and store to; below 90 it compiles to plain pointers."""
    return x if isinstance(x, tl.tensor_descriptor) else tl.make_tensor_descriptor(x[0], x[1], x[2], BLOCK)


@triton.jit
def attention_forward_kernel(
    q, k, v, o, lse, first_key, scale, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr
):
    """Queries of one head over the key blocks that they see; softmax in base 2, rescaled as m_i grows."""
    start_m = tl.program_id(0) * BLOCK_M
    h = tl.program_id(1)
    q = as_descriptor(q, [BLOCK_M, D])
    o = as_descriptor(o, [BLOCK_M, D])
    k = as_descriptor(k, [BLOCK_N, D])
    v = as_descriptor(v, [BLOCK_N, D])
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    end = tl.minimum(start_m + BLOCK_M, T)
    row_first = tl.load(first_key + offs_m, mask=offs_m < T, other=T)[:, None]
    first = tl.load(first_key + start_m)
    last = tl.load(first_key + end - 1)
    qk_scale = tl.load(scale) * LOG2_E
    q_block = q.load([start_m, h * D])
    m_i = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row may see no key of a block
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start_n in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
        qk = tl.dot(q_block, k.load([start_n, h * D]).T)
        if (start_n < last) | (start_n + BLOCK_N > start_m + 1):  # the interval cuts this block
            key = start_n + offs_n
            qk = tl.where((key >= row_first) & (key <= offs_m[:, None]), qk, float("-inf"))
        m_ij = tl.maximum(m_i, tl.max(qk, 1) * qk_scale)
        p = tl.math.exp2(qk * qk_scale - m_ij[:, None])
        alpha = tl.math.exp2(m_i - m_ij)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_ij
        acc = tl.dot(p.to(q_block.dtype), v.load([start_n, h * D]), acc * alpha[:, None])
    o.store([start_m, h * D], (acc / l_i[:, None]).to(o.dtype))
    tl.store(lse + h * T + offs_m, m_i + tl.math.log2(l_i), mask=offs_m < T)


@triton.jit
def attention_dq_kernel(
    q,
    k,
    v,
    o,
    do,
    dq,
    lse,
    delta,
    first_key,
    scale,
    T,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
):
    """dq of a block of queries, and delta = sum(do * o) of each row, for attention_dkv_kernel."""
    start_m = tl.program_id(0) * BLOCK_M
    h = tl.program_id(1)
    q = as_descriptor(q, [BLOCK_M, D])
    o = as_descriptor(o, [BLOCK_M, D])
    k = as_descriptor(k, [BLOCK_N, D])
    v = as_descriptor(v, [BLOCK_N, D])
    do = as_descriptor(do, [BLOCK_M, D])
    dq = as_descriptor(dq, [BLOCK_M, D])
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    end = tl.minimum(start_m + BLOCK_M, T)
    row_first = tl.load(first_key + offs_m, mask=offs_m < T, other=T)[:, None]
    first = tl.load(first_key + start_m)
    last = tl.load(first_key + end - 1)
    qk_scale = tl.load(scale) * LOG2_E
    q_block = q.load([start_m, h * D])
    do_block = do.load([start_m, h * D])
    o_block = o.load([start_m, h * D])
    delta_i = tl.sum(do_block.to(tl.float32) * o_block.to(tl.float32), 1)
    tl.store(delta + h * T + offs_m, delta_i, mask=offs_m < T)
    lse_i = tl.load(lse + h * T + offs_m, mask=offs_m < T, other=0)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start_n in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
        k_block = k.load([start_n, h * D])
        p = tl.math.exp2(tl.dot(q_block, k_block.T) * qk_scale - lse_i[:, None])
        if (start_n < last) | (start_n + BLOCK_N > start_m + 1):
            key = start_n + offs_n
            p = tl.where((key >= row_first) & (key <= offs_m[:, None]), p, 0)
        ds = p * (tl.dot(do_block, v.load([start_n, h * D]).T) - delta_i[:, None])
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc)
    dq.store([start_m, h * D], (acc * tl.load(scale)).to(dq.dtype))


@triton.jit
def attention_dkv_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    lse,
    delta,
    first_key,
    end_query,
    scale,
    T,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
):
    """dk and dv of a block of keys, over the queries up to end_query[block]; scores are transposed."""
    start_n = tl.program_id(0) * BLOCK_N
    h = tl.program_id(1)
    q = as_descriptor(q, [BLOCK_M, D])
    do = as_descriptor(do, [BLOCK_M, D])
    k = as_descriptor(k, [BLOCK_N, D])
    v = as_descriptor(v, [BLOCK_N, D])
    dk = as_descriptor(dk, [BLOCK_N, D])
    dv = as_descriptor(dv, [BLOCK_N, D])
    offs_m = tl.arange(0, BLOCK_M)
    key = start_n + tl.arange(0, BLOCK_N)
    qk_scale = tl.load(scale) * LOG2_E
    k_block = k.load([start_n, h * D])
    v_block = v.load([start_n, h * D])
    dk_acc = tl.zeros([BLOCK_N, D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D], tl.float32)
    for start_m in range(start_n, tl.load(end_query + tl.program_id(0)), BLOCK_M):
        q_block = q.load([start_m, h * D])
        do_block = do.load([start_m, h * D])
        row = start_m + offs_m
        inside = row < T
        qk = tl.dot(k_block, q_block.T)
        lse_i = tl.load(lse + h * T + row, mask=inside, other=0)
        p = tl.math.exp2(qk * qk_scale - lse_i[None, :])
        last = tl.load(first_key + tl.minimum(start_m + BLOCK_M, T) - 1)
        if (start_n < last) | (start_n + BLOCK_N > start_m + 1):
            row_first = tl.load(first_key + row, mask=inside, other=T)
            p = tl.where((key[:, None] >= row_first[None, :]) & (key[:, None] <= row[None, :]), p, 0)
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc)
        dp = tl.dot(v_block, do_block.T)  # before what is loaded for it: fewer registers
        delta_i = tl.load(delta + h * T + row, mask=inside, other=0)
        ds = p * (dp - delta_i[None, :])
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc)
    dk.store([start_n, h * D], (dk_acc * tl.load(scale)).to(dk.dtype))
    dv.store([start_n, h * D], dv_acc.to(dv.dtype))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """-> o (T, H, d) and the base-2 log-sum-exp of its scores (H, T)."""
    T, H, D = q.shape
    BLOCK_M, BLOCK_N, warps, stages = config_for_arch(ATTENTION_FORWARD)
    o, lse = q.new_empty(q.shape), q.new_empty(H, T, dtype=torch.float32)
    queries = partial(head_blocks, BLOCK_M)
    keys = partial(head_blocks, BLOCK_N)
    attention_forward_kernel[triton.cdiv(T, BLOCK_M), H](
        queries(q),
        keys(k),
        keys(v),
        queries(o),
        lse,
        first_key,
        scale,
        T,
        BLOCK_M,
        BLOCK_N,
        D,
        num_warps=warps,
        num_stages=stages,
    )
    return o, lse


def head_blocks(rows: int, x: Tensor) -> "TensorDescriptor | tuple":
    """x (T, H, d) for a kernel that moves so many rows of one head at a time."""
    return make_descriptor(x.flatten(1), rows, x.size(2))


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, scale: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv (T, H, d). No atomics: the same bits every time."""
    T, H, D = q.shape
    delta = torch.empty_like(lse)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    BLOCK_M, BLOCK_N, warps, stages = config_for_arch(ATTENTION_DQ)
    queries = partial(head_blocks, BLOCK_M)
    keys = partial(head_blocks, BLOCK_N)
    attention_dq_kernel[triton.cdiv(T, BLOCK_M), H](
        queries(q),
        keys(k),
        keys(v),
        queries(o),
        queries(do),
        queries(dq),
        lse,
        delta,
        first_key,
        scale,
        T,
        BLOCK_M,
        BLOCK_N,
        D,
        num_warps=warps,
        num_stages=stages,
    )
    BLOCK_M, BLOCK_N, warps, stages = config_for_arch(ATTENTION_DKV)
    last_keys = torch.arange(
        BLOCK_N - 1, T + BLOCK_N - 1, BLOCK_N, dtype=torch.int32, device=first_key.device
    )
    end_query = torch.searchsorted(first_key, last_keys, right=True, out_int32=True)
    queries = partial(head_blocks, BLOCK_M)
    keys = partial(head_blocks, BLOCK_N)
    attention_dkv_kernel[triton.cdiv(T, BLOCK_N), H](
        queries(q),
        keys(k),
        keys(v),
        queries(do),
        keys(dk),
        keys(dv),
        lse,
        delta,
        first_key,
        end_query,
        scale,
        T,
        BLOCK_M,
        BLOCK_N,
        D,
        num_warps=warps,
        num_stages=stages,
    )
    return dq, dk, dv


def keep_for_attention_backward(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def attention_gradients(ctx, do: Tensor, _) -> tuple:
    dq, dk, dv = attention_backward_op(do, *ctx.saved_tensors)
    return dq, dk, dv, None, None


def fake_attention(q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(H, T, dtype=torch.float32)


def fake_attention_backward(do: Tensor, q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


custom_op = partial(torch.library.custom_op, mutates_args=())
attention_op = custom_op("train_gpt::attention", attention_forward)
attention_op.register_fake(fake_attention)
attention_op.register_autograd(attention_gradients, setup_context=keep_for_attention_backward)
attention_backward_op = custom_op("train_gpt::attention_backward", attention_backward)
attention_backward_op.register_fake(fake_attention_backward)


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, window: int | None, scale: Tensor | float
) -> Tensor:
    """reference_attention for scale > 0 and first_key non-decreasing. FlashAttention-2, 2307.08691."""
    if not isinstance(scale, Tensor):
        scale = q.new_full((), scale, dtype=torch.float32)
    d = q.size(2)
    missing = triton.next_power_of_2(d) - d
    if missing:  # filled up with zeros
        q, k, v = (F.pad(t, (0, missing)) for t in (q, k, v))
    o, _ = attention_op(q, k, v, first_key.to(torch.int32), scale)
    return o[..., :d]


# ----- What stands between the product that makes q, k, v and attention; its reference is prepare_qkv -----

PREPARE_BLOCK = 32  # tokens of a head that a program takes
RMS_EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # norm's


@triton.jit
def tokens_of_a_head(T, H: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr):
    """What a program takes (BLOCK,): tokens, whether they exist, where their q begins in qkv, their places in
    attention, where these begin. A head of a pair has every second place.
    """
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = token * 2 + head % 2 if PAIRED else token
    at = place * (H // 2 * D) + head // 2 * D if PAIRED else token * (H * D) + head * D
    return token, token < T, token * (3 * H * D) + head * D, place, at


@triton.jit
def load_heads(base, row, lane, inside, D: tl.constexpr, QK_NORM: tl.constexpr):
    """Rows of q or k (BLOCK, D) in float32, normed if they are to be; one over their root mean squares."""
    x = tl.load(base + row[:, None] + lane, mask=inside[:, None], other=0).to(tl.float32)
    per_root = tl.rsqrt(tl.sum(x * x, 1) / D + RMS_EPS)
    if QK_NORM:
        x *= per_root[:, None]
    return x, per_root


@triton.jit
def load_angles(cos, sin, place, inside, D: tl.constexpr, HALF: tl.constexpr):
    """Rotary's cos and sin of each pair of dimensions (BLOCK, D / 2): 1 and 0 where nothing turns."""
    turn = tl.arange(0, D // 2)
    turns = inside[:, None] & (turn < HALF)
    at = place[:, None] * HALF + turn
    return tl.load(cos + at, mask=turns, other=1), tl.load(sin + at, mask=turns, other=0)


@triton.jit
def prepare_forward_kernel(
    qkv,
    value,
    is_first,
    cos,
    sin,
    q,
    k,
    v,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRED: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    QK_NORM: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some tokens of a head."""
    token, inside, row, place, to = tokens_of_a_head(T, H, D, PAIRED, BLOCK)
    lane = tl.arange(0, D)
    c, s = load_angles(cos, sin, place, inside, D, HALF)
    for which in tl.static_range(2):
        x, _ = load_heads(qkv + which * H * D, row, lane, inside, D, QK_NORM)
        if KEY_OFFSET and which == 1:
            follows = inside & (tl.load(is_first + token, mask=inside, other=1) == 0)
            before, _ = load_heads(qkv + H * D, row - 3 * H * D, lane, follows, D, QK_NORM)
            x = tl.where(follows[:, None] & (lane >= 2 * HALF), before, x)
        even, odd = x.reshape(BLOCK, D // 2, 2).split()
        y = tl.join(even * c - odd * s, even * s + odd * c).reshape(BLOCK, D)
        out = k if which == 1 else q
        tl.store(out + to[:, None] + lane, y.to(q.dtype.element_ty), mask=inside[:, None])
    y = tl.load(qkv + 2 * H * D + row[:, None] + lane, mask=inside[:, None], other=0).to(tl.float32)
    if HAS_VALUE:
        at = token * (H * D) + tl.program_id(1) * D
        y += tl.load(value + at[:, None] + lane, mask=inside[:, None], other=0).to(tl.float32)
    tl.store(v + to[:, None] + lane, y.to(v.dtype.element_ty), mask=inside[:, None])


@triton.jit
def prepare_backward_kernel(
    dq,
    dk,
    dv,
    qkv,
    is_first,
    cos,
    sin,
    d_qkv,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRED: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of some tokens of a head."""
    token, inside, row, place, at = tokens_of_a_head(T, H, D, PAIRED, BLOCK)
    lane = tl.arange(0, D)
    c, s = load_angles(cos, sin, place, inside, D, HALF)
    for which in tl.static_range(2):
        dy = tl.load((dk if which == 1 else dq) + at[:, None] + lane, mask=inside[:, None], other=0)
        even, odd = dy.to(tl.float32).reshape(BLOCK, D // 2, 2).split()
        dx = tl.join(even * c + odd * s, odd * c - even * s).reshape(BLOCK, D)  # turned back
        if KEY_OFFSET and which == 1:
            own = tl.load(is_first + token, mask=inside, other=0) != 0
            sends = tl.load(is_first + token + 1, mask=token + 1 < T, other=1) == 0
            moved = sends[:, None] & (lane >= 2 * HALF)
            dx = tl.where(own[:, None] | (lane < 2 * HALF), dx, 0)
            dx += tl.load(dk + (at + H * D)[:, None] + lane, mask=moved, other=0).to(tl.float32)
        if QK_NORM:
            n, per_root = load_heads(qkv + which * H * D, row, lane, inside, D, QK_NORM)
            dx = (dx - n * (tl.sum(dx * n, 1) / D)[:, None]) * per_root[:, None]
        out = d_qkv + which * H * D + row[:, None] + lane
        tl.store(out, dx.to(d_qkv.dtype.element_ty), mask=inside[:, None])
    dy = tl.load(dv + at[:, None] + lane, mask=inside[:, None], other=0)
    tl.store(d_qkv + 2 * H * D + row[:, None] + lane, dy, mask=inside[:, None])


@torch.library.custom_op("train_gpt::prepare_qkv", mutates_args=())
def prepare_op(
    qkv: Tensor,
    value: Tensor | None,
    is_first: Tensor,
    cos: Tensor,
    sin: Tensor,
    paired: bool,
    key_offset: bool,
    qk_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    T, _, H, D = qkv.shape
    q, k, v = fake_prepare(qkv, value, is_first, cos, sin, paired)
    given = (qkv, qkv if value is None else value, is_first.view(torch.uint8), cos, sin)
    assert all(t.is_contiguous() for t in given), [t.stride() for t in given]
    switches = (paired, key_offset, qk_norm, value is not None)
    prepare_forward_kernel[triton.cdiv(T, PREPARE_BLOCK), H](
        *given, q, k, v, T, H, D, cos.size(1), *switches, PREPARE_BLOCK, num_warps=4
    )
    return q, k, v


@prepare_op.register_fake
def fake_prepare(
    qkv: Tensor, value: Tensor | None, is_first: Tensor, cos: Tensor, sin: Tensor, paired: bool, *rest: bool
) -> tuple[Tensor, Tensor, Tensor]:
    T, _, H, D = qkv.shape
    size = (2 * T, H // 2, D) if paired else (T, H, D)
    return qkv.new_empty(size), qkv.new_empty(size), qkv.new_empty(size)


@torch.library.custom_op("train_gpt::prepare_qkv_backward", mutates_args=())
def prepare_backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    is_first: Tensor,
    cos: Tensor,
    sin: Tensor,
    paired: bool,
    key_offset: bool,
    qk_norm: bool,
) -> Tensor:
    T, _, H, D = qkv.shape
    d_qkv = torch.empty_like(qkv)
    given = (*(t.contiguous() for t in (dq, dk, dv)), qkv, is_first.view(torch.uint8), cos, sin)
    prepare_backward_kernel[triton.cdiv(T, PREPARE_BLOCK), H](
        *given, d_qkv, T, H, D, cos.size(1), paired, key_offset, qk_norm, PREPARE_BLOCK, num_warps=4
    )
    return d_qkv


prepare_backward_op.register_fake(lambda dq, dk, dv, qkv, *rest: torch.empty_like(qkv))


def keep_for_prepare_backward(ctx, inputs: tuple, output: tuple) -> None:
    qkv, value, is_first, cos, sin, *ctx.switches = inputs
    ctx.has_value = value is not None
    ctx.save_for_backward(qkv, is_first, cos, sin)


def prepare_gradients(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
    d_qkv = prepare_backward_op(dq, dk, dv, *ctx.saved_tensors, *ctx.switches)
    return d_qkv, d_qkv[:, 2] if ctx.has_value else None, *[None] * 6


prepare_op.register_autograd(prepare_gradients, setup_context=keep_for_prepare_backward)


def triton_prepare_qkv(
    qkv: Tensor, value: Tensor | None, is_first: Tensor, cos: Tensor, sin: Tensor, *switches: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """prepare_qkv in one pass, for heads whose dimensions are a power of two."""
    D = qkv.size(3)
    assert D == triton.next_power_of_2(D) >= 16, D
    value = None if value is None else value.contiguous()
    return prepare_op(qkv, value, is_first, cos, sin, *switches)


# ----- MLP -----


def mlp(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """x (T, D); up, down (4D, D) -> (T, D). relu(x)^2: 2109.08668"""
    hidden = F.linear(x, up)
    hidden = F.relu(hidden).square() if activation == "relu2" else F.gelu(hidden)
    return hidden @ down


# BLOCK_M, BLOCK_N, bytes of BLOCK_K, warps, stages forward, backward, in FP8; shared memory: 99 KB on Ada and
# on 120, 227 on 90.
RELU2_BLOCKS = {
    80: (128, 256, 64, 8, 3, 3, 3),
    90: (128, 256, 128, 8, 4, 3, 3),
    120: (128, 128, 128, 8, 3, 3, 2),
}
PROCESSORS = 132  # an H100's, where there is no GPU
HIDDEN_SCALE = 2**-2  # of the MLP's hidden values in FP8


@triton.jit
def relu2_kernel(
    a,
    b,
    hidden,
    out,
    out8,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE8: tl.constexpr,
    BACKWARD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program takes every PROGRAMS-th block, in one flat loop: while it stores one, it loads the next.

    a and b in FP8 are worth SCALE times their product; out / SCALE8 is then stored in FP8, too.
    """
    HALF: tl.constexpr = BLOCK_N // 2  # what is stored at once: less shared memory
    a = as_descriptor(a, [BLOCK_M, BLOCK_K])
    b = as_descriptor(b, [BLOCK_N, BLOCK_K])
    out = as_descriptor(out, [BLOCK_M, HALF])
    across = tl.cdiv(out.shape[1], BLOCK_N)
    blocks = tl.cdiv(out.shape[0], BLOCK_M) * across
    for block in tl.range(tl.program_id(0), blocks, PROGRAMS, flatten=True):
        row = block // across * BLOCK_M
        column = block % across * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(a.load([row, k]), b.load([column, k]).T, acc)
        halves = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            if BACKWARD:
                squared = as_descriptor(hidden, [BLOCK_M, HALF]).load([row, column + i * HALF])
                y = halves[i] * 2 * tl.sqrt(squared.to(tl.float32))
            else:
                y = tl.maximum(halves[i], 0) * tl.maximum(halves[i], 0)
            if SCALE8 > 0:
                y *= SCALE * SCALE
                y8 = tl.minimum(y / SCALE8, 448.0).to(a.dtype)
                as_descriptor(out8, [BLOCK_M, HALF]).store([row, column + i * HALF], y8)
            out.store([row, column + i * HALF], y.to(out.dtype))


def launch_relu2(a: Tensor, b: Tensor, hidden: Tensor | None, out: Tensor, out8: Tensor | None) -> None:
    BLOCK_M, BLOCK_N, bytes_of_k, warps, *stages = config_for_arch(RELU2_BLOCKS)
    fp8, BLOCK_K = out8 is not None, bytes_of_k // min(2, a.itemsize)
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else PROCESSORS
    programs = min(processors, triton.cdiv(len(a), BLOCK_M) * triton.cdiv(len(b), BLOCK_N))
    relu2_kernel[(programs,)](
        make_descriptor(a, BLOCK_M, BLOCK_K),
        make_descriptor(b, BLOCK_N, BLOCK_K),
        make_descriptor(out if hidden is None else hidden, BLOCK_M, BLOCK_N // 2),
        make_descriptor(out, BLOCK_M, BLOCK_N // 2),
        make_descriptor(out8 if fp8 else out, BLOCK_M, BLOCK_N // 2),
        a.size(1),
        X_SCALE * HEAD_SCALE,
        HIDDEN_SCALE if fp8 else 0,
        hidden is not None,
        programs,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        num_warps=warps,
        num_stages=stages[2 if fp8 else hidden is not None],
    )


@torch.library.custom_op("train_gpt::relu2_product", mutates_args=())
def relu2_product(a: Tensor, b: Tensor, hidden: Tensor | None) -> Tensor:
    """a (T, K), b (N, K) -> relu(a b^T)^2 (T, N); with that as hidden: 2 sqrt(hidden) a b^T."""
    out = a.new_empty(len(a), len(b))
    launch_relu2(a, b, hidden, out, None)
    return out


relu2_product.register_fake(lambda a, b, hidden: a.new_empty(a.size(0), b.size(0)))


@torch.library.custom_op("train_gpt::relu2_product_fp8", mutates_args=())
def relu2_product_fp8(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """FP8: a (T, K) over X_SCALE, b (N, K) over HEAD_SCALE -> relu(a b^T)^2 (T, N), it over HIDDEN_SCALE."""
    out, out8 = (a.new_empty(len(a), len(b), dtype=kind) for kind in (dtype, a.dtype))
    launch_relu2(a, b, None, out, out8)
    return out, out8


@relu2_product_fp8.register_fake
def fake_relu2_product_fp8(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.size(0), b.size(0), dtype=dtype), a.new_empty(a.size(0), b.size(0))


class ReLU2MLP(torch.autograd.Function):
    """relu(x up^T)^2 is all that is kept: its root serves the derivative, more exactly than a kept relu."""

    @staticmethod
    def forward(ctx, x, up, down, fp8):
        if fp8:
            hidden, hidden8 = relu2_product_fp8(to_fp8(x, X_SCALE), to_fp8(up, HEAD_SCALE), x.dtype)
            scales = (x.new_full((), scale, dtype=torch.float32) for scale in (HIDDEN_SCALE, HEAD_SCALE))
            y = fp8_product(hidden8, to_fp8(down, HEAD_SCALE), *scales, x.dtype)
        else:
            hidden = relu2_product(x, up, None)
            y = hidden @ down
        ctx.save_for_backward(x, up, down, hidden)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, up, down, hidden = ctx.saved_tensors
        d_up = relu2_product(dy.contiguous(), down, hidden)  # of x up^T
        return d_up @ up, d_up.T @ x, hidden.T @ dy, None


def triton_mlp(x: Tensor, up: Tensor, down: Tensor, activation: str, fp8: bool = False) -> Tensor:
    """mlp, fused for relu2 in bfloat16; D a multiple of 8. fp8: its forward products are FP8's, from 89 on.

    Then x and hidden values saturate at 112, weights at 1.75; gradients are bfloat16's. D a multiple of 16.
    """
    if activation != "relu2":
        return mlp(x, up, down, activation)
    return ReLU2MLP.apply(x.contiguous(), up, down, fp8 and torch.is_grad_enabled())


# ----- Head and loss -----

# Logits become cap[0] sigmoid((logits + cap[1]) / cap[2]); 0 first: they stay.
Cap = tuple[float, float, float]
HEAD_CHUNK = {"cpu": 1024, "cuda": 16384}  # tokens, by device


def reference_head_loss(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap) -> Tensor:
    """x (T, D), head (D, V), targets (T,) -> sum over k of weights[k] times the loss on token k + 1 ahead."""
    T, logits = len(targets), (x @ head).float()
    if cap[0]:
        logits = cap[0] * torch.sigmoid((logits + cap[1]) / cap[2])
    losses = [F.cross_entropy(logits[: T - k], targets[k:], reduction="sum") for k in range(len(weights))]
    return (torch.stack(losses) * weights).sum() / T


def head_loss(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    cap: Cap,
    head_chunk: Callable | None = None,
    learn: bool = True,
    joined: int = 1,
    prefixes: Tensor | None = None,
    candidates: int = 0,
) -> Tensor:
    """reference_head_loss by chunks of tokens: float32 logits of a whole sequence never exist at once.

    Of several joined sequences, equally long, the mean. prefixes (V,): the last weight is of the loss on the
    next token's prefix, where it has one. candidates: the softmax is over so many tokens, see sample_vocab.
    """
    T, length = len(targets), len(targets) // joined
    if prefixes is not None:
        weights, prefix_weight = weights[:-1], weights[-1]
    ahead = torch.arange(len(weights), device=x.device)
    place = torch.arange(T, device=x.device)[:, None] + ahead  # (T, n)
    inside = place % length >= ahead  # of a token's own sequence; none is shorter than `ahead`
    weights = torch.where(inside & (place < T), weights / T, 0)  # no loss on what is past the end
    targets = targets[place.clamp_max(T - 1)]
    if prefixes is not None:
        shorter = prefixes[targets[:, :1]]
        weights = torch.cat([weights, torch.where(shorter >= 0, prefix_weight / T, 0)], dim=1)
        targets = torch.cat([targets, shorter.clamp_min(0)], dim=1)
    with_grad = learn and torch.is_grad_enabled()
    head_chunk = head_chunk or plain_kernels().head_chunk
    size = HEAD_CHUNK[x.device.type]
    if candidates:  # a draw follows from its chunk: none goes over a joint
        size = [min(size, length - begin) for begin in range(0, length, size)] * joined
    return HeadLoss.apply(x, head, targets, weights, cap, head_chunk, with_grad, candidates, size)


def sample_vocab(targets: Tensor, vocab_rows: int, count: int) -> tuple[Tensor, Tensor]:
    """targets (c, n) -> the tokens, (count,), that the softmax is over, and what is added to their logits.

    The targets, and others drawn evenly, which stand for all that are left out: the log of how many each
    stands for is added, so that the softmax's denominator has the right mean (1412.2007). The draw follows
    from the targets alone: a run that is resumed, joins micro-batches or has other ranks draws the same.
    """
    token = torch.arange(vocab_rows, device=targets.device)
    is_target = torch.zeros_like(token).index_fill_(0, targets.flatten(), 1)
    salt = (targets[:, 0] * torch.arange(1, len(targets) + 1, device=targets.device)).sum()
    hashed = (token + 1) * 0x9E3779B1 + salt * 0x85EBCA6B
    hashed = ((hashed >> 15) ^ hashed) * 0xC2B2AE35
    hashed = ((hashed >> 13) ^ hashed) & 0x7FFFFFFF
    key = ((is_target << 31) + hashed) * vocab_rows + token  # no two are the same
    tokens = (key.topk(count).values % vocab_rows).sort().values
    known = is_target.sum()
    stands_for = (vocab_rows - known) / (count - known).clamp_min(1)
    return tokens, torch.where(is_target[tokens] > 0, 0.0, stands_for.log())


def read_prefixes(cfg: Config) -> Tensor:
    """(vocab_rows,): each token's longest proper beginning that is a token, too, or -1. UserError.

    By the vocabulary that data/ writes beside shards, `base64 rank` a line.
    """
    path, ranks = find_data(cfg) / "vocab.tiktoken", {}
    about, again = f"--prefix_weight {cfg.prefix_weight:g}: {path}", "make the data again"
    try:
        need(path.is_file() and path.stat().st_size < 10**8, f"{about}: there is no such vocabulary; {again}")
        for line in path.read_text("ascii").splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)[:1000]] = int(rank)  # no real token is as long
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not `base64 rank` a line"
        raise UserError(f"{about}: {reason}; {again}") from None
    known = set(ranks.values()) <= set(range(cfg.vocab_size))
    need(known, f"{about}: not of {cfg.vocab_size} tokens; {again}")
    prefixes = [-1] * cfg.vocab_rows
    for token, rank in ranks.items():
        beginnings = (token[:length] for length in range(len(token) - 1, 0, -1))
        prefixes[rank] = next((ranks[part] for part in beginnings if part in ranks), -1)
    return torch.tensor(prefixes)


class HeadLoss(torch.autograd.Function):
    """The gradient is made with the loss, while a chunk's logits are at hand; backward only scales it."""

    @staticmethod
    def forward(ctx, x, head, targets, weights, cap, head_chunk, with_grad, candidates, size):
        """size: tokens of a chunk, or of each."""
        loss, dx, d_head = 0.0, [], None
        if candidates and with_grad:
            d_head = torch.zeros_like(head, dtype=torch.float32)
        for x_chunk, *chunk in zip(x.split(size), targets.split(size), weights.split(size), strict=True):
            if candidates:
                tokens, offsets = sample_vocab(chunk[0], head.size(1), candidates)
                part, chunk = head.index_select(1, tokens), places(tokens, *chunk)
                chunk_loss, chunk_dx, d_part = head_chunk(
                    x_chunk, part, *chunk, cap, with_grad, offsets=offsets
                )
                if with_grad:
                    d_head.index_add_(1, tokens, d_part)
            else:
                chunk_loss, chunk_dx, d_part = head_chunk(x_chunk, head, *chunk, cap, with_grad)
                d_head = d_part if d_head is None else d_head.add_(d_part)
            loss = loss + chunk_loss
            dx.append(chunk_dx)
        if with_grad:
            ctx.save_for_backward(torch.cat(dx), d_head.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, d_head = ctx.saved_tensors
        return (grad * dx).to(dx.dtype), (grad * d_head).to(d_head.dtype), *[None] * 7


def places(tokens: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Where in tokens, which ascend, the targets are; the weights of those that are there, of others 0."""
    place = torch.searchsorted(tokens, targets).clamp_max(len(tokens) - 1)
    return place, torch.where(tokens[place] == targets, weights, 0)


# Loss, gradients by x (c, D) and head (D, V), float32.
ChunkLoss = tuple[Tensor, Tensor | None, Tensor | None]


def head_chunk(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    cap: Cap,
    with_grad: bool,
    fp8: bool = False,
    offsets: Tensor | None = None,
) -> ChunkLoss:
    """x (c, D), targets and weights (c, n), offsets (V,) of logits, of targets 0; fp8 is for GPUs."""
    loss, dz = cross_entropy((x @ head).float(), targets, weights, cap, offsets)
    if not with_grad:
        return loss, None, None
    dz = dz.to(x.dtype)
    return loss, dz @ head.T, (x.T @ dz).float()


def cross_entropy(
    z: Tensor, targets: Tensor, weights: Tensor, cap: Cap, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z (c, V) before the cap; targets, weights (c, n) -> weighted cross-entropy, gradient by z (c, V).

    offsets (V,): added to capped logits.
    """
    s = torch.sigmoid((z + cap[1]) / cap[2]) if cap[0] else None
    logits = cap[0] * s if cap[0] else z
    logits = logits if offsets is None else logits + offsets
    top = logits.amax(dim=-1, keepdim=True)
    exp = (logits - top).exp()
    total = exp.sum(dim=-1, keepdim=True)
    loss = (weights * ((top + total.log()) - logits.gather(1, targets))).sum()
    dz = (exp * (weights.sum(dim=-1, keepdim=True) / total)).scatter_add(1, targets, -weights)
    return loss, dz * (cap[0] / cap[2] * s * (1 - s)) if cap[0] else dz


@triton.jit
def capped_logit(z, CAP: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """z -> its logit in bits, and the logit's derivative by z.

    In bits, as hardware knows powers of two only; and squares a reciprocal root, as a division takes ten
    instructions: more time goes into arithmetic here than into memory.
    """
    if CAP == 0:
        return z * LOG2_E, z * 0 + 1
    root = tl.rsqrt(1 + tl.exp2(z * (-LOG2_E / WIDTH) - SHIFT * LOG2_E / WIDTH))
    s = root * root
    return s * (CAP * LOG2_E), (s - s * s) * (CAP / WIDTH)


@triton.jit
def cross_entropy_kernel(
    z,
    targets,
    weights,
    offsets,
    loss,
    log_totals,
    V,
    N: tl.constexpr,
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: z (V,) before the cap; targets, weights (N,) -> its loss; z becomes its gradient.

    offsets: None, or (V,), of logits in bits, of targets 0.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    lane = tl.arange(0, BLOCK_V)
    k = tl.arange(0, AHEAD)
    target = tl.load(targets + row * N + k, mask=k < N, other=0)
    weight = tl.load(weights + row * N + k, mask=k < N, other=0)
    picked, picked_slope = capped_logit(tl.load(z + target).to(tl.float32), CAP, SHIFT, WIDTH)
    m_i = tl.full([BLOCK_V], -1e30 if CAP == 0 else CAP * LOG2_E, tl.float32)
    l_i = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        inside = start + lane < V
        z_block = tl.load(z + start + lane, mask=inside, other=0).to(tl.float32)
        logit, _ = capped_logit(z_block, CAP, SHIFT, WIDTH)
        if offsets is not None:
            logit += tl.load(offsets + start + lane, mask=inside, other=0)
        logit = tl.where(inside, logit, float("-inf"))
        if CAP == 0 or CAP > 64:
            m_ij = tl.maximum(m_i, logit)
            l_i = l_i * tl.exp2(m_i - m_ij) + tl.exp2(logit - m_ij)
            m_i = m_ij
        else:
            l_i += tl.exp2(logit - CAP * LOG2_E)
    highest = tl.max(m_i, 0)
    log_total = highest + tl.log2(tl.sum(l_i * tl.exp2(m_i - highest), 0))
    tl.store(loss + row, tl.sum(weight * (log_total - picked), 0) * LN_2)
    tl.store(log_totals + row, log_total)
    if WITH_GRAD:
        all_weight = tl.sum(weight, 0)
        same = tl.sum(tl.where(target[:, None] == target[None, :], weight[None, :], 0), 1)
        tl.debug_barrier()
        for start in range(0, V, BLOCK_V):
            inside = start + lane < V
            z_block = tl.load(z + start + lane, mask=inside, other=0).to(tl.float32)
            logit, slope = capped_logit(z_block, CAP, SHIFT, WIDTH)
            if offsets is not None:
                logit += tl.load(offsets + start + lane, mask=inside, other=0)
            dz = all_weight * tl.exp2(logit - log_total) * slope
            tl.store(z + start + lane, dz.to(z.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        dz = (all_weight * tl.exp2(picked - log_total) - same) * picked_slope
        tl.store(z + target, dz.to(z.dtype.element_ty), mask=k < N)


@torch.library.custom_op("train_gpt::cross_entropy_", mutates_args={"z"})
def cross_entropy_(
    z: Tensor,
    targets: Tensor,
    weights: Tensor,
    cap: list[float],
    with_grad: bool,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """cross_entropy in a kernel: z (c, V) -> losses, log-sum-exps in bits (c,).

    with_grad: z becomes its gradient. offsets (V,): in bits.
    """
    tensors = (z, targets, weights)
    assert all(t.is_contiguous() for t in tensors), [t.stride() for t in tensors]
    n = targets.size(1)
    loss, log_totals = (z.new_empty(len(z), dtype=torch.float32) for _ in range(2))
    AHEAD = triton.next_power_of_2(n)
    inputs = (z, targets, weights, offsets, loss, log_totals, z.size(1), n)
    cross_entropy_kernel[(len(z),)](*inputs, *cap, with_grad, AHEAD, BLOCK_V=4096, num_warps=8)
    return loss, log_totals


@cross_entropy_.register_fake
def fake_cross_entropy_(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(len(z), dtype=torch.float32), z.new_empty(len(z), dtype=torch.float32)


@triton.jit
def logit_gradient_kernel(
    z,
    log_totals,
    row_weights,
    offsets,
    dz,
    dz_t,
    rows,
    V,
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A block of the gradient by z, as if nothing were a target, in E5M2, and its transpose.

    The bytes of four rows in a column are one word: words are transposed faster than bytes. E5M2 is the upper
    byte of float16, rounded here: some ptxas end by a signal where a byte that they converted is in a word.
    """
    first_row = tl.program_id(1) * BLOCK_M
    first_column = tl.program_id(0) * BLOCK_V
    quarter = tl.arange(0, BLOCK_M // 4)
    column = tl.arange(0, BLOCK_V)
    origin = first_row.to(tl.int64) * V + first_column
    words = tl.zeros([BLOCK_M // 4, BLOCK_V], tl.uint32)
    if offsets is not None:
        offset = tl.load(offsets + first_column + column, mask=first_column + column < V, other=0)
    for i in tl.static_range(4):
        row = 4 * quarter + i
        inside = (first_row + row[:, None] < rows) & (first_column + column < V)
        place = row[:, None] * V + column
        z_block = tl.load(z + origin + place, mask=inside, other=0).to(tl.float32)
        log_total = tl.load(log_totals + first_row + row, mask=first_row + row < rows, other=0)
        weight = tl.load(row_weights + first_row + row, mask=first_row + row < rows, other=0)
        logit, slope = capped_logit(z_block, CAP, SHIFT, WIDTH)
        if offsets is not None:
            logit += offset
        y = weight[:, None] * tl.exp2(logit - log_total[:, None]) * slope
        half = y.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        byte = (half + 0x7F + (half >> 8 & 1)) >> 8
        tl.store(dz + origin + place, byte.to(tl.uint8), mask=inside)
        words |= byte << (8 * i)
    origin_t = first_column.to(tl.int64) * (rows // 4) + first_row // 4
    inside_t = (first_column + column[:, None] < V) & (first_row + 4 * quarter < rows)
    place_t = column[:, None] * (rows // 4) + quarter
    tl.store(dz_t + origin_t + place_t, words.T.to(tl.int32, bitcast=True), mask=inside_t)


@triton.jit
def target_gradient_kernel(
    z,
    log_totals,
    row_weights,
    targets,
    weights,
    scale,
    dz,
    dz_t,
    rows,
    V,
    N: tl.constexpr,
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The gradient at the targets of some rows, of which several may be the same."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = tl.arange(0, AHEAD)
    inside = (row < rows) & (k < N)
    target = tl.load(targets + row * N + k, mask=inside, other=0)
    picked = tl.zeros([BLOCK_M, AHEAD], tl.float32)  # the weights of a row that have this target
    for other in tl.static_range(N):
        also = tl.load(targets + row * N + other, mask=row < rows, other=0)
        weight = tl.load(weights + row * N + other, mask=row < rows, other=0)
        picked += tl.where(also == target, weight, 0)
    origin = row.to(tl.int64) * V
    logit, slope = capped_logit(
        tl.load(z + origin + target, mask=inside, other=0).to(tl.float32), CAP, SHIFT, WIDTH
    )
    log_total = tl.load(log_totals + row, mask=row < rows, other=0)
    weight = tl.load(row_weights + row, mask=row < rows, other=0)
    y = (weight * tl.exp2(logit - log_total) - picked / tl.load(scale)) * slope
    y8 = y.to(dz.dtype.element_ty)
    tl.store(dz + origin + target, y8, mask=inside)
    tl.store(dz_t + target * rows + row, y8, mask=inside)


@torch.library.custom_op("train_gpt::logit_gradient", mutates_args=())
def logit_gradient(
    z: Tensor,
    log_totals: Tensor,
    targets: Tensor,
    weights: Tensor,
    cap: list[float],
    scale: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z (c, V), and cross_entropy_'s log-sum-exps -> its gradient over scale, E5M2: (c, V), and (V, c).

    c is a multiple of 4. offsets: as cross_entropy_ had them.
    """
    BLOCK_M, BLOCK_V, warps = 128, 64, 4
    rows, V = z.shape
    assert rows % 4 == 0, rows
    n = targets.size(1)
    dz, dz_t = (z.new_empty(size, dtype=torch.float8_e5m2) for size in ((rows, V), (V, rows)))
    row_weights = weights.sum(1) / scale
    blocks = triton.cdiv(V, BLOCK_V), triton.cdiv(rows, BLOCK_M)
    to = dz.view(torch.uint8), dz_t.view(torch.int32)
    logit_gradient_kernel[blocks](
        z, log_totals, row_weights, offsets, *to, rows, V, *cap, BLOCK_M, BLOCK_V, num_warps=warps
    )
    inputs = (z, log_totals, row_weights, targets, weights, scale)
    AHEAD = triton.next_power_of_2(n)
    target_gradient_kernel[(triton.cdiv(rows, 64),)](*inputs, dz, dz_t, rows, V, n, *cap, 64, AHEAD)
    return dz, dz_t


@logit_gradient.register_fake
def fake_logit_gradient(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    new = partial(z.new_empty, dtype=torch.float8_e5m2)
    return new(z.shape), new(z.shape[::-1])


X_SCALE, HEAD_SCALE = 2**-2, 2**-8  # near the records' 100 / 448 and 1.6 / 448; powers of two round nothing
FP8_MAX = 448.0  # the largest of float8_e4m3fn


def to_fp8(x: Tensor, scale: float) -> Tensor:
    """Saturated first: eager torch 2.11 makes NaN of what is above."""
    return (x * (1 / scale)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def fp8_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a (T, K) times b (K, N), whose columns must be contiguous there, times both scales."""
    return torch._scaled_mm(a, b.T.contiguous().T, a_scale, b_scale, out_dtype=dtype, use_fast_accum=True)


def triton_head_chunk(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    cap: Cap,
    with_grad: bool,
    fp8: bool = True,
    offsets: Tensor | None = None,
) -> ChunkLoss:
    """head_chunk without float32 logits in memory. fp8: in training its products are FP8's, from 89 on."""
    bits = None if offsets is None else offsets / math.log(2)
    if with_grad and fp8 and compute_capability() >= 89 and len(x) % 16 == 0:
        return fp8_head_chunk(x, head, targets, weights, cap, bits)
    z = x @ head
    losses, _ = cross_entropy_(z, targets, weights, cap, with_grad, bits)
    loss = losses.sum()
    return (loss, z @ head.T, (x.T @ z).float()) if with_grad else (loss, None, None)


def fp8_head_chunk(
    x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap, offsets: Tensor | None
) -> ChunkLoss:
    """Three FP8 products, as the record's. offsets: in bits."""
    x8, head8 = to_fp8(x, X_SCALE), to_fp8(head, HEAD_SCALE)
    x_scale, head_scale = (x.new_full((), s, dtype=torch.float32) for s in (X_SCALE, HEAD_SCALE))
    product = torch._scaled_mm
    z = fp8_product(x8, head8, x_scale, head_scale, x.dtype)
    losses, log_totals = cross_entropy_(z, targets, weights, cap, False, offsets)
    dz_scale = weights.sum(1).amax().clamp_min(1e-30) / 2**14  # E5M2 ends at 57,344
    dz, dz_t = logit_gradient(z, log_totals, targets, weights, cap, dz_scale, offsets)
    dx = product(dz, head8.T, dz_scale, head_scale, out_dtype=x.dtype)
    d_head = product(x8.T.contiguous(), dz_t.T, x_scale, dz_scale, out_dtype=torch.float32)
    return losses.sum(), dx, d_head


# ----- Muon's symmetric product; its reference is symmetric_product, in part 3 -----


@triton.jit
def symmetric_kernel(
    x,
    square,
    out,
    alpha,
    beta,
    DEPTH: tl.constexpr,  # Triton 3.6 waits after every wgmma of a loop of unknown length
    BETA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block on or below the diagonal of alpha x x^T + beta x, and its mirror image."""
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_M
    n = tl.program_id(2)
    if column > row:
        return
    x = as_descriptor(x, [1, BLOCK_M, BLOCK_K])
    out = as_descriptor(out, [1, BLOCK_M, BLOCK_M])
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        left = x.load([n, row, k]).reshape(BLOCK_M, BLOCK_K)
        right = x.load([n, column, k]).reshape(BLOCK_M, BLOCK_K)
        acc = tl.dot(left, right.T, acc)
    acc *= alpha
    if BETA:
        square_block = as_descriptor(square, [1, BLOCK_M, BLOCK_M]).load([n, row, column])
        acc += beta * square_block.reshape(BLOCK_M, BLOCK_M).to(tl.float32)
    y = acc.to(out.dtype)
    out.store([n, row, column], y.reshape(1, BLOCK_M, BLOCK_M))
    if column < row:
        out.store([n, column, row], y.T.reshape(1, BLOCK_M, BLOCK_M))


@torch.library.custom_op("train_gpt::symmetric_product", mutates_args=())
def triton_symmetric_product(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """symmetric_product in bfloat16, half of it computed; rows and columns multiples of 8."""
    BLOCK_M, BLOCK_K = 128, 64  # 96 KB: two programs on a multiprocessor
    n, rows, depth = x.shape
    x, out = x.contiguous(), x.new_empty(n, rows, rows)
    blocks = triton.cdiv(rows, BLOCK_M)
    symmetric_kernel[blocks, blocks, n](
        make_descriptor(x, 1, BLOCK_M, BLOCK_K),
        make_descriptor(x, 1, BLOCK_M, BLOCK_M),
        make_descriptor(out, 1, BLOCK_M, BLOCK_M),
        alpha,
        beta,
        depth,
        beta != 0,
        BLOCK_M,
        BLOCK_K,
        num_warps=8,
        num_stages=3,
    )
    return out


@triton_symmetric_product.register_fake
def fake_symmetric_product(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    return x.new_empty(len(x), x.size(1), x.size(1))


# ----- Transposes between the head and the tied embedding -----


def transpose_(to: Tensor, x: Tensor, add: bool) -> Tensor:
    """to (R, C) = x.T, or to += x.T, in place; x (C, R)."""
    return to.add_(x.T) if add else to.copy_(x.T)


@triton.jit
def transpose_kernel(
    dst, src, rows, columns, dst_stride, src_stride, ADD: tl.constexpr, BLOCK_M: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    readable = (column[:, None] < columns) & (row < rows)
    y = tl.load(src + column[:, None] * src_stride + row, mask=readable).to(tl.float32).T
    place = dst + row[:, None] * dst_stride + column
    inside = (row[:, None] < rows) & (column < columns)
    if ADD:
        y += tl.load(place, mask=inside).to(tl.float32)
    tl.store(place, y.to(dst.dtype.element_ty), mask=inside)


def triton_transpose_(dst: Tensor, src: Tensor, add: bool, block: int = 64) -> Tensor:
    """transpose_ through shared memory, so that both sides are touched along their rows."""
    fits = dst.shape == src.T.shape and dst.stride(1) == src.stride(1) == 1
    assert fits, [(t.shape, t.stride()) for t in (dst, src)]
    blocks = tuple(triton.cdiv(size, block) for size in dst.shape)
    transpose_kernel[blocks](dst, src, *dst.shape, dst.stride(0), src.stride(0), add, block)
    return dst


# ----- Lookups in tables -----


def look_up(table: Tensor, rows: Tensor, order: "RowOrder | None", sparse: bool = False) -> Tensor:
    """table (V, D), rows (T,) -> (T, D). order: see triton_look_up."""
    return F.embedding(rows, table, sparse=sparse)


ROWS_AT_ONCE = 32  # sorted rows that a program adds up


@dataclass(frozen=True)
class RowOrder:
    """Rows that are looked up, sorted, so that the gradients of a row stand together."""

    rows: Tensor  # (T,) int32
    place: Tensor  # (T,) where each stood
    run_ends: Tensor  # for each ROWS_AT_ONCE of them, where the last one's equals end

    @staticmethod
    def of(rows: Tensor) -> "RowOrder":
        ordered, place = torch.sort(rows.to(torch.int32), stable=True)
        last = torch.arange(ROWS_AT_ONCE - 1, len(rows) + ROWS_AT_ONCE - 1, ROWS_AT_ONCE, device=rows.device)
        last = ordered[last.clamp_max(len(rows) - 1)]
        return RowOrder(ordered, place, torch.searchsorted(ordered, last, right=True, out_int32=True))


@triton.jit
def add_to_row(grad, row, values, D, lane):
    """grad[row] += values (BLOCK_D,), of which D count; rounded once."""
    to = grad + row.to(tl.int64) * D + lane
    total = tl.load(to, mask=lane < D, other=0).to(tl.float32) + values
    tl.store(to, total.to(grad.dtype.element_ty), mask=lane < D)


@triton.jit
def add_rows_kernel(grad, dy, rows, place, partial, T, D, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds dy of its rows to grad; a row that other programs have, too, goes into partial (2, D) of each."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, BLOCK_D)
    inside = lane < D
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, T)
    partial += 2 * chunk * D
    row = tl.load(rows + first)
    shared = row == tl.load(rows + first - 1, mask=first > 0, other=-1)  # with the program before
    acc = tl.zeros([BLOCK_D], tl.float32)
    for i in range(first, end):
        next_row = tl.load(rows + i)
        if next_row != row:
            if shared:
                tl.store(partial + lane, acc, mask=inside)
            else:
                add_to_row(grad, row, acc, D, lane)
            acc = tl.zeros([BLOCK_D], tl.float32)
            row = next_row
            shared = False
        source = dy + tl.load(place + i).to(tl.int64) * D + lane
        acc += tl.load(source, mask=inside, other=0).to(tl.float32)
    if shared:
        tl.store(partial + lane, acc, mask=inside)
    elif row == tl.load(rows + end, mask=end < T, other=-1):
        tl.store(partial + D + lane, acc, mask=inside)
    else:
        add_to_row(grad, row, acc, D, lane)


@triton.jit
def finish_rows_kernel(grad, rows, run_ends, partial, T, D, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row that begins among this program's and goes on: its parts, in their order, onto grad."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, BLOCK_D)
    inside = lane < D
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, T)
    row = tl.load(rows + end - 1)
    run_end = tl.load(run_ends + chunk)
    if (run_end <= end) | (row == tl.load(rows + first - 1, mask=first > 0, other=-1)):
        return
    acc = tl.load(partial + (2 * chunk + 1) * D + lane, mask=inside, other=0)
    for later in range(chunk + 1, tl.cdiv(run_end, CHUNK)):
        acc += tl.load(partial + 2 * later * D + lane, mask=inside, other=0)
    add_to_row(grad, row, acc, D, lane)


def add_rows_(grad: Tensor, dy: Tensor, order: RowOrder) -> None:
    """grad (V, D): to each row what dy (T, D) has for it. No atomics: the same bits every time."""
    T, D = dy.shape
    chunks, BLOCK_D = len(order.run_ends), triton.next_power_of_2(D)
    partial_sums = torch.empty(chunks, 2, D, dtype=torch.float32, device=dy.device)
    shape = (T, D, ROWS_AT_ONCE, BLOCK_D)
    add_rows_kernel[(chunks,)](grad, dy, order.rows, order.place, partial_sums, *shape)
    finish_rows_kernel[(chunks,)](grad, order.rows, order.run_ends, partial_sums, *shape)


class RowLookup(torch.autograd.Function):
    """A lookup whose gradient goes into table.grad at once, where others' may stand already."""

    @staticmethod
    def forward(ctx, table, rows, order):
        ctx.table, ctx.order = table, order
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx, dy):
        table = ctx.table
        if table.grad is None:
            table.grad = torch.zeros_like(table)
        add_rows_(table.grad, dy.contiguous(), ctx.order)
        return None, None, None


def triton_look_up(table: Tensor, rows: Tensor, order: RowOrder | None, sparse: bool = False) -> Tensor:
    """look_up without a gradient of the table's size. order: RowOrder.of(rows), None where none learns."""
    if order is None or not torch.is_grad_enabled():
        return look_up(table, rows, order)
    return RowLookup.apply(table, rows, order)


# ===== B. Ranks and batches: how processes exchange what they have, and how batches arrive. =====


def read_environment(name: str, default: int) -> int:
    """A variable of torchrun's."""
    text = os.environ.get(name, str(default))
    digits = re.fullmatch(r"\d{1,9}", text, re.ASCII)
    need(digits, f"{name}={text!r} in the environment: not a number; torchrun sets it")
    return int(text)


LOST_CONNECTION = re.compile(r"[Cc]onnection|[Tt]imed out|[Tt]imeout|Broken pipe|NCCL|Gloo|gloo")


def lost_connection(error: RuntimeError) -> "RunFailed":
    reason = "another process ended, the network failed, or --rank_timeout is too short"
    return RunFailed(f"{one_line(str(error), 200)} ({reason})")


@dataclass
class DistEnv:
    """Collectives start at once and give a function that waits; with one process they do nothing."""

    rank: int
    world_size: int
    device: torch.device

    @staticmethod
    def join(cfg: Config, device: torch.device) -> "DistEnv":
        rank, world_size = read_environment("RANK", 0), read_environment("WORLD_SIZE", 1)
        advice = "start a number that divides it, or change it"
        fair = world_size > 0 and cfg.micro_batches % world_size == 0
        need(fair, f"--micro_batches {cfg.micro_batches}: {world_size} processes cannot share them; {advice}")
        share = cfg.micro_batches // world_size
        whole = not cfg.join or share % cfg.join == 0
        need(
            whole,
            f"--join {cfg.join}: must divide the {share} micro-batches of each of {world_size} processes",
        )
        found = f"RANK={rank} and WORLD_SIZE={world_size} in the environment"
        advice = "unset both, or start with torchrun"
        need(rank < world_size, f"{found}: ranks go from 0 to {world_size - 1}; {advice}")
        if world_size > 1:
            started = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
            need(started, f"{found}, but not all that torchrun sets; {advice}")
            need(read_environment("MASTER_PORT", 0) < 2**16, f"{found}, MASTER_PORT is no port; {advice}")
            backend = "nccl" if device.type == "cuda" else "gloo"
            try:
                with quiet_stderr():
                    dist.init_process_group(backend, timeout=timedelta(seconds=cfg.rank_timeout))
            except (RuntimeError, ValueError) as error:  # nobody else came, or no such host
                reason = one_line(str(error), 200)
                raise UserError(f"{found}, but no way to the other processes ({reason}); {advice}") from None
        return DistEnv(rank, world_size, device)

    def all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """The sum over ranks, in place."""
        work = dist.all_reduce(x, async_op=True) if self.world_size > 1 else None

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return x

        return wait

    def reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """x (rows, ...) -> this rank's shard of the sum, in float32, to the same bits whenever it is run."""
        if self.world_size == 1:
            return lambda: x
        parts = torch.empty_like(x)
        work = dist.all_to_all_single(parts, x, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return parts.view(self.world_size, -1, *x.shape[1:]).sum(0, dtype=torch.float32)  # in one pass

        return wait

    def all_gather(self, whole: Tensor, shard: Tensor) -> Callable[[], None]:
        """Fills whole with every rank's shard, which may be a view of its place in it."""
        if self.world_size == 1:
            return lambda: None
        before_2_13 = getattr(dist, "all_gather_into_tensor", None)  # what all_gather_single was called
        gather = getattr(dist, "all_gather_single", before_2_13)
        work = gather(whole, shard, async_op=True)
        return work.wait

    def close(self, failed: bool) -> None:
        """A failed GPU run leaves without it: NCCL would wait for ranks that died."""
        if self.world_size > 1 and (self.device.type == "cpu" or not failed):
            dist.destroy_process_group()


class SparseGradient:
    """The bigram table's gradient between ranks: only rows that a token touched travel, as seed 002 asks.

    The tokens say which: indices go out, between hosts, during the forward pass, values after the backward.
    """

    def __init__(self, env: DistEnv, num_rows: int, timeout: timedelta):
        self.env, self.rows_per_rank = env, -(-num_rows // env.world_size)
        self.hosts = dist.new_group(backend="gloo", timeout=timeout)  # indices are the hosts': no GPU waits
        self.rows = np.empty(0, dtype=np.int64)  # that this rank's tokens touched since Adam's last step
        self.bytes_sent = 0

    def exchange_indices(self, rows: np.ndarray, last: bool) -> None:
        """rows that this rank's micro-batches of a step touch; last: of the steps whose gradients add up."""
        self.rows = np.union1d(self.rows, rows)
        if not last:
            return
        owner_ends = np.searchsorted(self.rows, self.rows_per_rank * np.arange(self.env.world_size + 1))
        self.send_counts = torch.from_numpy(np.diff(owner_ends))
        self.receive_counts = torch.empty_like(self.send_counts)
        dist.all_to_all_single(self.receive_counts, self.send_counts, group=self.hosts)
        self.received_rows = torch.empty(int(self.receive_counts.sum()), dtype=torch.int64)
        self.indices = dist.all_to_all_single(
            self.received_rows,
            torch.from_numpy(self.rows),
            self.receive_counts.tolist(),
            self.send_counts.tolist(),
            group=self.hosts,
            async_op=True,
        )

    def reduce_scatter(self, grad: Tensor) -> Callable[[], Tensor]:
        """grad (rows, D), dense -> a function that gives this rank's rows of the sum, as DistEnv's would."""
        self.indices.wait()
        device, counts = grad.device, self.receive_counts.tolist()
        rows = torch.empty(len(self.rows), dtype=torch.int64, device=device)
        copy_to_device(torch.from_numpy(self.rows), rows)
        values = grad[rows]
        arrived = values.new_empty(len(self.received_rows), values.size(1))
        work = dist.all_to_all_single(arrived, values, counts, self.send_counts.tolist(), async_op=True)
        sent_away = len(self.rows) - int(self.send_counts[self.env.rank])
        self.bytes_sent = sent_away * (grad[0].nbytes + self.rows.itemsize)
        place = copy_to_device(self.received_rows, torch.empty_like(self.received_rows, device=device))
        place -= self.rows_per_rank * self.env.rank
        self.rows = self.rows[:0]

        def wait() -> Tensor:
            work.wait()
            shard = torch.zeros(self.rows_per_rank, grad.size(1), device=device)
            by_rank = zip(place.split(counts), arrived.split(counts), strict=True)
            for rank_place, rank_values in by_rank:
                shard.index_add_(0, rank_place, rank_values.float())
            return shard

        return wait


@dataclass(frozen=True)
class StepBatch:
    """A rank's share of one step, and what follows from its tokens alone."""

    sequences: list[tuple[Tensor, Tensor]]  # (tokens, targets) of each micro-batch
    position: tuple[int, int]  # of the loader, behind them
    bigram_rows: np.ndarray  # rows of the bigram table that they touch; empty where nobody asks
    flops: int  # of the model on them, forward and backward


class Prefetcher:
    """Loads the batches of the next steps in a thread, while a step runs."""

    AHEAD = 8  # steps: a new shard takes its time

    def __init__(self, loader: Loader, schedule: Schedule, env: DistEnv, sparse_grad: SparseGradient | None):
        self.loader, self.schedule, self.env, self.sparse_grad = loader, schedule, env, sparse_grad
        self.worker = ThreadPoolExecutor(1)
        self.prefetched: dict[int, Future[StepBatch]] = {}

    def get(self, step: int) -> StepBatch:
        """The batch of a step; steps must be asked for in order."""
        cfg = self.schedule.cfg
        for later in range(step, min(step + self.AHEAD + 1, cfg.num_steps)):
            if later not in self.prefetched:
                self.prefetched[later] = self.worker.submit(self.load_batches, later)
        return self.prefetched.pop(step).result()

    def load_batches(self, step: int) -> StepBatch:
        stage, env = self.schedule.stage(step), self.env
        sequences = list(self.loader.load_batches(stage, env.rank, env.world_size))
        position = (self.loader.file, self.loader.document)
        rows = np.empty(0, dtype=np.int64)
        if self.sparse_grad is not None:
            rows = self.touched_rows(sequences)
        candidates = self.schedule.candidates(step)
        flops = sum(step_flops(self.schedule.cfg, sequences, stage.windows, candidates).values())
        return StepBatch(sequences, position, rows, flops)

    def touched_rows(self, sequences: list[tuple[Tensor, Tensor]]) -> np.ndarray:
        cfg = self.schedule.cfg
        num_rows = cfg.bigram_rows * cfg.vocab_rows
        touched = []
        for tokens, _ in sequences:
            is_first = Documents.find(tokens, cfg.bos_id).is_first
            touched += [rows for rows, _ in ngram_rows(tokens, is_first, num_rows, cfg.ngrams)]
        return torch.cat(touched).numpy()

    def close(self) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)


# ===== C. Log, checkpoints, signals: what a run says and leaves behind. =====


def open_standard_streams() -> None:
    """Where standard input, output or error is closed, the next file that is opened would take its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == number, f"{os.devnull} opened as {opened}, not {number}"
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # names of files may hold what cannot be printed


def one_line(text: str, limit: int = 1000) -> str:
    """text without line ends and control characters, which a terminal would obey, and not too long."""
    shown = "".join(c if c.isprintable() else " " for c in text).strip()
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def say(line: str, end: str = "\n") -> None:
    """A line for whoever watches. When nobody can (`| head`, a full disk), the run goes on without."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except (OSError, ValueError):
        silence = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(silence, sys.stdout.fileno())


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Libraries in C++ print stacks; what went wrong is in the exception too."""
    sys.stderr.flush()
    kept, silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silence)


def complain(message: str, exit_code: int) -> int:
    """One line on stderr, without control characters, -> exit_code."""
    with contextlib.suppress(OSError, ValueError):
        print(one_line(f"train_gpt.py: {message}"), file=sys.stderr, flush=True)
    return exit_code


def first_line(error: BaseException) -> str:
    """Of its message; without a message its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe_bug(error: Exception) -> str:
    """A line on an error of ours; its traceback in a file."""
    import tempfile
    import traceback

    text = f"failed by a bug of this program: {type(error).__name__}: {one_line(str(error), 300)}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="traceback-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        return f"{text}; please report it with {file.name}"
    except OSError:
        return text


Stopped = KeyboardInterrupt  # with the signal's name; `except Exception` lets it through


class StopSignals:
    """SIGTERM and Ctrl-C: noted for the end of the step if there is something to save, else the end, now."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.name: str | None = None  # of the last signal
        self.heard_at = 0.0  # when the first one came
        self.leaving = False  # the run ends already
        self.may_save: Callable[[], bool] = lambda: False

    def install(self, may_save: Callable[[], bool]) -> None:
        """may_save: whether the run has done anything since it began."""
        self.may_save = may_save
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _frame: object) -> None:
        if self.name is None:
            self.heard_at = time.monotonic()
        again = time.monotonic() - self.heard_at > 2  # torchrun's comes twice at once
        self.name = signal.Signals(number).name
        wait_for_step = self.cfg.save_on_stop and self.may_save()
        if not self.leaving and (again or not wait_for_step):
            raise Stopped(self.name)


class Clock:
    """Training time only: it stands still during validation, compilation and warm-up."""

    def __init__(self, machine: "Gpu | Cpu"):
        self.machine, self.total, self.started = machine, 0.0, None

    def start(self) -> None:
        self.machine.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.machine.synchronize()
        self.total, self.started = self.total + time.perf_counter() - self.started, None

    def seconds(self) -> float:
        running = time.perf_counter() - self.started if self.started is not None else 0.0
        return self.total + running


class LiveLine:
    """Where a terminal shows the run: its state, in one line that is written over."""

    CLEAR = "\r\x1b[K"

    def __init__(self, env: DistEnv):
        alone = "TORCHELASTIC_RUN_ID" not in os.environ and env.world_size == 1
        self.shown = alone and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.drawn = False

    def show(self, text: str) -> None:
        if self.shown:
            columns = shutil.get_terminal_size().columns
            say(f"{self.CLEAR}{text[: columns - 1]}", end="")
            self.drawn = True

    def clear(self) -> None:
        if self.drawn:
            say(self.CLEAR, end="")
        self.drawn = False


class Log:
    """One file a run: the source, the configuration, then one line of key:value pairs an event."""

    SEPARATOR = "=" * 100

    def __init__(self, cfg: Config, env: DistEnv, saved: dict | None = None):
        """saved: the checkpoint that the run goes on from; its log is appended to."""
        self.run_id = saved["run_id"] if saved else str(uuid.uuid4())
        self.path = Path(cfg.log_dir) / f"{self.run_id}.txt"
        self.file, self.appending = None, False
        self.waiting: list[str] = []  # lines, until the run begins
        self.live = LiveLine(env)
        self.writes = env.rank == 0
        if not self.writes:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.appending = saved is not None and self.path.exists()
            if self.appending:
                self.open()
                written = self.path.read_bytes()
                if written and not written.endswith(b"\n"):  # the disk was full, or it was killed
                    self.file.write("\n")
            else:  # an interrupted start leaves no log, but what cannot be written must show now
                probe = self.path.with_name(f".{self.run_id}.probe")
                probe.touch()
                probe.unlink()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--log_dir {cfg.log_dir}: no log can be written there ({reason})") from None
        say(f"log: {self.path}")

    def open(self) -> None:
        """Line by line: an interrupted log is whole so far. Locked: two runs would mix their lines."""
        self.file = self.path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.writes, advice = False, "wait for it or end it"
            raise UserError(f"{self.path}: another process goes on with this run; {advice}") from None
        except OSError:
            pass  # a file system without locks

    def begin(self) -> None:
        """The lines that wait go to disk, and from now on every line at once."""
        lines, self.waiting = self.waiting, []
        if not lines or not self.writes:
            return
        try:
            if self.file is None:
                self.open()
            self.file.writelines(f"{line}\n" for line in lines)
        except OSError as error:  # a full disk: the run matters more than its log
            complain(f"log: a line could not be written ({error.strerror})", 0)

    def write(self, line: str, echo: bool = True) -> None:
        """Once the run has begun, to disk."""
        if self.writes:
            self.waiting.append(line)
        if self.file is not None:
            self.begin()
        if echo and self.writes:
            self.live.clear()
            say(line)

    def header(self, cfg: Config, overrides: dict, facts: dict[str, object]) -> None:
        """facts: what is known of the machine. A log that goes on has its header already."""
        if not self.writes or self.appending:
            return
        source, config = f"source_sha256:{source_hash()}", f"config:{json.dumps(asdict(cfg))}"
        for line in (SOURCE.rstrip("\n"), self.SEPARATOR, source, config):
            self.write(line, echo=False)
        self.write(f"preset:{cfg.preset} overrides:{json.dumps(overrides)}")
        for name, fact in facts.items():
            self.write(f"{name}: {fact}")
        self.write(self.SEPARATOR, echo=False)

    def remove(self) -> None:
        """The log of a run that did nothing."""
        if self.writes and not self.appending:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets the lock go."""
        self.live.clear()
        file, self.file = self.file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def source_hash() -> str:
    return hashlib.sha256(SOURCE.encode()).hexdigest()


def run_facts(machine: "Gpu | Cpu", env: DistEnv, model: GPT, ceiling: float) -> dict[str, object]:
    """What the log's header says of machine and model. Never the environment: it may hold tokens."""
    threads, total = torch.get_num_threads(), sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if name in ("qkvo", "mlp"))
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
        "hardware": f"{machine.name()}; {env.world_size} process(es), {threads} thread(s) each",
        "precision": str(model.dtype).removeprefix("torch."),
        "compile": machine.compile_failure or "torch.compile",
        "parameters": f"{total:,}, of them {matrices:,} in matrices",
        "matrix ceiling": f"{ceiling / 1e9:.0f} GFLOP/s measured, all processes together",
        "operators": model.kernels.note,
        "joined": f"{model.cfg.join} micro-batch(es) a pass",
    }


@dataclass(frozen=True)
class PendingLoss:
    """A step whose loss may still be on its way from the device."""

    step: int
    host: Tensor  # (2,): loss, how many ranks want to stop
    wait: Callable[[], None]  # until it is there
    tokens_seen: int
    flops: int


class Progress:
    """A line for each step, and the end of the run when a loss is not finite."""

    def __init__(self, cfg: Config, log: Log, clock: Clock, model: GPT, ceiling: float, step_lag: int):
        self.cfg, self.log, self.clock, self.model, self.ceiling = cfg, log, clock, model, ceiling
        self.pending_losses: list[PendingLoss] = []
        self.average: float | None = None  # of the training loss, over about ten steps
        self.stop_requested = False
        self.tokens_of_run = Schedule(cfg).tokens
        self.remember_norms()

    def add(self, step: int, copied: tuple[Tensor, Callable[[], None]], tokens_seen: int, flops: int) -> None:
        host, wait = copied
        self.pending_losses.append(PendingLoss(step, host, wait, tokens_seen, flops))

    def report(self, lag: int) -> None:
        """Writes the losses of all steps but the last `lag`: a GPU is read a step late, so as not to wait."""
        while len(self.pending_losses) > lag:
            pending = self.pending_losses.pop(0)
            pending.wait()
            loss, stops = pending.host.tolist()
            self.stop_requested = self.stop_requested or stops > 0
            self.require_finite(loss, "training", pending.step)
            seconds = self.clock.seconds()
            rate = pending.tokens_seen / seconds
            mfu = pending.flops / seconds / self.ceiling
            pairs = f" train_loss:{loss:.4f} tokens_per_second:{rate:.0f} mfu:{mfu:.3f}"
            self.write_event(pending.step, "", pairs, echo=not self.log.live.shown)
            if self.average and loss > 1.3 * self.average:
                rise = f"train_loss {loss:.4f} at step {pending.step}, {self.average:.4f} before"
                self.log.write(f"spike: {rise}; {self.suspect()}")
            self.average = 0.9 * (self.average or loss) + 0.1 * loss
            if self.log.live.shown:
                self.show(pending.step, self.tokens_of_run - pending.tokens_seen, rate, mfu)

    def show(self, step: int, tokens_left: int, rate: float, mfu: float) -> None:
        """On a terminal, in place of a line a step. rate: tokens a second; mfu: of the matrix ceiling."""
        minutes, seconds = divmod(round(tokens_left / rate), 60)
        left = f"{minutes}:{seconds:02} left"
        speed = f"{rate:,.0f} tokens/s, {mfu:.0%} of the ceiling"
        self.log.live.show(f"step {step}/{self.cfg.num_steps}   loss {self.average:.3f}   {left}   {speed}")

    def write_event(self, step: int, before: str, after: str, echo: bool = True) -> None:
        """The form that every tool of this field reads; more key:value pairs only behind it."""
        milliseconds = 1e3 * self.clock.seconds()
        average = milliseconds / max(step, 1)
        at = f"step:{step}/{self.cfg.num_steps}"
        self.log.write(f"{at} {before}train_time:{milliseconds:.0f}ms step_avg:{average:.2f}ms{after}", echo)

    def write_summary(self, tokens_seen: int, flops: int, peak_memory: int) -> None:
        """What people plot afterwards (seeds 003, 004): learned scalars by layer, and what the run took."""
        for name, p in self.model.named_parameters():
            if name.endswith("_scale"):
                values = [round(value, 4) for value in p.flatten().tolist()]
                self.log.write(f"scalars:{name} {json.dumps(values)}", echo=False)
        mfu = flops / max(self.clock.seconds(), 1e-9) / self.ceiling
        self.log.write(f"peak_memory:{peak_memory / 2**20:.0f}MiB tokens:{tokens_seen} mfu:{mfu:.3f}")

    def require_finite(self, loss: float, kind: str, step: int) -> float:
        if not math.isfinite(loss):
            advice = "lower --muon_lr or --adam_lr"
            raise RunFailed(f"the {kind} loss is {loss} at step {step} ({self.suspect()}); {advice}")
        return loss

    @torch.no_grad()
    def group_norms(self) -> dict[str, float]:
        return {name: float(p.norm(dtype=torch.float32)) for name, p in self.model.named_parameters()}

    def remember_norms(self) -> None:
        self.norms = self.group_norms()

    def suspect(self) -> str:
        """The parameter group that a loss gone wrong points to."""
        now = self.group_norms()
        broken = [name for name, size in now.items() if not math.isfinite(size)]
        if broken:
            return f"not finite: {', '.join(broken)}"
        growth = {name: now[name] / (self.norms[name] + 1e-6) if self.norms[name] else 0.0 for name in now}
        name = max(growth, key=growth.get)
        rise = f"from norm {self.norms[name]:.4g} to {now[name]:.4g}"
        return f"grown most since the last validation: {name}, {rise}"


def matrix_flops(cfg: Config) -> dict[str, int]:
    """FLOPs of matrix products for a token, forward, by part; attention's scores depend on documents."""
    D, attending = cfg.model_dim, sum(layer.attends for layer in topology(cfg))
    return {
        "projections": 2 * attending * 4 * D * cfg.num_heads * cfg.head_dim,
        "MLP": 2 * len(cfg.windows) * 2 * cfg.mlp_ratio * D**2,
        "head": 2 * D * cfg.vocab_rows,
    }


def attended_pairs(tokens: np.ndarray, bos_id: int, window: int, paired: bool) -> int:
    """Query-key pairs that the mask lets through, for each head (or pair of heads), of one sequence."""
    position = np.arange(len(tokens))
    age = position - np.maximum.accumulate(np.where(tokens == bos_id, position, 0)) + 1
    visible = (2 * age - 1, 2 * age) if paired else (age,)
    return int(sum(np.minimum(keys, window).sum() for keys in visible))


def step_flops(
    cfg: Config, batches: list[tuple[Tensor, Tensor]], windows: tuple[int, int], candidates: int = 0
) -> dict[str, int]:
    """FLOPs of the model on these micro-batches by part, 3 x forward, without recomputation.

    candidates: tokens that the softmax is over; 0: all.
    """
    count = len(batches) * len(batches[0][0])
    parts = {part: 3 * count * flops for part, flops in matrix_flops(cfg).items()}
    parts["head"] = parts["head"] * (candidates or cfg.vocab_rows) // cfg.vocab_rows
    parts["attention"] = 0
    kinds = Counter((layer.window, layer.paired) for layer in topology(cfg) if layer.attends)
    for tokens, _ in batches:
        for (kind, paired), layers in kinds.items():
            window = windows[1] if kind == "long" else windows[0]
            pairs = layers * attended_pairs(tokens.numpy(), cfg.bos_id, window, paired)
            heads = cfg.num_heads // (2 if paired else 1)
            two_products = 4 * cfg.head_dim * pairs  # of head_dim multiply-adds a pair
            parts["attention"] += 3 * heads * two_products
    return parts


CHECKPOINT_FORMAT = 3  # 1: o transposed, skips after the mix, gradients of the mean loss; 2: other names
KEPT_CHECKPOINTS = 2
RUN_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,99}", re.ASCII)
# Settings that say nothing of what a run computes: a resumed run may have others.
MAY_DIFFER = {
    "join",
    "data_dir",
    "log_dir",
    "rank_timeout",
    "save_every",
    "save_on_stop",
    "resume",
    "compile",
    "reference",
    "operators",
    "graphs",
    "warmup",
    "val_every",
}
CHECKPOINT_TYPES = {
    "format": int,
    "config": str,
    "run_id": str,
    "source_sha256": str,
    "torch": str,
    "hardware": str,
    "saved_at": float,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "tied": bool,
    "loader": tuple,
    "clock": float,
    "tokens_seen": int,
    "flops": int,
    "average": (float, type(None)),
    "rng": Tensor,
}


def settings(cfg: Config) -> dict:
    """The configuration as a checkpoint keeps it; what `auto` came to on this machine is part of it."""
    dtype = str(pick_dtype(cfg)).removeprefix("torch.")
    return json.loads(json.dumps(asdict(cfg) | {"dtype": dtype}))


class Checkpoints:
    """A run's checkpoints, beside its log; the newest few are kept."""

    def __init__(self, cfg: Config, log: Log, facts: dict[str, object]):
        self.cfg, self.log, self.hardware = cfg, log, one_line(str(facts["hardware"]))

    def write(self, step: int, **content: Any) -> None:
        """A new file. Where it cannot be written the run goes on, and the last good one stays."""
        path = Path(self.cfg.log_dir) / checkpoint_name(self.log.run_id, step)
        content |= dict(
            format=CHECKPOINT_FORMAT,
            config=json.dumps(settings(self.cfg)),
            run_id=self.log.run_id,
            source_sha256=source_hash(),
            torch=str(torch.__version__),
            hardware=self.hardware,
            saved_at=time.time(),
            step=step,
        )
        try:
            save_checkpoint(path, content)
            self.log.write(f"checkpoint: {path}")
        except (OSError, RuntimeError) as error:
            while error.__context__:  # a full disk, most often, behind RuntimeErrors of torch
                error = error.__context__
            reason = first_line(error)
            self.log.write(f"checkpoint: NOT saved at step {step}, the last good one stays ({reason})")

    def write_changes(self, saved: dict) -> None:
        """Into the log: what is no longer as it was. A record may not change its source."""
        now = {"torch": str(torch.__version__), "hardware": self.hardware}
        if saved["source_sha256"] != source_hash():
            change = f"sha256 was {saved['source_sha256']}, is {source_hash()}"
            self.log.write(f"resumed: source changed, {change}")
        for name, value in now.items():
            if saved[name] != value:
                self.log.write(f"resumed: {name} changed, was {saved[name]}, is {value}")


def save_checkpoint(path: Path, content: dict) -> None:
    """Whole or not at all: it gets its name when it is on disk. OSError or RuntimeError where that fails."""
    part = path.with_name(f".{path.name}.part")
    run = path.name.partition(".step")[0]
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    for killed in path.parent.glob(f".{run}.step*.part"):  # what a process that was killed left
        with contextlib.suppress(OSError):
            killed.unlink()
    # Steps count, not times of change: clocks are set back, copies look new. What stands at a later step is
    # damaged, or not this run's: it stays, until the run comes there. So does RUN.step000100.best.pt.
    found = path.parent.glob(f"{run}.step*.pt")
    own = [other for other in found if other.name == checkpoint_name(run, step_of(other))]
    older = sorted((other for other in own if step_of(other) < step_of(path)), key=step_of, reverse=True)
    for superseded in older[KEPT_CHECKPOINTS - 1 :]:
        with contextlib.suppress(OSError):  # the new one is safe; that counts
            superseded.unlink()


def checkpoint_name(run: str, step: int) -> str:
    return f"{run}.step{step:06d}.pt"


def step_of(path: Path) -> int:
    """RUN.step000100.pt -> 100; -1 for another name."""
    match = re.search(r"\.step(\d{1,9})\.pt$", path.name, re.ASCII)
    return int(match[1]) if match else -1


def load_whole(path: Path, thoroughly: bool = True) -> Any:
    """What torch.save wrote, none of whose code is run. Errors of many kinds if it is not whole.

    thoroughly: with its checksums, which torch writes but never reads.
    """
    if thoroughly and zipfile.ZipFile(path).testzip():
        raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def is_plain(value: object) -> bool:
    """A tensor whose values are there: not sparse, and not on the device meta, which has none."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def read_checkpoint(path: Path, passed_over: list[str], thoroughly: bool = True) -> dict | None:
    """The content of a checkpoint, see load_whole, and its path as "file".

    None, and a line more in passed_over, if it is not whole.
    """
    try:
        content = load_whole(path, thoroughly)
        if not isinstance(content, dict) or not {"format", "config"} & content.keys():
            raise ValueError
        return content | {"file": path}
    except Exception as error:  # noqa: BLE001, half a file can fail in many ways
        passed_over.append(f"resume: {path} is not whole ({type(error).__name__}), looking for an older one")
        return None


def check_checkpoint(content: dict, cfg: Config) -> None:
    """UserError for a whole file that this run cannot go on from: another version, or tampered with."""
    path, found = content["file"], content.get("format")
    old = "a checkpoint of another train_gpt.py, whose model computes or keeps something else"
    advice = "start anew under another --log_dir, or finish it with the train_gpt.py in its log"
    need(isinstance(found, int) and found == CHECKPOINT_FORMAT, f"{path}: {old}; {advice}")
    remove = "remove it to go on without"
    for name, kind in CHECKPOINT_TYPES.items():
        value = content.get(name)
        right = name in content and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        right = right and (kind is not str or name == "config" or one_line(value) == value)
        need(right, f"{path}: holds no {name} of the right kind; {remove}")
    check_same_config(content, cfg)
    need(RUN_ID.fullmatch(content["run_id"]), f"{path}: its run id is no name for a file; {remove}")
    within = 0 < content["step"] <= cfg.num_steps
    need(within, f"{path}: stands at step {content['step']} of {cfg.num_steps}; {remove}")
    for name in ("clock", "tokens_seen", "flops", "average"):
        sane = content[name] is None or 0 <= content[name] < math.inf
        need(sane, f"{path}: its {name} is {content[name]}; {remove}")
    position = content["loader"]
    counts = len(position) == 2 and all(isinstance(n, int) and n >= 0 for n in position)
    need(counts, f"{path}: its place in the data is {position!r}; {remove}")
    try:
        torch.Generator().set_state(content["rng"])
    except (RuntimeError, TypeError):
        raise UserError(f"{path}: holds no state of a random generator; {remove}") from None


def check_same_config(content: dict, cfg: Config) -> None:
    path = content["file"]
    try:
        then = json.loads(content["config"])
        if not isinstance(then, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: holds no config of the right kind; remove it to go on without") from None
    now, differing = settings(cfg), []
    defaults = json.loads(json.dumps(asdict(Config())))  # of fields that came after the checkpoint
    for name in sorted({*then, *now} - MAY_DIFFER):
        before = then.get(name, defaults.get(name))
        if before != now.get(name):
            differing.append(f"--{name} was {before}, is {now.get(name)}")
    advice = "use its flags, another --log_dir, or no --resume"
    need(not differing, f"{path}: a checkpoint of another configuration ({'; '.join(differing)}); {advice}")


def check_tensors(content: dict, model: GPT, optimizer: Optimizer) -> None:
    """UserError if a checkpoint's tensors are not such as the model's and the optimizer's, or not finite."""
    path, remove = content["file"], "remove it to go on without"
    expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    if model.cfg.ema_rate:
        expected |= {f"live {name}": expected[name] for name, _ in model.named_parameters()}
    for name, state in optimizer.state.items():
        for key, shard in state.items():
            expected[f"{name} {key}"] = optimizer.whole_shape(name, key), shard.dtype
    live = content.get("live", {})  # a checkpoint may be older than it
    need(isinstance(live, dict), f"{path}: holds no live of the right kind; {remove}")
    tensors = content["model"] | {f"live {name}": t for name, t in live.items()}
    for name, state in content["optimizer"].items():
        need(isinstance(state, dict), f"{path}: no state of the optimizer for {name}; {remove}")
        tensors |= {f"{name} {key}": t for key, t in state.items()}
    found = {}
    for name, t in tensors.items():
        found[name] = (tuple(t.shape), t.dtype) if is_plain(t) else "not a tensor"
    different = [str(name) for name in expected | found if expected.get(name) != found.get(name)]
    names = ", ".join(different[:5])
    need(not different, f"{path}: not the tensors of this model and optimizer ({names}); {remove}")
    for name, t in tensors.items():
        finite = not t.is_floating_point() or bool(t.isfinite().all())
        need(finite, f"{path}: {name} is not finite; remove it to go on from an older one")


def check_place(content: dict, schedule: Schedule, loader: Loader) -> None:
    """UserError if a checkpoint's long window is not its step's, or its place is not in the data."""
    path, step, (file, document) = content["file"], content["step"], content["loader"]
    window, expected = int(content["model"]["long_window"]), schedule.windows(step - 1)[1]
    need(
        window == expected, f"{path}: its long window is {window}, not {expected}; remove it to go on without"
    )
    if file < len(loader.files):
        loader.open(file)
    inside = file < len(loader.files) and document <= len(loader.starts)
    shards = f"--data_dir {loader.cfg.data_dir}"
    need(
        inside, f"{path}: document {document} of shard {file} is not in {shards}; give the data that it read"
    )


def find_checkpoint(cfg: Config, env: DistEnv) -> dict | None:
    """The newest whole checkpoint under log_dir, the same for all ranks, or None."""
    passed_over: list[str] = []
    content, _ = newest_checkpoint(cfg, passed_over)
    if content is not None:
        check_checkpoint(content, cfg)  # if it is refused, that is the only line
    for line in passed_over:
        complain(line, 0)
    found = torch.tensor(content["step"] + 1 if content else 0, device=env.device)
    wait = env.all_reduce(found.clone())
    together = int(wait()) == env.world_size * int(found)
    advice = "all nodes must see the same folder"
    need(together, f"--log_dir {cfg.log_dir}: the processes found different checkpoints there; {advice}")
    return content


def newest_checkpoint(cfg: Config, passed_over: list[str]) -> tuple[dict | None, Path | None]:
    """The newest whole one under log_dir, with its path; (None, None): there is none."""
    try:
        paths = [path for path in Path(cfg.log_dir).glob("*.step*.pt") if step_of(path) >= 0]
    except OSError as error:
        raise UserError(f"--log_dir {cfg.log_dir}: cannot be read ({error.strerror})") from None
    return newest_of(paths, passed_over)


def newest_of(paths: list[Path], passed_over: list[str]) -> tuple[dict | None, Path | None]:
    """The newest whole one, by what they say: runs by the time of their newest, a run's files by steps.

    passed_over: gets a line for each that is not whole.
    """
    by_run: dict[str, list[dict]] = {}
    for path in paths:
        content = read_checkpoint(path, passed_over, thoroughly=False)
        if content is not None:
            by_run.setdefault(str(content.get("run_id")), []).append(content)
    for contents in by_run.values():
        contents.sort(key=partial(stated_number, name="step"), reverse=True)
    runs = sorted(by_run.values(), key=lambda run: stated_number(run[0], "saved_at"), reverse=True)
    for contents in runs:
        for content in contents:
            whole = read_checkpoint(content["file"], passed_over)
            if whole is not None:
                return whole, whole["file"]
    return None, None


def stated_number(content: dict, name: str) -> float:
    """A number in a checkpoint that nobody has checked yet, to sort by."""
    value = content.get(name)
    return value if isinstance(value, (int, float)) and value == value else -math.inf


# ===== D. Machine: dtype, compiler, warm-up; then the GPU: its kernels, graphs, copies. =====


def pick_dtype(cfg: Config) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it, else float32."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    return torch.bfloat16 if multiplies_bfloat16(cfg.device) else torch.float32


def multiplies_bfloat16(device: str) -> bool:
    """GPUs do, and CPUs with AVX-512 BF16 or AMX; emulated, a product takes twenty times as long."""
    return device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def least_memory(cfg: Config, dtype: torch.dtype, world_size: int) -> dict[str, int]:
    """Bytes that a process cannot do without, by what they hold: there is more, which depends on kernels."""
    needed = {"parameters and gradients": 0, "the optimizer": 0}
    for spec in parameter_table(cfg):
        values, size = math.prod(spec.full_shape), 4 if spec.fp32 else dtype.itemsize
        by_row = spec.name == "bigram_embed" and cfg.bigram_by_row
        sparse = by_row and cfg.device == "cpu" and world_size == 1  # see Cpu.choose_kernels
        needed["parameters and gradients"] += values * size * (1 if sparse else 2)
        moments = values * 4 * (0 if by_row else 2)
        needed["the optimizer"] += moments // (world_size if spec.sharded else 1)
    of_a_layer = 8 * cfg.model_dim * dtype.itemsize  # a token's x, q, k, v, and the MLP's hidden values
    together = max(1, cfg.join) * most_tokens(cfg)
    return needed | {"a micro-batch": together * of_a_layer * len(cfg.windows)}


def joined_by_memory(cfg: Config, machine: "Gpu | Cpu", world_size: int) -> int:
    """How many of a rank's micro-batches a GPU computes together: 1, 2, 4, ...

    A token takes 28 values of the model's width a layer, by what an H100 reserved for `short`, graphs among
    it (records/gpu); all is to fit into seven tenths of the memory. Plain attention takes several times that.
    """
    if cfg.device == "cpu" or cfg.reference:
        return 1
    needed = least_memory(cfg, machine.dtype, world_size)
    fixed = needed["parameters and gradients"] + needed["the optimizer"]
    a_micro_batch = most_tokens(cfg) * 28 * cfg.model_dim * machine.dtype.itemsize * len(cfg.windows)
    share, joined = cfg.micro_batches // world_size, 1
    while share % (2 * joined) == 0 and fixed + 2 * joined * a_micro_batch <= 0.7 * machine.total_memory():
        joined *= 2
    return joined


def check_memory(cfg: Config, machine: "Gpu | Cpu", env: "DistEnv") -> None:
    """UserError before anything is written, if a run cannot fit whatever else it does."""
    needed, there = least_memory(cfg, machine.dtype, env.world_size), machine.total_memory()
    parts = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in needed.items())
    sizes = " ".join(
        f"--{name} {getattr(cfg, name)}" for name in ("model_dim", "bigram_rows", "micro_batches")
    )
    advice = "use a smaller model, or raise --micro_batches"
    fits = sum(needed.values()) <= there
    need(fits, f"{sizes}: takes at least (GiB) {parts}; there are {there / 2**30:,.1f}; {advice}")


def compile_failure(cfg: Config, device: torch.device) -> str | None:
    """Why torch.compile cannot be used here (no C++ compiler, say), by trying it."""
    if not cfg.compile:
        return "--no-compile"
    try:
        compiled = torch.compile(lambda x: x.sin() + 1)
        compiled(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001, whatever it is, the run goes on without
        return f"torch.compile failed: {first_line(error)}"
    torch._dynamo.config.recompile_limit = 64  # a graph for each kind of layer, stage and validation window
    return None


def compile_for_any_length(f: Callable) -> Callable:
    """f as one graph, compiled once for all sizes of its tensors' first dimension."""
    compiled = torch.compile(f, fullgraph=True)

    def call(*arguments: Any) -> Any:
        for t in tensors_in(arguments):
            if t.dim():
                torch._dynamo.maybe_mark_dynamic(t, 0)
        return compiled(*arguments)

    return call


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict, Positions)):
        inner = vars(value) if isinstance(value, Positions) else value
        for item in inner.values() if isinstance(inner, dict) else inner:
            yield from tensors_in(item)


def matrix_ceiling(
    device: torch.device, dtype: torch.dtype, size: int, synchronize: Callable[[], None]
) -> float:
    """FLOP/s of a large square matrix product: the best of several, outside the clock."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    synchronize()
    times = [time.perf_counter()]
    while len(times) < 4 or times[-1] - times[0] < 0.25:
        a @ b
        synchronize()
        times.append(time.perf_counter())
    return 2 * size**3 / float(np.diff(times).min())


def copy_to_device(host: Tensor, onto: Tensor) -> Tensor:
    """Host memory onto a tensor of the device; a GPU's queue goes on meanwhile."""
    return onto.copy_(host.pin_memory() if onto.is_cuda else host, non_blocking=True)


class Gpu:
    """What the trainer asks of a CUDA GPU. Cpu has the same methods."""

    step_lag = 1  # steps whose loss is not read yet: the host stays ahead
    compiles_validation = True

    def __init__(self, cfg: Config):
        local_rank, gpus = read_environment("LOCAL_RANK", 0), torch.cuda.device_count()
        advice = "use --preset cpu, or --device cpu"
        need(gpus > 0, f"--preset {cfg.preset}, --device cuda: there is no CUDA GPU; {advice}")
        own = local_rank < gpus
        advice = "start as many processes as GPUs"
        need(own, f"process {local_rank} has no GPU of its own, there are {gpus}; {advice}")
        torch.cuda.set_device(local_rank)
        self.cfg, self.device, self.dtype = cfg, torch.device("cuda", local_rank), pick_dtype(cfg)
        self.inputs: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def total_memory(self) -> int:
        """Bytes that this process may use."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def matrix_ceiling(self) -> float:
        return matrix_ceiling(self.device, self.dtype, 8192, self.synchronize)

    def choose_kernels(self, cfg: Config, env: DistEnv, before: dict[str, str]) -> Kernels:
        """before: versions of operators that a checkpoint was made with; a flag's go first."""
        self.compile_failure = compile_failure(cfg, self.device)
        kernels = plain_kernels(static_grads=True)
        if self.compile_failure is None:
            kernels = replace(
                kernels,
                compile=partial(torch.compile, dynamic=False, fullgraph=True),
                compile_layers=compile_for_any_length,
                normuon_=torch.compile(normuon_, dynamic=False),
                adam_=torch.compile(adam_, dynamic=False),
                adam_rows_=torch.compile(adam_rows_, dynamic=False),
            )
        if self.dtype == torch.bfloat16 and not cfg.reference:
            pins = before | read_operators(cfg.operators)
            kernels = choose_versions(cfg, env, kernels, operator_trials(cfg, env), pins)
        self.compiles_validation = kernels.attention is not banded_attention
        if self.compile_failure is None and not self.compiles_validation:
            kernels = compile_in_pieces(kernels)
        torch.cuda.empty_cache()  # the trials' memory is not the run's
        torch.cuda.reset_peak_memory_stats()
        return kernels

    def new_graphs(self, log: Log) -> "CudaGraphs | NoGraphs":
        return CudaGraphs(log) if self.cfg.graphs else NoGraphs()

    def copy_batches(self, sequences: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches where the model reads them: in the same memory every time."""
        length = len(sequences[0][0])
        if length not in self.inputs:
            empty = partial(torch.empty, length, dtype=torch.int64, device=self.device)
            self.inputs[length] = [(empty(), empty()) for _ in sequences]
        copies = []
        for (tokens, targets), (to_tokens, to_targets) in zip(sequences, self.inputs[length], strict=True):
            copies.append((copy_to_device(tokens, to_tokens), copy_to_device(targets, to_targets)))
        return copies

    def copy_to_host(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """-> what is on the host, once the function has been called, which waits."""
        host, event = torch.empty(x.shape, pin_memory=True), torch.cuda.Event()
        host.copy_(x, non_blocking=True)
        event.record()
        return host, event.synchronize

    def peak_memory(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated()


OPERATORS = {  # each one's versions; without a measurement the first right one runs
    "attention": ("kernel", "plain"),
    "prepare_qkv": ("kernel", "plain"),
    "mlp": ("fp8", "kernel", "plain"),
    "head_chunk": ("fp8", "kernel", "plain"),
    "symmetric_product": ("kernel", "plain"),
    "transpose_": ("kernel", "plain"),
    "look_up": ("kernel", "plain"),
}
CLEARLY = 1.02  # times as fast as the first right version: what a later one must be to be taken


def read_operators(text: str) -> dict[str, str]:
    """The flag --operators -> version by operator. UserError."""
    pins = {}
    for word in filter(None, text.split(",")):
        name, _, version = word.partition("=")
        known = version in OPERATORS.get(name, ())
        choices = "; ".join(f"{operator}={'|'.join(versions)}" for operator, versions in OPERATORS.items())
        need(known, f"--operators {word}: there is no such version; there are {choices}")
        pins[name] = version
    return pins


def operators_of(saved: dict | None) -> dict[str, str]:
    """What a checkpoint's run took: the same bits come of the same versions."""
    try:
        return read_operators(str(json.loads(saved["config"]).get("operators", ""))) if saved else {}
    except UserError:
        return {}


@dataclass(frozen=True)
class Trial:
    """An operator's fast versions, what they must show before one is taken, and at what they are timed."""

    fast: dict[str, Callable]
    small: list  # arguments on which results are compared
    large: Callable[[], list]  # arguments of the model's sizes
    leaves: int = 0  # of the arguments, by which gradients are computed, too
    tolerance: dict[str, float] = field(default_factory=dict)  # else 0.02
    shows: Callable[[Callable], Callable] = lambda operator: operator  # the operator -> what is compared
    timed: Callable[[Callable], Callable] | None = None  # and what is timed, if that is something else
    compiled: bool = True  # the model calls it from compiled code
    needs: dict[str, bool] = field(default_factory=dict)  # fields of Kernels that go with the kernel


class TrialInputs:
    """Arguments of the operators, random, for T tokens."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg, self.device = cfg, device
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device).bfloat16()

    def attention(self, T: int, heads: int, length: int, window: int) -> list:
        place = torch.arange(T, device=self.device)
        first_key = torch.maximum(place // length * length, place - window + 1)
        scale = torch.tensor(0.1, device=self.device)
        return [*self.random(3, T, heads, self.cfg.head_dim), first_key, window, scale]

    def prepare_qkv(self, T: int) -> list:
        """What `prepared` takes."""
        heads = self.cfg.num_heads, self.cfg.head_dim
        is_first = torch.arange(T, device=self.device) % 99 == 0
        angles = torch.rand(2 * T, self.cfg.rotary_pairs, generator=self.generator, device=self.device)
        return [self.random(T, 3, *heads), self.random(T, *heads), is_first, angles.cos(), angles.sin()]

    def mlp(self, T: int) -> list:
        D = self.cfg.model_dim
        up_and_down = self.random(2, self.cfg.mlp_ratio * D, D) / D**0.5
        return [self.random(T, D), *up_and_down, self.cfg.activation]

    def head_chunk(self, T: int) -> list:
        cfg, D = self.cfg, self.cfg.model_dim
        x, head = self.random(T, D), self.random(D, cfg.vocab_rows) * 6 / D**0.5
        targets = (x @ head).topk(2).indices  # likely ones: the others weigh, too
        weights = torch.full((T, 2), 1 / T, device=self.device)
        return [x, head, targets, weights, (cfg.softcap, cfg.softcap_shift, cfg.softcap_width), True]

    def transpose_(self, rows: int, columns: int) -> list:
        return [self.random(rows, columns), self.random(columns, rows), True]

    def look_up(self, table_rows: int, T: int) -> list:
        D = self.cfg.model_dim
        often = torch.rand(T, generator=self.generator, device=self.device) ** 2  # some rows often
        return [self.random(table_rows, D), (often * table_rows).long(), self.random(T, D)]


def operator_trials(cfg: Config, env: DistEnv) -> dict[str, Trial]:
    make, D, V = TrialInputs(cfg, env.device), cfg.model_dim, cfg.vocab_rows
    few, many = 384, max(1, cfg.join) * most_tokens(cfg)
    matrices = -(-len(cfg.windows) // env.world_size)  # a rank's share
    has_fp8 = compute_capability() >= 89
    mlps = {"kernel": triton_mlp}
    if cfg.fp8_mlp and has_fp8 and cfg.activation == "relu2":
        mlps = {"fp8": partial(triton_mlp, fp8=True)} | mlps
    heads = {"kernel": partial(triton_head_chunk, fp8=False)}
    if cfg.fp8_head and has_fp8:
        heads = {"fp8": triton_head_chunk} | heads
    return {
        "attention": Trial(
            {"kernel": triton_attention},
            make.attention(few, 2, length=99, window=few),
            partial(make.attention, many, cfg.num_heads, length=600, window=cfg.stages[-1].windows[0]),
            leaves=3,
            needs={"reads_window": False},
        ),
        "prepare_qkv": Trial(
            {"kernel": triton_prepare_qkv},
            make.prepare_qkv(few),
            partial(make.prepare_qkv, many),
            leaves=2,
            shows=lambda prepare: partial(prepared, prepare, cfg),
        ),
        "mlp": Trial(mlps, make.mlp(few), partial(make.mlp, many), leaves=3, tolerance={"fp8": 0.15}),
        "head_chunk": Trial(
            heads,
            make.head_chunk(few),
            partial(make.head_chunk, min(many, HEAD_CHUNK["cuda"])),
            tolerance={"fp8": 0.1},
        ),
        "symmetric_product": Trial(
            {"kernel": triton_symmetric_product},
            [make.random(2, 2 * D, D).mT],
            lambda: [make.random(matrices, cfg.mlp_ratio * D, D)],
            timed=lambda product: partial(polar_express, symmetric_product=product),
        ),
        "transpose_": Trial(
            {"kernel": triton_transpose_},
            make.transpose_(D, few),
            partial(make.transpose_, V, D),
            compiled=False,
        ),
        "look_up": Trial(
            {"kernel": triton_look_up},
            make.look_up(99, few),
            partial(make.look_up, V, many),
            shows=table_gradient,
            compiled=False,
            needs={"sorted_lookups": True},
        ),
    }


def choose_versions(
    cfg: Config, env: DistEnv, kernels: Kernels, trials: dict[str, Trial], pins: dict[str, str]
) -> Kernels:
    """Of each operator the fastest of the versions that give the plain one's result; pins: by name.

    Compared on small inputs, timed on inputs of the model's sizes, by all ranks together.
    """
    torch.compiler.assume_constant_result(compute_capability)  # here: the compiler takes seconds to import
    names, notes, fields_of_kernels = [], [], {}
    for name, trial in trials.items():
        plain, right, wrong = getattr(kernels, name), {}, []
        for version, fast in trial.fast.items():
            tolerance = trial.tolerance.get(version, 0.02)
            functions = trial.shows(plain), trial.shows(fast)
            reason = differs_from_plain(*functions, trial.small, trial.leaves, env.device, tolerance)
            if reason:
                wrong.append(f"{version}: {reason}")
            else:
                right[version] = fast
        right["plain"] = plain
        if pins.get(name) in right:
            version, note = pins[name], "as asked for"
        elif cfg.warmup:
            version, note = fastest(env, right, trial, kernels.compile)
        else:
            version, note = next(iter(right)), ""
        if version == "kernel":
            fields_of_kernels |= trial.needs
        fields_of_kernels[name] = right[version]
        names.append(f"{name}={version}")
        reasons = "; ".join(filter(None, (*wrong, note)))
        notes.append(f"{name}={version}" + (f" ({reasons})" if reasons else ""))
    return replace(kernels, versions=",".join(names), note=", ".join(notes), **fields_of_kernels)


def fastest(env: DistEnv, versions: dict[str, Callable], trial: Trial, compiled: Callable) -> tuple[str, str]:
    """-> its name on all ranks, and how many times as long the others take. The first, unless one is clearly
    faster.
    """
    times = dict.fromkeys((*trial.fast, "plain"), math.inf)  # of what is wrong here: no rank takes it
    if list(versions) == ["plain"]:
        times["plain"] = 0.0
    else:
        large = trial.large()
        for version, operator in versions.items():
            work = (trial.timed or trial.shows)(operator)
            times[version] = milliseconds(compiled(work) if trial.compiled else work, large, trial.leaves)
    if env.world_size > 1:
        wait = env.all_reduce(torch.tensor(list(times.values()), device=env.device))
        times = dict(zip(times, wait().tolist(), strict=True))
    first, best = next(iter(versions)), min(versions, key=times.get)
    best = first if times[first] < CLEARLY * times[best] else best
    others = [f"{times[name] / times[best]:.2f} times as long {name}" for name in versions if name != best]
    return best, ", ".join(others)


def milliseconds(work: Callable, arguments: list, leaves: int) -> float:
    """The device's, of a call and its gradients by the first `leaves` arguments: the median of five replays.

    Infinite for what does not run at this size, for want of memory, say.
    """
    inputs = [a.detach().requires_grad_() for a in arguments[:leaves]] + arguments[leaves:]

    def call() -> None:
        output = work(*inputs)
        if leaves:
            torch.autograd.grad(output, inputs[:leaves], output.detach())

    graph, times = torch.cuda.CUDAGraph(), []
    try:
        call()  # compiles
        call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    except Exception:  # noqa: BLE001, whatever it is, another version runs
        return math.inf
    return max(sorted(times[1:])[2], 1e-6)


def prepared(prepare: Callable, cfg: Config, *inputs: Tensor) -> Tensor:
    """q, k and v of both kinds of layer in one, weighed: a norm has no gradient of its sum of squares."""
    places, parts = len(inputs[0]), []
    for paired in (False, True) if "p" in cfg.paired_heads else (False,):
        qkv, value, is_first, cos, sin = inputs
        angles = (cos, sin) if paired else (cos[:places], sin[:places])
        offset = cfg.key_offset and not paired
        parts += prepare(qkv, value, is_first, *angles, paired, offset, cfg.qk_norm)
    whole = torch.cat([part.flatten() for part in parts])
    return whole * torch.arange(len(whole), device=whole.device).remainder(7)


def table_gradient(look_up: Callable) -> Callable:
    """(table, rows, dy) -> the gradient that a lookup leaves in table.grad."""

    def gradient(table: Tensor, rows: Tensor, dy: Tensor) -> Tensor:
        table = table.requires_grad_()
        look_up(table, rows, RowOrder.of(rows)).backward(dy)
        return table.grad

    return gradient


def differs_from_plain(
    plain: Callable, fast: Callable, arguments: list, leaves: int, device: torch.device, tolerance: float
) -> str:
    """Why a fast version cannot run here; '': it can.

    Its results, and gradients by the first `leaves` arguments, are held against the plain one's in float32.
    """

    def results(operator: Callable, dtype: torch.dtype) -> list[Tensor]:
        given = []
        for a in arguments:
            if isinstance(a, Tensor):
                a = a.to(device, dtype if a.dtype == torch.bfloat16 else a.dtype, copy=True)
            given.append(a)
        inputs = [a.requires_grad_() for a in given[:leaves]]
        output = operator(*given)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        if inputs:
            outputs.extend(torch.autograd.grad(outputs[0].float().square().sum(), inputs))
        return outputs

    try:
        for ours, exact in zip(results(fast, torch.bfloat16), results(plain, torch.float32), strict=True):
            error = float((ours - exact).detach().norm() / exact.detach().norm())
            if not error < tolerance:
                return f"relative error {error:.2g}"
    except Exception as error:  # noqa: BLE001, whatever it is, the plain version stays
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


class NoGraphs:
    """Work is called, not replayed."""

    enabled = False

    def run(self, key: object, work: Callable[[], None]) -> None:
        work()

    def clear(self) -> None:
        pass


class CudaGraphs:
    """Work that is the same on every step of a kind: captured as a CUDA graph once, then replayed."""

    enabled = True

    def __init__(self, log: Log):
        self.log, self.captured, self.pool = log, {}, None

    def capture(self, key: object, work: Callable[[], None]) -> None:
        """If something in it cannot be captured on this stack, the log says so, and it stays a plain call."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                work()
            self.captured[key], self.pool = graph, graph.pool()
            graph.replay()  # the first time takes longer
        except Exception as error:  # noqa: BLE001, whatever it is, the work can still be called
            self.log.write(f"graphs: no graph of {key} ({first_line(error)})")
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind

    def run(self, key: object, work: Callable[[], None]) -> None:
        if key in self.captured:
            self.captured[key].replay()
        else:
            work()

    def clear(self) -> None:
        self.captured = {}


def warm_up(trainer: Trainer) -> None:
    """Compiles and runs every stage on dummy tokens, both optimizers, validation; then all is as it was."""
    began = time.perf_counter()
    model, optimizer, tied = trainer.model, trainer.optimizer, trainer.optimizer.tied
    states = [t for state in optimizer.state.values() for t in state.values()]
    live = [*model.parameters(), *states]
    kept = [t.detach().to("cpu", copy=True) for t in live]
    inputs = run_dummy_steps(trainer)
    trainer.log.live.show(f"compiling {len(inputs) + 1} of {len(inputs) + 2}: validation ...")
    run_dummy_validation(trainer)
    trainer.log.live.show(f"compiling {len(inputs) + 2} of {len(inputs) + 2}: the optimizers ...")
    for is_tied in dict.fromkeys((tied, False)):
        optimizer.tied = is_tied
        run_dummy_update(trainer)
    if trainer.graphs.enabled:
        capture_graphs(trainer, inputs, tied)
    with torch.no_grad():
        for t, value in zip(live, kept, strict=True):
            t.copy_(value)
    optimizer.tied = tied
    seconds = time.perf_counter() - began
    trainer.log.write(f"warm-up: {seconds:.1f} s outside the clock, {len(inputs)} kind(s) of step")


# Tokens of a pass, (short, long) window, tokens that the softmax is over (0: all).
StepKind = tuple[int, tuple[int, int], int]


def run_dummy_steps(trainer: Trainer) -> dict[StepKind, list[tuple[Tensor, Tensor]]]:
    """A micro-batch of each kind of step -> the memory that each kind reads its sequences from."""
    cfg, schedule = trainer.cfg, trainer.schedule
    copy_to_device(torch.tensor([*schedule.predict(0), 0.0]), trainer.step_scalars)
    kinds = {trainer.step_kind(begin) for begin, _ in schedule.spans}
    inputs = {}
    for kind in sorted(kinds, reverse=True):  # the largest first: the others find room in its memory
        length = kind[0]
        passes = cfg.micro_batches // trainer.env.world_size // trainer.joined
        sequences = [dummy_sequence(cfg, length)] * passes
        inputs[kind] = trainer.machine.copy_batches(sequences)
        trainer.log.live.show(f"compiling {len(inputs)} of {len(kinds) + 2}: a step on {length} tokens ...")
        trainer.accumulate_gradients(inputs[kind][:1], *kind[1:])
    return inputs


def run_dummy_validation(trainer: Trainer) -> None:
    cfg = trainer.cfg
    if not trainer.machine.compiles_validation:
        return
    steps = range(0, cfg.num_steps, cfg.val_every) if cfg.val_every else ()
    for windows in sorted({trainer.schedule.val_windows(step) for step in (*steps, cfg.num_steps)}):
        trainer.evaluate(*dummy_sequence(cfg, cfg.val_seq_len), windows)


def run_dummy_update(trainer: Trainer) -> None:
    """A step of both optimizers with learning rates of 0."""
    for p in trainer.model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if trainer.optimizer.sparse_grad is not None:
        trainer.optimizer.sparse_grad.exchange_indices(np.arange(8), last=True)
    trainer.optimizer.step(trainer.cfg.adam_every - 1, lr_mul=0.0, momentum=0.9, untie=False)


def capture_graphs(trainer: Trainer, inputs: dict[StepKind, list[tuple[Tensor, Tensor]]], tied: bool) -> None:
    """A graph for each kind of step, and for each kind of update."""
    optimizer = trainer.optimizer
    for kind, sequences in inputs.items():
        trainer.graphs.capture(kind, partial(trainer.accumulate_gradients, sequences, *kind[1:]))
    for is_tied in dict.fromkeys((tied, False)):
        optimizer.tied = is_tied
        for adam_turn in (False, True):
            trainer.graphs.capture((adam_turn, is_tied), partial(optimizer.update, adam_turn))
    torch._foreach_zero_([p.grad for p in trainer.model.parameters()])


def dummy_sequence(cfg: Config, length: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets), (length,) each, with a BOS now and then."""
    return split_targets(np.arange(length + 1) * 37 % cfg.vocab_size)


# ===== E. CPU: attention in bands, which is also the fallback of a GPU, and what only a CPU needs. =====


class Cpu:
    """What the trainer asks of a CPU. Gpu has the same methods."""

    step_lag = 0
    compiles_validation = False

    def __init__(self, cfg: Config):
        self.device, self.dtype = torch.device("cpu"), pick_dtype(cfg)
        processes = read_environment("LOCAL_WORLD_SIZE", 1)
        if processes > 1:  # torchrun says 1 thread; a core without a thread is idle
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // processes))
        keep_freed_memory()

    def name(self) -> str:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = re.findall(r"model name\s*: (.*)", cpuinfo)
        name = names[0] if names else platform.processor() or platform.machine()
        return f"{name}, {os.cpu_count()} cores"

    def total_memory(self) -> int:
        """This process's share of the machine's bytes, or of its container's."""
        if "SC_PHYS_PAGES" not in os.sysconf_names:
            return sys.maxsize
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
        total = total if limit == resource.RLIM_INFINITY else min(total, limit)
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        processes = (read_environment(name, 1) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        return total // max(1, min(processes))

    def synchronize(self) -> None:
        pass

    def matrix_ceiling(self) -> float:
        emulated = self.dtype == torch.bfloat16 and not multiplies_bfloat16("cpu")
        size = 256 if emulated else 2048  # else a product takes minutes
        return matrix_ceiling(self.device, self.dtype, size, self.synchronize)

    def choose_kernels(self, cfg: Config, env: DistEnv, before: dict[str, str]) -> Kernels:
        self.compile_failure = compile_failure(cfg, self.device)
        kernels = plain_kernels(
            adam_rows_=partial(move_touched_rows_, adam_rows_),
            new_mantissa=new_float32_copy,
            # Ranks exchange rows of a dense gradient.
            sparse_bigram_grad=cfg.bigram_by_row and env.world_size == 1,
            muon_dtype=torch.bfloat16 if multiplies_bfloat16("cpu") else torch.float32,
        )
        if self.compile_failure is None:
            kernels = replace(
                compile_in_pieces(kernels),
                compile=partial(torch.compile, dynamic=False, fullgraph=True),
                adam_=flat_adam(),
                adam_rows_=partial(move_touched_rows_, torch.compile(adam_rows_, dynamic=True)),
            )
        return kernels

    def new_graphs(self, log: Log) -> NoGraphs:
        return NoGraphs()

    def copy_batches(self, sequences: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return sequences

    def copy_to_host(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return x, lambda: None

    def peak_memory(self) -> int:
        """Bytes."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident if sys.platform == "darwin" else 1024 * resident


def compile_in_pieces(kernels: Kernels) -> Kernels:
    """For plain attention, which is hundreds of operators: not layers as a whole, but the pieces that cost.

    The others take minutes to compile, for a few percent of a step.
    """
    softmax = compile_for_any_length(masked_softmax), compile_for_any_length(softmax_gradient)
    plain = kernels.prepare_qkv is prepare_qkv
    return replace(
        kernels,
        compile_layers=None,
        compile_small=False,
        prepare_qkv=compile_for_any_length(prepare_qkv) if plain else kernels.prepare_qkv,
        attention=partial(banded_attention, softmax=softmax),
    )


def validating(machine: Gpu | Cpu) -> contextlib.AbstractContextManager:
    """Uncompiled, unless the machine compiles it: its length takes longer to compile than a validation takes,
    and plain attention of a long sequence is hundreds of pieces for the compiler.
    """
    eager = machine.compile_failure is None and not machine.compiles_validation
    return torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext()


def is_out_of_memory(error: Exception) -> bool:
    """torch says it of a CPU in a RuntimeError."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def keep_freed_memory() -> None:
    """glibc: freed memory stays ours. To map and zero activations anew costs a third more time."""
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
        libc.mallopt(option, value)


QUERY_BLOCK = 128
SPAN = 16384  # queries that attend at once where nothing is kept for a backward pass


def masked_softmax(
    scores: Tensor, first_key: Tensor, query: Tensor, key: Tensor, dtype: torch.dtype
) -> Tensor:
    """scores (blocks, H, queries, keys) -> their softmax over the keys from first_key to the query's own."""
    masked = (key < first_key) | (key > query)
    return scores.float().masked_fill(masked, float("-inf")).softmax(dim=-1).to(dtype)


def softmax_gradient(d_weights: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient by the scores, from that by the weights. What is masked has a weight of 0."""
    d_weights = d_weights.float()
    return (weights * (d_weights - (d_weights * weights).sum(dim=-1, keepdim=True))).to(dtype)


# masked_softmax and softmax_gradient, or what they compile to.
Softmax = tuple[Callable, Callable]


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    window: int,
    scale: Tensor | float,
    softmax: Softmax = (masked_softmax, softmax_gradient),
) -> Tensor:
    """reference_attention by blocks of queries and the keys they reach, window >= i - first_key[i] + 1."""
    q = (q * scale).to(v.dtype)
    if len(q) <= SPAN or torch.is_grad_enabled():
        return attend_in_blocks(q, k, v, first_key, window, softmax)
    parts = []
    for start in range(0, len(q), SPAN):
        begin = max(0, start - window + 1)  # the first key that this span reaches
        seen = slice(begin, start + SPAN)
        shifted = (first_key[seen] - begin).clamp_min(0)
        part = attend_in_blocks(q[seen], k[seen], v[seen], shifted, window, softmax)
        parts.append(part[start - begin :])
    return torch.cat(parts)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, window: int, softmax: Softmax
) -> Tensor:
    """banded_attention of a whole sequence, q scaled: work and memory are T x window."""
    T, H, d = q.shape
    back = -(-(min(window, T) - 1) // QUERY_BLOCK) * QUERY_BLOCK  # keys before a block's own
    blocks = -(-T // QUERY_BLOCK)
    missing = blocks * QUERY_BLOCK - T
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (q, k, v))
    count = partial(torch.arange, dtype=torch.int32, device=q.device)
    query = count(blocks * QUERY_BLOCK).view(blocks, 1, QUERY_BLOCK, 1)
    key = query[:, :, :1] - back + count(back + QUERY_BLOCK)
    first_key = F.pad(first_key.to(torch.int32), (0, missing)).view(blocks, 1, QUERY_BLOCK, 1)
    return BlockAttention.apply(q, k, v, first_key, query, key, back, softmax)[:T]


class BlockAttention(torch.autograd.Function):
    """q, k, v (T, H, d), T in whole blocks -> (T, H, d).

    The softmax is kept in the dtype of v: on a CPU that costs less than to compute it again.
    """

    @staticmethod
    def forward(ctx, q, k, v, first_key, query, key, back, softmax):
        q = query_blocks(q)
        k, v = key_blocks(k, back), key_blocks(v, back)  # (blocks, H, back + QUERY_BLOCK, d)
        weights = softmax[0](q @ k.mT, first_key, query, key, v.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.softmax_gradient = softmax[1]
        return (weights @ v).transpose(1, 2).flatten(0, 1)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, weights = ctx.saved_tensors
        dy = query_blocks(dy)
        d_scores = ctx.softmax_gradient(dy @ v.mT, weights, v.dtype)
        dq = (d_scores @ k).transpose(1, 2).flatten(0, 1)
        return dq, add_key_blocks(d_scores.mT @ q), add_key_blocks(weights.mT @ dy), *[None] * 5


def query_blocks(x: Tensor) -> Tensor:
    """x (T, H, d) -> (blocks, H, QUERY_BLOCK, d), in this order: products would copy it each time."""
    return x.unflatten(0, (-1, QUERY_BLOCK)).transpose(1, 2).contiguous()


def key_blocks(x: Tensor, back: int) -> Tensor:
    """x (T, H, d) -> for each block of queries the rows from `back` before it to its end."""
    padded = F.pad(x, (0, 0, 0, 0, back, 0))
    shifted = []
    for start in range(0, back + 1, QUERY_BLOCK):
        block = padded[start : start + len(x)].unflatten(0, (-1, QUERY_BLOCK))
        shifted.append(block.transpose(1, 2))
    return torch.cat(shifted, dim=2)


def add_key_blocks(parts: Tensor) -> Tensor:
    """key_blocks backwards: parts (blocks, H, back + QUERY_BLOCK, d) -> (T, H, d), sums over blocks."""
    blocks, H, keys, d = parts.shape
    before = keys // QUERY_BLOCK - 1  # blocks of keys before a block's own
    total = parts.new_zeros(before + blocks, H, QUERY_BLOCK, d)
    for i, part in enumerate(parts.split(QUERY_BLOCK, dim=2)):
        total[i : i + blocks] += part
    return total[before:].transpose(1, 2).flatten(0, 1)


def new_float32_copy(p: Tensor) -> Tensor:
    """In place of the missing mantissa bits, with which a CPU's compiled loops take ten times as long."""
    return p.float()


LARGE = 2**14  # values from which a compiled loop is faster than eager operators


def flat_adam() -> Callable:
    """adam_ for a CPU: one compiled loop for tables of every size, eager operators for gates and scalars."""
    compiled = torch.compile(adam_, dynamic=True)

    def flat_adam_(*tensors: Tensor | None, wd: float, betas: tuple[float, float], **rest: Any) -> None:
        if tensors[0].numel() < LARGE:
            return adam_(*tensors, wd=wd, betas=betas, **rest)
        flat = [None if t is None else t.flatten() for t in tensors]
        wd, *betas = torch.tensor([wd, *betas])  # numbers would be compiled in
        compiled(*flat, wd=wd, betas=betas, **rest)

    return flat_adam_


def move_touched_rows_(
    adam_rows_: Callable,
    p: Tensor,
    mantissa_lo: Tensor | None,
    grad: Tensor,
    second_moment: Tensor,
    moves: Tensor,
    **rates: Any,
) -> None:
    """adam_rows_ of rows with a gradient alone: a step costs what its tokens cost, not what a table does."""
    grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
    rows, values = grad.indices()[0], grad.values().clone()  # torch compiles no views of sparse tensors
    wholes = [t for t in (p, mantissa_lo, second_moment, moves) if t is not None]
    parts = [whole[rows] for whole in wholes]
    low = parts[1] if mantissa_lo is not None else None
    adam_rows_(parts[0], low, values, *parts[-2:], **rates)
    for whole, part in zip(wholes, parts, strict=True):
        whole.index_copy_(0, rows, part)


# ===== F. Counts: embedding, head and bigram table that start from how often tokens follow each other. =====

COUNTED = 2**24  # tokens at most
SPECTRAL_NEIGHBOURS = ((1, 1.0), (2, 0.7), (-1, 0.7))  # how far behind a token, how much that one counts


class Counts:
    """What a model takes from counts: embedding and head (--spectral), and its bigram table (--ngram_start).

    A row that has seen a text knows by heart what follows there, and a model that reads it again with such
    rows learns to trust them. So no part of a run reads more than READ_AT_ONCE of the text, give or take a
    step, and with each part the table starts from counts of the rest. Rank 0 counts for all.
    """

    def __init__(
        self, cfg: Config, schedule: Schedule, first_shard: np.ndarray, env: DistEnv, dtype: torch.dtype
    ):
        self.cfg, self.first_shard, self.env, self.dtype = cfg, first_shard, env, dtype
        self.has_table = cfg.spectral > 0 and cfg.ngram_start > 0 and cfg.bigram_rows > 0
        self.parts = parts_of_run(cfg, schedule) if self.has_table else {}
        self.restarts = list(self.parts)[1:]  # steps before which the table starts again

    @cached_property
    def bigram_model(self) -> tuple[Tensor, Tensor]:
        need(len(self.first_shard) > 1, "--spectral: the first training shard has no two tokens to count")
        tokens = self.first_shard[:COUNTED].astype(np.int64)
        return spectral_start(self.cfg, tokens, self.env.device, self.dtype)

    def prepare(self, since: int) -> None:
        """What a run that goes on with a step has counted before, if it restarts the table again."""
        if self.env.rank == 0 and any(step >= since for step in self.restarts):
            _ = self.bigram_model

    def start_model(self, model: GPT) -> None:
        """Before the first step."""
        if self.has_table:
            self.start_table(model, 0)
        embed, head = self.bigram_model if self.env.rank == 0 else (None, None)
        self.share(model.embed, embed)
        self.share(model.lm_head, head)
        if self.cfg.copy_start and self.cfg.key_offset and self.cfg.copy_values:
            directions = None if head is None else logit_directions(head, self.first_shard[:COUNTED])
            start_saying(model, self.of_rank_0(directions, model.embed.shape))

    def start_table(self, model: GPT, step: int) -> int:
        """Before the first step of a part -> how many tokens were counted (on rank 0)."""
        table, tokens = model.bigram_embed.data.zero_(), ()
        if self.env.rank == 0:
            tokens = tokens_outside(self.cfg, *self.parts[step])
            with ThreadPoolExecutor(1) as worker:  # sorts beside the products of the bigram model
                counting = worker.submit(all_ngrams, self.cfg, tokens)
                head = model.lm_head.detach().float() if step > 0 else self.bigram_model[1]
                directions = logit_directions(head, tokens)
                ngrams = counting.result()
            signs = model.bigram_sign if self.cfg.bigram_signs else None
            add_ngram_start_(table, self.cfg, self.bigram_model, directions, signs, ngrams)
        if self.env.world_size > 1:
            self.share(model.bigram_embed, table)
        return len(tokens)

    def share(self, p: nn.Parameter, value: Tensor | None) -> None:
        p.data.copy_(self.of_rank_0(value, p.shape))

    def of_rank_0(self, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Rank 0's value, for every rank; the others give None. They sum by memory, not by index."""
        value = torch.zeros(shape, device=self.env.device) if value is None else value.contiguous()
        return self.env.all_reduce(value)()


@torch.no_grad()
def start_saying(model: GPT, directions: Tensor) -> None:
    """A long layer with a table of its own says which token it reads: that raises the token's logit.

    So the layer that starts out copying completes what it copies. directions: of logits, (V, D). The layer's
    v is its value embedding alone at first, and o passes it as it is.
    """
    tables = [layer.value_embed for layer in model.layers]
    attending = [layer for layer in model.layers if layer.attends]
    for n, layer in enumerate(attending):
        if layer.window == "long" and layer.value_embed and tables.count(layer.value_embed) == 1:
            getattr(model, f"value_embed_{layer.value_embed}").copy_(model.cfg.copy_values * directions)
            model.qkvo[n, 2].zero_()
            model.qkvo[n, 3].copy_(torch.eye(model.cfg.model_dim))


READ_AT_ONCE = 0.95  # at most, of the text, by a part of a run


def parts_of_run(cfg: Config, schedule: Schedule) -> dict[int, tuple[int, int]]:
    """First step of each part: where its text begins and ends, in tokens, with all epochs one text.

    A part begins where no gradient waits for Adam. A step that reads more than a part may is one of its own.
    """
    walker = Loader(cfg)
    sizes = {path: shard_tokens(path) for path in set(walker.files)}
    file_begins = np.cumsum([0, *(sizes[path] for path in walker.files)])
    begins = []  # of each step, and the end of the last
    for step in range(cfg.num_steps + 1):
        at_end = walker.document == len(walker.starts)
        place = len(walker.tokens) if at_end else walker.starts[walker.document]
        begins.append(int(file_begins[walker.file] + place))
        if step < cfg.num_steps:
            stage = schedule.stage(step)
            for _ in range(cfg.micro_batches):
                walker.next_sequence(stage.batch_tokens // cfg.micro_batches + 1, stage.max_doc_len)
    span, text = begins[-1] - begins[0], sum(sizes.values())
    count = math.ceil(span / (READ_AT_ONCE * text))
    marks = [begins[0] + span * part / count for part in range(count)]
    firsts = np.array([np.abs(np.subtract(begins[:-1], mark)).argmin() for mark in marks])  # nearest steps
    firsts = np.unique(firsts - firsts % cfg.adam_every)  # where no gradient of the table waits for others
    return {int(a): (begins[a], begins[b]) for a, b in pairwise([*firsts, cfg.num_steps])}


def tokens_outside(cfg: Config, begin: int, end: int) -> np.ndarray:
    """begin, end: see parts_of_run -> the COUNTED tokens of the text that come next, or fewer (n,), int64."""
    sizes = {path: shard_tokens(path) for path in find_shards(cfg, "train")}
    text = sum(sizes.values())
    places = [(end % text, begin % text)]
    if end - begin >= text:
        places = []
    elif end % text >= begin % text:
        places = [(end % text, text), (0, begin % text)]
    found = [np.empty(0, dtype=np.int64)]
    for first, last in places:
        shard_begin = 0
        for path, size in sizes.items():
            inside = slice(max(first - shard_begin, 0), min(last - shard_begin, size))
            missing = COUNTED - sum(map(len, found))
            if inside.start < inside.stop and missing > 0:  # no other shard is read
                shard = read_shard(path, cfg.vocab_size, cfg.bos_id)
                found.append(shard[inside][:missing].astype(np.int64))
            shard_begin += size
    return np.concatenate(found)


def shard_tokens(path: Path) -> int:
    """How many it holds, by its size: read_shard checks that its header says the same."""
    return max(0, path.stat().st_size - HEADER_BYTES) // 2


def spectral_start(
    cfg: Config, tokens: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """tokens (N,) -> embed (V, D) and lm_head (D, V), together a bigram model; dtype: of the large products.

    The embedding holds singular vectors of a matrix of smoothed pointwise mutual information (Levy and
    Goldberg 2014), which is sparse, as a row's constant is nothing to a softmax; the head is the least
    squares fit to the matrix of the next token.
    """
    V = cfg.vocab_rows
    share = token_shares(tokens, V, device)[:, None]
    root = share.sqrt()
    pairs = {gap: count_pairs(tokens, gap, V) for gap in {abs(gap) for gap, _ in SPECTRAL_NEIGHBOURS}}
    blocks = []
    for gap, weight in SPECTRAL_NEIGHBOURS:
        blocks.append(neighbour_information(cfg, pairs[abs(gap)], gap, weight, share, root))
    nearby = torch.cat(blocks, dim=1)
    nearby = nearby if nearby.is_sparse else nearby.to(dtype)
    basis = torch.randn(V, cfg.model_dim - 1, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(2):  # 0909.4061
        basis = torch.linalg.qr((nearby @ (nearby.T @ basis.to(nearby.dtype))).float()).Q
    rest = (nearby.T @ basis.to(nearby.dtype)).float()
    squares, turn = torch.linalg.eigh(rest.T @ rest)
    x = basis @ turn * squares.clamp_min(0).sqrt() / root
    x = norm(F.pad(x, (0, 1), value=3 * float(x.square().mean().sqrt())))  # last: how common a token is
    gram = (share * x).T @ x
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    fit = (blocks[0].T @ (root * x) / root).T + torch.outer((share * x).sum(0), share[:, 0].log())
    return cfg.embed_std * x, torch.linalg.solve(gram, fit)


def token_shares(tokens: np.ndarray, vocab_rows: int, device: torch.device) -> Tensor:
    """(vocab_rows,): of the text, with half a token more of each."""
    counts = torch.from_numpy(np.bincount(tokens, minlength=vocab_rows) + 0.5).float().to(device)
    return counts / counts.sum()


def count_pairs(tokens: np.ndarray, gap: int, vocab_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """-> tokens and others `gap` behind them (2, n), and how often they occur (n,)."""
    codes, counts = np.unique(tokens[:-gap] * vocab_rows + tokens[gap:], return_counts=True)
    return np.stack(divmod(codes, vocab_rows)), counts


def neighbour_information(
    cfg: Config, pairs: tuple[np.ndarray, np.ndarray], gap: int, weight: float, share: Tensor, root: Tensor
) -> Tensor:
    """(V, V): how much more often than by chance a token has another `gap` behind it; pairs: of abs(gap)."""
    V, device = cfg.vocab_rows, share.device
    place, counts = (torch.from_numpy(array).to(device) for array in pairs)
    place = place if gap > 0 else place.flip(0)
    expected = cfg.spectral * share[place[1], 0]
    lift = torch.log1p(counts.float() / expected)
    values = weight * lift * root[place, 0].prod(0)
    block = torch.sparse_coo_tensor(place, values, (V, V), check_invariants=False)
    return block.to_dense() if V <= 2**13 else block.coalesce()  # dense: several times as fast


NGRAM_SMOOTHING = 5.0  # how many tokens what is known of a shorter context weighs
NgramCounts = tuple[np.ndarray, np.ndarray]  # codes, which ascend, and how often they occur, (n,) each


def add_ngram_start_(
    table: Tensor,
    cfg: Config,
    bigram_model: tuple[Tensor, Tensor],
    directions: Tensor,
    signs: Tensor | None,
    ngrams: list[NgramCounts],
) -> None:
    """Adds to the bigram table (rows, D) what all_ngrams counted, of text that it is not trained on next.

    bigram_model: embed (V, D) and head (D, V) of spectral_start; directions: of logits, (V, D); signs: the
    model's, if any. The rows of pairs and triples that occur at least twice say what follows them more often
    than the bigram model knows: of each token that does its direction, as far as its logit should rise,
    weighed by its probability.
    """
    V, device = cfg.vocab_rows, table.device
    codes, _ = ngrams[0]
    p = bigram_probabilities(*bigram_model, codes)
    for length in range(2, len(ngrams) + 1):
        shorter_codes, shorter_p = codes, p
        codes, counts = ngrams[length - 1]
        contexts, follows = np.divmod(codes, V)
        begins, sizes, totals = group_by_context(contexts, counts)
        shorter = shorter_p[np.searchsorted(shorter_codes, contexts // V * V + follows)]
        p = (counts + NGRAM_SMOOTHING * shorter) / np.repeat(totals + NGRAM_SMOOTHING, sizes)
        twice = totals >= 2
        kept = np.repeat(twice, sizes)
        weights = torch.from_numpy((cfg.ngram_start * p * np.log(p / shorter))[kept]).float().to(device)
        bags = torch.from_numpy(np.cumsum(sizes[twice]) - sizes[twice]).to(device)
        follows = torch.from_numpy(follows[kept]).to(device)
        values = F.embedding_bag(follows, directions, bags, mode="sum", per_sample_weights=weights)
        rows, keys = context_rows(cfg, contexts[begins[twice]], length)
        if signs is not None:
            values *= signs[keys.to(device).remainder(cfg.bigram_signs)]
        table.index_add_(0, rows.to(device), values.to(table.dtype))


def all_ngrams(cfg: Config, tokens: np.ndarray) -> list[NgramCounts]:
    """tokens (N,) int64 -> count_ngrams of contexts of one token, of two, .., up to --ngrams."""
    longest = min(cfg.ngrams, int(63 / math.log2(cfg.vocab_rows)) - 1)  # codes have 63 bits
    *shorter, (codes, counts) = [count_ngrams(cfg, tokens, length) for length in range(1, longest + 1)]
    _, sizes, totals = group_by_context(codes // cfg.vocab_rows, counts)
    kept = np.repeat(totals >= 2, sizes)  # of the longest those that occur once are of no use
    return [*shorter, (codes[kept], counts[kept])]


def group_by_context(contexts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """contexts (n,), which ascend -> where each begins, how many tokens follow it, how often it occurs."""
    begins = np.flatnonzero(np.diff(contexts, prepend=-1))
    return begins, np.diff(begins, append=len(contexts)), np.add.reduceat(counts, begins)


def count_ngrams(cfg: Config, tokens: np.ndarray, length: int) -> NgramCounts:
    """Of contexts of `length` tokens with the one that follows.

    A code has the token that follows last, the context's latest token first. None goes over a document's end.
    """
    code, inside = 0, True
    places = max(len(tokens) - length, 0)
    for k in (*range(length - 1, -1, -1), length):
        token = tokens[k : k + places]
        code = code * cfg.vocab_rows + token
        inside = inside & ((token != cfg.bos_id) | (k == 0))
    return np.unique(code[inside], return_counts=True)


def context_rows(cfg: Config, contexts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """contexts (n,) of count_ngrams, `length` tokens each -> what ngram_rows says of their last tokens."""
    tokens = np.stack([contexts // cfg.vocab_rows**k % cfg.vocab_rows for k in range(length)], axis=1)
    is_first = torch.arange(tokens.size) % length == 0
    num_rows = cfg.bigram_rows * cfg.vocab_rows
    rows, keys = ngram_rows(torch.from_numpy(tokens.reshape(-1)), is_first, num_rows, length)[-1]
    return rows[length - 1 :: length], keys[length - 1 :: length]


def bigram_probabilities(embed: Tensor, head: Tensor, codes: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """codes (n,) of pairs, ascending -> what embed and head say of the second after the first, (n,)."""
    codes = torch.from_numpy(codes).to(embed.device)
    first, second = codes // len(embed), codes % len(embed)
    ends = torch.searchsorted(first, torch.arange(0, len(embed), chunk, device=embed.device)).tolist()
    found = []
    for n, (begin, end) in enumerate(pairwise([*ends, len(codes)])):
        p = torch.softmax(norm(embed[n * chunk : (n + 1) * chunk]) @ head, dim=1)
        found.append(p[first[begin:end] - n * chunk, second[begin:end]])
    return torch.cat(found).double().clamp_min(1e-12).cpu().numpy()  # what occurs has one


def logit_directions(head: Tensor, tokens: np.ndarray) -> Tensor:
    """head (D, V) -> (V, D): what added to the head's input raises a token's logit by 1, and others least."""
    share = token_shares(tokens, head.size(1), head.device)
    centred = head.T - share @ head.T
    others = centred.T @ (share[:, None] * centred)  # what a direction does to all logits, squared
    others.diagonal().add_(others.diagonal().mean())
    directions = torch.linalg.solve(others, centred.T).T
    return (directions / (directions * centred).sum(dim=1, keepdim=True)).contiguous()


if __name__ == "__main__":
    sys.exit(main())
