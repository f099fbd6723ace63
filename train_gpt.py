"""train_gpt.py -- train a small GPT on FineWeb to a fixed validation loss, as fast as the machine can. All of it is here.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                    the record run: preset "short", no flags
    torchrun --standalone --nproc_per_node=8 train_gpt.py --preset medium    the larger model, target 2.92
    python train_gpt.py --preset one-gpu                                     one GPU with 24 GB
    python train_gpt.py --preset cpu --num_steps 20                          no GPU; any scalar field of Config is a flag

Reading order                       to change...                                    edit
    1  Config                       a size, a layer's features, a schedule          PRESETS (or pass a flag)
    2  Model                        the network                                     GPT.__init__ (declare), GPT.hidden (use)
    3  Optimizer                    an update rule, how ranks share work            Optimizer, normuon_, adam_
    4  Data                         nothing: the token stream is fixed              Loader
    5  Schedule                     learning rate, momentum, windows over time      Schedule
    6  Operators                    how a formula is computed                       the plain version, then the kernel
    7  Run                          the log, the clock, the loop                    train

Ideas are credited where they live: "seed 000" .. "seed 004" are the reports this project grew from (README.md, Sources),
numbers like 2505.16932 are arXiv ids."""
import argparse, base64, copy, ctypes, hashlib, json, math, os, platform
import re, resource, signal, sys, time, uuid, zipfile, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                     # no Triton for this system, so no GPU either: kernels are read, never run
    triton, tl, TensorDescriptor = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None), None

SOURCE = Path(__file__).read_text()  # read before anything slow, so the log holds what really ran

class UserError(Exception):
    """Something a user can put right. The message is one line: the file, flag or value, and what to do. Exit code 2."""

class RunFailed(Exception):
    """A run that cannot go on, though nothing was asked for wrongly (a loss that is not finite). Exit code 1."""

def need(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)

# ===== 1. Config: what a run is. A record is a preset with no overrides. ============================================
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
    windows: str                    # s short, l long, - no attention (after =: --windows=-l)
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
    bigram_momentum: float = 0.75   # beta1 of the bigram table's Adam; 0: a CPU moves only rows that a token touched
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
    yarn_limit: int = 1664          # tokens: rotary wavelengths stretch with the long window up to there; 0: never. 2309.00071
    softmax_scale: float = 0.1
    final_long_window: int = 2560   # of the last validation, tokens; rotary and softmax scale stay as they were trained
    activation: str = "relu2"       # "relu2" | "gelu"
    softcap: float = 23.0           # logits end in (0, softcap); 0: no cap
    softcap_shift: float = 5.0
    softcap_width: float = 7.5
    # initial values
    embed_std: float = 0.005
    spectral: float = 0.0           # smoothing of the counts from which embed and lm_head start, tokens; 0: random
    value_embed_std: float = 0.01   # seed 000; 0 before
    input_embed_std: float = 1.0    # of the further input embeddings
    matrix_std: float = 0.5         # of the MLP's first matrix, over sqrt(model_dim); the second starts at 0
    qkv_std: float = 0.5            # of q, k and v, over sqrt(model_dim)
    o_std: float = 0.5              # of o, over sqrt(model_dim)
    resid_scale: float = 1.1        # of the stream, before every layer
    # optimization
    num_steps: int = 1547
    extension_share: float = 0.026  # of num_steps: constant settings after the schedule (40 steps of 1547)
    cooldown_share: float = 0.55    # of the schedule: the learning rate falls on a line to final_lr
    final_lr: float = 0.1           # of the peak
    matrix_optimizer: str = "normuon"   # "normuon" | "adamw": Adam for all, on matrices at adam_lr
    muon_lr: float = 0.023
    muon_wd: float = 1.2
    muon_beta2: float = 0.95
    momentum_min: float = 0.85
    momentum_max: float = 0.95
    momentum_warmup: int = 300      # steps from min to max
    momentum_cooldown: int = 50     # last steps, back to min
    adam_lr: float = 0.008
    adam_every: int = 2             # steps, whose gradients add up, between Adam's; Muon moves on each
    scalar_lr: float = 5.0          # times adam_lr: of the learned scalars; 0: they stay as they start
    x0_lr: float = 5.0              # times adam_lr: of the scalars of x0 and of further input embeddings
    skip_gate_lr: float = 0.05      # times adam_lr
    embed_beta1: float = 0.5        # Adam's, of embed and lm_head
    table_beta1: float = 0.75       # of value embeddings and further input embeddings
    x0_beta1: float = 0.65          # of the scalars of x0 and of further input embeddings
    gate_beta1: float = 0.9         # of gates
    gate_beta2: float = 0.99
    adam_wd: float = 0.005
    adam_eps: float = 1e-10         # beside gradients of the loss summed over an eighth of a step's tokens, LOSS_SHARES
    untie_share: float = 2/3        # of the schedule: embed and lm_head are one until then; 0: never tied, 1: always
    max_predict: int = 3            # next tokens that a stage may ask for; 1: no multi-token prediction
    # data and evaluation
    data_dir: str = "data/fineweb10B"
    epochs: int = 1                 # times that the training shards may be read; a record reads them once
    batch_mul: float = 1.0          # times every stage's batch_tokens
    micro_batches: int = 8          # of a step, whatever the ranks: 1, 2, 4 and 8 of them compute the same thing
    val_tokens: int = 10485760      # fixed, or losses could not be compared
    val_seq_len: int = 262144       # a validation sequence; documents are cut at its ends
    val_every: int = 250            # steps; 0: only at the end
    # machine
    device: str = "cuda"            # "cuda" | "cpu"
    dtype: str = "auto"             # "bfloat16" | "float32"; auto: bfloat16 where the hardware multiplies it
    compile: bool = True
    fp8_head: bool = True           # GPU: the head's logits are a product in FP8 while training
    reference: bool = False         # GPU: no kernels of this file, plain PyTorch in their place, as in float32
    graphs: bool = True             # GPU: replay each kind of step from CUDA graphs, captured in the warm-up
    warmup: bool = True             # compile and run each stage on dummy data before the clock starts
    rank_timeout: float = 300.0     # seconds that a process waits for the others before it gives up
    save_every: int = 0             # steps between checkpoints, beside the log, and one at the end; 0: none
    save_on_stop: bool = False      # SIGTERM and Ctrl-C save a checkpoint before they end the run
    resume: bool = False            # go on from the newest whole checkpoint under log_dir, if there is one
    plan: str = ""                  # such as 8xH100: print what the run would take there, and run nothing
    log_dir: str = "logs"
    seed: int = 0

    num_heads = property(lambda self: self.model_dim // self.head_dim)
    vocab_rows = property(lambda self: -(-self.vocab_size // 128) * 128)
    scheduled_steps = property(lambda self: self.num_steps - round(self.extension_share * self.num_steps))

def topology(cfg: Config) -> tuple[Layer, ...]:
    """The five strings as rows. UserError names the string and the layer that do not fit."""
    for name in ("paired_heads", "value_embeds", "skips", "backout"):
        text = getattr(cfg, name)
        need(len(text) == len(cfg.windows), f"--{name} {text!r} describes {len(text)} layers, --windows {len(cfg.windows)}")
    windows, rows = {"s": "short", "l": "long", "-": "none"}, []
    for i, window in enumerate(cfg.windows):
        for name, allowed in (("windows", "sl-"), ("paired_heads", "p."), ("backout", "b.")):
            mark = getattr(cfg, name)[i]
            need(mark in allowed, f"--{name}: layer {i} is {mark!r}; use {' or '.join(allowed)} (s short, l long, - none)")
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
    first, last = map(int, text.split(":")) if re.fullmatch(r"\d+:\d+", text) else (0, 0)
    need(not text or first < last <= cfg.model_dim,
         f"--{name} {text!r}: give first:last with 0 <= first < last <= model_dim {cfg.model_dim}, or '' for no gate")
    return slice(first, last) if text else None

def check_config(cfg: Config) -> None:
    """UserError names the first value that no run can have."""
    def check(names: str, good: Callable, rule: str) -> None:
        for name in names.split():
            need(good(value := getattr(cfg, name)), f"--{name} {value}: {rule}")
    topology(cfg)
    check("vocab_size model_dim head_dim mlp_ratio num_steps max_predict micro_batches val_tokens val_seq_len"
          " final_long_window epochs adam_every", lambda v: v >= 1, "must be at least 1")
    check("extra_inputs bigram_rows bigram_signs val_every save_every momentum_warmup momentum_cooldown embed_std"
          " value_embed_std input_embed_std matrix_std qkv_std o_std yarn_limit x0_lr skip_gate_lr muon_lr muon_wd adam_lr adam_wd adam_eps softcap scalar_lr spectral",
          lambda v: 0 <= v < math.inf, "must not be negative")
    check("softmax_scale softcap_width rotary_base rank_timeout", lambda v: 0 < v < math.inf, "must be above 0")
    check("extension_share cooldown_share untie_share rotary_share momentum_min momentum_max muon_beta2 bigram_momentum"
          " embed_beta1 table_beta1 x0_beta1 gate_beta1 gate_beta2",
          lambda v: 0 <= v <= 1, "must lie between 0 and 1")
    for name, choices in (("device", "cuda cpu"), ("dtype", "auto bfloat16 float32"), ("activation", "relu2 gelu"),
                          ("matrix_optimizer", "normuon adamw")):
        check(name, lambda v: v in choices.split(), f"choose from {choices}")
    for name in ("smear_chunk", "skip_chunk", "attn_chunk", "ve_chunk"):
        chunk(cfg, name)
    check("extension_share", lambda _: cfg.scheduled_steps >= 1, f"leaves no scheduled step of --num_steps {cfg.num_steps}")
    check("spectral", lambda v: not (v and cfg.untie_share), "needs --untie_share 0: embed and lm_head start as two")
    check("head_dim", lambda v: v % 4 == 0, "must be a multiple of 4 (rotary turns pairs in half of it)")
    check("model_dim", lambda v: v % cfg.head_dim == 0, f"must be a multiple of --head_dim {cfg.head_dim}")
    check("paired_heads", lambda v: cfg.num_heads % 2 == 0 or "p" not in v,
          f"{cfg.num_heads} heads cannot be paired; change --model_dim or --head_dim, or use only dots")
    check("ve_own_dims", lambda v: 0 <= v <= cfg.model_dim, f"must lie between 0 and --model_dim {cfg.model_dim}")
    check("bos_id", lambda v: 0 <= v < cfg.vocab_size, f"must lie in the vocabulary, --vocab_size {cfg.vocab_size}")
    check("vocab_size", lambda v: v <= 2**16, "shards hold 16-bit tokens, at most 65536")
    check("val_tokens", lambda v: v % cfg.val_seq_len == 0, f"must be a multiple of --val_seq_len {cfg.val_seq_len}")
    for tokens in {stage.batch_tokens for stage in cfg.stages}:
        check("micro_batches", lambda v: 0 < tokens and tokens % v == 0, f"must divide the {tokens} tokens of a step")

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
        Stage(until=1/3, batch_tokens=131072, windows=(128, 384), max_doc_len=2048, lr_mul=1.0,
              predict=((1.0, 1.0), (0.5, 0.5), (0.25, 0.0))),
        Stage(until=2/3, batch_tokens=262144, windows=(384, 896), max_doc_len=2048, lr_mul=1.52,     # (16/8)**0.6
              predict=((1.0, 1.0), (0.5, 0.0))),
        Stage(until=1.0, batch_tokens=393216, windows=(640, 1408), max_doc_len=2048, lr_mul=1.73),   # (24/8)**0.5
        Stage(until=2.0, batch_tokens=393216, windows=(768, 1664), max_doc_len=2048, lr_mul=1.73),   # the extension
    ),
)
# Two CPU cores and the embedded corpus, minutes instead of GPUs; its losses compare only with its own. One layer: in so
# little time many steps of a shallow model learn more than few of a deep one (records/cpu/recipe).
CPU = replace(
    SHORT, preset="cpu", vocab_size=4096, bos_id=4095, model_dim=256, bigram_signs=8192,
    windows="l", paired_heads=".", value_embeds="1", skips=".", backout=".",
    stages=(Stage(until=1.0, batch_tokens=4096, windows=(128, 512), max_doc_len=1024, lr_mul=1.0),),
    num_steps=490, adam_lr=0.012, muon_lr=0.035, adam_every=1, extension_share=0.0, momentum_warmup=245, softcap=0.0,
    momentum_cooldown=82, final_long_window=512, data_dir="data/corpus", micro_batches=1, val_tokens=163840,
    val_seq_len=32768, val_every=245, device="cpu", embed_std=0.15, spectral=50.0, untie_share=0.0, bigram_rows=20,
    bigram_momentum=0.0, save_every=1000,                       # at the end: something to sample from
)
def medium_stages() -> tuple[Stage, ...]:
    """Twelfths of 4,700 scheduled steps, each from the first step in it, and 40 steps at the final settings."""
    ends = [math.ceil(4700 * twelfth / 12) / 4700 for twelfth in range(1, 13)]
    tokens, lr_muls = [131072, 262144, 393216], [1.0, 1.52, 1.73]                      # and then 524288, 2.0
    predict = [((1.0, 1.0), (0.5, 0.5), (0.25, 0.0)), ((1.0, 1.0), (0.5, 0.0))]        # and then the next token alone
    stages = []
    for i, blocks in enumerate((3, 7, 11, 13, 15, 17, 19, 21, 23, 23, 23, 23, 23)):
        stages.append(Stage(
            until=ends[i] if i < 12 else 2.0, batch_tokens=tokens[i] if i < 3 else 524288, max_doc_len=4096,
            windows=(128 * min(11, blocks // 2), 128 * blocks), lr_mul=lr_muls[i] if i < 3 else 2.0,
            predict=predict[i] if i < 2 else ((1.0, 1.0),)))
    return tuple(stages)

# The medium track's public record of 2025-12-31; what is left out of it, and why, is in docs/model.md.
MEDIUM = replace(
    SHORT, preset="medium", model_dim=1024, stages=medium_stages(), num_steps=4740, extension_share=40/4740,
    #              0123456789abcdef
    windows=      "lsss" "lsss" "sssl" "sssl",
    paired_heads= "................",
    value_embeds= "01234......01234",
    skips=        "..c.b.a..abc....",
    backout=      "...........b....",
    extra_inputs=1, bigram_rows=0, smear_chunk="0:16", skip_chunk="0:16", attn_chunk="0:16", ve_chunk="0:16", ve_own_dims=0,
    final_long_window=27 * 128, value_embed_std=0.0, qkv_std=1.0, o_std=0.0, resid_scale=1.05, cooldown_share=0.7,
    muon_lr=0.015, adam_lr=0.004, adam_eps=1e-8, scalar_lr=10.0, skip_gate_lr=0.01, embed_beta1=0.8, table_beta1=0.8,
    x0_beta1=0.8, gate_beta1=0.8, gate_beta2=0.95, untie_share=1/6, fp8_head=False,
)
PRESETS = {
    "short": SHORT,
    "medium": MEDIUM,
    # The medium track as it stood in 2025, on which seeds 003 and 004 build.
    "medium-2025": replace(
        SHORT, preset="medium-2025", model_dim=1024, num_steps=6000, extra_inputs=1,
        #              0123456789abcdef
        windows=      "sssl" "sss-" "sssl" "sssl",
        paired_heads= "................",
        value_embeds= "012..........012",
        skips=        "..c.b.a..abc....",
        backout=      "..........b.....",
    ),
    # The short model on one GPU with 24 GB: the same steps in four times as many micro-batches.
    "one-gpu": replace(SHORT, preset="one-gpu", micro_batches=32),
    "cpu": CPU,
    # What the cpu track is measured against: a plain GPT-2 (with rotary) of its size, with the AdamW of llm.c and nanoGPT.
    "cpu-adamw": replace(
        CPU, preset="cpu-adamw", windows="sl", paired_heads="..", value_embeds="..", skips="..", backout="..",
        matrix_optimizer="adamw", num_steps=8600, epochs=16, adam_lr=6e-4, adam_wd=10/9, adam_every=2, final_lr=0.0,
        val_every=1500, bigram_rows=0, bigram_momentum=0.75, smear_chunk="", spectral=0.0, attn_chunk="",
        key_offset=False, qk_norm=False, rotary_share=1.0, head_dim=64, softmax_scale=1/8, activation="gelu",
        scalar_lr=0.0, x0_lr=0.0, resid_scale=1.0, embed_std=0.02, matrix_std=0.64, qkv_std=0.64, o_std=0.64,
        untie_share=1.0),
}

def parse_config(argv: list[str]) -> tuple[Config, dict]:
    """--preset NAME, then --field value for any scalar field. Also returns the overrides: a record has none."""
    parser = argparse.ArgumentParser(prog="train_gpt.py", allow_abbrev=False, description=__doc__.split("\n\nReading")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="A preset's values: PRESETS, at the top of train_gpt.py.")
    parser.error = lambda message: need(False, f"{message} (--help lists the flags)")
    parser.add_argument("--preset", choices=PRESETS, default="short" if torch.cuda.is_available() else "cpu")
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
    need(0 < cfg.batch_mul < 1e6, f"--batch_mul {cfg.batch_mul}: must be above 0")
    stages = tuple(replace(stage, batch_tokens=round(cfg.batch_mul * stage.batch_tokens)) for stage in cfg.stages)
    check_config(cfg := replace(cfg, stages=stages))
    return cfg, overrides

# ===== 2. Model: each parameter is declared once, with its shape, its init and how it is optimized. =================
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

def matrices(*stds: float) -> Callable:
    """A uniform bank (n, len(stds), rows, columns): the standard deviation of each of a layer's matrices."""
    bound = 3**0.5 * torch.tensor(stds).view(-1, 1, 1)
    return lambda p, rng: p.uniform_(-1, 1, generator=rng).mul_(bound)

SPECTRAL_NEIGHBOURS = ((1, 1.0), (2, 0.7), (-1, 0.7))           # how far behind a token, how much its neighbour there counts

class GPT(nn.Module):
    """tokens (T,), one packed stream of documents -> the mean loss. dtype: of matrices and tables; the rest is float32."""
    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32, compiled: bool = False):
        super().__init__()
        self.set_pieces(partial(torch.compile, dynamic=False, fullgraph=True) if compiled else lambda f: f)
        self.cfg, self.layers, self.dtype, self.specs = cfg, topology(cfg), dtype, {}
        self.value_tables = sorted({row.value_embed for row in self.layers} - {None})
        self.chunks = {name: chunk(cfg, f"{name}_chunk") for name in ("smear", "skip", "attn", "ve")}
        self.attending, self.valued, self.skipping = zip(
            *[(row.window != "none", row.value_embed is not None, row.skip_from is not None) for row in self.layers])
        self.declare_tables()
        self.declare_layers()
        undeclared = {name for name, _ in self.named_parameters()} ^ set(self.specs)
        assert not undeclared, f"parameters without a declaration, or the reverse: {undeclared}"
        self.declare_buffers()

    def set_pieces(self, unit: Callable) -> None:
        """Layers are alike: a piece, wrapped by unit, compiles once for all."""
        for piece in (first_stream, norm, mix, skip, gated_value, project, attend, put_back, mlp_block):
            setattr(self, piece.__name__, unit(piece))
        self.head_chunk = unit(IN_USE["head_chunk"])

    def eager(self) -> "GPT":
        """The same parameters and buffers, uncompiled: for a few passes of another length than training's."""
        model = copy.copy(self)
        model.set_pieces(lambda f: f)
        return model

    def declare_tables(self) -> None:
        cfg = self.cfg
        V, D, H, d = cfg.vocab_rows, cfg.model_dim, cfg.num_heads, cfg.head_dim
        table = partial(self.param, optimizer="adam", sharded=True)
        ends = dict(init=normal(cfg.embed_std), betas=(cfg.embed_beta1, 0.95), wd=150.0)
        table("embed", (V, D), **ends)
        table("lm_head", (D, V), **ends)        # transposed, so that its gradient x.T @ dlogits needs no transpose
        self.lm_head.data.copy_(self.embed.T)   # tied until the untie step
        for k in range(cfg.extra_inputs):
            table(f"input_embed_{k}", (V, D), init=normal(cfg.input_embed_std), betas=(cfg.table_beta1, 0.95), lr=75.0, wd=5.0)
        for name in self.value_tables:
            table(f"value_embed_{name}", (V, H * d), init=normal(cfg.value_embed_std), betas=(cfg.table_beta1, 0.95),
                  lr=75.0, wd=5.0)
        table("bigram_embed", (cfg.bigram_rows * V, D), init=constant(0), lr=75.0, wd=5.0, betas=(cfg.bigram_momentum, 0.95))

    def declare_layers(self) -> None:
        cfg, chunks = self.cfg, self.chunks
        L, D, H, d = len(self.layers), cfg.model_dim, cfg.num_heads, cfg.head_dim
        attending, valued, skipping = sum(self.attending), sum(self.valued), sum(self.skipping)
        kind = {"optimizer": "muon", "wd": 1.0} if cfg.matrix_optimizer == "normuon" else {"optimizer": "adam", "wd": 150.0}
        bank = partial(self.param, sharded=True, **kind)
        gate = partial(self.param, optimizer="adam", init=constant(0), dtype=torch.float32, betas=(cfg.gate_beta1, cfg.gate_beta2))
        scalar = partial(self.param, optimizer="adam", lr=cfg.scalar_lr, dtype=torch.float32)
        width = lambda name, own=0: chunks[name].stop - chunks[name].start + own if chunks[name] else 0  # noqa: E731
        qkvo_std = [std * D**-0.5 for std in (cfg.qkv_std, cfg.qkv_std, cfg.qkv_std, cfg.o_std)]
        bank("qkvo", (attending, 4, D, D), init=matrices(*qkvo_std))        # H d is D, and a row an output in all four
        bank("mlp", (L, 2, cfg.mlp_ratio * D, D), init=matrices(cfg.matrix_std * D**-0.5, 0.0), second_lr=2.0)
        gate("attn_gate", (attending, H, width("attn")), wd=1.0)
        gate("ve_gate", (valued, H, width("ve", cfg.ve_own_dims)), wd=1.0)
        if chunks["smear"]:
            gate("smear_gate", (1, width("smear")), lr=0.01)
            scalar("smear_scale", (1,), init=constant(0))
        gate("skip_gate", (skipping, 1, width("skip")), lr=cfg.skip_gate_lr)
        scalar("skip_scale", (skipping,), init=constant(-1.5))
        scalar("qkv_scale", (attending,), init=constant(0.5))
        scalar("o_scale", (attending,), init=constant(1.0))
        scalar("resid_scale", (L,), init=constant(cfg.resid_scale))
        x0 = dict(init=constant(0), lr=cfg.x0_lr, betas=(cfg.x0_beta1, 0.95))
        scalar("x0_scale", (L,), **x0)
        scalar("input_scale", (L, cfg.extra_inputs), **x0)
        scalar("bigram_scale", (L if cfg.bigram_rows else 0,), init=constant(0.1))
        scalar("backout_scale", (cfg.backout.count("b"),), init=constant(0.5))

    def param(self, name: str, shape: tuple[int, ...], *, init: Callable, dtype: torch.dtype | None = None, **spec) -> None:
        """Each parameter draws from a generator of its own, so a switch elsewhere does not change its start."""
        value = torch.empty(shape)
        if value.numel() == 0:                                                      # what the switches leave out
            return
        if not value.is_meta:
            init(value, torch.Generator().manual_seed(zlib.crc32(f"{self.cfg.seed} {name}".encode())))
        self.register_parameter(name, nn.Parameter(value.to(dtype or self.dtype)))
        self.specs[name] = Spec(**spec)

    def declare_buffers(self) -> None:
        cfg, half = self.cfg, int(self.cfg.head_dim * self.cfg.rotary_share) // 2
        powers = torch.arange(half, dtype=torch.float32) / max(half - 1, 1)
        self.register_buffer("rotary_freqs", cfg.rotary_base ** -powers)            # radians a token, (half,)
        self.register_buffer("softmax_scale", torch.tensor(cfg.softmax_scale))
        self.register_buffer("long_window", torch.tensor(cfg.stages[0].windows[1]))
        longest = max(cfg.val_seq_len, *(stage.batch_tokens // cfg.micro_batches for stage in cfg.stages))
        positions = longest * (2 if any(layer.paired for layer in self.layers) else 1)
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
        """A change of the long window in training. YaRN (2309.00071): slow frequencies stretch with it up to yarn_limit, those
        that turn over 32 times in it stay. A window that only validation uses changes neither them nor the softmax scale."""
        before = int(self.long_window)
        if window != before and window <= self.cfg.yarn_limit:
            freqs, scale = yarn(self.rotary_freqs, before, window)
            self.rotary_freqs.copy_(freqs)
            self.softmax_scale.mul_(scale)
            self.turn_rotary()
        self.long_window.fill_(window)

    def forward(self, tokens: Tensor, targets: Tensor, weights: Tensor, windows: tuple[int, int], learn=True) -> Tensor:
        """tokens, targets (T,) ids; weights (n,) of the losses on the next n tokens; windows (short, long) -> mean loss."""
        cap = (self.cfg.softcap, self.cfg.softcap_shift, self.cfg.softcap_width)
        piece = partial(self.head_chunk, fp8=self.cfg.fp8_head)
        return head_loss(self.hidden(tokens, windows), self.lm_head, targets, weights, cap, piece, learn)

    def hidden(self, tokens: Tensor, windows: tuple[int, int], past=None) -> Tensor:
        """tokens (T,) -> what the head reads, (T, D). past: what remembers the tokens before these (evals/model.py)."""
        cfg, layers, p = self.cfg, self.layers, self._parameters
        reach = {"short": windows[0], "long": windows[1]}
        first, doc_start = documents(tokens, cfg.bos_id)
        x = x0 = self.first_stream(F.embedding(tokens, p["embed"]), first, p.get("smear_scale"), p.get("smear_gate"),
                                   self.chunks["smear"])                            # (T, D)
        added = [self.norm(F.embedding(tokens, p[f"input_embed_{k}"])) for k in range(cfg.extra_inputs)]
        if cfg.bigram_rows:
            added.append(self.bigram(tokens, first, p["bigram_embed"]))
        values = {name: F.embedding(tokens, p[f"value_embed_{name}"]) for name in self.value_tables}
        if past:                                                                # the token before served smear and bigrams
            x0, first, doc_start, *added = (t[past.again:] for t in (x0, first, doc_start, *added))
            x, values = x0, {name: value[past.again:] for name, value in values.items()}
        qkvo, attn_gate = deal(p.get("qkvo"), self.attending), deal(p.get("attn_gate"), self.attending)
        qkv_scale, o_scale = deal(p.get("qkv_scale"), self.attending), deal(p.get("o_scale"), self.attending)
        skip_scale, skip_gate = deal(p.get("skip_scale"), self.skipping), deal(p.get("skip_gate"), self.skipping)
        ve_gate, mlp_bank = deal(p.get("ve_gate"), self.valued), p["mlp"].unbind(0)
        mixed = ("resid_scale", "x0_scale", "input_scale", "bigram_scale")
        scales = torch.cat([p[name].view(len(layers), -1) for name in mixed if name in p], dim=1)   # (L, 2 + added)
        outputs: list[Tensor] = []
        for i, row in enumerate(layers):
            if row.skip_from is not None:                                           # before the mix: resid_scale holds for it too
                x = self.skip(x, outputs[row.skip_from], x0, skip_scale[i], skip_gate[i], self.chunks["skip"])
            x = self.mix([x, x0, *added], scales[i])
            if row.window != "none":
                n = self.norm(x)
                q, k, v = self.project(n, qkvo[i], qkv_scale[i], cfg.head_dim, cfg.qk_norm)
                if row.value_embed is not None:
                    value = values[row.value_embed].view_as(v)
                    v = v + self.gated_value(n, value, ve_gate[i], self.chunks["ve"], cfg.ve_own_dims)
                positions = len(x) * (2 if row.paired else 1)
                attend = partial(past.attend, i) if past else self.attend
                y = attend(q, k, v, first, doc_start, self.rotary_cos[:positions], self.rotary_sin[:positions],
                           self.softmax_scale, reach[row.window], row.paired, cfg.key_offset and row.window == "long")
                x = self.put_back(x, y, n, qkvo[i], o_scale[i], attn_gate[i], self.chunks["attn"])
            x = self.mlp_block(x, mlp_bank[i][0], mlp_bank[i][1], cfg.activation)
            outputs.append(x)
        for row, output in zip(layers, outputs):
            if row.backout:                                                         # what only the middle needed goes out
                x = x - p["backout_scale"][0] * output
        return self.norm(x)

    def bigram(self, tokens: Tensor, first: Tensor, table: Tensor) -> Tensor:
        """A row a pair of neighbours, by hash; with signs, pairs that share a row can be told apart. -> (T, D)"""
        few = tokens.device.type == "cpu" and not (self.cfg.bigram_momentum or dist.is_initialized())
        x = F.embedding(bigram_rows(tokens, first, len(table)), table, sparse=few)
        if self.cfg.bigram_signs:
            now = tokens.to(torch.int32)
            x = x * self.bigram_sign[(now ^ before(now, first)).remainder(self.cfg.bigram_signs)]
        return x

def documents(tokens: Tensor, bos_id: int) -> tuple[Tensor, Tensor]:
    """(T,) -> whether a token is the first of its document, and where that document starts, (T,) each.
    Documents never see each other: for a first token there is no token before, in the smear, keys and bigrams too."""
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
    """n (T, D) the normed stream, qkvo (4, D, D), of which each row is an output -> q, k, v (T, H, d)."""
    q, k, v = F.linear(n, scale * qkvo[:3].flatten(0, 1)).view(len(n), 3, -1, head_dim).unbind(1)
    return (norm(q), norm(k), v) if qk_norm else (q, k, v)

def attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor, doc_start: Tensor, cos: Tensor, sin: Tensor, scale: Tensor,
           reach: int, paired: bool, key_offset: bool) -> Tensor:
    """q, k, v (T, H, d); cos, sin (T or, paired, 2T, half) -> (T, H, d)."""
    q, k, v = placed(q, k, v, first, cos, sin, paired, key_offset)
    doc_start = 2 * doc_start.repeat_interleave(2) if paired else doc_start
    lo = torch.maximum(doc_start, torch.arange(len(q), device=q.device) - reach + 1)
    y = IN_USE["attention"](q, k, v, lo, reach, scale)
    return unpair(y) if paired else y

def placed(q: Tensor, k: Tensor, v: Tensor, first: Tensor, cos: Tensor, sin: Tensor, paired: bool,
           key_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (T, H, d) as attention takes them, paired (2T, H/2, d); only the key offset looks at another token."""
    if key_offset:                                                                  # one layer finds "what followed this?"
        still = k[..., 2 * cos.size(-1):]
        k = torch.cat((k[..., :2 * cos.size(-1)], torch.where(first[:, None, None], still, before(still, first))), dim=-1)
    q, k, v = (pair(q), pair(k), pair(v)) if paired else (q, k, v)                  # twice the length, half the heads
    return rotary(q, cos, sin), rotary(k, cos, sin), v

def put_back(x: Tensor, y: Tensor, n: Tensor, qkvo: Tensor, scale: Tensor, w: Tensor | None, dims: slice | None) -> Tensor:
    """x (T, D) plus the heads' outputs y (T, H, d), each gated by what the normed stream n says, through o."""
    if w is not None:
        y = y * gate(n[:, dims], w).to(y.dtype)[..., None]
    return x + F.linear(y.flatten(1), scale * qkvo[3])

def mlp_block(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    return x + IN_USE["mlp"](norm(x), up, down, activation)

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
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1)
def unpair(x: Tensor) -> Tensor:
    """(2T, H/2, d) -> (T, H, d), the reverse of pair."""
    return x.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2)

def spectral_start(cfg: Config, tokens: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """What stands near what in tokens (N,) -> embed (V, D) and lm_head (D, V), together a bigram model. The embedding holds
    singular vectors of a matrix of smoothed pointwise mutual information (Levy and Goldberg 2014), which is sparse, as a
    constant of a row is nothing to a softmax; the head is the least squares fit to that of the next token."""
    V, blocks = cfg.vocab_rows, []
    share = torch.from_numpy(np.bincount(tokens, minlength=V) + 0.5).float().to(device)[:, None]
    root = (share := share / share.sum()).sqrt()
    for gap, weight in SPECTRAL_NEIGHBOURS:
        pairs, counts = np.unique(tokens[:-abs(gap)] * V + tokens[abs(gap):], return_counts=True)
        place = torch.from_numpy(np.stack(divmod(pairs, V)[::1 if gap > 0 else -1])).to(device)
        lift = torch.log1p(torch.from_numpy(counts).float().to(device) / (cfg.spectral * share[place[1], 0]))
        block = torch.sparse_coo_tensor(place, weight * lift * root[place, 0].prod(0), (V, V), check_invariants=False)
        blocks.append(block.to_dense() if V <= 2**13 else block.coalesce())                 # dense: several times as fast
    nearby = torch.cat(blocks, dim=1)
    basis = torch.randn(V, cfg.model_dim - 1, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(2):                                                                      # 0909.4061
        basis = torch.linalg.qr(nearby @ (nearby.T @ basis)).Q
    rest = nearby.T @ basis
    squares, turn = torch.linalg.eigh(rest.T @ rest)
    x = basis @ turn * squares.clamp_min(0).sqrt() / root
    x = norm(F.pad(x, (0, 1), value=3 * float(x.square().mean().sqrt())))                   # last: how common a token is
    gram = (share * x).T @ x
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    fit = (blocks[0].T @ (root * x) / root).T + torch.outer((share * x).sum(0), share[:, 0].log())
    return cfg.embed_std * x, torch.linalg.solve(gram, fit)

# ===== 3. Optimizer: NorMuon for matrix banks, Adam for the rest. Driven by the declarations. =======================
class Optimizer:
    """NorMuon and Adam over a model's declared parameters, for 1 to N ranks, with embedding and head tied, then untied.
    A replicated parameter is all-reduced and updated on every rank. A sharded one counts in units, matrices of a bank or
    rows of a table, padded so that ranks divide them: gradients reduce-scatter, a rank updates its units, all gather."""
    def __init__(self, cfg: Config, model: GPT, ranks: "Ranks", compiled: bool = False):
        self.cfg, self.specs, self.ranks = cfg, model.specs, ranks
        self.params = dict(model.named_parameters())
        self.tied = cfg.untie_share > 0
        self.state = {name: self.new_state(name) for name in self.params}
        self.rates = {name: self.new_rates(name) for name, spec in self.specs.items() if spec.optimizer == "muon"}
        self.dials = torch.zeros(3, device=ranks.device)    # on the device, where a graph reads them
        self.lr_mul, self.momentum, self.adam_steps = self.dials.unbind()
        self.sparse = None
        if "bigram_embed" in self.params and ranks.size > 1:
            self.sparse = SparseRows(ranks, len(self.params["bigram_embed"]), timedelta(seconds=cfg.rank_timeout))
        cuda = ranks.device.type == "cuda"
        unit = partial(torch.compile, dynamic=not cuda) if compiled else lambda f: f
        self.normuon_, self.adam_ = (unit(update) if cuda else update for update in (normuon_, adam_))
        self.flat_adam_ = unit(adam_) if compiled and not cuda else None    # one loop for tables of every size

    def units(self, name: str, t: Tensor) -> Tensor:
        """t (a parameter, its gradient or a state of it) as (units, ...), a view if nothing is padded."""
        t = t.flatten(0, -3) if self.specs[name].optimizer == "muon" else t
        missing = -len(t) % self.ranks.size if self.specs[name].sharded else 0
        return F.pad(t, (*[0] * (2 * t.dim() - 1), missing)) if missing else t

    def own(self, name: str, units: Tensor) -> Tensor:
        """What this rank updates, a view."""
        return units.chunk(self.ranks.size)[self.ranks.rank] if self.specs[name].sharded else units

    def new_state(self, name: str) -> dict[str, Tensor]:
        """What is remembered of this rank's units, in float32; low: what bfloat16 leaves out of a value, see exact."""
        p, muon = self.own(name, self.units(name, self.params[name].detach())), self.specs[name].optimizer == "muon"
        m = torch.zeros_like(p, dtype=torch.float32)
        state = {"momentum": m, "second": m.mean(dim=averaged_side(p), keepdim=True) if muon else torch.zeros_like(m)}
        if p.dtype == torch.bfloat16:
            state["low"] = p.float() if p.device.type == "cpu" else torch.zeros_like(p, dtype=torch.int16)
        if p.device.type == "cpu" and name == "bigram_embed" and not self.cfg.bigram_momentum:
            state["moved"] = torch.zeros(len(p), 1)         # instead: on which of its steps Adam moved a row last
            del state["momentum"]
        return state

    def new_rates(self, name: str) -> Tensor:
        """(units, 1, 1): what multiplies the learning rate of this rank's matrices of a bank (n, k, rows, columns)."""
        p, spec = self.params[name], self.specs[name]
        rate = torch.full((*p.shape[:2], 1, 1), max(1, p.size(-2) / p.size(-1))**0.5, device=p.device)
        rate[:, 1:2] *= spec.second_lr
        return self.own(name, self.units(name, rate))

    def adam_turn(self, step: int) -> bool:
        return (step + 1) % self.cfg.adam_every == 0

    @torch.no_grad()
    def step(self, step: int, lr_mul: float, momentum: float, untie: bool,
             move: Callable[[bool], None] | None = None) -> None:
        """Muon's banks move on every step, Adam's parameters on the last of every adam_every, on the gradients of them all.
        move: plays self.move(adam_turn) back from a CUDA graph. Exchanges of uneven size stay outside of it."""
        adam_turn = self.adam_turn(step)
        upload(torch.tensor([lr_mul, momentum, (step + 1) // self.cfg.adam_every]), self.dials)
        sparse = adam_turn and self.sparse
        arriving = sparse.start(self.units("bigram_embed", self.params["bigram_embed"].grad)) if sparse else None
        (move or self.move)(adam_turn)
        if arriving:
            self.update("bigram_embed", arriving())()
            self.clear("bigram_embed")
        if untie and self.tied:
            assert adam_turn, f"untied on step {step}, on which Adam does not move"
            self.tied = False
            for key in self.state["lm_head"]:
                self.load_state("embed", key, self.whole_state("lm_head", key).T)

    @torch.no_grad()
    def move(self, adam_turn: bool) -> None:
        """All that is the same on every step of a kind: reductions, updates, gathers."""
        moving = [name for name, spec in self.specs.items() if (spec.optimizer == "muon" or adam_turn)
                  and not (self.sparse and name == "bigram_embed")]
        assert not (unreached := [name for name in moving if self.params[name].grad is None]), f"no gradient: {unreached}"
        if adam_turn and self.tied:                         # one Adam step on the head, for both
            moving.remove("embed")
            IN_USE["transposed_"](self.params["lm_head"].grad, self.params["embed"].grad, add=True)
            self.clear("embed")
        gathered, reduced = [], {}
        for name in moving:                                 # every rank in the same order, all at once
            start = self.ranks.reduce_scatter if self.specs[name].sharded else self.ranks.all_reduce
            reduced[name] = start(self.units(name, self.params[name].grad))
        for name in sorted(moving, key=lambda name: (self.specs[name].optimizer == "muon", self.params[name].numel())):
            gathered.append(self.update(name, reduced[name]()))
            self.clear(name)
        for wait in gathered:
            wait()
        if adam_turn and self.tied:
            IN_USE["transposed_"](self.params["embed"].detach(), self.params["lm_head"].detach(), add=False)

    def clear(self, name: str) -> None:
        """The gradient is used up. On a GPU its memory stays, since graphs write there."""
        self.params[name].grad = self.params[name].grad.zero_() if self.ranks.device.type == "cuda" else None

    def update(self, name: str, grad: Tensor) -> Callable[[], None]:
        """Moves this rank's units, sets the gathering going -> a function that waits for it."""
        cfg, spec, state, whole = self.cfg, self.specs[name], self.state[name], self.units(name, self.params[name])
        read = (self.own(name, whole), state.get("low"), grad, state.get("momentum"), state["second"])
        if spec.optimizer == "muon":
            self.normuon_(*read, lr=cfg.muon_lr * self.lr_mul, wd=cfg.muon_wd * spec.wd, momentum=self.momentum,
                          beta2=cfg.muon_beta2, rates=self.rates[name])
        elif "moved" in state:
            self.move_rows(spec, *read[:3], state["second"], state["moved"])
        else:
            self.move_adam(spec, read)
        return self.finish(name, whole) if spec.sharded else lambda: None

    def move_adam(self, spec: Spec, read: tuple[Tensor | None, ...]) -> None:
        wd, betas, update = self.cfg.adam_wd * spec.wd, spec.betas, self.adam_
        if self.flat_adam_ and spec.sharded:
            read, update = tuple(t if t is None else t.flatten() for t in read), self.flat_adam_
            wd, *betas = torch.tensor([wd, *betas])             # numbers would be compiled in
        rate = self.cfg.adam_lr * spec.lr * self.lr_mul
        update(*read, lr=rate, wd=wd, betas=betas, eps=self.cfg.adam_eps, steps=self.adam_steps)

    def move_rows(self, spec: Spec, p: Tensor, low: Tensor | None, grad: Tensor, second: Tensor, moved: Tensor) -> None:
        """Adam without momentum: a row without a gradient stays, and only its second moment fades. Here that waits until
        the row moves again, so that a step costs what its tokens cost and not what the table does."""
        grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
        rows, values = grad.indices()[0], grad.values().clone()                 # torch compiles no views of sparse tensors
        faded = second[rows] * spec.betas[1]**(self.adam_steps - 1 - moved[rows])
        part = (p[rows], None if low is None else low[rows], values, torch.zeros_like(faded), faded)
        self.move_adam(spec, part)
        for whole, new in ((p, part[0]), (low, part[1]), (second, faded), (moved, self.adam_steps.expand(len(rows), 1))):
            if whole is not None:
                whole.index_copy_(0, rows, new)

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
        self.state[name][key].copy_(self.own(name, self.units(name, whole)))

class SparseRows:
    """The bigram table's gradient between ranks: only rows that a token touched travel (seed 002 asks for this).
    The tokens say which: indices go out, between hosts, while the forward pass runs; values follow the backward pass."""
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
        values = grad[upload(torch.from_numpy(self.rows), torch.empty(len(self.rows), dtype=torch.int64, device=device))]
        arrived = values.new_empty(len(self.wanted), values.size(1))
        work = dist.all_to_all_single(arrived, values, counts, self.sent.tolist(), async_op=True)
        self.bytes_sent = (len(self.rows) - int(self.sent[self.ranks.rank])) * (grad[0].nbytes + self.rows.itemsize)
        places, self.rows = upload(self.wanted, torch.empty_like(self.wanted, device=device)), self.rows[:0]
        places -= self.share * self.ranks.rank
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

def normuon_(p: Tensor, low: Tensor | None, g: Tensor, m: Tensor, second: Tensor, *, lr: Tensor | float, wd: float,
             momentum: Tensor | float, beta2: float, rates: Tensor) -> None:
    """One NorMuon step (2510.05491) on matrices (units, rows, columns), in place; rates (units, 1, 1) multiply lr."""
    u = normuon_direction(g.float(), m, second, momentum, beta2)
    weight = exact(p, low)
    kept = 1 - wd * lr**2 * rates * (u * weight >= 0)           # decay, cautious (2411.16085): never against the update
    store_exact_(p, low, kept.mul_(weight).sub_(u.mul_(lr * rates)))

def normuon_direction(g: Tensor, m: Tensor, second: Tensor, momentum: Tensor | float, beta2: float) -> Tensor:
    """Nesterov momentum, orthogonalised, rows (or columns) of equal size on average; the matrix's norm stays."""
    m.lerp_(g, 1 - momentum)
    u = polar_express(g.lerp(m, momentum))
    squares = u.norm(dim=averaged_side(u), keepdim=True, dtype=torch.float32).square()         # of each row (or column)
    second.lerp_(squares / u.size(averaged_side(u)), 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    size, resized = (x.sum(dim=(-2, -1), keepdim=True) for x in (squares, squares * scale.square()))
    return u * (scale * (size / resized.clamp_min(1e-20)).sqrt())

POLAR_EXPRESS = (           # 2505.16932, its coefficients for five steps, safety 2e-2, cushion 2
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
    x = x.mT.contiguous() if tall else x                        # the Gram matrix on the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = IN_USE["symmetric_product"](x)
        x = torch.baddbmm(x, IN_USE["symmetric_product"](gram, alpha=c, beta=b), x, beta=a)     # rounds once
    return x.mT.contiguous() if tall else x

def adam_(p: Tensor, low: Tensor | None, g: Tensor, m: Tensor, second: Tensor, *, lr: Tensor | float, wd: float,
          betas: tuple[float, float], eps: float, steps: Tensor | int) -> None:
    """Adam's step number `steps` (from 1) with cautious weight decay, in place."""
    g = g.float()
    m.lerp_(g, 1 - betas[0])
    second.lerp_(g.square(), 1 - betas[1])
    u = m / (second / (1 - betas[1]**steps)).sqrt_().add_(eps)  # in place: a CPU runs this as it stands
    weight = exact(p, low)
    kept = 1 - wd * lr**2 * (u * weight > 0)
    store_exact_(p, low, kept.mul_(weight).sub_(u.mul_(lr / (1 - betas[0]**steps))))

def exact(p: Tensor, low: Tensor | None) -> Tensor:
    """The float32 value of a parameter; a bfloat16 one keeps the 16 bits that it lacks in low, int16. On a CPU low is the
    whole value, float32: compilers make no vectors of those bits, and take ten times as long."""
    if low is None or low.dtype == torch.float32:
        return p.float() if low is None else low
    return (p.view(torch.int16).to(torch.int32) << 16).add_(low).view(torch.float32)

def store_exact_(p: Tensor, low: Tensor | None, value: Tensor) -> None:
    """The reverse. p is value rounded (not cut, which would pull every weight towards 0); low, signed, is the rest."""
    if low is None or low.dtype == torch.float32:
        p.copy_(value)
        return None if low is None else low.copy_(value)
    bits = value.view(torch.int32)
    p.view(torch.int16).copy_((bits + 0x8000).bitwise_right_shift_(16))
    low.copy_(bits)                                             # its low half

# ===== 4. Data: .bin shards of uint16 tokens behind a 256-int32 header. Nothing reorders, filters, pads or wraps. ===
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES, FIRST_DOCUMENTS = 20240520, 1, 1024, 2**20    # a shard's first tokens have a BOS

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
    return given if (given := Path(cfg.data_dir)).is_dir() else Path(__file__).resolve().parent / given

def find_shards(cfg: Config, split: str) -> list[Path]:
    files = sorted(find_data(cfg).glob(f"*_{split}_*.bin"))
    need(len(files) > 0, f"--data_dir {cfg.data_dir}: no *_{split}_*.bin there; ./run.sh fetches or makes a preset's data")
    return files

class Loader:
    """Training sequences in a fixed order: micro-batch n of a step is the same tokens whatever the number of ranks.
    A sequence starts at a BOS and is filled with whole documents, each cut at the stage's limit, the last one where the
    sequence is full; the next sequence starts with the next document. The position is (file, document)."""
    def __init__(self, cfg: Config):
        self.cfg, self.files = cfg, find_shards(cfg, "train") * cfg.epochs
        self.open(0)

    def open(self, file: int) -> None:
        need(file < len(self.files), f"--num_steps {self.cfg.num_steps}: too few tokens in the {len(self.files)} training "
                                     f"shards of --data_dir {self.cfg.data_dir}; get more, train less, or raise --epochs")
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
        for stage in map(schedule.stage, range(self.cfg.num_steps)):
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
    lengths = np.full(vocab_size, -1)
    lengths[bos_id] = 0                                         # a BOS stands for no text
    try:
        for word, rank in map(bytes.split, path.read_bytes().splitlines() if path.exists() else ()):
            assert int(rank) >= 0 > lengths[int(rank)]
            lengths[int(rank)] = len(base64.b64decode(word, validate=True))
        assert lengths.min() >= 0 or not path.exists()
    except (ValueError, IndexError, AssertionError):
        raise UserError(f"{path}: not one `base64 rank` line a token below {vocab_size}; make the data again") from None
    return lengths if path.exists() else None

# ===== 5. Schedule: pure functions of the step, so that they can be printed and tested. =============================
class Schedule:
    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.ends = [*(round(stage.until * cfg.scheduled_steps) for stage in cfg.stages[:-1]), cfg.num_steps]

    def stage_index(self, step: int) -> int:
        return next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
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
        """The stage's multiplier, then a line down to final_lr, and final_lr in the extension; no cooldown: no line."""
        cfg, flat_steps = self.cfg, int(self.cfg.scheduled_steps * (1 - self.cfg.cooldown_share))
        if step < flat_steps or not cfg.cooldown_share:
            return self.stage(step).lr_mul
        done = min(1.0, (step - flat_steps) / max(1, cfg.scheduled_steps - flat_steps))
        return (1 - done) * self.stage(step).lr_mul + done * cfg.final_lr

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
        """The step of Adam's after whose update embedding and head part; num_steps or more: never."""
        step = math.ceil(self.cfg.untie_share * self.cfg.scheduled_steps)
        return step - (step + 1) % -self.cfg.adam_every if self.cfg.untie_share < 1 else self.cfg.num_steps

# ===== 6. Operators: plain PyTorch, which runs on CPUs, then what a GPU runs. tests/reference.py is what both compute. =
QUERY_BLOCK = 128

def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, reach: int, scale: Tensor | float) -> Tensor:
    """q, k, v (T, H, d); query i sees keys lo[i] .. i, lo (T,) holds document starts and window -> (T, H, d).
    By blocks of queries and the keys they reach, reach >= i - lo[i] + 1: cost is T x reach."""
    T, H, d = q.shape
    back = -(-(min(reach, T) - 1) // QUERY_BLOCK) * QUERY_BLOCK                     # keys before a block's own
    blocks = -(-T // QUERY_BLOCK)
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, blocks * QUERY_BLOCK - T)) for t in (q, k, v))
    count = partial(torch.arange, dtype=torch.int32, device=q.device)
    query = count(blocks * QUERY_BLOCK).view(blocks, 1, QUERY_BLOCK, 1)
    key = query[:, :, :1] - back + count(back + QUERY_BLOCK)
    lo = F.pad(lo.to(torch.int32), (0, blocks * QUERY_BLOCK - T)).view(blocks, 1, QUERY_BLOCK, 1)
    q = (q * scale).to(v.dtype).view(blocks, QUERY_BLOCK, H, d).transpose(1, 2)     # (blocks, H, QUERY_BLOCK, d)
    k, v = (bands(t, back) for t in (k, v))                                         # (blocks, H, back + QUERY_BLOCK, d)
    return BlockAttention.apply(q, k, v, (key < lo) | (key > query)).transpose(1, 2).reshape(-1, H, d)[:T]

class BlockAttention(torch.autograd.Function):
    """The softmax is kept in the dtype of v: on a CPU that costs less than to compute it again."""
    @staticmethod
    def forward(ctx, q, k, v, hidden):
        share = (q @ k.mT).float().masked_fill(hidden, float("-inf")).softmax(dim=-1).to(v.dtype)
        ctx.save_for_backward(q, k, v, share)
        return share @ v

    @staticmethod
    def backward(ctx, dy):
        q, k, v, share = ctx.saved_tensors
        d_share = (dy @ v.mT).float()
        d_scores = (share * (d_share - (d_share * share).sum(dim=-1, keepdim=True))).to(v.dtype)
        return d_scores @ k, d_scores.mT @ q, share.mT @ dy, None

def bands(x: Tensor, back: int) -> Tensor:
    """x (T, H, d) -> for each block of queries the rows from `back` before it to its end; slices: cheap gradients."""
    before = F.pad(x, (0, 0, 0, 0, back, 0))
    shifted = [before[start:start + len(x)].unflatten(0, (-1, QUERY_BLOCK)) for start in range(0, back + 1, QUERY_BLOCK)]
    return torch.cat(shifted, dim=1).transpose(1, 2)

# Rows of queries, of keys, warps, stages, from a compute capability on; Hopper's are those of PyTorch's flex_attention.
ATTENTION_FORWARD = {80: (128, 64, 8, 2), 90: (128, 64, 8, 3), 120: (128, 64, 8, 2)}
ATTENTION_DQ = {80: (64, 64, 4, 2), 90: (128, 64, 8, 3), 120: (64, 64, 4, 2)}
ATTENTION_DKV = {80: (64, 64, 8, 2), 90: (64, 128, 8, 3), 120: (64, 64, 8, 2)}

@torch.compiler.assume_constant_result
def target() -> int:
    """The compute capability that kernels are compiled for, 90 on an H100; Triton's interpreter passes for one."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch

def fitting(table: dict[int, tuple]) -> tuple:
    return table[max(capability for capability in table if capability <= target())]

def blocks_of(x: Tensor, *shape: int) -> TensorDescriptor | tuple:
    """x for a kernel that moves blocks of this shape, by TMA from 90 on. Outside of x it reads 0 and writes nothing."""
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride == 0 or stride * x.itemsize % 16 for stride in x.stride()[:-1]):
        x = x.contiguous()
    return TensorDescriptor.from_tensor(x, list(shape)) if target() >= 90 else (x, tuple(x.shape), x.stride())

@triton.jit
def opened(x, SHAPE: tl.constexpr):
    """What blocks_of gave, to load from and store to. Below 90 the compiler makes plain pointers of it."""
    return x if isinstance(x, tl.tensor_descriptor) else tl.make_tensor_descriptor(x[0], x[1], x[2], SHAPE)

@triton.jit
def attention_forward_kernel(q, k, v, o, lse, lo, scale, T, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """A block of queries of one head over the key blocks that it sees; softmax in base 2, rescaled as its maximum grows."""
    m, h = tl.program_id(0) * BM, tl.program_id(1)
    q, o, k, v = opened(q, [BM, D]), opened(o, [BM, D]), opened(k, [BN, D]), opened(v, [BN, D])
    rows, end = m + tl.arange(0, BM), tl.minimum(m + BM, T)
    row_lo, columns = tl.load(lo + rows, mask=rows < T, other=T)[:, None], tl.arange(0, BN)
    first, last = tl.load(lo + m), tl.load(lo + end - 1)
    factor = tl.load(scale) * 1.4426950408889634                                    # exp(x) = exp2(x log2(e))
    queries = q.load([m, h * D])
    top = tl.full([BM], -1e30, tl.float32)                                          # finite: a row may see no key of a block
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    for n in range(first // BN * BN, end, BN):
        s = tl.dot(queries, k.load([n, h * D]).T)
        if (n < last) | (n + BN > m + 1):                                           # the interval cuts this block
            s = tl.where((n + columns >= row_lo) & (n + columns <= rows[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * factor)
        p = tl.math.exp2(s * factor - new[:, None])
        shrink = tl.math.exp2(top - new)
        total, top = total * shrink + tl.sum(p, 1), new
        acc = tl.dot(p.to(queries.dtype), v.load([n, h * D]), acc * shrink[:, None])
    o.store([m, h * D], (acc / total[:, None]).to(o.dtype))
    tl.store(lse + h * T + rows, top + tl.math.log2(total), mask=rows < T)

@triton.jit
def attention_dq_kernel(q, k, v, o, do, dq, lse, delta, lo, scale, T, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """dq of a block of queries; and delta = sum(do * o) over each row, which attention_dkv_kernel needs too."""
    m, h = tl.program_id(0) * BM, tl.program_id(1)
    q, o, k, v = opened(q, [BM, D]), opened(o, [BM, D]), opened(k, [BN, D]), opened(v, [BN, D])
    do, dq = opened(do, [BM, D]), opened(dq, [BM, D])
    rows, end = m + tl.arange(0, BM), tl.minimum(m + BM, T)
    row_lo, columns = tl.load(lo + rows, mask=rows < T, other=T)[:, None], tl.arange(0, BN)
    first, last = tl.load(lo + m), tl.load(lo + end - 1)
    factor = tl.load(scale) * 1.4426950408889634
    queries, row_do = q.load([m, h * D]), do.load([m, h * D])
    row_delta = tl.sum(row_do.to(tl.float32) * o.load([m, h * D]).to(tl.float32), 1)
    tl.store(delta + h * T + rows, row_delta, mask=rows < T)
    row_lse, acc = tl.load(lse + h * T + rows, mask=rows < T, other=0), tl.zeros([BM, D], tl.float32)
    for n in range(first // BN * BN, end, BN):
        block = k.load([n, h * D])
        p = tl.math.exp2(tl.dot(queries, block.T) * factor - row_lse[:, None])
        if (n < last) | (n + BN > m + 1):
            p = tl.where((n + columns >= row_lo) & (n + columns <= rows[:, None]), p, 0)
        ds = p * (tl.dot(row_do, v.load([n, h * D]).T) - row_delta[:, None])
        acc = tl.dot(ds.to(block.dtype), block, acc)
    dq.store([m, h * D], (acc * tl.load(scale)).to(dq.dtype))

@triton.jit
def attention_dkv_kernel(q, k, v, do, dk, dv, lse, delta, lo, end, scale, T, BM: tl.constexpr, BN: tl.constexpr,
                         D: tl.constexpr):
    """dk and dv of a block of keys, over the queries up to end[block] that see it; scores are transposed, a row a key."""
    n, h = tl.program_id(0) * BN, tl.program_id(1)
    q, do, k, v = opened(q, [BM, D]), opened(do, [BM, D]), opened(k, [BN, D]), opened(v, [BN, D])
    dk, dv = opened(dk, [BN, D]), opened(dv, [BN, D])
    keys, columns = n + tl.arange(0, BN), tl.arange(0, BM)
    factor = tl.load(scale) * 1.4426950408889634
    row_k, row_v = k.load([n, h * D]), v.load([n, h * D])
    dk_acc, dv_acc = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    for m in range(n, tl.load(end + tl.program_id(0)), BM):
        queries, block = q.load([m, h * D]), do.load([m, h * D])
        place, inside = h * T + m + columns, m + columns < T
        p = tl.math.exp2(tl.dot(row_k, queries.T) * factor - tl.load(lse + place, mask=inside, other=0)[None, :])
        if (n < tl.load(lo + tl.minimum(m + BM, T) - 1)) | (n + BN > m + 1):
            column_lo = tl.load(lo + m + columns, mask=inside, other=T)
            p = tl.where((keys[:, None] >= column_lo[None, :]) & (keys[:, None] <= (m + columns)[None, :]), p, 0)
        dv_acc = tl.dot(p.to(block.dtype), block, dv_acc)
        ds = p * (tl.dot(row_v, block.T) - tl.load(delta + place, mask=inside, other=0)[None, :])
        dk_acc = tl.dot(ds.to(queries.dtype), queries, dk_acc)
    dk.store([n, h * D], (dk_acc * tl.load(scale)).to(dk.dtype))
    dv.store([n, h * D], dv_acc.to(dv.dtype))

def attention_forward(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> o (T, H, d) and the base-2 log-sum-exp of its scores (H, T)."""
    (T, H, D), (BM, BN, warps, stages) = q.shape, fitting(ATTENTION_FORWARD)
    o, lse = q.new_empty(q.shape), q.new_empty(H, T, dtype=torch.float32)
    rows, keys = (lambda x, n=n: blocks_of(x.flatten(1), n, D) for n in (BM, BN))
    attention_forward_kernel[triton.cdiv(T, BM), H](rows(q), keys(k), keys(v), rows(o), lse, lo, scale, T, BM, BN, D,
                                                    num_warps=warps, num_stages=stages)
    return o, lse

def attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, scale: Tensor, o: Tensor, lse: Tensor
                       ) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv (T, H, d). No atomics: the same bits every time."""
    (T, H, D), delta, (dq, dk, dv) = q.shape, torch.empty_like(lse), (q.new_empty(q.shape) for _ in range(3))
    BM, BN, warps, stages = fitting(ATTENTION_DQ)
    rows, keys = (lambda x, n=n: blocks_of(x.flatten(1), n, D) for n in (BM, BN))
    attention_dq_kernel[triton.cdiv(T, BM), H](rows(q), keys(k), keys(v), rows(o), rows(do), rows(dq), lse, delta, lo, scale,
                                               T, BM, BN, D, num_warps=warps, num_stages=stages)
    BM, BN, warps, stages = fitting(ATTENTION_DKV)
    last = torch.arange(BN - 1, T + BN - 1, BN, dtype=torch.int32, device=lo.device)
    end = torch.searchsorted(lo, last, right=True, out_int32=True)
    rows, keys = (lambda x, n=n: blocks_of(x.flatten(1), n, D) for n in (BM, BN))
    attention_dkv_kernel[triton.cdiv(T, BN), H](rows(q), keys(k), keys(v), rows(do), keys(dk), keys(dv), lse, delta, lo, end,
                                                scale, T, BM, BN, D, num_warps=warps, num_stages=stages)
    return dq, dk, dv

attention_op = torch.library.custom_op("train_gpt::attention", attention_forward, mutates_args=())
attention_op.register_fake(lambda q, *rest: (q.new_empty(q.shape), q.new_empty(*q.shape[1::-1], dtype=torch.float32)))
attention_backward_op = torch.library.custom_op("train_gpt::attention_backward", attention_backward, mutates_args=())
attention_backward_op.register_fake(lambda do, q, *rest: tuple(q.new_empty(q.shape) for _ in range(3)))
attention_op.register_autograd(lambda ctx, do, _: (*attention_backward_op(do, *ctx.saved_tensors), None, None),
                               setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))

def attention_triton(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, reach: int, scale: Tensor | float) -> Tensor:
    """attention for scale > 0, lo non-decreasing; d filled up to a power of two. FlashAttention-2, 2307.08691."""
    scale, d = scale if isinstance(scale, Tensor) else q.new_full((), scale, dtype=torch.float32), q.size(2)
    missing = triton.next_power_of_2(d) - d
    q, k, v = (F.pad(t, (0, missing)) for t in (q, k, v)) if missing else (q, k, v)
    return attention_op(q, k, v, lo.to(torch.int32), scale)[0][..., :d]

def mlp(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """x (T, D); up, down (4D, D) -> (T, D). relu(x)^2: 2109.08668"""
    hidden = F.linear(x, up)
    return (F.relu(hidden).square() if activation == "relu2" else F.gelu(hidden)) @ down

# Rows, columns, depth of a block, warps, stages forward and backward; shared memory: 99 KB on Ada and on 120, 227 on 90.
RELU2_BLOCKS = {80: (128, 256, 32, 8, 3, 3), 90: (128, 256, 64, 8, 4, 3), 120: (128, 128, 64, 8, 3, 3)}
PROCESSORS = 132                                                # an H100's, where there is no GPU

@triton.jit
def relu2_kernel(a, b, hidden, out, DEPTH: tl.constexpr, BACKWARD: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """A program takes every PROGRAMS-th block, in one flat loop: while it stores one, it already loads the next."""
    HALF: tl.constexpr = COLUMNS // 2                               # what is stored at once: less shared memory
    a, b, out = opened(a, [ROWS, STEP]), opened(b, [COLUMNS, STEP]), opened(out, [ROWS, HALF])
    across = tl.cdiv(out.shape[1], COLUMNS)
    for block in tl.range(tl.program_id(0), tl.cdiv(out.shape[0], ROWS) * across, PROGRAMS, flatten=True):
        row, column = block // across * ROWS, block % across * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, DEPTH, STEP):
            total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
        halves = total.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            if BACKWARD:
                y = halves[i] * 2 * tl.sqrt(opened(hidden, [ROWS, HALF]).load([row, column + i * HALF]).to(tl.float32))
            else:
                y = tl.maximum(halves[i], 0) * tl.maximum(halves[i], 0)
            out.store([row, column + i * HALF], y.to(out.dtype))

@torch.library.custom_op("train_gpt::relu2_product", mutates_args=())
def relu2_product(a: Tensor, b: Tensor, hidden: Tensor | None) -> Tensor:
    """a (T, K), b (N, K) -> relu(a b^T)^2 (T, N); with such a result as hidden: 2 sqrt(hidden) a b^T, its derivative"""
    ROWS, COLUMNS, STEP, warps, *stages = fitting(RELU2_BLOCKS)
    out, backward = a.new_empty(len(a), len(b)), hidden is not None
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else PROCESSORS
    programs = min(processors, triton.cdiv(len(a), ROWS) * triton.cdiv(len(b), COLUMNS))
    kept, to = (blocks_of(t, ROWS, COLUMNS // 2) for t in (hidden if backward else out, out))
    relu2_kernel[programs,](blocks_of(a, ROWS, STEP), blocks_of(b, COLUMNS, STEP), kept, to, a.size(1), backward, programs,
                            ROWS, COLUMNS, STEP, num_warps=warps, num_stages=stages[backward])
    return out

relu2_product.register_fake(lambda a, b, hidden: a.new_empty(len(a), len(b)))

class ReLU2MLP(torch.autograd.Function):
    """relu(x up^T)^2 is all that is kept: the derivative needs its root, with half the rounding error of a kept relu."""
    @staticmethod
    def forward(ctx, x, up, down):
        hidden = relu2_product(x, up, None)
        ctx.save_for_backward(x, up, down, hidden)
        return hidden @ down

    @staticmethod
    def backward(ctx, dy):
        x, up, down, hidden = ctx.saved_tensors
        d_up = relu2_product(dy.contiguous(), down, hidden)         # of x up^T
        return d_up @ up, d_up.T @ x, hidden.T @ dy

def mlp_triton(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """mlp, fused for relu2 in bfloat16; D a multiple of 8."""
    return ReLU2MLP.apply(x.contiguous(), up, down) if activation == "relu2" else mlp(x, up, down, activation)

Cap = tuple[float, float, float]                                # logits become cap[0] sigmoid((logits + cap[1]) / cap[2])
HEAD_CHUNK = {"cpu": 1024, "cuda": 16384}                       # tokens, by device

def head_loss(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap, piece: Callable | None = None,
              learn: bool = True) -> Tensor:
    """x (T, D), head (D, V), targets (T,): sum over k of weights[k] * cross-entropy with the token k + 1 ahead, over T.
    A chunk of tokens at a time: the float32 logits of a whole sequence never exist at once."""
    T, ahead = len(targets), torch.arange(len(weights), device=x.device)
    place = torch.arange(T, device=x.device)[:, None] + ahead                       # (T, n)
    weights = torch.where(place < T, weights / T, 0)                                # no loss on what is past the end
    targets = targets[place.clamp_max(T - 1)]
    return HeadLoss.apply(x, head, targets, weights, cap, piece or head_chunk, learn and torch.is_grad_enabled())

class HeadLoss(torch.autograd.Function):
    """The gradient is made with the loss, while a chunk's logits are at hand; backward only scales it."""
    @staticmethod
    def forward(ctx, x, head, targets, weights, cap, piece, with_grad):
        loss, dx, dhead = 0.0, [], None
        for part, *rest in zip(*(t.split(HEAD_CHUNK[x.device.type]) for t in (x, targets, weights))):
            part_loss, part_dx, part_dhead = piece(part, head, *rest, cap, with_grad)
            loss, dx = loss + part_loss, [*dx, part_dx]
            dhead = part_dhead if dhead is None else dhead.add_(part_dhead)
        if with_grad:
            ctx.save_for_backward(torch.cat(dx), dhead.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dhead = ctx.saved_tensors
        return (grad * dx).to(dx.dtype), (grad * dhead).to(dhead.dtype), None, None, None, None, None

def head_chunk(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap, with_grad: bool, fp8: bool = False):
    """x (c, D), targets and weights (c, n) -> loss, its gradient by x (c, D) and by head (D, V) in float32, or None."""
    loss, dz = chunk_loss((x @ head).float(), targets, weights, cap)
    dz = dz.to(x.dtype)
    return (loss, dz @ head.T, (x.T @ dz).float()) if with_grad else (loss, None, None)

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

@triton.jit
def capped_logit(z, CAP: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """z -> its logit, the logit's derivative by z."""
    if CAP == 0:
        return z, z * 0 + 1
    s = tl.sigmoid((z + SHIFT) * (1 / WIDTH))
    return CAP * s, CAP / WIDTH * s * (1 - s)

@triton.jit
def cross_entropy_kernel(z, targets, weights, loss, V, N: tl.constexpr, CAP: tl.constexpr, SHIFT: tl.constexpr,
                         WIDTH: tl.constexpr, WITH_GRAD: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program: z (V,) before the cap, targets and weights (N,) -> the row's loss; z becomes its gradient."""
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    lane, k = tl.arange(0, BLOCK), tl.arange(0, AHEAD)
    target = tl.load(targets + row * N + k, mask=k < N, other=0)
    weight = tl.load(weights + row * N + k, mask=k < N, other=0)
    picked, picked_slope = capped_logit(tl.load(z + target).to(tl.float32), CAP, SHIFT, WIDTH)
    top, total = tl.full([BLOCK], -1e30 if CAP == 0 else CAP, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lane < V
        logit, _ = capped_logit(tl.load(z + start + lane, mask=inside, other=0).to(tl.float32), CAP, SHIFT, WIDTH)
        logit = tl.where(inside, logit, float("-inf"))
        if CAP == 0 or CAP > 64:
            higher = tl.maximum(top, logit)
            total = total * tl.exp(top - higher) + tl.exp(logit - higher)
            top = higher
        else:
            total += tl.exp(logit - CAP)
    highest = tl.max(top, 0)
    log_total = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(loss + row, tl.sum(weight * (log_total - picked), 0))
    if WITH_GRAD:
        all_weight = tl.sum(weight, 0)
        same = tl.sum(tl.where(target[:, None] == target[None, :], weight[None, :], 0), 1)
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            inside = start + lane < V
            logit, slope = capped_logit(tl.load(z + start + lane, mask=inside, other=0).to(tl.float32), CAP, SHIFT, WIDTH)
            tl.store(z + start + lane, (all_weight * tl.exp(logit - log_total) * slope).to(z.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        dz = (all_weight * tl.exp(picked - log_total) - same) * picked_slope
        tl.store(z + target, dz.to(z.dtype.element_ty), mask=k < N)

@torch.library.custom_op("train_gpt::cross_entropy_", mutates_args={"z"})
def cross_entropy_(z: Tensor, targets: Tensor, weights: Tensor, cap: list[float], with_grad: bool) -> Tensor:
    """chunk_loss in one kernel: z (c, V) -> the loss of each row (c,), float32; z becomes its gradient if that is wanted."""
    assert all(t.is_contiguous() for t in (z, targets, weights)), [t.stride() for t in (z, targets, weights)]
    n, loss = targets.size(1), z.new_empty(len(z), dtype=torch.float32)
    cross_entropy_kernel[len(z),](z, targets, weights, loss, z.size(1), n, *cap, with_grad, triton.next_power_of_2(n),
                                  BLOCK=4096, num_warps=8)
    return loss

cross_entropy_.register_fake(lambda z, *rest: z.new_empty(len(z), dtype=torch.float32))

X_SCALE, HEAD_SCALE = 2**-2, 2**-8      # near the records' 100 / 448 and 1.6 / 448; powers of two round nothing

def to_fp8(x: Tensor, scale: float) -> Tensor:
    return (x * (1 / scale)).to(torch.float8_e4m3fn)            # which saturates, at 448

def head_chunk_triton(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap, with_grad: bool, fp8: bool = True):
    """head_chunk without float32 logits in memory; with fp8 they are, in training, a product in FP8, where the GPU has it."""
    if with_grad and fp8 and target() >= 89:
        scale = x.new_full((), (X_SCALE * HEAD_SCALE)**0.5, dtype=torch.float32)
        head8 = to_fp8(head.T, HEAD_SCALE).contiguous().T       # columns contiguous, as _scaled_mm wants its second factor
        z = torch._scaled_mm(to_fp8(x, X_SCALE), head8, scale, scale, out_dtype=x.dtype, use_fast_accum=True)
    else:
        z = x @ head
    loss = cross_entropy_(z, targets, weights, cap, with_grad).sum()
    return (loss, z @ head.T, (x.T @ z).float()) if with_grad else (loss, None, None)

def symmetric_product(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha x x^T + beta x, x (n, rows, columns); beta needs x symmetric."""
    return torch.baddbmm(x, x, x.mT, alpha=alpha, beta=beta) if beta else alpha * (x @ x.mT)

@triton.jit
def symmetric_kernel(x, square, out, alpha, beta, depth, BETA: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """A block on or below the diagonal of alpha x x^T + beta x, and its mirror image."""
    row, column, n = tl.program_id(0) * ROWS, tl.program_id(1) * ROWS, tl.program_id(2)
    if column > row:
        return
    x, out, total = opened(x, [1, ROWS, STEP]), opened(out, [1, ROWS, ROWS]), tl.zeros((ROWS, ROWS), tl.float32)
    for k in range(0, depth, STEP):
        right = x.load([n, column, k]).reshape(ROWS, STEP).T
        total = tl.dot(x.load([n, row, k]).reshape(ROWS, STEP), right, total)
    total *= alpha
    if BETA:
        total += beta * opened(square, [1, ROWS, ROWS]).load([n, row, column]).reshape(ROWS, ROWS).to(tl.float32)
    y = total.to(out.dtype)
    out.store([n, row, column], y.reshape(1, ROWS, ROWS))
    if column < row:
        out.store([n, column, row], y.T.reshape(1, ROWS, ROWS))

@torch.library.custom_op("train_gpt::symmetric_product", mutates_args=())
def symmetric_product_triton(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """symmetric_product in bfloat16, half of it computed; rows and columns multiples of 8."""
    ROWS, STEP, out = 128, 64, x.new_empty(len(x), x.size(1), x.size(1))        # 96 KB: two programs on a multiprocessor
    x, blocks = x.contiguous(), triton.cdiv(x.size(1), ROWS)
    given = blocks_of(x, 1, ROWS, STEP), blocks_of(x, 1, ROWS, ROWS), blocks_of(out, 1, ROWS, ROWS), alpha, beta, x.size(2)
    symmetric_kernel[blocks, blocks, len(x)](*given, beta != 0, ROWS, STEP, num_warps=8, num_stages=3)
    return out

symmetric_product_triton.register_fake(lambda x, alpha=1.0, beta=0.0: x.new_empty(len(x), x.size(1), x.size(1)))

def transposed_(to: Tensor, x: Tensor, add: bool) -> Tensor:
    """to (R, C) = x.T, or to += x.T, in place; x (C, R)."""
    return to.add_(x.T) if add else to.copy_(x.T)

@triton.jit
def transposed_kernel(dst, src, rows, columns, dst_stride, src_stride, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(src + column[:, None] * src_stride + row, mask=(column[:, None] < columns) & (row < rows)).to(tl.float32).T
    place, inside = dst + row[:, None] * dst_stride + column, (row[:, None] < rows) & (column < columns)
    if ADD:
        y += tl.load(place, mask=inside).to(tl.float32)
    tl.store(place, y.to(dst.dtype.element_ty), mask=inside)

def transposed_triton_(dst: Tensor, src: Tensor, add: bool, block: int = 64) -> Tensor:
    """transposed_ through shared memory, so that both sides are touched along their rows."""
    assert dst.shape == src.T.shape and dst.stride(1) == src.stride(1) == 1, [(t.shape, t.stride()) for t in (dst, src)]
    blocks = tuple(triton.cdiv(size, block) for size in dst.shape)
    transposed_kernel[blocks](dst, src, *dst.shape, dst.stride(0), src.stride(0), add, block)
    return dst

IN_USE = {f.__name__: f for f in (attention, mlp, head_chunk, symmetric_product, transposed_)}  # by model and optimizer

def choose_operators(cfg: Config, device: torch.device) -> str:
    """On a GPU, each fast version that is right on a small input takes its place. -> the line of the log on what runs."""
    rng, D, T, notes = torch.Generator().manual_seed(0), cfg.model_dim, 384, []
    random = lambda *size: torch.randn(*size, generator=rng).bfloat16()  # noqa: E731
    cap, targets = (cfg.softcap, cfg.softcap_shift, cfg.softcap_width), torch.randint(cfg.vocab_size, (T, 2), generator=rng)
    fast_versions = (                                           # with arguments as wide as the model
        (attention, attention_triton, [*random(3, T, 2, cfg.head_dim), torch.arange(T) // 99 * 99, T, torch.tensor(0.1)]),
        (mlp, mlp_triton, [random(T, D), *random(2, cfg.mlp_ratio * D, D) / D**0.5, cfg.activation]),
        (head_chunk, head_chunk_triton,
         [random(T, D), random(D, cfg.vocab_rows) / D**0.5, targets, torch.full((T, 2), 1 / T), cap, True, cfg.fp8_head]),
        (symmetric_product, symmetric_product_triton, [random(2, 2 * D, D).mT]),
        (transposed_, transposed_triton_, [random(D, T), random(T, D), True]),
    ) if device.type == "cuda" and not cfg.reference and pick_dtype(cfg) == torch.bfloat16 else ()
    for plain, fast, args in fast_versions:
        wrong = trial(plain, fast, args, device)
        IN_USE[plain.__name__] = plain if wrong else fast
        notes.append(f"{plain.__name__} plain ({wrong})" if wrong else f"{plain.__name__} by kernel")
    return ", ".join(notes) or "all plain"

def trial(plain: Callable, fast: Callable, args: list, device: torch.device) -> str:
    """Why a fast version cannot run here: its results and gradients against the plain one's in float32; '': it can."""
    def results(operator: Callable, dtype: torch.dtype) -> list[Tensor]:
        here = [a.to(device, dtype if a.dtype == torch.bfloat16 else a.dtype, copy=True) if isinstance(a, Tensor) else a
                for a in args]
        leaves = [a.requires_grad_() for a in here[:3] if plain in (attention, mlp)]
        out = (out,) if isinstance(out := operator(*here), Tensor) else out
        return [*out, *torch.autograd.grad(out[0].float().square().sum(), leaves)] if leaves else list(out)
    try:
        for ours, exact in zip(results(fast, torch.bfloat16), results(plain, torch.float32)):
            error = float((ours - exact).detach().norm() / exact.detach().norm())
            if not error < 0.05 and not is_null(device):
                return f"relative error {error:.2g}"
    except Exception as error:  # noqa: BLE001, whatever it is, the plain version stays
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""

# ===== 7. Run: ranks, log, clock, and the loop. =====================================================================
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

    def all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """The sum over ranks, in place."""
        work = dist.all_reduce(x, async_op=True) if self.size > 1 else None
        return lambda: (work and work.wait(), x)[1]

    def reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """x (units, ...) -> this rank's share of the sum, in float32 and in the order of ranks, unlike a library's."""
        if self.size == 1:
            return lambda: x
        parts = torch.empty_like(x)
        work = dist.all_to_all_single(parts, x, async_op=True)
        return lambda: (work.wait(), sum(part.float() for part in parts.view(self.size, -1, *x.shape[1:])))[1]

    def all_gather(self, whole: Tensor, own: Tensor) -> Callable[[], Tensor]:
        """Fills whole with every rank's own, which may be a view of its place in it."""
        work = dist.all_gather_single(whole, own, async_op=True) if self.size > 1 else None
        return lambda: (work and work.wait(), whole)[1]

def upload(host: Tensor, onto: Tensor) -> Tensor:
    """Host memory onto a tensor of the device; a GPU's queue goes on meanwhile."""
    return onto.copy_(host.pin_memory() if onto.is_cuda else host, non_blocking=True)

def download(x: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """The reverse: what is on the host, once the function has been called, which waits."""
    if not x.is_cuda:
        return x, lambda: None
    host, event = torch.empty(x.shape, pin_memory=True).copy_(x, non_blocking=True), torch.cuda.Event()
    event.record()
    return host, event.synchronize

class Graphs:
    """Work that is the same on every step of a kind: captured as a CUDA graph once, replayed then; else a plain call."""
    def __init__(self, log: "Log"):
        self.log, self.kept, self.pool = log, {}, None

    def capture(self, key: object, work: Callable[[], None]) -> None:
        """If something in it cannot be captured on this stack, the log says so, and it stays a plain call."""
        try:
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool=self.pool, capture_error_mode="thread_local"):
                work()
            self.kept[key], self.pool = graph, graph.pool()
            graph.replay()                                      # the first time takes longer
        except RuntimeError as error:
            self.log.write(f"graphs: no graph of {key} ({str(error).splitlines()[0]})")

    def __call__(self, key: object, work: Callable[[], None]) -> None:
        self.kept[key].replay() if key in self.kept else work()

class Log:
    """One file a run: the source, the configuration, then one line of key:value pairs an event."""
    END = "=" * 100

    def __init__(self, cfg: Config, ranks: Ranks, run_id: str | None = None):
        """run_id: of the run that goes on; its log is appended to."""
        self.file, self.run_id = None, run_id or str(uuid.uuid4())
        if ranks.rank == 0:
            path = Path(cfg.log_dir) / f"{self.run_id}.txt" if not is_null(ranks.device) else Path(os.devnull)
            self.appending = run_id is not None and path.exists()
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
        self.write("\n".join((SOURCE.rstrip("\n"), self.END, f"source_sha256:{hashlib.sha256(SOURCE.encode()).hexdigest()}",
                              f"config:{json.dumps(asdict(cfg))}")), echo=False)
        self.write(f"preset:{cfg.preset} overrides:{json.dumps(overrides)}")
        for name, fact in facts.items():
            self.write(f"{name}: {fact}")
        self.write(self.END, echo=False)

def is_null(device: torch.device) -> bool:
    """A stand-in for a GPU that computes nothing (tests/null_device.py): its losses are no results, nothing is kept."""
    return device.type == "cuda" and torch.cuda.get_device_name(device).startswith("NULLGPU")

def keep_memory(device: torch.device) -> None:
    """glibc: freed memory stays ours. Large activations, mapped and zeroed page by page anew, cost a CPU a third more."""
    libc = ctypes.CDLL(None) if device.type == "cpu" and platform.libc_ver()[0] == "glibc" else None
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)) if libc else ():
        libc.mallopt(option, value)                             # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of mallopt(3)

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
    fast = cfg.device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if fast else "float32")

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
    times = [(now := Clock(device).now)()]
    while len(times) < 4 or times[-1] - times[0] < 0.5:
        a @ b
        times.append(now())
    return 2 * size**3 / float(np.diff(times).min())

def matrix_flops(cfg: Config) -> dict[str, int]:
    """FLOPs of matrix products a token, forward, by part; attention's scores apart, which depend on the documents."""
    D, attending = cfg.model_dim, sum(layer.window != "none" for layer in topology(cfg))
    return {"projections": 2 * attending * 4 * D * cfg.num_heads * cfg.head_dim,
            "MLP": 2 * len(cfg.windows) * 2 * cfg.mlp_ratio * D**2, "head": 2 * D * cfg.vocab_rows}

def attended_pairs(tokens: np.ndarray, bos_id: int, window: int, paired: bool) -> int:
    """Query-key pairs that the mask lets through, for each head (or pair of heads), of one sequence."""
    position = np.arange(len(tokens))
    age = position - np.maximum.accumulate(np.where(tokens == bos_id, position, 0)) + 1
    return int(sum(np.minimum(n, window).sum() for n in ((2 * age - 1, 2 * age) if paired else (age,))))

def step_flops(cfg: Config, batches: list[tuple[Tensor, Tensor]], windows: tuple[int, int]) -> dict[str, int]:
    """FLOPs of the model on these micro-batches by part, 3 x forward; nothing for masked blocks or recomputation."""
    kinds = Counter((layer.window, layer.paired) for layer in topology(cfg) if layer.window != "none")
    reach, count = {"short": windows[0], "long": windows[1]}, len(batches) * len(batches[0][0])
    parts = {part: 3 * count * flops for part, flops in matrix_flops(cfg).items()} | {"attention": 0}
    for tokens, _ in batches:
        for (window, paired), layers in kinds.items():          # two products of head_dim multiply-adds a pair and head
            pairs = layers * attended_pairs(tokens.numpy(), cfg.bos_id, reach[window], paired)
            parts["attention"] += 3 * 4 * cfg.num_heads // (2 if paired else 1) * cfg.head_dim * pairs
    return parts

def facts_of(ranks: Ranks, model: GPT, failure: str | None, ceiling: float) -> dict[str, object]:
    """What the log's header says of this machine and this model. Never the environment: it may hold tokens."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (re.findall(r"model name\s*: (.*)", cpuinfo) or [platform.processor() or platform.machine()])[0]
    chip = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{cpu}, {os.cpu_count()} cores"
    matrices = sum(p.numel() for name, p in model.named_parameters() if name in ("qkvo", "mlp"))
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
        "hardware": f"{chip}; {ranks.size} process(es), {torch.get_num_threads()} thread(s) each",
        "precision": str(model.dtype).removeprefix("torch."), "compile": failure or "torch.compile",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, of them {matrices:,} in matrices",
        "matrix ceiling": f"{ceiling / 1e9:.0f} GFLOP/s measured, all processes together",
    }

CHECKPOINT_FORMAT = 2   # 1, which said nothing of it: o transposed, skips after the mix, gradients of the mean loss
LOSS_SHARES = 8         # gradients are those of the loss summed over this share of a step's tokens, whatever its micro-batches are
Stopped = KeyboardInterrupt                                     # with the signal's name; `except Exception` lets it through
KEPT_CHECKPOINTS, MAY_DIFFER = 2, set("data_dir log_dir rank_timeout save_every save_on_stop resume compile reference graphs"
                                      " warmup val_every plan".split())

def save_checkpoint(path: Path, content: dict) -> None:
    """Whole or not at all: a name of its own until it is on disk. OSError or RuntimeError when it cannot be written."""
    part, run = path.with_name(f".{path.name}.part"), path.name.partition(".step")[0]
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
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
            then, now, written = json.loads(content["config"]), settings(cfg), content.get("format")
        except Exception as error:  # noqa: BLE001, half a file can fail in many ways
            print(f"resume: {path} is not whole ({type(error).__name__}), looking for an older one", file=sys.stderr)
            continue
        need(written == CHECKPOINT_FORMAT, f"{path}: a checkpoint of an older train_gpt.py, whose model computes something else; "
                                           "start anew under another --log_dir, or finish it with the train_gpt.py in its log")
        differing = [f"--{name} was {then.get(name)}, is {now.get(name)}" for name in sorted({*then, *now} - MAY_DIFFER)
                     if then.get(name) != now.get(name)]
        need(not differing, f"{path}: a checkpoint of another configuration ({'; '.join(differing)}); use its flags, "
                            "another --log_dir, or no --resume")
        return content
    return None

class Run:
    """One run from its configuration to its last validation. What a user can get wrong is found before the log exists."""
    def __init__(self, cfg: Config, overrides: dict):
        self.cfg, self.schedule, self.ranks = cfg, Schedule(cfg), Ranks.join(cfg)
        self.loader, self.validation = Loader(cfg), Validation(cfg)
        if self.ranks.rank == 0:
            self.loader.check_enough(self.schedule)
        saved = newest_checkpoint(cfg) if cfg.resume else None
        found = torch.tensor(saved["step"] + 1 if saved else 0, device=self.ranks.device)
        need(int(self.ranks.all_reduce(found.clone())()) == self.ranks.size * int(found),
             f"--log_dir {cfg.log_dir}: the processes found different checkpoints there; all nodes must see the same folder")
        self.log, self.clock = Log(cfg, self.ranks, saved and saved["run_id"]), Clock(self.ranks.device)
        keep_memory(self.ranks.device)
        self.ceiling = matrix_ceiling(self.ranks.device, pick_dtype(cfg)) * self.ranks.size     # before compilers start
        failure, operators = compile_failure(cfg, self.ranks.device), choose_operators(cfg, self.ranks.device)
        torch._dynamo.config.recompile_limit = 64               # a graph for each kind of layer, stage and validation window
        self.model = GPT(cfg, pick_dtype(cfg), compiled=not failure).to(self.ranks.device)
        if cfg.spectral and not saved:                          # training time; one process's result for all
            self.clock.start()
            found = spectral_start(cfg, self.loader.tokens[:2**24].astype(np.int64), self.ranks.device)
            for p, value in zip((self.model.embed, self.model.lm_head), found):
                p.data.copy_(self.ranks.all_reduce(value * (self.ranks.rank == 0))())
            self.clock.stop()
        self.optimizer = Optimizer(cfg, self.model, self.ranks, compiled=not failure)
        self.log.header(cfg, overrides, facts_of(self.ranks, self.model, failure, self.ceiling) | {"operators": operators})
        self.dials = torch.zeros(len(self.schedule.predict(0)) + 1, device=self.ranks.device)   # loss weights, signals
        self.result, self.inputs = torch.zeros(2, device=self.ranks.device), {}                 # what graphs write and read
        self.graphs, self.worker, self.ahead, self.position = Graphs(self.log), ThreadPoolExecutor(1), {}, (0, 0)
        self.steps_done = self.tokens_seen = self.flops = 0
        self.stop = self.last_signal = self.saved_step = self.average = self.leaving = None
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
            last, windows = step == cfg.num_steps, self.schedule.val_windows(step)
            if last and cfg.save_every and self.saved_step != step:
                self.report(unread, lag=0)                      # first: a loss that is not finite ends the run here
                self.save()
            if not last and windows[1] != long_window:
                self.model.set_long_window(long_window := windows[1])
            if last or (cfg.val_every and step % cfg.val_every == 0):
                self.report(unread, lag=0)
                self.clock.stop()
                loss, self.norms = self.validate(windows), self.group_norms()
                if last:
                    self.write_scalars()
                known = f" val_bpb:{bpb:.4f}" if (bpb := self.validation.bits_per_byte(loss)) else ""
                self.write_event(step, f"val_loss:{loss:.4f} ", f"{known} tokens:{self.tokens_seen}")
                self.clock.start()
            if last:
                return loss
            unread.append((step + 1, *download(self.train_step(step, windows)), self.tokens_seen, self.flops))
            self.report(unread, lag)
            if self.optimizer.adam_turn(step):                  # no gradient waits for its other parts
                if self.stop or (cfg.save_every and self.steps_done % cfg.save_every < cfg.adam_every):
                    self.report(unread, lag=0)
                    self.save()
                if self.stop:
                    raise Stopped(self.stop)

    def fetch(self, step: int) -> tuple:
        """This rank's micro-batches of a step and what follows from them alone; in a thread, while the step before runs."""
        batches = list(self.loader.step(self.schedule.stage(step), self.ranks.rank, self.ranks.size))
        position, rows = (self.loader.file, self.loader.document), []
        if self.optimizer.sparse:
            rows = [bigram_rows(t, documents(t, self.cfg.bos_id)[0], len(self.model.bigram_embed)) for t, _ in batches]
        return batches, position, rows, sum(step_flops(self.cfg, batches, self.schedule.windows(step)).values())

    def train_step(self, step: int, windows: tuple[int, int]) -> Tensor:
        """One step, always the preset's number of micro-batches over all ranks.
        -> (2,): its loss, multi-token terms included, and how many ranks were asked to stop, summed so that all agree."""
        fetched = self.ahead.pop(step, None) or self.worker.submit(self.fetch, step)
        batches, self.position, rows, flops = fetched.result()
        for later in range(step + 1 + len(self.ahead), min(step + 9, self.cfg.num_steps)):     # a new shard takes its time
            self.ahead[later] = self.worker.submit(self.fetch, later)
        if rows:
            self.optimizer.sparse.announce(torch.cat(rows).numpy(), last=self.optimizer.adam_turn(step))
        upload(torch.tensor([*self.schedule.predict(step), float(self.last_signal is not None)]), self.dials)
        batches = self.place(batches)
        self.graphs((len(batches[0][0]), windows), lambda: self.compute(batches, windows))
        self.optimizer.step(step, self.schedule.lr_mul(step), self.schedule.momentum(step), step == self.schedule.untie_step,
                            lambda turn: self.graphs((turn, self.optimizer.tied), lambda: self.optimizer.move(turn)))
        self.steps_done, self.tokens_seen = step + 1, self.tokens_seen + self.schedule.stage(step).batch_tokens
        self.flops += flops * self.ranks.size
        return self.ranks.all_reduce(self.result.clone())()

    def place(self, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches where the model reads them: on a GPU in the same memory every time."""
        if self.ranks.device.type == "cpu":
            return batches
        size = len(batches[0][0])
        if size not in self.inputs:
            self.inputs[size] = [tuple(torch.empty_like(t, device=self.ranks.device) for t in pair) for pair in batches]
        return [tuple(map(upload, pair, onto)) for pair, onto in zip(batches, self.inputs[size])]

    def compute(self, batches: list[tuple[Tensor, Tensor]], windows: tuple[int, int]) -> None:
        """Forward and backward of these micro-batches: gradients add up, the loss and the last dial go to self.result."""
        self.result.copy_(F.pad(self.dials[-1:], (1, 0)))
        for tokens, targets in batches:
            loss = self.model(tokens, targets, self.dials[:-1], windows)
            (len(tokens) / LOSS_SHARES * loss).backward()
            self.result[0] += loss.detach() / self.cfg.micro_batches

    def save(self) -> None:
        """Everything a resumed run needs, the same whatever the number of ranks. All ranks call it; the clock stands."""
        self.clock.stop()
        place = "cpu" if self.log.file else "meta"              # only one process keeps what they all gather
        optimizer = {name: {key: self.optimizer.whole_state(name, key).to(place) for key in state}
                     for name, state in self.optimizer.state.items()}
        if self.log.file and not is_null(self.ranks.device):
            path = Path(self.cfg.log_dir) / f"{self.log.run_id}.step{self.steps_done:06d}.pt"
            content = {"format": CHECKPOINT_FORMAT, "config": json.dumps(settings(self.cfg)), "run_id": self.log.run_id, "step": self.steps_done,
                       "model": self.model.state_dict(), "optimizer": optimizer, "tied": self.optimizer.tied,
                       "loader": self.position, "clock": self.clock.total, "tokens_seen": self.tokens_seen,
                       "flops": self.flops, "average": self.average, "rng": torch.get_rng_state()}
            try:
                save_checkpoint(path, content)
                self.log.write(f"checkpoint: {path}")
            except (OSError, RuntimeError) as error:            # a full disk, most often, behind a RuntimeError of torch
                why = str(error.__context__ or error).splitlines()[0]
                self.log.write(f"checkpoint: NOT saved at step {self.steps_done}, the last good one stays ({why})")
        self.saved_step = self.steps_done
        self.clock.start()

    def restore(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.model.turn_rotary()
        for name, state in saved["optimizer"].items():
            for key, whole in state.items():
                self.optimizer.load_state(name, key, whole.to(self.ranks.device))
        self.optimizer.tied, self.clock.total, self.position = saved["tied"], saved["clock"], saved["loader"]
        self.tokens_seen, self.flops, self.average = saved["tokens_seen"], saved["flops"], saved["average"]
        self.loader.open(self.position[0])
        self.loader.document, self.steps_done, self.saved_step = self.position[1], saved["step"], saved["step"]
        torch.set_rng_state(saved["rng"])
        self.log.write(f"resumed: from step {self.steps_done} with {self.ranks.size} process(es)")

    def hear(self, number: int, _frame) -> None:
        """A signal: remembered for the end of the step if there is something to save, else the end, now."""
        again = self.last_signal and time.monotonic() - self.last_signal[1] > 2             # torchrun's comes twice at once
        self.last_signal = signal.Signals(number).name, time.monotonic()
        if not self.leaving and (again or not self.cfg.save_on_stop or self.steps_done == self.began_at):
            raise Stopped(self.last_signal[0])

    @torch.no_grad()
    def group_norms(self) -> dict[str, float]:
        return {name: float(p.norm(dtype=torch.float32)) for name, p in self.model.named_parameters()}

    def validate(self, windows: tuple[int, int]) -> float:
        """Plain cross-entropy, nats a token, over the whole validation stream."""
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for n in range(self.ranks.rank, self.validation.count, self.ranks.size):
            total += self.evaluate(*self.validation.sequence(n), windows)
        return self.finite(float(self.ranks.all_reduce(total)()) / self.validation.count, "validation", self.steps_done)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor, windows: tuple[int, int]) -> Tensor:
        """One sequence's loss. On a CPU uncompiled: another length would compile for longer than all validation takes."""
        device = self.ranks.device
        model = self.model if device.type == "cuda" else self.model.eager()
        return model(tokens.to(device), targets.to(device), torch.ones(1, device=device), windows, False)

    def warm_up(self) -> None:
        """Compiles and runs every stage on dummy tokens, both optimizers and validation; then all is as it was."""
        cfg, device, began = self.cfg, self.ranks.device, time.perf_counter()
        state = [*self.model.parameters(), *(t for s in self.optimizer.state.values() for t in s.values())]
        saved, tied = [t.detach().to("cpu", copy=True) for t in state], self.optimizer.tied
        dummy = lambda size: split_targets(np.arange(size + 1) * 37 % cfg.vocab_size)  # noqa: E731, a BOS now and then
        steps = range(cfg.num_steps)
        plans = {(stage.batch_tokens // cfg.micro_batches, stage.windows) for stage in map(self.schedule.stage, steps)}
        placed = {kind: self.place([dummy(kind[0])] * (cfg.micro_batches // self.ranks.size)) for kind in sorted(plans)}
        upload(torch.tensor([*self.schedule.predict(0), 0.0]), self.dials)
        for kind, batches in placed.items():
            self.compute(batches[:1], kind[1])
        validated = [*(steps[::cfg.val_every] if cfg.val_every else ()), cfg.num_steps]
        for windows in sorted({self.schedule.val_windows(step) for step in validated}) if device.type == "cuda" else ():
            self.evaluate(*dummy(cfg.val_seq_len), windows)
        for self.optimizer.tied in {tied, False}:
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.optimizer.sparse:
                self.optimizer.sparse.announce(np.arange(8), last=True)
            self.optimizer.step(cfg.adam_every - 1, lr_mul=0.0, momentum=0.9, untie=False)
        if cfg.graphs and device.type == "cuda":
            for kind, batches in placed.items():
                self.graphs.capture(kind, partial(self.compute, batches, kind[1]))
            for turn, self.optimizer.tied in {(False, tied), (False, False), (True, tied), (True, False)}:
                self.graphs.capture((turn, self.optimizer.tied), partial(self.optimizer.move, turn))
            torch._foreach_zero_([p.grad for p in self.model.parameters()])
        with torch.no_grad():
            for t, s in zip(state, saved):
                t.copy_(s)
        self.optimizer.tied = tied
        self.log.write(f"warm-up: {time.perf_counter() - began:.1f} s outside the clock, {len(plans)} kind(s) of step")

    def report(self, unread: list[tuple], lag: int) -> None:
        """A line for each step whose loss is due; ends the run when a loss is not finite."""
        while len(unread) > lag:
            step, result, wait, tokens, flops = unread.pop(0)
            wait()
            loss, stops = result.tolist()
            if stops:
                self.stop = self.last_signal[0] if self.last_signal else "a signal to another process"
            value, seconds = self.finite(loss, "training", step), self.clock.seconds()
            self.write_event(step, "", f" train_loss:{value:.4f} tokens_per_second:{tokens / seconds:.0f}"
                                       f" mfu:{flops / seconds / self.ceiling:.3f}")
            if self.average and value > 1.3 * self.average:
                self.log.write(f"spike: train_loss {value:.4f} at step {step}, {self.average:.4f} before; {self.suspect()}")
            self.average = 0.9 * (self.average or value) + 0.1 * value

    def suspect(self) -> str:
        """The parameter group that a loss gone wrong points to."""
        now = self.group_norms()
        if broken := [name for name, norm in now.items() if not math.isfinite(norm)]:
            return f"not finite: {', '.join(broken)}"
        name = max(now, key=lambda name: now[name] / (self.norms[name] + 1e-6) if self.norms[name] else 0.0)
        return f"grown most since the last validation: {name}, from norm {self.norms[name]:.4g} to {now[name]:.4g}"

    def write_event(self, step: int, before: str, after: str) -> None:
        """The form that every tool of this field reads; more key:value pairs only behind it."""
        ms, at = 1e3 * self.clock.seconds(), f"step:{step}/{self.cfg.num_steps}"
        self.log.write(f"{at} {before}train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms{after}")

    def write_scalars(self) -> None:
        """What people plot afterwards (seeds 003, 004): the learned scalars by layer, and what the run took."""
        for name, p in self.model.named_parameters():
            if name.endswith("_scale"):
                self.log.write(f"scalars:{name} {json.dumps([round(v, 4) for v in p.flatten().tolist()])}", echo=False)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
        peak = torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else resident
        self.log.write(f"peak_memory:{peak / 2**20:.0f}MiB tokens:{self.tokens_seen}"
                       f" mfu:{self.flops / max(self.clock.seconds(), 1e-9) / self.ceiling:.3f}")

    def finite(self, loss: float, kind: str, step: int) -> float:
        if not math.isfinite(loss) and not is_null(self.ranks.device):
            raise RunFailed(f"the {kind} loss is {loss} at step {step} ({self.suspect()}); lower --muon_lr or --adam_lr")
        return loss

def train(cfg: Config, overrides: dict) -> float:
    """One whole run; returns its final validation loss."""
    run = Run(cfg, overrides)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, run.hear)
        if cfg.warmup:
            run.warm_up()
        return run.loop()
    except (Stopped, RunFailed, RuntimeError) as error:
        run.leaving = True                                      # before any call: from here on a signal is only noted
        if isinstance(error, RuntimeError) and run.ranks.size > 1:
            time.sleep(2)                                       # torchrun must see first who died, and name it
            if run.last_signal:                                 # it did; or all were told to stop, and others left first
                error = Stopped(run.last_signal[0])
        done = f"{run.steps_done} of {cfg.num_steps} steps done, train_time:{1e3 * run.clock.seconds():.0f}ms"
        stopped = isinstance(error, Stopped)
        run.log.write(f"interrupted: {done} ({error})" if stopped else f"failed: {error}", echo=stopped)
        raise error
    finally:
        run.leaving, run.graphs.kept = True, {}                 # NCCL's end waits for graphs that hold collectives
        if run.ranks.size > 1 and (run.ranks.device.type == "cpu" or not sys.exc_info()[0]):    # nor for ranks that died
            dist.destroy_process_group()

def main() -> None:
    try:
        cfg, overrides = parse_config(sys.argv[1:])
        if cfg.plan:
            need(Path(__file__).with_name("evals").is_dir(), "--plan: needs evals/plan.py, which is not beside this file")
            sys.modules["train_gpt"] = sys.modules["__main__"]  # which evals/plan.py imports
            from evals.plan import plan
            return plan(cfg, cfg.plan)
        train(cfg, overrides)
    except (UserError, RunFailed) as error:
        print(f"train_gpt.py: {'error' if isinstance(error, UserError) else 'failed'}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt as error:
        sys.exit(143 if str(error) == "SIGTERM" else 130)

if __name__ == "__main__":
    main()
