"""
train_gpt.py -- train a small GPT on FineWeb to a fixed validation loss, as fast as the machine can. All of it is here.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                    the record run: preset "short", no flags
    torchrun --standalone --nproc_per_node=8 train_gpt.py --preset medium    the larger model, target 2.92
    python train_gpt.py --preset one-gpu                                     one GPU with 24 GB
    python train_gpt.py --preset cpu --num_steps 20                          no GPU; any scalar field of Config is a flag

Reading order                       to change...                                    edit
    1  Config                       a size, a layer's features, a schedule          PRESETS (or pass a flag)
    2  Model                        the network                                     GPT.__init__ (declare), GPT.forward (use)
    3  Optimizer                    an update rule, how ranks share work            Optimizer, normuon_, adam_
    4  Data                         nothing: the token stream is fixed              Loader
    5  Schedule                     learning rate, momentum, windows over time      Schedule
    6  Operators                    how a formula is computed                       its reference, then what runs
    7  Run                          the log, the clock, the loop                    train

Ideas are credited where they live: "seed 000" .. "seed 004" are the reports this project grew from (README.md, Sources),
numbers like 2505.16932 are arXiv ids.
"""
import argparse
import base64
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import resource
import signal
import sys
import threading
import time
import uuid
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SOURCE = Path(__file__).read_text()  # read before anything slow, so the log holds what really ran

class UserError(Exception):
    """Something a user can put right. The message is one line: the file, flag or value, and what to do. Exit code 2."""

class RunFailed(Exception):
    """A run that cannot go on, though nothing was asked for wrongly (a loss that is not finite). Exit code 1."""

def need(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)

# =====================================================================================================================
# 1. Config: what a run is. A record is a preset with no overrides.
# =====================================================================================================================

@dataclass(frozen=True)
class Layer:
    """One row of the topology table: what is special about this layer."""
    window: str                     # "short" | "long" | "none": none = no attention here
    paired: bool                    # heads 2j and 2j+1 see each other's keys
    value_embed: str | None         # name of the table that is added to v
    skip_from: int | None           # the earlier layer whose output comes in here
    backout: bool                   # this layer's output is subtracted at the end

@dataclass(frozen=True)
class Stage:
    """One row of the schedule table."""
    until: float                    # ends at this share of the scheduled steps; the last row runs to the end
    batch_tokens: int               # per optimizer step, all ranks and micro-batches together
    windows: tuple[int, int]        # (short, long), tokens
    max_doc_len: int                # documents are cut there, tokens
    lr_mul: float                   # of the peak learning rate
    predict: tuple[tuple[float, float], ...] = ((1.0, 1.0),)  # weight of the k-th next token: (at start, at end)

@dataclass(frozen=True)
class Config:
    preset: str
    # topology: a character a layer. topology() reads these five as a table with a row a layer.
    windows: str                    # s short, l long, - no attention
    paired_heads: str               # p paired, . not
    value_embeds: str               # . none, else the name of the table; the same name twice shares it (U-Net)
    skips: str                      # a letter's first place sends its output, its second receives it
    backout: str                    # b: this output is subtracted at the end (nowhere: off)
    stages: tuple[Stage, ...]
    # sizes
    vocab_size: int = 50257         # GPT-2's; tables have rows up to the next multiple of 128
    bos_id: int = 50256             # begins every document
    model_dim: int = 768
    head_dim: int = 128
    mlp_ratio: int = 4
    extra_inputs: int = 0           # further input embeddings, seed 004
    bigram_rows: int = 5            # rows of the bigram table, in vocabularies; 0: no table
    bigram_signs: int = 0           # rows of the sign table (8192 in later records); 0: no sign trick
    # gates on chunks of the residual stream, seed 001
    smear_chunk: str = "0:12"       # first:last dimensions that the smear gate reads; '': no smear
    skip_chunk: str = "6:18"        # of the skip gate; '': the skip keeps its scalar
    attn_chunk: str = "18:30"       # of the attention gate; '': y passes whole
    ve_chunk: str = "18:24"         # of the value embedding's gate; '': it passes whole
    ve_own_dims: int = 6            # dimensions of the value embedding itself that its gate reads too, seed 000
    # attention and head
    key_offset: bool = True         # long layers: the stationary half of k comes from the token before
    qk_norm: bool = True
    rotary_share: float = 0.5       # of each head's dimensions; the rest is stationary
    rotary_base: float = 1024.0
    yarn: bool = True               # stretch rotary wavelengths when the long window changes, 2309.00071
    softmax_scale: float = 0.1
    final_long_window: int = 2560   # of the last validation, tokens
    activation: str = "relu2"       # "relu2" | "gelu"
    softcap: float = 23.0           # logits end in (0, softcap); 0: no cap
    softcap_shift: float = 5.0
    softcap_width: float = 7.5
    # initial values
    embed_std: float = 0.005
    value_embed_std: float = 0.01   # seed 000; 0 before
    matrix_std: float = 0.5         # over sqrt(model_dim)
    # optimization
    num_steps: int = 1547
    extension_share: float = 0.026  # of num_steps: constant settings after the schedule (40 steps of 1547)
    cooldown_share: float = 0.55    # of the schedule: the learning rate falls on a line to final_lr
    final_lr: float = 0.1           # of the peak
    muon_lr: float = 0.023
    muon_wd: float = 1.2
    muon_beta2: float = 0.95
    momentum_min: float = 0.85
    momentum_max: float = 0.95
    momentum_warmup: int = 300      # steps from min to max
    momentum_cooldown: int = 50     # last steps, back to min
    adam_lr: float = 0.008
    adam_wd: float = 0.005
    adam_eps: float = 1e-10
    untie_share: float = 2/3        # of the schedule: embed and lm_head are one until then; 0: never tied, 1: always
    max_predict: int = 3            # next tokens that a stage may ask for; 1: no multi-token prediction
    # data and evaluation
    data_dir: str = "data/fineweb10B"
    micro_batches: int = 8          # of a step, whatever the ranks: 1, 2, 4 and 8 of them compute the same thing
    val_tokens: int = 10485760      # fixed, or losses could not be compared
    val_seq_len: int = 32768
    val_every: int = 250            # steps; 0: only at the end
    # machine
    device: str = "cuda"            # "cuda" | "cpu"
    dtype: str = "auto"             # "bfloat16" | "float32"; auto: bfloat16 where the hardware multiplies it
    compile: bool = True
    warmup: bool = True             # compile and run each stage on dummy data before the clock starts
    rank_timeout: float = 300.0     # seconds that a process waits for the others before it gives up
    save_every: int = 0             # steps between checkpoints, beside the log, and one at the end; 0: none
    save_on_stop: bool = False      # SIGTERM and Ctrl-C save a checkpoint before they end the run
    resume: bool = False            # go on from the newest whole checkpoint under log_dir, if there is one
    log_dir: str = "logs"
    seed: int = 0

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def vocab_rows(self) -> int:
        return -(-self.vocab_size // 128) * 128

    @property
    def scheduled_steps(self) -> int:
        return self.num_steps - round(self.extension_share * self.num_steps)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of the run."""
        return max([self.val_seq_len] + [stage.batch_tokens // self.micro_batches for stage in self.stages])

def topology(cfg: Config) -> tuple[Layer, ...]:
    """The five strings as rows. UserError names the string and the layer that do not fit."""
    for name in ("paired_heads", "value_embeds", "skips", "backout"):
        text = getattr(cfg, name)
        need(len(text) == len(cfg.windows), f"--{name} {text!r} describes {len(text)} layers, --windows {len(cfg.windows)}")
    windows = {"s": "short", "l": "long", "-": "none"}
    rows = []
    for i, window in enumerate(cfg.windows):
        need(window in windows, f"--windows: layer {i} is {window!r}; use s (short), l (long) or - (no attention)")
        need(cfg.paired_heads[i] in "p.", f"--paired_heads: layer {i} is {cfg.paired_heads[i]!r}; use p or .")
        need(cfg.backout[i] in "b.", f"--backout: layer {i} is {cfg.backout[i]!r}; use b or .")
        table, skip = cfg.value_embeds[i], cfg.skips[i]
        need(table == "." or window != "-", f"--value_embeds: layer {i} has no attention to add table {table!r} to")
        need(table == "." or table.isascii() and table.isalnum(), f"--value_embeds: {table!r}: use letters and digits")
        need(skip == "." or cfg.skips.count(skip) == 2, f"--skips: {skip!r} must stand twice, for sender and receiver")
        sender = cfg.skips.index(skip)
        rows.append(Layer(windows[window], paired=cfg.paired_heads[i] == "p", value_embed=None if table == "." else table,
                          skip_from=sender if skip != "." and sender < i else None, backout=cfg.backout[i] == "b"))
    need(cfg.backout.count("b") <= 1, f"--backout {cfg.backout!r}: at most one layer")
    need(len(rows) > 0, "--windows '': a model has at least one layer")
    return tuple(rows)

def chunk(cfg: Config, name: str) -> slice | None:
    """A gate's "first:last" as a slice of the model's dimensions."""
    text = getattr(cfg, name)
    if not text:
        return None
    first, colon, last = text.partition(":")
    good = colon and first.isdecimal() and last.isdecimal() and int(first) < int(last) <= cfg.model_dim
    need(good, f"--{name} {text!r}: give first:last with 0 <= first < last <= model_dim {cfg.model_dim}, or '' for no gate")
    return slice(int(first), int(last))

def check_config(cfg: Config) -> None:
    """UserError names the first value that no run can have."""
    def check(name: str, good: bool, rule: str) -> None:
        need(good, f"--{name} {getattr(cfg, name)}: {rule}")
    layers = topology(cfg)
    for name in ("vocab_size", "model_dim", "head_dim", "mlp_ratio", "num_steps", "max_predict", "micro_batches",
                 "val_tokens", "val_seq_len", "final_long_window"):
        check(name, getattr(cfg, name) >= 1, "must be at least 1")
    for name in ("extra_inputs", "bigram_rows", "bigram_signs", "val_every", "save_every", "momentum_warmup",
                 "momentum_cooldown", "embed_std", "value_embed_std", "matrix_std", "muon_lr", "muon_wd", "adam_lr",
                 "adam_wd", "adam_eps", "softcap"):
        check(name, 0 <= getattr(cfg, name) < math.inf, "must not be negative")
    for name in ("softmax_scale", "softcap_width", "rotary_base", "rank_timeout"):
        check(name, 0 < getattr(cfg, name) < math.inf, "must be above 0")
    for name in ("extension_share", "cooldown_share", "untie_share", "rotary_share", "momentum_min", "momentum_max",
                 "muon_beta2"):
        check(name, 0 <= getattr(cfg, name) <= 1, "must lie between 0 and 1")
    for name, allowed in (("device", "cuda cpu"), ("dtype", "auto bfloat16 float32"), ("activation", "relu2 gelu")):
        check(name, getattr(cfg, name) in allowed.split(), f"choose from {allowed}")
    for name in ("smear_chunk", "skip_chunk", "attn_chunk", "ve_chunk"):
        chunk(cfg, name)
    check("extension_share", cfg.scheduled_steps >= 1, f"leaves no scheduled step of --num_steps {cfg.num_steps}")
    check("head_dim", cfg.head_dim % 4 == 0, "must be a multiple of 4 (rotary turns pairs in half of it)")
    check("model_dim", cfg.model_dim % cfg.head_dim == 0, f"must be a multiple of --head_dim {cfg.head_dim}")
    check("paired_heads", cfg.num_heads % 2 == 0 or not any(layer.paired for layer in layers),
          f"{cfg.num_heads} heads cannot be paired; change --model_dim or --head_dim, or use only dots")
    check("ve_own_dims", 0 <= cfg.ve_own_dims <= cfg.model_dim, f"must lie between 0 and --model_dim {cfg.model_dim}")
    check("bos_id", 0 <= cfg.bos_id < cfg.vocab_size, f"must lie in the vocabulary, --vocab_size {cfg.vocab_size}")
    check("vocab_size", cfg.vocab_size <= 2**16, "shards hold 16-bit tokens, at most 65536")
    check("val_tokens", cfg.val_tokens % cfg.val_seq_len == 0, f"must be a multiple of --val_seq_len {cfg.val_seq_len}")
    for stage in cfg.stages:
        check("micro_batches", stage.batch_tokens % cfg.micro_batches == 0, f"must divide {stage.batch_tokens} tokens")

# The February 2026 form of the 8xH100 short track with seed 000's value embeddings; constants from its public record.
SHORT = Config(
    preset="short",
    #              0123456789a
    windows=      "ssslss-sssl",
    paired_heads= "p.p..p...p.",
    value_embeds= ".01.....234",
    skips=        "...a..a....",
    backout=      ".......b...",
    stages=(
        Stage(until=1/3, batch_tokens=131072, windows=(128, 384), max_doc_len=896, lr_mul=1.0,
              predict=((1.0, 1.0), (0.5, 0.5), (0.25, 0.0))),
        Stage(until=2/3, batch_tokens=262144, windows=(384, 896), max_doc_len=2048, lr_mul=1.52,     # (16/8)**0.6
              predict=((1.0, 1.0), (0.5, 0.0))),
        Stage(until=1.0, batch_tokens=393216, windows=(640, 1408), max_doc_len=2048, lr_mul=1.73),   # (24/8)**0.5
        Stage(until=2.0, batch_tokens=393216, windows=(768, 1664), max_doc_len=2048, lr_mul=1.73),   # the extension
    ),
)
PRESETS = {
    "short": SHORT,
    "medium": replace(
        SHORT, preset="medium", model_dim=1024, num_steps=6000, extra_inputs=1,
        #              0123456789abcdef
        windows=      "sssl" "sss-" "sssl" "sssl",
        paired_heads= "................",
        value_embeds= "012..........012",
        skips=        "..c.b.a..abc....",
        backout=      "..........b.....",
    ),
    # The short model on one GPU with 24 GB: the same steps in four times as many micro-batches.
    "one-gpu": replace(SHORT, preset="one-gpu", micro_batches=32, val_seq_len=16384),
    # Two CPU cores and the embedded corpus, minutes instead of GPUs; its losses compare only with its own.
    "cpu": replace(
        SHORT, preset="cpu", vocab_size=4096, bos_id=4095, model_dim=256, head_dim=64, softmax_scale=0.14,
        #              012345
        windows=      "sslssl",
        paired_heads= "p...p.",
        value_embeds= ".01.23",
        skips=        ".a..a.",
        backout=      "...b..",
        stages=(
            Stage(until=0.5, batch_tokens=8192, windows=(128, 512), max_doc_len=1024, lr_mul=1.0,
                  predict=((1.0, 1.0), (0.5, 0.0))),
            Stage(until=2.0, batch_tokens=8192, windows=(128, 512), max_doc_len=1024, lr_mul=1.0),
        ),
        num_steps=120, adam_lr=0.016, muon_lr=0.035, extension_share=0.0, momentum_warmup=60, momentum_cooldown=20,
        final_long_window=512, data_dir="data/corpus", micro_batches=1, val_tokens=163840, val_seq_len=8192, val_every=40,
        device="cpu",
    ),
}

def parse_config(argv: list[str]) -> tuple[Config, dict]:
    """--preset NAME, then --field value for any scalar field. Also returns the overrides: a record has none."""
    parser = argparse.ArgumentParser(prog="train_gpt.py", allow_abbrev=False, description=__doc__.split("\n\nReading")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="A preset's values: PRESETS, at the top of train_gpt.py.")
    parser.error = partial(_flag_error, parser)
    default = "short" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=PRESETS, default=default)
    comments = dict(re.findall(r"^    (\w+): \w+ [^#\n]*# (.*)", SOURCE, re.MULTILINE))    # the fields' own
    for f in fields(Config):
        if f.type in (int, float, str) and f.name != "preset":
            parser.add_argument(f"--{f.name}", type=f.type, metavar=f.type.__name__, help=comments.get(f.name))
        elif f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=comments.get(f.name))
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    base = PRESETS[given.pop("preset")]
    overrides = {k: v for k, v in given.items() if v != getattr(base, k)}
    cfg = replace(base, **overrides)
    check_config(cfg)
    return cfg, overrides

def _flag_error(parser: argparse.ArgumentParser, message: str) -> None:
    raise UserError(f"{message} (--help lists the flags)")

# =====================================================================================================================
# 2. Model: each parameter is declared once, with its shape, its init and how it is optimized.
# =====================================================================================================================

@dataclass(frozen=True)
class Spec:
    """Everything that the optimizer needs to know of a parameter."""
    optimizer: str                              # "muon": a bank of matrices (..., rows, columns) | "adam"
    sharded: bool = False                       # ranks share the update: reduce-scatter and all-gather, not all-reduce
    lr: float = 1.0                             # multiplies the optimizer's learning rate
    wd: float = 0.0                             # multiplies the optimizer's weight decay
    betas: tuple[float, float] = (0.9, 0.99)    # Adam's
    second_lr: float = 1.0                      # muon: multiplies the learning rate of matrices [:, 1] of the bank

def normal(std: float) -> Callable:
    return lambda p, rng: p.normal_(std=std, generator=rng) if std else p.zero_()

def constant(value: float) -> Callable:
    return lambda p, rng: p.fill_(value)

def matrices(std: float, zero_second: bool = False) -> Callable:
    """A uniform bank; zero_second: [:, 1] is zero, so that the MLP begins as nothing added."""
    def fill(p: Tensor, rng: torch.Generator) -> None:
        p.uniform_(-3**0.5 * std, 3**0.5 * std, generator=rng)
        if zero_second:
            p[:, 1] = 0
    return fill

class GPT(nn.Module):
    """tokens (T,), one packed stream of documents -> the mean loss. dtype: of matrices and tables; the rest is float32."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32, compiled: bool = False):
        super().__init__()
        unit = partial(torch.compile, dynamic=False, fullgraph=True) if compiled else lambda f: f
        self.first_stream, self.normed, self.mix, self.skip = unit(first_stream), unit(norm), unit(mix), unit(skip)
        self.gated_value, self.project, self.attend = unit(gated_value), unit(project), unit(attend)
        self.put_back, self.mlp_block = unit(put_back), unit(mlp_block)
        self.head_chunk = unit(head_chunk)                              # layers are alike: a piece compiles once for all
        self.cfg, self.layers, self.dtype, self.specs = cfg, topology(cfg), dtype, {}
        self.value_tables = sorted({row.value_embed for row in self.layers} - {None})
        self.chunks = {name: chunk(cfg, f"{name}_chunk") for name in ("smear", "skip", "attn", "ve")}
        self.declare_tables()
        self.declare_layers()
        undeclared = {name for name, _ in self.named_parameters()} ^ set(self.specs)
        assert not undeclared, f"parameters without a declaration, or the reverse: {undeclared}"
        self.declare_buffers()

    def declare_tables(self) -> None:
        cfg = self.cfg
        V, D, H, d = cfg.vocab_rows, cfg.model_dim, cfg.num_heads, cfg.head_dim
        table = partial(self.param, optimizer="adam", sharded=True)
        ends = dict(init=normal(cfg.embed_std), betas=(0.5, 0.95), wd=150.0)
        table("embed", (V, D), **ends)
        table("lm_head", (D, V), **ends)        # transposed, so that its gradient x.T @ dlogits needs no transpose
        with torch.no_grad():
            self.lm_head.copy_(self.embed.T)    # tied until the untie step
        for k in range(cfg.extra_inputs):
            table(f"input_embed_{k}", (V, D), **ends)
        for name in self.value_tables:
            table(f"value_embed_{name}", (V, H * d), init=normal(cfg.value_embed_std), betas=(0.75, 0.95), lr=75.0, wd=5.0)
        if cfg.bigram_rows:
            rows = cfg.bigram_rows * V
            table("bigram_embed", (rows, D), init=constant(0), betas=(0.75, 0.95), lr=75.0, wd=5.0)

    def declare_layers(self) -> None:
        cfg, layers, chunks = self.cfg, self.layers, self.chunks
        L, D, H, d = len(layers), cfg.model_dim, cfg.num_heads, cfg.head_dim
        attending = sum(layer.window != "none" for layer in layers)
        valued = sum(layer.value_embed is not None for layer in layers)
        skipping = sum(layer.skip_from is not None for layer in layers)
        bank = partial(self.param, optimizer="muon", sharded=True, wd=1.0)
        gate = partial(self.param, optimizer="adam", init=constant(0), dtype=torch.float32)
        scalar = partial(self.param, optimizer="adam", lr=5.0, dtype=torch.float32)
        width = lambda name: chunks[name].stop - chunks[name].start  # noqa: E731

        bank("qkvo", (attending, 4, H * d, D), init=matrices(cfg.matrix_std * D**-0.5))
        bank("mlp", (L, 2, cfg.mlp_ratio * D, D), init=matrices(cfg.matrix_std * D**-0.5, zero_second=True), second_lr=2.0)
        if chunks["attn"] and attending:
            gate("attn_gate", (attending, H, width("attn")), wd=1.0)
        if chunks["ve"] and valued:
            gate("ve_gate", (valued, H, width("ve") + cfg.ve_own_dims), wd=1.0)
        if chunks["smear"]:
            gate("smear_gate", (1, width("smear")), lr=0.01)
            scalar("smear_scale", (1,), init=constant(0))
        if chunks["skip"] and skipping:
            gate("skip_gate", (skipping, 1, width("skip")), lr=0.05)
        scalar("skip_scale", (skipping,), init=constant(-1.5))
        scalar("qkv_scale", (attending,), init=constant(0.5))
        scalar("o_scale", (attending,), init=constant(1.0))
        scalar("resid_scale", (L,), init=constant(1.1))
        scalar("x0_scale", (L,), init=constant(0), betas=(0.65, 0.95))
        if cfg.extra_inputs:
            scalar("input_scale", (L, cfg.extra_inputs), init=constant(0), betas=(0.65, 0.95))
        if cfg.bigram_rows:
            scalar("bigram_scale", (L,), init=constant(0.1))
        if "b" in cfg.backout:
            scalar("backout_scale", (1,), init=constant(0.5))

    def param(self, name: str, shape: tuple[int, ...], *, init: Callable, dtype: torch.dtype | None = None, **spec) -> None:
        """Each parameter draws from a generator of its own, so a switch elsewhere does not change its start."""
        value = torch.empty(shape)
        if value.numel() == 0:
            return
        if not value.is_meta:
            init(value, torch.Generator().manual_seed(zlib.crc32(f"{self.cfg.seed} {name}".encode())))
        self.register_parameter(name, nn.Parameter(value.to(dtype or self.dtype)))
        self.specs[name] = Spec(**spec)

    def declare_buffers(self) -> None:
        cfg = self.cfg
        half = int(cfg.head_dim * cfg.rotary_share) // 2
        powers = torch.arange(half, dtype=torch.float32) / max(half - 1, 1)
        self.register_buffer("rotary_freqs", cfg.rotary_base ** -powers)            # radians a token, (half,)
        self.register_buffer("softmax_scale", torch.tensor(cfg.softmax_scale))
        self.register_buffer("long_window", torch.tensor(cfg.stages[0].windows[1]))
        positions = cfg.longest * (2 if any(layer.paired for layer in self.layers) else 1)
        for name in ("rotary_cos", "rotary_sin"):
            self.register_buffer(name, torch.empty(positions, half), persistent=False)
        if cfg.bigram_rows and cfg.bigram_signs:
            signs = torch.empty(cfg.bigram_signs, cfg.model_dim)
            if not signs.is_meta:                                                   # fixed: not a matter of the run's seed
                signs = torch.randint(0, 2, signs.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
            self.register_buffer("bigram_sign", signs.to(self.dtype), persistent=False)
        self.turn_rotary()

    @torch.no_grad()
    def turn_rotary(self) -> None:
        angles = torch.outer(torch.arange(len(self.rotary_cos), device=self.rotary_freqs.device), self.rotary_freqs)
        self.rotary_cos.copy_(angles.cos())
        self.rotary_sin.copy_(angles.sin())

    @torch.no_grad()
    def set_long_window(self, window: int) -> None:
        """YaRN (2309.00071): slow frequencies stretch with the long window, those that turn over 32 times in it stay."""
        before = int(self.long_window)
        if self.cfg.yarn and window != before:
            freqs, scale = yarn(self.rotary_freqs, before, window)
            self.rotary_freqs.copy_(freqs)
            self.softmax_scale.mul_(scale)
            self.turn_rotary()
        self.long_window.fill_(window)

    def forward(self, tokens: Tensor, targets: Tensor, weights: Tensor, windows: tuple[int, int]) -> Tensor:
        """tokens, targets (T,) ids; weights (n,) of the losses on the next n tokens; windows (short, long) -> mean loss."""
        cfg, layers, p = self.cfg, self.layers, dict(self.named_parameters())
        reach = {"short": windows[0], "long": windows[1]}
        first, doc_start = documents(tokens, cfg.bos_id)
        x = x0 = self.first_stream(F.embedding(tokens, p["embed"]), first, p.get("smear_scale"), p.get("smear_gate"),
                                   self.chunks["smear"])                            # (T, D)
        added = [self.normed(F.embedding(tokens, p[f"input_embed_{k}"])) for k in range(cfg.extra_inputs)]
        if cfg.bigram_rows:
            added.append(self.bigram(tokens, first, p["bigram_embed"]))
        values = {name: F.embedding(tokens, p[f"value_embed_{name}"]) for name in self.value_tables}

        attending, valued, skipping = zip(*[(row.window != "none", row.value_embed is not None, row.skip_from is not None)
                                            for row in layers])
        qkvo, attn_gate = deal(p.get("qkvo"), attending), deal(p.get("attn_gate"), attending)
        qkv_scale, o_scale = deal(p.get("qkv_scale"), attending), deal(p.get("o_scale"), attending)
        skip_scale, skip_gate = deal(p.get("skip_scale"), skipping), deal(p.get("skip_gate"), skipping)
        ve_gate, mlp_bank = deal(p.get("ve_gate"), valued), p["mlp"].unbind(0)
        mixed = ("resid_scale", "x0_scale", "input_scale", "bigram_scale")
        scales = torch.cat([p[name].view(len(layers), -1) for name in mixed if name in p], dim=1)   # (L, 2 + added)
        outputs: list[Tensor] = []
        for i, row in enumerate(layers):
            x = self.mix([x, x0, *added], scales[i])
            if row.skip_from is not None:
                x = self.skip(x, outputs[row.skip_from], x0, skip_scale[i], skip_gate[i], self.chunks["skip"])
            if row.window != "none":
                n = self.normed(x)
                q, k, v = self.project(n, qkvo[i], qkv_scale[i], cfg.head_dim, cfg.qk_norm)
                if row.value_embed is not None:
                    value = values[row.value_embed].view_as(v)
                    v = v + self.gated_value(n, value, ve_gate[i], self.chunks["ve"], cfg.ve_own_dims)
                positions = len(x) * (2 if row.paired else 1)
                y = self.attend(q, k, v, first, doc_start, self.rotary_cos[:positions], self.rotary_sin[:positions],
                                self.softmax_scale, reach[row.window], row.paired, cfg.key_offset and row.window == "long")
                x = self.put_back(x, y, n, qkvo[i], o_scale[i], attn_gate[i], self.chunks["attn"])
            x = self.mlp_block(x, mlp_bank[i][0], mlp_bank[i][1], cfg.activation)
            outputs.append(x)
        for row, output in zip(layers, outputs):
            if row.backout:                                                         # what only the middle needed goes out
                x = x - p["backout_scale"][0] * output
        cap = (cfg.softcap, cfg.softcap_shift, cfg.softcap_width)
        return head_loss(self.normed(x), p["lm_head"], targets, weights, cap, self.head_chunk)

    def bigram(self, tokens: Tensor, first: Tensor, table: Tensor) -> Tensor:
        """A row a pair of neighbours, by hash; with signs, pairs that share a row can be told apart. -> (T, D)"""
        x = F.embedding(bigram_rows(tokens, first, len(table)), table)
        if self.cfg.bigram_signs:
            now = tokens.to(torch.int32)
            x = x * self.bigram_sign[(now ^ before(now, first)).remainder(self.cfg.bigram_signs)]
        return x

def documents(tokens: Tensor, bos_id: int) -> tuple[Tensor, Tensor]:
    """(T,) -> whether a token is the first of its document, and where that document starts, (T,) each.

    Documents never see each other: for a first token there is no token before, in the smear, the keys and the bigrams too.
    """
    position = torch.arange(len(tokens), device=tokens.device)
    first = (tokens == bos_id) | (position == 0)
    return first, torch.where(first, position, 0).cummax(0).values

def first_stream(x: Tensor, first: Tensor, scale: Tensor | None, w: Tensor | None, dims: slice | None) -> Tensor:
    """Token embeddings (T, D), with a gated share of the embedding before, normed."""
    return norm(x if w is None else x + (scale * gate(x[:, dims], w)).to(x.dtype) * before(x, first))

def mix(streams: list[Tensor], scales: Tensor) -> Tensor:
    """The weighted sum with which every layer begins: stream, x0, extra inputs, bigram; scales one for each."""
    return sum(scale * stream for scale, stream in zip(scales.unbind(0), streams))

def skip(x: Tensor, saved: Tensor, x0: Tensor, scale: Tensor, w: Tensor | None, dims: slice | None) -> Tensor:
    """x plus a gated share of an earlier layer's output (U-Net)."""
    share = torch.sigmoid(scale)
    return x + (share if w is None else share * 2 * gate(x0[:, dims], w)).to(x.dtype) * saved

def gated_value(n: Tensor, value: Tensor, w: Tensor | None, dims: slice | None, own: int) -> Tensor:
    """n (T, D) the normed stream, value (T, H, d) -> what v gains; the gate reads dims of n, own of value (seed 000)."""
    if w is None:
        return value
    z = torch.cat((n[:, dims], value.flatten(1)[:, :own]), dim=-1)
    return (2 * gate(z, w)).to(value.dtype)[..., None] * value

def project(n: Tensor, qkvo: Tensor, scale: Tensor, head_dim: int, qk_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """n (T, D) the normed stream, qkvo (4, H d, D) -> q, k, v (T, H, d)."""
    q, k, v = F.linear(n, scale * qkvo[:3].flatten(0, 1)).view(len(n), 3, -1, head_dim).unbind(1)
    return (norm(q), norm(k), v) if qk_norm else (q, k, v)

def attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor, doc_start: Tensor, cos: Tensor, sin: Tensor, scale: Tensor,
           reach: int, paired: bool, key_offset: bool) -> Tensor:
    """q, k, v (T, H, d); cos, sin (T or, paired, 2T, half) -> (T, H, d)."""
    if key_offset:                                                                  # one layer finds "what followed this?"
        still = k[..., 2 * cos.size(-1):]
        k = torch.cat((k[..., :2 * cos.size(-1)], torch.where(first[:, None, None], still, before(still, first))), dim=-1)
    if paired:                                                                      # twice the length, half the heads
        q, k, v = pair(q), pair(k), pair(v)
        doc_start = 2 * doc_start.repeat_interleave(2)
    lo = torch.maximum(doc_start, torch.arange(len(q), device=q.device) - reach + 1)
    y = attention(rotary(q, cos, sin), rotary(k, cos, sin), v, lo, reach, scale)
    return unpair(y) if paired else y

def put_back(x: Tensor, y: Tensor, n: Tensor, qkvo: Tensor, scale: Tensor, w: Tensor | None, dims: slice | None) -> Tensor:
    """x (T, D) plus the heads' outputs y (T, H, d), each gated by what the normed stream n says, through o."""
    if w is not None:
        y = y * gate(n[:, dims], w).to(y.dtype)[..., None]
    return x + y.flatten(1) @ (scale * qkvo[3])

def mlp_block(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    return x + mlp(norm(x), up, down, activation)

def deal(bank: Tensor | None, wanted: list[bool]) -> list[Tensor | None]:
    """The rows of a bank, dealt out to the layers that have one."""
    rows = iter(bank.unbind(0) if bank is not None else [])
    return [next(rows, None) if wants else None for wants in wanted]

def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))

def gate(x: Tensor, w: Tensor) -> Tensor:
    """x (T, c), w (gates, c) -> sigmoid(w . x) (T, gates), float32; 1/2 at the start, where w is 0."""
    return torch.sigmoid(F.linear(x.float(), w))

def before(x: Tensor, first: Tensor) -> Tensor:
    """x (T, ...) of the token before; 0 for the first token of a document."""
    shifted = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    return shifted.masked_fill(first.view(-1, *[1] * (x.dim() - 1)), 0)

def bigram_rows(tokens: Tensor, first: Tensor, num_rows: int) -> Tensor:
    """tokens (T,) -> row of the bigram table for each, (T,) int32; the first token of a document has the last row."""
    now = tokens.to(torch.int32)                                                    # wraps: the hash is defined on 32 bits
    mixed = (36313 * now) ^ (27191 * before(now, first))
    return torch.where(first, num_rows - 1, mixed.remainder(num_rows - 1))

def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, d); cos, sin (T, half): turns the first 2 half dimensions in adjacent pairs, leaves the rest."""
    cos, sin = cos[:, None], sin[:, None]
    turning, still = x.split((2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)), dim=-1)
    a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((turned, still), dim=-1)

def yarn(freqs: Tensor, a: int, b: int) -> tuple[Tensor, float]:
    """The long window goes from a to b tokens -> new frequencies, factor of the softmax scale. 2309.00071"""
    rotations = a * freqs / (2 * math.pi)
    ramp = ((rotations - 1) / 31).clamp(0, 1)
    return freqs * (a / b + ramp * (1 - a / b)), 0.2 * math.log(b / a) + 1

def pair(x: Tensor) -> Tensor:
    """(T, H, d) -> (2T, H/2, d): token t of heads 2j and 2j+1 at positions 2t and 2t+1."""
    T, H, d = x.shape
    return x.view(T, H // 2, 2, d).transpose(1, 2).reshape(2 * T, H // 2, d)

def unpair(x: Tensor) -> Tensor:
    """(2T, H/2, d) -> (T, H, d), the reverse of pair."""
    T2, H2, d = x.shape
    return x.view(T2 // 2, 2, H2, d).transpose(1, 2).reshape(T2 // 2, 2 * H2, d)

# =====================================================================================================================
# 3. Optimizer: NorMuon for matrix banks, Adam for the rest. Driven by the declarations.
# =====================================================================================================================

class Optimizer:
    """NorMuon and Adam over a model's declared parameters, for 1 to N ranks, with embedding and head tied, then untied.

    A replicated parameter is all-reduced and updated on every rank. A sharded one counts in units, matrices of a bank or
    rows of a table, padded so that ranks divide them: gradients reduce-scatter, a rank updates its units, all gather them.
    """

    def __init__(self, cfg: Config, model: GPT, ranks: "Ranks"):
        self.cfg, self.specs, self.ranks = cfg, model.specs, ranks
        self.params = dict(model.named_parameters())
        self.tied = cfg.untie_share > 0
        self.state = {name: self.new_state(name) for name in self.params}
        self.sparse = None
        if "bigram_embed" in self.params and ranks.size > 1:
            self.sparse = SparseRows(ranks, len(self.params["bigram_embed"]), timedelta(seconds=cfg.rank_timeout))
        compiled = partial(torch.compile, dynamic=False) if cfg.compile and ranks.device.type == "cuda" else lambda f: f
        self.normuon_, self.adam_ = compiled(normuon_), compiled(adam_)

    def units(self, name: str, t: Tensor) -> Tensor:
        """t (a parameter, its gradient or a state of it) as (units, ...), a view if nothing is padded."""
        t = t.flatten(0, -3) if self.specs[name].optimizer == "muon" else t
        missing = -len(t) % self.ranks.size if self.specs[name].sharded else 0
        return F.pad(t, (*[0] * (2 * t.dim() - 1), missing)) if missing else t

    def own(self, name: str, units: Tensor) -> Tensor:
        """What this rank updates, a view."""
        return units.chunk(self.ranks.size)[self.ranks.rank] if self.specs[name].sharded else units

    def new_state(self, name: str) -> dict[str, Tensor]:
        """What is remembered of this rank's units, in float32; low: the bits of the value that bfloat16 leaves out."""
        p, muon = self.own(name, self.units(name, self.params[name].detach())), self.specs[name].optimizer == "muon"
        state = {"momentum": torch.zeros_like(p, dtype=torch.float32)}
        m = state["momentum"]
        state["second"] = m.mean(dim=averaged_side(p), keepdim=True) if muon else torch.zeros_like(m)
        if p.dtype == torch.bfloat16:
            state["low"] = torch.zeros_like(p, dtype=torch.int16)
        return state

    def rates(self, name: str) -> Tensor:
        """(units, 1, 1): what multiplies the learning rate of this rank's matrices of a bank (n, k, rows, columns)."""
        p, spec = self.params[name], self.specs[name]
        rate = torch.full((*p.shape[:2], 1, 1), max(1, p.size(-2) / p.size(-1))**0.5, device=p.device)
        rate[:, 1:2] *= spec.second_lr
        return self.own(name, self.units(name, rate))

    @torch.no_grad()
    def step(self, step: int, lr_mul: float, momentum: float, untie: bool) -> None:
        """Muon's banks move on every step, Adam's parameters on odd ones, on the gradients of two steps."""
        adam_turn = step % 2 == 1
        moving = [name for name, spec in self.specs.items() if spec.optimizer == "muon" or adam_turn]
        for name in moving:
            assert self.params[name].grad is not None, f"no gradient reached {name}"
        if adam_turn and self.tied:                         # one Adam step on the head, for both
            moving.remove("embed")
            self.params["lm_head"].grad += self.params["embed"].grad.T
            self.params["embed"].grad = None
        reduced = {name: self.start_reduction(name) for name in moving}     # every rank in the same order, all at once
        gathered = []
        for name in sorted(moving, key=lambda name: (self.specs[name].optimizer == "muon", self.params[name].numel())):
            gathered.append(self.update(name, reduced[name](), lr_mul, momentum, adam_steps=(step + 1) // 2))
            self.params[name].grad = None
        for wait in gathered:
            wait()
        if adam_turn and self.tied:
            self.params["embed"].copy_(self.params["lm_head"].T)
        if untie and self.tied:
            assert adam_turn, f"untied on step {step}, which is even"
            self.tied = False
            for key in self.state["lm_head"]:
                self.load_state("embed", key, self.whole_state("lm_head", key).T)

    def start_reduction(self, name: str) -> Callable[[], Tensor]:
        """Sets the sum over ranks going -> a function that waits for it, the gradient of this rank's units."""
        if name == "bigram_embed" and self.sparse:
            return self.sparse.start(self.units(name, self.params[name].grad))
        grad = self.units(name, self.params[name].grad)
        return self.ranks.reduce_scatter(grad) if self.specs[name].sharded else self.ranks.all_reduce(grad)

    def update(self, name: str, grad: Tensor, lr_mul: float, momentum: float, adam_steps: int) -> Callable[[], None]:
        """Moves this rank's units, sets the gathering going -> a function that waits for it."""
        cfg, spec, state = self.cfg, self.specs[name], self.state[name]
        whole = self.units(name, self.params[name])
        p = self.own(name, whole)
        if spec.optimizer == "muon":
            self.normuon_(p, state.get("low"), grad, state["momentum"], state["second"], lr=cfg.muon_lr * lr_mul,
                          wd=cfg.muon_wd * spec.wd, momentum=momentum, beta2=cfg.muon_beta2, rates=self.rates(name))
        else:
            self.adam_(p, state.get("low"), grad, state["momentum"], state["second"], lr=cfg.adam_lr * spec.lr * lr_mul,
                       wd=cfg.adam_wd * spec.wd, betas=spec.betas, eps=cfg.adam_eps, steps=adam_steps)
        return self.finish(name, whole) if spec.sharded else lambda: None

    def finish(self, name: str, whole: Tensor) -> Callable[[], None]:
        gathering, target = self.ranks.all_gather(whole, self.own(name, whole)), self.params[name].flatten(0, -whole.dim())
        def wait() -> None:
            gathering()
            if whole.data_ptr() != target.data_ptr():       # padded: a copy
                target.copy_(whole[:len(target)])
        return wait

    def whole_state(self, name: str, key: str) -> Tensor:
        """(units, ...) of all ranks, without padding: the same for every number of ranks. All ranks must call it."""
        own = self.state[name][key]
        if not self.specs[name].sharded or self.ranks.size == 1:
            return own
        whole = own.new_empty(len(own) * self.ranks.size, *own.shape[1:])
        self.ranks.all_gather(whole.view(torch.uint8), own.view(torch.uint8))()     # gloo gathers no int16
        p = self.params[name]
        return whole[:math.prod(p.shape[:-2]) if self.specs[name].optimizer == "muon" else len(p)]

    def load_state(self, name: str, key: str, whole: Tensor) -> None:
        """The reverse: this rank keeps its units of what whole_state gave."""
        missing = -len(whole) % self.ranks.size if self.specs[name].sharded else 0
        padded = F.pad(whole, (*[0] * (2 * whole.dim() - 1), missing)) if missing else whole
        self.state[name][key].copy_(self.own(name, padded))

class SparseRows:
    """The bigram table's gradient between ranks: only rows that a token touched travel (seed 002 asks for this).

    The tokens say which: indices go out, between hosts, while the forward pass runs; values follow the backward pass.
    """

    def __init__(self, ranks: "Ranks", num_rows: int, timeout: timedelta):
        self.ranks, self.share = ranks, -(-num_rows // ranks.size)
        self.hosts = dist.new_group(backend="gloo", timeout=timeout)    # known on the host: no GPU waits for indices
        self.rows, self.bytes_sent = np.empty(0, dtype=np.int64), 0

    def announce(self, rows: np.ndarray, last: bool) -> None:
        """rows that this rank's micro-batches of a step touch; last: of the steps whose gradients add up."""
        self.rows = np.union1d(self.rows, rows)
        if last:
            owner_ends = np.searchsorted(self.rows, self.share * np.arange(self.ranks.size + 1))
            self.sent = torch.from_numpy(np.diff(owner_ends))
            self.received = torch.empty_like(self.sent)
            dist.all_to_all_single(self.received, self.sent, group=self.hosts)
            self.wanted = torch.empty(int(self.received.sum()), dtype=torch.int64)
            self.indices = dist.all_to_all_single(self.wanted, torch.from_numpy(self.rows), self.received.tolist(),
                                                  self.sent.tolist(), group=self.hosts, async_op=True)

    def start(self, grad: Tensor) -> Callable[[], Tensor]:
        """grad (rows, D), dense -> a function that gives this rank's rows of the sum over ranks, as reduce_scatter would."""
        self.indices.wait()
        device, counts = grad.device, self.received.tolist()
        values = grad[torch.from_numpy(self.rows).to(device)]
        arrived = values.new_empty(len(self.wanted), values.size(1))
        work = dist.all_to_all_single(arrived, values, counts, self.sent.tolist(), async_op=True)
        leaving = len(self.rows) - int(self.sent[self.ranks.rank])
        self.bytes_sent = leaving * (values.size(1) * values.element_size() + self.rows.itemsize)
        places, self.rows = self.wanted.to(device) - self.share * self.ranks.rank, self.rows[:0]
        def wait() -> Tensor:
            work.wait()
            own = torch.zeros(self.share, grad.size(1), device=device)
            for place, value in zip(places.split(counts), arrived.split(counts)):   # in the order of ranks
                own.index_add_(0, place, value.float())
            return own
        return wait

def averaged_side(matrix: Tensor) -> int:
    """The dimension to average over, so that one value is left for each index of the longer side."""
    return -1 if matrix.size(-2) >= matrix.size(-1) else -2

def normuon_(p: Tensor, low: Tensor | None, g: Tensor, m: Tensor, second: Tensor, *, lr: float, wd: float, momentum: float,
             beta2: float, rates: Tensor) -> None:
    """One NorMuon step (2510.05491) on matrices (units, rows, columns), in place; rates (units, 1, 1) multiply lr."""
    u = normuon_direction(g.float(), m, second, momentum, beta2)
    weight = exact(p, low)
    decay = wd * lr * weight * (u * weight > 0)                 # cautious (2411.16085): never against the update
    store_exact_(p, low, weight - lr * rates * (u + decay))

def normuon_direction(g: Tensor, m: Tensor, second: Tensor, momentum: float, beta2: float) -> Tensor:
    """Nesterov momentum, orthogonalised, rows (or columns) of equal size on average; the matrix's norm stays."""
    m.lerp_(g, 1 - momentum)
    u = polar_express(g.lerp(m, momentum)).float()
    size = u.norm(dim=(-2, -1), keepdim=True)
    second.lerp_(u.square().mean(dim=averaged_side(u), keepdim=True), 1 - beta2)
    u = u * second.clamp_min(1e-10).rsqrt()
    return u * (size / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))

# 2505.16932, its coefficients for five steps, safety 2e-2, cushion 2
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

def polar_express(g: Tensor) -> Tensor:
    """g (n, rows, columns) -> about U V^T of its singular value decomposition, bfloat16."""
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x                                     # the Gram matrix on the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = symmetric_product(x)
        x = a * x + symmetric_product(gram, alpha=c, beta=b) @ x
    return x.mT if tall else x

def adam_(p: Tensor, low: Tensor | None, g: Tensor, m: Tensor, second: Tensor, *, lr: float, wd: float,
          betas: tuple[float, float], eps: float, steps: int) -> None:
    """Adam's step number `steps` (from 1) with cautious weight decay, in place."""
    g = g.float()
    m.lerp_(g, 1 - betas[0])
    second.lerp_(g.square(), 1 - betas[1])
    u = (m / (1 - betas[0]**steps)) / ((second / (1 - betas[1]**steps)).sqrt() + eps)
    weight = exact(p, low)
    store_exact_(p, low, weight - lr * u - wd * lr**2 * weight * (u * weight > 0))

def exact(p: Tensor, low: Tensor | None) -> Tensor:
    """The float32 value of a parameter; a bfloat16 one keeps the 16 bits that it lacks in low, int16."""
    if low is None:
        return p.float()
    return ((p.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)

def store_exact_(p: Tensor, low: Tensor | None, value: Tensor) -> None:
    """The reverse. p is value rounded (not cut, which would pull every weight towards 0); low, signed, is the rest."""
    if low is None:
        p.copy_(value)
        return
    bits = value.view(torch.int32)
    high = (bits + 0x8000) >> 16
    p.view(torch.int16).copy_(high)
    low.copy_(bits - (high << 16))

# =====================================================================================================================
# 4. Data: .bin shards of uint16 tokens behind a 256-int32 header. Nothing reorders, filters, pads or wraps.
# =====================================================================================================================

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
FIRST_DOCUMENTS = 2**20                                         # tokens in which a shard must have a BOS

def read_shard(path: Path, vocab_size: int, bos_id: int) -> np.ndarray:
    """The tokens of a shard (n,), uint16, memory-mapped. UserError names the file and what is wrong with it."""
    need(path.is_file(), f"{path}: not a file that can be read; fetch or make it again")
    size = path.stat().st_size
    need(size >= HEADER_BYTES, f"{path}: {size} bytes are less than a shard's header; fetch or make it again")
    header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
    need(header[0] == SHARD_MAGIC, f"{path}: not a token shard (magic {header[0]}, not {SHARD_MAGIC})")
    need(header[1] == SHARD_VERSION, f"{path}: shard version {header[1]}, this program reads version {SHARD_VERSION}")
    expected = HEADER_BYTES + 2 * int(header[2])
    need(size == expected, f"{path}: {size} bytes, but its header promises {expected}; fetch or make it again")
    need(header[2] > 0, f"{path}: holds no tokens; fetch or make it again")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
    need(tokens.max() < vocab_size, f"{path}: token id {tokens.max()} is outside the vocabulary, --vocab_size {vocab_size}")
    need((tokens[:FIRST_DOCUMENTS] == bos_id).any(), f"{path}: no document begins (--bos_id {bos_id}) in its first tokens")
    return tokens

def find_data(cfg: Config) -> Path:
    """--data_dir as given, or, where that is not there, beside this file (the presets' own folders)."""
    given = Path(cfg.data_dir)
    return given if given.is_dir() else Path(__file__).resolve().parent / given

def find_shards(cfg: Config, split: str) -> list[Path]:
    files = sorted(find_data(cfg).glob(f"*_{split}_*.bin"))
    need(len(files) > 0, f"--data_dir {cfg.data_dir}: no *_{split}_*.bin there; ./run.sh fetches or makes a preset's data")
    return files

class Loader:
    """Training sequences in a fixed order: micro-batch n of a step is the same tokens whatever the number of ranks.

    A sequence starts at a BOS and is filled with whole documents, each cut at the stage's limit, the last one where the
    sequence is full; the next sequence starts with the next document. The position is (file, document).
    """

    def __init__(self, cfg: Config):
        self.cfg, self.files = cfg, find_shards(cfg, "train")
        self.open(0)

    def open(self, file: int) -> None:
        need(file < len(self.files), f"--num_steps {self.cfg.num_steps}: too few tokens in the {len(self.files)} training "
                                     f"shard(s) of --data_dir {self.cfg.data_dir}; get more or train fewer steps")
        self.tokens = read_shard(self.files[file], self.cfg.vocab_size, self.cfg.bos_id)
        self.starts = np.flatnonzero(self.tokens == self.cfg.bos_id)
        self.sizes = np.diff(self.starts, append=len(self.tokens))
        self.file, self.document, self.limit = file, 0, 0

    def pieces(self, count: int, max_doc_len: int) -> list[np.ndarray]:
        """The next sequence of count tokens, still as views of the shards."""
        found = []
        while count > 0:
            if self.document == len(self.starts):
                self.open(self.file + 1)
            if self.limit != max_doc_len:
                self.limit, self.ends = max_doc_len, np.minimum(self.sizes, max_doc_len).cumsum()
            done = self.ends[self.document - 1] if self.document else 0
            stop = min(int(np.searchsorted(self.ends, done + count)) + 1, len(self.starts))
            for document in range(self.document, stop):
                size = min(self.sizes[document], max_doc_len, count)
                found.append(self.tokens[self.starts[document]:self.starts[document] + size])
                count -= size
            self.document = stop
        return found

    def step(self, stage: Stage, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of one step: (tokens, targets), each (T,) int64."""
        size = stage.batch_tokens // self.cfg.micro_batches
        for n in range(self.cfg.micro_batches):
            pieces = self.pieces(size + 1, stage.max_doc_len)
            if n % ranks == rank:
                yield split_targets(np.concatenate(pieces))

    def check_enough(self, schedule: "Schedule") -> None:
        """UserError now, not hours later, if the run would outlast the data; reads only where documents begin."""
        walker = Loader(self.cfg)
        for step in range(self.cfg.num_steps):
            stage = schedule.stage(step)
            for _ in range(self.cfg.micro_batches):
                walker.pieces(stage.batch_tokens // self.cfg.micro_batches + 1, stage.max_doc_len)

def split_targets(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(tokens.astype(np.int64))
    return both[:-1], both[1:]

class Validation:
    """The first val_tokens targets of the validation stream as it is, in sequences of val_seq_len."""

    def __init__(self, cfg: Config):
        found = [read_shard(path, cfg.vocab_size, cfg.bos_id) for path in find_shards(cfg, "val")]
        total = sum(map(len, found))
        need(total > cfg.val_tokens, f"--val_tokens {cfg.val_tokens}: --data_dir {cfg.data_dir} has {total}, needs one more")
        self.tokens, self.size = np.concatenate(found)[:cfg.val_tokens + 1], cfg.val_seq_len
        self.count = cfg.val_tokens // cfg.val_seq_len
        lengths = token_bytes(find_data(cfg) / "vocab.tiktoken", cfg.vocab_size, cfg.bos_id)
        self.bytes = int(lengths[self.tokens[1:]].sum()) if lengths is not None else None

    def sequence(self, n: int) -> tuple[Tensor, Tensor]:
        return split_targets(self.tokens[n * self.size:(n + 1) * self.size + 1])

    def bits_per_byte(self, loss: float) -> float | None:
        """loss in nats a token, the BOS targets included, over the bytes of the text (a BOS has none)."""
        return loss * (len(self.tokens) - 1) / (math.log(2) * self.bytes) if self.bytes else None

def token_bytes(path: Path, vocab_size: int, bos_id: int) -> np.ndarray | None:
    """Bytes that each token stands for, (vocab_size,), from tiktoken's `base64 rank` lines; None without the file."""
    if not path.exists():
        return None
    lengths = np.full(vocab_size, -1)
    lengths[bos_id] = 0                                         # a BOS stands for no text
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            word, rank = line.split()
            assert int(rank) >= 0 > lengths[int(rank)]
            lengths[int(rank)] = len(base64.b64decode(word, validate=True))
        except (ValueError, IndexError, AssertionError):
            raise UserError(f"{path}: line {number} is no `base64 rank` below {vocab_size}; make the data again") from None
    need(lengths.min() >= 0, f"{path}: no line for token {lengths.argmin()} of {vocab_size}; make the data again")
    return lengths

def tokens_needed(cfg: Config) -> int:
    """Tokens that the run trains on; documents cut at the limit leave the rest unread, so shards hold more."""
    schedule = Schedule(cfg)
    return sum(schedule.stage(step).batch_tokens for step in range(cfg.num_steps))

# =====================================================================================================================
# 5. Schedule: pure functions of the step, so that they can be printed and tested.
# =====================================================================================================================

class Schedule:
    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.ends = [round(stage.until * cfg.scheduled_steps) for stage in cfg.stages]
        self.ends[-1] = cfg.num_steps

    def stage_index(self, step: int) -> int:
        return next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)

    def stage(self, step: int) -> Stage:
        return self.cfg.stages[self.stage_index(step)]

    def windows(self, step: int) -> tuple[int, int]:
        """(short, long) in tokens; the last validation, after the last step, looks further."""
        short, long = self.stage(step).windows
        return (short, self.cfg.final_long_window) if step >= self.cfg.num_steps else (short, long)

    def lr_mul(self, step: int) -> float:
        """The stage's multiplier, then a line down to final_lr, and final_lr in the extension; no cooldown: no line."""
        left = (1 - step / self.cfg.scheduled_steps) / self.cfg.cooldown_share if self.cfg.cooldown_share else 1.0
        flat = min(1.0, max(0.0, left))
        return flat * self.stage(step).lr_mul + (1 - flat) * self.cfg.final_lr

    def momentum(self, step: int) -> float:
        """Muon's: up over the first steps, down over the last."""
        cfg = self.cfg
        rising = step / cfg.momentum_warmup if cfg.momentum_warmup else 1.0
        falling = (cfg.num_steps - step) / max(cfg.momentum_cooldown, 1)
        return cfg.momentum_min + (cfg.momentum_max - cfg.momentum_min) * min(1.0, rising, falling)

    def predict(self, step: int) -> tuple[float, ...]:
        """Weights of the losses on the next tokens; each moves on a line through its stage."""
        i = self.stage_index(step)
        begin = self.ends[i - 1] if i else 0
        done = (step - begin) / max(self.ends[i] - begin, 1)
        weights = [a + done * (b - a) for a, b in self.cfg.stages[i].predict[:self.cfg.max_predict]]
        most = min(self.cfg.max_predict, max(len(stage.predict) for stage in self.cfg.stages))
        return (*weights, *[0.0] * (most - len(weights)))       # always as many: one compiled graph for all stages

    @property
    def untie_step(self) -> int:
        """The odd step after whose update embedding and head part; num_steps or more: never."""
        if self.cfg.untie_share == 1:
            return self.cfg.num_steps
        step = math.ceil(self.cfg.untie_share * self.cfg.scheduled_steps)
        return step if step % 2 else step + 1

# =====================================================================================================================
# 6. Operators: the reference is the documentation and the oracle of the tests; what follows it is what runs.
# =====================================================================================================================

def attention_reference(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, scale: Tensor | float) -> Tensor:
    """q, k, v (T, H, d); query i sees keys lo[i] .. i, lo (T,) holds document starts and window -> (T, H, d)."""
    key = torch.arange(len(k), device=k.device)
    visible = (key >= lo[:, None]) & (key <= key[:, None])                          # (T, T)
    scores = torch.einsum("qhd,khd->hqk", q * scale, k).float().masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).to(v.dtype), v)

QUERY_BLOCK = 128

def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, reach: int, scale: Tensor | float) -> Tensor:
    """attention_reference by blocks of queries and the keys they reach, reach >= i - lo[i] + 1: cost is T x reach."""
    T, H, d = q.shape
    back = -(-(min(reach, T) - 1) // QUERY_BLOCK) * QUERY_BLOCK                     # keys before a block's own
    blocks = -(-T // QUERY_BLOCK)
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, blocks * QUERY_BLOCK - T)) for t in (q, k, v))
    query = torch.arange(blocks * QUERY_BLOCK, device=q.device).view(blocks, 1, QUERY_BLOCK, 1)
    key = query[:, :, :1] - back + torch.arange(back + QUERY_BLOCK, device=q.device)
    lo = F.pad(lo, (0, blocks * QUERY_BLOCK - T)).view(blocks, 1, QUERY_BLOCK, 1)
    q = (q * scale).to(v.dtype).view(blocks, QUERY_BLOCK, H, d).transpose(1, 2)     # (blocks, H, QUERY_BLOCK, d)
    k, v = (bands(t, back) for t in (k, v))                                         # (blocks, H, back + QUERY_BLOCK, d)
    scores = (q @ k.mT).float().masked_fill((key < lo) | (key > query), float("-inf"))
    y = scores.softmax(dim=-1).to(v.dtype) @ v
    return y.transpose(1, 2).reshape(-1, H, d)[:T]

def bands(x: Tensor, back: int) -> Tensor:
    """x (T, H, d) -> for each block of queries the rows from `back` before it to its end; slices: cheap gradients."""
    before = F.pad(x, (0, 0, 0, 0, back, 0))
    shifted = [before[start:start + len(x)].unflatten(0, (-1, QUERY_BLOCK)) for start in range(0, back + 1, QUERY_BLOCK)]
    return torch.cat(shifted, dim=1).transpose(1, 2)

def mlp(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """x (T, D); up, down (4D, D) -> (T, D). relu(x)^2: 2109.08668"""
    hidden = F.linear(x, up)
    return (F.relu(hidden).square() if activation == "relu2" else F.gelu(hidden)) @ down

Cap = tuple[float, float, float]                                # logits become cap[0] sigmoid((logits + cap[1]) / cap[2])

def head_loss_reference(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap) -> Tensor:
    """x (T, D), head (D, V), targets (T,): sum over k of weights[k] * cross-entropy with the token k + 1 ahead, over T."""
    logits = (x @ head).float()
    if cap[0]:
        logits = cap[0] * torch.sigmoid((logits + cap[1]) / cap[2])
    T = len(targets)
    losses = [F.cross_entropy(logits[:T - k], targets[k:], reduction="sum") for k in range(len(weights))]
    return (torch.stack(losses) * weights).sum() / T

HEAD_CHUNK = 1024                                               # tokens

def head_loss(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap,
              piece: Callable | None = None) -> Tensor:
    """head_loss_reference, a chunk of tokens at a time: the float32 logits of a whole sequence never exist at once."""
    T, ahead = len(targets), torch.arange(len(weights), device=x.device)
    place = torch.arange(T, device=x.device)[:, None] + ahead                       # (T, n)
    weights = torch.where(place < T, weights / T, 0)                                # no loss on what is past the end
    targets = targets[place.clamp_max(T - 1)]
    return HeadLoss.apply(x, head, targets, weights, cap, piece or head_chunk, torch.is_grad_enabled())

class HeadLoss(torch.autograd.Function):
    """The gradient is made with the loss, while a chunk's logits are at hand; backward only scales it."""

    @staticmethod
    def forward(ctx, x, head, targets, weights, cap, piece, with_grad):
        chunks = zip(*(t.split(HEAD_CHUNK) for t in (x, targets, weights)))
        losses, dx, dhead = zip(*[piece(part, head, *rest, cap, with_grad) for part, *rest in chunks])
        if with_grad:
            ctx.save_for_backward(torch.cat(dx), sum(dhead).to(head.dtype))
        return sum(losses)

    @staticmethod
    def backward(ctx, grad):
        dx, dhead = ctx.saved_tensors
        return (grad * dx).to(dx.dtype), (grad * dhead).to(dhead.dtype), None, None, None, None, None

def head_chunk(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap, with_grad: bool):
    """x (c, D), targets and weights (c, n) -> loss, its gradient by x (c, D) and by head (D, V) in float32, or None."""
    loss, dz = chunk_loss((x @ head).float(), targets, weights, cap)
    if not with_grad:
        return loss, None, None
    dz = dz.to(x.dtype)
    return loss, dz @ head.T, (x.T @ dz).float()

def chunk_loss(z: Tensor, targets: Tensor, weights: Tensor, cap: Cap) -> tuple[Tensor, Tensor]:
    """z (c, V) before the cap, targets and weights (c, n) -> weighted cross-entropy, its gradient by z (c, V)."""
    s = torch.sigmoid((z + cap[1]) / cap[2]) if cap[0] else None
    logits = cap[0] * s if cap[0] else z
    top = logits.amax(dim=-1, keepdim=True)
    exp = (logits - top).exp()
    total = exp.sum(dim=-1, keepdim=True)
    loss = (weights * ((top + total.log()) - logits.gather(1, targets))).sum()
    dz = (exp * (weights.sum(dim=-1, keepdim=True) / total)).scatter_add(1, targets, -weights)
    return loss, dz * (cap[0] / cap[2] * s * (1 - s)) if cap[0] else dz

def symmetric_product(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha x x^T + beta x, x (n, rows, columns); beta needs x symmetric."""
    product = alpha * (x @ x.mT)
    return product + beta * x if beta else product

# =====================================================================================================================
# 7. Run: ranks, log, clock, and the loop.
# =====================================================================================================================

@dataclass
class Ranks:
    """Who am I among the processes. Collectives start at once and give a function that waits; with one process, no-ops."""
    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(cfg: Config) -> "Ranks":
        rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        size, near = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        need(cfg.micro_batches % size == 0, f"--micro_batches {cfg.micro_batches}: {size} processes cannot share them; "
                                            "start a number that divides it, or change it")
        if cfg.device == "cuda":
            gpus = torch.cuda.device_count()
            need(gpus > 0, f"--preset {cfg.preset}: wants a CUDA GPU and there is none; use --preset cpu, or --device cpu")
            need(local < gpus, f"process {local} has no GPU of its own, there are {gpus}; start as many processes as GPUs")
            torch.cuda.set_device(local)
        elif near > 1:                                          # torchrun says 1 thread; a core without a thread is idle
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // near))
        if size > 1:
            dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=timedelta(seconds=cfg.rank_timeout))
        return Ranks(rank, size, torch.device("cuda", local) if cfg.device == "cuda" else torch.device("cpu"))

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """The sum over ranks, in place."""
        work = dist.all_reduce(x, async_op=True) if self.size > 1 else None
        return lambda: (work and work.wait(), x)[1]

    def reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """x (units, ...) -> this rank's share of the sum, in float32 and in the order of ranks: a library's reduce-scatter
        moves as many bytes, but adds in bfloat16 and in an order of its own."""
        if self.size == 1:
            return lambda: x
        parts = torch.empty_like(x)
        work = dist.all_to_all_single(parts, x, async_op=True)
        return lambda: (work.wait(), sum(part.float() for part in parts.view(self.size, -1, *x.shape[1:])))[1]

    def all_gather(self, whole: Tensor, own: Tensor) -> Callable[[], Tensor]:
        """Fills whole with every rank's own, which may be a view of its place in it."""
        work = dist.all_gather_single(whole, own, async_op=True) if self.size > 1 else None
        return lambda: (work and work.wait(), whole)[1]

class Pulse(threading.Thread):
    """Every process says twice a second that it lives, in the store that they met in, so that a dead one can be named."""

    def __init__(self, ranks: Ranks):
        super().__init__(daemon=True)
        self.ranks, self.over, self.last_word = ranks, threading.Event(), "failed"
        if ranks.size > 1:
            self.store = dist.PrefixStore("pulse", dist.distributed_c10d._get_default_store())
            self.start()

    def run(self) -> None:
        beat, key = 0, str(self.ranks.rank)
        try:
            while not self.over.wait(0.5):
                self.store.set(key, str(beat := beat + 1))
            self.store.set(key, self.last_word)
        except RuntimeError:                                    # the store is gone, with torchrun
            pass

    def end(self) -> None:
        self.over.set()
        if self.ranks.size > 1:
            self.join(timeout=10)

    def beat(self, rank: int) -> bytes:
        return self.store.get(str(rank)) if self.store.check([str(rank)]) else b""

    def silent(self) -> list[int]:
        """Processes that for three seconds say nothing, and did not say that they leave."""
        silent = {}
        try:
            for wait in range(31 if self.ranks.size > 1 else 0):
                time.sleep(0.1 if wait else 0)
                beats = {rank: self.beat(rank) for rank in (silent if wait else range(self.ranks.size))}
                silent = {rank: beat for rank, beat in beats.items() if beat != b"left" and silent.get(rank, beat) == beat}
                if not silent:
                    break
        except RuntimeError:                                    # as above: nobody knows
            return []
        return list(silent)

class Log:
    """One file a run: the source, the configuration, then one line of key:value pairs an event."""
    END = "=" * 100

    def __init__(self, cfg: Config, ranks: Ranks, run_id: str | None = None):
        """run_id: of the run that goes on; its log is appended to."""
        self.file, self.run_id = None, run_id or str(uuid.uuid4())
        if ranks.rank == 0:
            path = Path(cfg.log_dir) / f"{self.run_id}.txt"
            self.appending = path.exists()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = path.open("a", buffering=1)         # line by line: an interrupted run's log is whole so far
            except OSError as error:
                raise UserError(f"--log_dir {cfg.log_dir}: no log can be written there ({error.strerror})") from None
            print(f"log: {path}", flush=True)

    def write(self, line: str, echo: bool = True) -> None:
        if self.file:
            try:
                self.file.write(line + "\n")
            except OSError as error:                            # a full disk: the run matters more than its log
                print(f"log: a line could not be written ({error.strerror})", file=sys.stderr)
            if echo:
                print(line, flush=True)

    def header(self, cfg: Config, overrides: dict, facts: dict[str, object]) -> None:
        """facts: what is known of the machine. A log that goes on has its header already."""
        if self.file is None or self.appending:
            return
        self.write(SOURCE.rstrip("\n"), echo=False)
        self.write(self.END, echo=False)
        self.write(f"source_sha256:{hashlib.sha256(SOURCE.encode()).hexdigest()}", echo=False)
        self.write(f"config:{json.dumps(asdict(cfg))}", echo=False)
        self.write(f"preset:{cfg.preset} overrides:{json.dumps(overrides)}")
        for name, fact in facts.items():
            self.write(f"{name}: {fact}")
        self.write(self.END, echo=False)

def keep_memory(device: torch.device) -> None:
    """glibc: freed memory stays ours. Else every large activation is mapped, and zeroed page by page, anew: a CPU step
    takes about a third longer."""
    libc = ctypes.CDLL(None) if device.type == "cpu" and platform.libc_ver()[0] == "glibc" else None
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):   # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of mallopt(3)
        if libc:
            libc.mallopt(option, value)

class Clock:
    """Training time only: it stands still during validation, compilation and warm-up."""

    def __init__(self, device: torch.device):
        self.device, self.total, self.started = device, 0.0, None

    def start(self) -> None:
        self.started = self.now()

    def stop(self) -> None:
        self.total, self.started = self.total + self.now() - self.started, None

    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

def pick_dtype(cfg: Config) -> torch.dtype:
    """auto: bfloat16 on GPUs and on CPUs that multiply it in hardware (AVX-512 BF16, AMX), else float32."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    fast = cfg.device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32

def compile_failure(cfg: Config, device: torch.device) -> str | None:
    """Why torch.compile cannot be used here (no C++ compiler, say), by trying it."""
    if not cfg.compile:
        return "--no-compile"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001, whatever it is, the run goes on without
        return f"torch.compile failed: {str(error).strip().splitlines()[0]}"
    return None

def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on this machine: the best of several, outside the clock."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.5:
        clock = Clock(device)
        clock.start()
        a @ b
        clock.stop()
        times.append(clock.total)
    return 2 * size**3 / min(times)

def matrix_flops(cfg: Config) -> int:
    """FLOPs of matrix products a token, forward; attention's scores apart, which depend on the documents."""
    width = cfg.num_heads * cfg.head_dim
    attending = sum(layer.window != "none" for layer in topology(cfg))
    matrices = attending * 4 * cfg.model_dim * width + len(cfg.windows) * 2 * cfg.mlp_ratio * cfg.model_dim**2
    return 2 * (matrices + cfg.model_dim * cfg.vocab_rows)

def attended_pairs(tokens: np.ndarray, bos_id: int, window: int, paired: bool) -> int:
    """Query-key pairs that the mask lets through, for each head (or pair of heads), of one sequence."""
    position = np.arange(len(tokens))
    start = np.maximum.accumulate(np.where(tokens == bos_id, position, 0))
    age = position - start + 1
    return int(sum(np.minimum(n, window).sum() for n in ((2 * age - 1, 2 * age) if paired else (age,))))

def step_flops(cfg: Config, batches: list[tuple[Tensor, Tensor]], windows: tuple[int, int]) -> int:
    """FLOPs of the model on these micro-batches, 3 x forward; nothing for masked blocks or recomputation."""
    reach = {"short": windows[0], "long": windows[1]}
    total = 0
    for tokens, _ in batches:
        total += len(tokens) * matrix_flops(cfg)
        pairs = {(layer.window, layer.paired): 0 for layer in topology(cfg) if layer.window != "none"}
        for window, paired in pairs:
            pairs[window, paired] = attended_pairs(tokens.numpy(), cfg.bos_id, reach[window], paired)
        for layer in topology(cfg):
            if layer.window != "none":                          # two products of head_dim multiply-adds a pair and head
                heads = cfg.num_heads // (2 if layer.paired else 1)
                total += 4 * heads * cfg.head_dim * pairs[layer.window, layer.paired]
    return 3 * total

def facts_of(ranks: Ranks, model: GPT, failure: str | None, ceiling: float) -> dict[str, object]:
    """What the log's header says of this machine and this model. Never the environment: it may hold tokens."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    chip = torch.cuda.get_device_name() if ranks.device.type == "cuda" else cpu
    matrices = sum(p.numel() for name, p in model.named_parameters() if model.specs[name].optimizer == "muon")
    return {
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
        "hardware": f"{chip}; {ranks.size} process(es), {torch.get_num_threads()} thread(s) each",
        "precision": str(model.dtype).removeprefix("torch."),
        "compile": failure or "torch.compile",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, of them {matrices:,} in matrices",
        "matrix ceiling": f"{ceiling / 1e9:.0f} GFLOP/s measured, all processes together",
    }

def peak_memory(device: torch.device) -> float:
    """MiB: allocated on the GPU, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

class Stopped(KeyboardInterrupt):
    """Somebody asked the run to end: the name of the signal. No library's `except Exception` keeps it."""

KEPT_CHECKPOINTS = 2
MAY_DIFFER = set("data_dir log_dir rank_timeout save_every save_on_stop resume compile warmup val_every".split())

def save_checkpoint(path: Path, content: dict) -> None:
    """Whole or not at all: a name of its own until it is on disk. OSError or RuntimeError when it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    run = path.name.partition(".step")[0]
    killed = path.parent.glob(f".{run}.step*.part")             # what a process that was killed left
    for old in [*by_age(path.parent, f"{run}.step*.pt")[KEPT_CHECKPOINTS:], *killed]:
        old.unlink()

def by_age(folder: Path, pattern: str) -> list[Path]:
    """Newest first; by time, as a run that went on from an older one may stand at a lower step."""
    return sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)

def settings(cfg: Config) -> dict:
    """The configuration as a checkpoint keeps it; what `auto` came to on this machine is part of it."""
    return json.loads(json.dumps(asdict(cfg) | {"dtype": str(pick_dtype(cfg)).removeprefix("torch.")}))

def newest_checkpoint(cfg: Config) -> dict | None:
    """The newest whole checkpoint under log_dir. UserError if it is of another configuration, naming what differs."""
    for path in by_age(Path(cfg.log_dir), "*.step*.pt"):
        try:
            if zipfile.ZipFile(path).testzip():                 # torch does not look at the checksums that it writes
                raise zipfile.BadZipFile
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)    # runs no code
            then, now = json.loads(content["config"]), settings(cfg)
        except Exception as error:  # noqa: BLE001, half a file can fail in many ways
            print(f"resume: {path} is not whole ({type(error).__name__}), looking for an older one", file=sys.stderr)
            continue
        differing = [f"--{name} was {then.get(name)}, is {now.get(name)}" for name in sorted({*then, *now} - MAY_DIFFER)
                     if then.get(name) != now.get(name)]
        need(not differing, f"{path}: a checkpoint of another configuration ({'; '.join(differing)}); use its flags, "
                            "another --log_dir, or no --resume")
        return content
    return None

class Run:
    """One run from its configuration to its last validation. What a user can get wrong is found before the log exists."""

    def __init__(self, cfg: Config, overrides: dict):
        self.cfg, self.schedule = cfg, Schedule(cfg)
        self.ranks = Ranks.join(cfg)
        self.loader, self.validation = Loader(cfg), Validation(cfg)
        self.loader.check_enough(self.schedule)
        saved = newest_checkpoint(cfg) if cfg.resume else None
        found = torch.tensor(saved["step"] + 1 if saved else 0, device=self.ranks.device)
        need(int(self.ranks.all_reduce(found.clone())()) == self.ranks.size * int(found),
             f"--log_dir {cfg.log_dir}: the processes found different checkpoints there; all nodes must see the same folder")
        self.log, self.clock = Log(cfg, self.ranks, saved and saved["run_id"]), Clock(self.ranks.device)
        keep_memory(self.ranks.device)
        failure = compile_failure(cfg, self.ranks.device)
        torch._dynamo.config.recompile_limit = 64               # a graph for each kind of layer, stage and validation window
        self.model = GPT(cfg, pick_dtype(cfg), compiled=not failure).to(self.ranks.device)
        self.optimizer = Optimizer(cfg, self.model, self.ranks)
        self.ceiling = matrix_ceiling(self.ranks.device, self.model.dtype) * self.ranks.size
        self.log.header(cfg, overrides, facts_of(self.ranks, self.model, failure, self.ceiling))
        self.steps_done = self.tokens_seen = self.flops = 0
        self.stop = self.last_signal = self.saved_step = self.average = None
        self.leaving = False
        if saved:
            self.restore(saved)
        elif cfg.resume:
            self.log.write(f"resume: no checkpoint in {cfg.log_dir}, starting at step 0")
        self.began_at, self.norms = self.steps_done, self.group_norms()

    def loop(self) -> float:
        """Trains and validates; returns the last validation loss, nats a token."""
        cfg, long_window, unread = self.cfg, int(self.model.long_window), []
        lag = 1 if self.ranks.device.type == "cuda" else 0      # a GPU's loss is read a step late, so that it never waits
        self.clock.start()
        for step in range(self.steps_done, cfg.num_steps + 1):
            last, windows = step == cfg.num_steps, self.schedule.windows(step)
            if last and cfg.save_every and self.saved_step != step:
                self.save()
            if windows[1] != long_window:
                self.model.set_long_window(long_window := windows[1])
            if last or (cfg.val_every and step % cfg.val_every == 0):
                self.report(unread, lag=0)
                self.clock.stop()
                loss = self.validate(windows)
                self.norms = self.group_norms()
                if last:
                    self.write_scalars()
                bpb = self.validation.bits_per_byte(loss)
                known = f" val_bpb:{bpb:.4f}" if bpb else ""
                self.write_event(step, f"val_loss:{loss:.4f} ", f"{known} tokens:{self.tokens_seen}")
                self.clock.start()
            if last:
                return loss
            unread.append((step + 1, self.train_step(step, windows)))
            self.report(unread, lag)
            if self.steps_done % 2 == 0:                        # after an odd step no gradient waits for its second half
                if self.stop or (cfg.save_every and self.steps_done % cfg.save_every < 2):
                    self.report(unread, lag=0)
                    self.save()
                if self.stop:
                    raise Stopped(self.stop)

    def train_step(self, step: int, windows: tuple[int, int]) -> Tensor:
        """One step, always the preset's number of micro-batches over all ranks.

        -> (2,): its loss, multi-token terms included, and how many ranks were asked to stop, summed so that all agree.
        """
        cfg, ranks, stage = self.cfg, self.ranks, self.schedule.stage(step)
        batches = list(self.loader.step(stage, ranks.rank, ranks.size))
        if self.optimizer.sparse:
            rows = [bigram_rows(t, documents(t, cfg.bos_id)[0], len(self.model.bigram_embed)).numpy() for t, _ in batches]
            self.optimizer.sparse.announce(np.concatenate(rows), last=step % 2 == 1)
        weights = torch.tensor(self.schedule.predict(step), device=ranks.device)
        total = torch.tensor([0.0, float(self.last_signal is not None)], device=ranks.device)
        for tokens, targets in batches:
            loss = self.model(tokens.to(ranks.device), targets.to(ranks.device), weights, windows) / cfg.micro_batches
            loss.backward()
            total[0] += loss.detach()
        self.optimizer.step(step, self.schedule.lr_mul(step), self.schedule.momentum(step), step == self.schedule.untie_step)
        self.steps_done, self.tokens_seen = step + 1, self.tokens_seen + stage.batch_tokens
        self.flops += step_flops(cfg, batches, windows) * ranks.size
        return ranks.all_reduce(total)()

    def save(self) -> None:
        """Everything a resumed run needs, the same whatever the number of ranks. All ranks call it; the clock stands."""
        self.clock.stop()
        place = "cpu" if self.log.file else "meta"              # only one process keeps what they all gather
        optimizer = {name: {key: self.optimizer.whole_state(name, key).to(place) for key in state}
                     for name, state in self.optimizer.state.items()}
        if self.log.file:
            path = Path(self.cfg.log_dir) / f"{self.log.run_id}.step{self.steps_done:06d}.pt"
            content = {"config": json.dumps(settings(self.cfg)), "run_id": self.log.run_id, "step": self.steps_done,
                       "model": self.model.state_dict(), "optimizer": optimizer, "tied": self.optimizer.tied,
                       "loader": (self.loader.file, self.loader.document), "clock": self.clock.total,
                       "tokens_seen": self.tokens_seen, "flops": self.flops, "average": self.average,
                       "rng": torch.get_rng_state()}
            try:
                save_checkpoint(path, content)
                self.log.write(f"checkpoint: {path}")
            except (OSError, RuntimeError) as error:            # a full disk, most often, behind a RuntimeError of torch
                cause = error.__context__ or error
                why = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
                self.log.write(f"checkpoint: NOT saved at step {self.steps_done}, the last good one stays ({why})")
        self.saved_step = self.steps_done
        self.clock.start()

    def restore(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.model.turn_rotary()
        for name, state in saved["optimizer"].items():
            for key, whole in state.items():
                self.optimizer.load_state(name, key, whole.to(self.ranks.device))
        self.optimizer.tied, self.steps_done, self.clock.total = saved["tied"], saved["step"], saved["clock"]
        self.tokens_seen, self.flops, self.average = saved["tokens_seen"], saved["flops"], saved["average"]
        self.loader.open(saved["loader"][0])
        self.loader.document = saved["loader"][1]
        torch.set_rng_state(saved["rng"])
        self.saved_step = self.steps_done
        self.log.write(f"resumed: from step {self.steps_done} with {self.ranks.size} process(es)")

    def hear(self, number: int, _frame) -> None:
        """A signal: remembered for the end of the step if there is something to save, else the end, now."""
        now, again = time.monotonic(), self.last_signal and time.monotonic() - self.last_signal[1] > 2    # torchrun: twice
        self.last_signal = signal.Signals(number).name, now
        if not self.leaving and (again or not self.cfg.save_on_stop or self.steps_done == self.began_at):
            raise Stopped(self.last_signal[0])

    @torch.no_grad()
    def group_norms(self) -> dict[str, float]:
        return {name: float(p.norm(dtype=torch.float32)) for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def validate(self, windows: tuple[int, int]) -> float:
        """Plain cross-entropy, nats a token, over the whole validation stream."""
        device, total = self.ranks.device, torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for n in range(self.ranks.rank, self.validation.count, self.ranks.size):
            tokens, targets = self.validation.sequence(n)
            total += self.model(tokens.to(device), targets.to(device), torch.ones(1, device=device), windows)
        return self.finite(float(self.ranks.all_reduce(total)()) / self.validation.count, "validation", self.steps_done)

    def warm_up(self) -> None:
        """Compiles and runs every stage on dummy tokens, both optimizers and validation; then all is as it was."""
        cfg, device, began = self.cfg, self.ranks.device, time.perf_counter()
        state = [*self.model.parameters(), *(t for s in self.optimizer.state.values() for t in s.values())]
        saved, tied = [t.detach().clone() for t in state], self.optimizer.tied
        rng = torch.Generator().manual_seed(0)
        def dummy(size: int) -> tuple[Tensor, Tensor]:
            ids = torch.randint(cfg.vocab_size, (size + 1,), generator=rng)
            ids[torch.rand(size + 1, generator=rng) < 1 / 500] = cfg.bos_id
            return ids[:-1].to(device), ids[1:].to(device)
        steps = range(cfg.num_steps)
        weights = torch.tensor(self.schedule.predict(0), device=device)
        plans = {(stage.batch_tokens // cfg.micro_batches, stage.windows) for stage in map(self.schedule.stage, steps)}
        for size, windows in sorted(plans):
            self.model(*dummy(size), weights, windows).backward()
        validated = [*(steps[::cfg.val_every] if cfg.val_every else ()), cfg.num_steps]
        with torch.no_grad():
            for windows in sorted({self.schedule.windows(step) for step in validated}):
                self.model(*dummy(cfg.val_seq_len), torch.ones(1, device=device), windows)
        for self.optimizer.tied in {tied, False}:
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.optimizer.sparse:
                self.optimizer.sparse.announce(np.arange(8), last=True)
            self.optimizer.step(1, lr_mul=0.0, momentum=0.9, untie=False)
        with torch.no_grad():
            for t, s in zip(state, saved):
                t.copy_(s)
        self.optimizer.tied = tied
        self.log.write(f"warm-up: {time.perf_counter() - began:.1f} s outside the clock, {len(plans)} kind(s) of step")

    def report(self, unread: list[tuple[int, Tensor]], lag: int) -> None:
        """A line for each step whose loss is due; ends the run when a loss is not finite."""
        while len(unread) > lag:
            step, result = unread.pop(0)
            loss, stops = result.tolist()
            if stops:
                self.stop = self.last_signal[0] if self.last_signal else "a signal to another process"
            value, seconds = self.finite(loss, "training", step), self.clock.seconds()
            self.write_event(step, "", f" train_loss:{value:.4f} tokens_per_second:{self.tokens_seen / seconds:.0f}"
                                       f" mfu:{self.flops / seconds / self.ceiling:.3f}")
            if self.average and value > 1.3 * self.average:
                self.log.write(f"spike: train_loss {value:.4f} at step {step}, {self.average:.4f} before; {self.suspect()}")
            self.average = 0.9 * (self.average or value) + 0.1 * value

    def suspect(self) -> str:
        """The parameter group that a loss gone wrong points to."""
        now = self.group_norms()
        broken = [name for name, norm in now.items() if not math.isfinite(norm)]
        if broken:
            return f"not finite: {', '.join(broken)}"
        name = max(now, key=lambda name: now[name] / (self.norms[name] + 1e-6) if self.norms[name] else 0.0)
        return f"grown most since the last validation: {name}, from norm {self.norms[name]:.4g} to {now[name]:.4g}"

    def write_event(self, step: int, before: str, after: str) -> None:
        """The form that every tool of this field reads; more key:value pairs only behind it."""
        ms = 1e3 * self.clock.seconds()
        time_taken = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
        self.log.write(f"step:{step}/{self.cfg.num_steps} {before}{time_taken}{after}")

    def write_scalars(self) -> None:
        """What people plot afterwards (seeds 003, 004): the learned scalars by layer, and what the run took."""
        for name, p in self.model.named_parameters():
            if name.endswith("_scale"):
                self.log.write(f"scalars:{name} {json.dumps([round(v, 4) for v in p.flatten().tolist()])}", echo=False)
        self.log.write(f"peak_memory:{peak_memory(self.ranks.device):.0f}MiB tokens:{self.tokens_seen}"
                       f" mfu:{self.flops / max(self.clock.seconds(), 1e-9) / self.ceiling:.3f}")

    def finite(self, loss: float, kind: str, step: int) -> float:
        if not math.isfinite(loss):
            raise RunFailed(f"the {kind} loss is {loss} at step {step} ({self.suspect()}); lower --muon_lr or --adam_lr")
        return loss

def train(cfg: Config, overrides: dict) -> float:
    """One whole run; returns its final validation loss."""
    run = Run(cfg, overrides)
    pulse = Pulse(run.ranks)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, run.hear)
        if cfg.warmup:
            run.warm_up()
        loss, pulse.last_word = run.loop(), "left"
        return loss
    except (Stopped, RunFailed, RuntimeError) as error:
        run.leaving = True                                      # before any call: from here on a signal is only noted
        silent = pulse.silent() if not isinstance(error, RunFailed) else []
        if silent:                                              # torchrun sends SIGTERM to the others when one has died
            names = ", ".join(map(str, silent))
            error = RunFailed(f"process {names} of {run.ranks.size} died or hangs, after step {run.steps_done}; "
                              "--resume goes on from the last checkpoint")
        elif isinstance(error, RuntimeError) and run.last_signal and run.ranks.size > 1:    # told to stop, others left first
            error = Stopped(run.last_signal[0])
        if isinstance(error, Stopped):
            ms = 1e3 * run.clock.seconds()
            pulse.last_word = "left"
            run.log.write(f"interrupted: {run.steps_done} of {cfg.num_steps} steps done, train_time:{ms:.0f}ms ({error})")
        else:
            run.log.write(f"failed: {error}", echo=False)
        raise error
    finally:
        run.leaving = True
        pulse.end()
        run.ranks.leave()

def main() -> None:
    try:
        train(*parse_config(sys.argv[1:]))
    except UserError as error:
        print(f"train_gpt.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"train_gpt.py: failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        sys.exit(143 if str(error) == "SIGTERM" else 130)

if __name__ == "__main__":
    main()
