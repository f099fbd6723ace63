"""What a run takes on GPUs that nobody has rented yet: parameters, FLOPs, bytes, the least time of a step.

    python -m evals.plan short 8xH100 [--num_steps 1000 ...]
    python -m evals.plan short H100 --scaling               1 to 64 GPUs: where more of them stop paying

A preset, GPUs, then any flags of train_gpt.py.
Counts of this project's model and optimizer, rates of data sheets; no GPU is needed. --scaling takes for all
cards the share of the peak that one H100 reached (records/gpu), and nodes of eight.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

import train_gpt as tg
from cli import command, need
from data.prepare import tokens_needed


@dataclass(frozen=True)
class GpuSpec:
    """A vendor's data sheet, without sparsity."""

    bf16: float  # TFLOP/s, sums in float32
    fp8: float  # TFLOP/s; 0: it has none
    memory: float  # GB
    bandwidth: float  # TB/s
    link: float  # GB/s to other GPUs, one way


GPUS = {
    "H100": GpuSpec(989, 1979, 80, 3.35, 450),  # SXM, NVLink
    "H200": GpuSpec(989, 1979, 141, 4.8, 450),  # SXM, NVLink
    "A100": GpuSpec(312, 0, 80, 2.039, 300),  # SXM with 80 GB, NVLink
    "L40S": GpuSpec(362, 733, 48, 0.864, 32),  # PCIe 4.0
    "RTX4090": GpuSpec(165.2, 330.3, 24, 1.008, 32),  # PCIe 4.0
    "RTX5090": GpuSpec(209.5, 419, 32, 1.792, 64),  # PCIe 5.0
}


REACHED = 0.46  # of bf16's peak, by the gradients of `short` on one H100: records/gpu
NODE = 8  # GPUs
NODE_LINK = 50  # GB/s of a GPU to those in other nodes: 400 Gb/s InfiniBand


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"usage: python -m evals.plan PRESET GPUS [flags of train_gpt.py]\n\n{__doc__ or ''}")
        return
    need(len(argv) >= 2, "give a preset and GPUs: python -m evals.plan short 8xH100")
    preset, order, *flags = argv
    scaling = "--scaling" in flags
    flags = [flag for flag in flags if flag != "--scaling"]
    need(preset in tg.PRESETS, f"{preset}: no preset; choose from {', '.join(tg.PRESETS)}")
    cfg, _ = tg.parse_config(["--preset", preset, *flags])
    count, gpu = read_order(order)
    if scaling:
        need(count == 1, f"{order}: --scaling takes a card without a number; it goes from 1 to 64")
        return print_scaling(cfg, gpu)
    shared = cfg.micro_batches % count == 0
    need(shared, f"{order}: {count} GPUs cannot share --micro_batches {cfg.micro_batches}")
    print_plan(joined_on(gpu, cfg, count), count, gpu)


def read_order(order: str) -> tuple[int, str]:
    """ "8xH100" -> 8, "H100"; without a number, 1."""
    match = re.fullmatch(r"(?:(\d{1,4}) ?X ?)?(\w+)", order.upper(), re.ASCII)
    known = match and match[2] in GPUS and int(match[1] or 1) > 0
    need(known, f"{order}: write 8xH100, say; the GPUs are {', '.join(GPUS)}")
    return int(match[1] or 1), match[2]


def joined_on(gpu: str, cfg: tg.Config, world_size: int) -> tg.Config:
    """With as many micro-batches a pass as the run would take on such a card; --join decides before that."""
    card = SimpleNamespace(dtype=torch.bfloat16, total_memory=lambda: int(GPUS[gpu].memory * 0.98 * 2**30))
    return replace(cfg, join=cfg.join or tg.joined_by_memory(cfg, card, world_size))


def on_paper(cfg: tg.Config, world_size: int) -> tg.Optimizer:
    """Parameters and states as the first of so many GPUs has them, on meta tensors."""
    meta = torch.device("meta")
    with meta:
        model = tg.GPT(cfg, tg.pick_dtype(replace(cfg, device="cuda")))
        optimizer = tg.Optimizer(cfg, model, tg.DistEnv(0, 1, meta))
    optimizer.env.world_size = world_size  # only now: there are no processes to connect
    optimizer.state = {name: optimizer.new_state(name) for name in optimizer.params}
    return optimizer


def kept_values(cfg: tg.Config) -> int:
    """Activations a token that are kept for the backward pass, compiled and with the file's own kernels.

    What enters a piece and its products; what is pointwise is computed again. A test counts the real ones;
    eager mode keeps twice as many.
    """
    D = cfg.model_dim
    total = (
        4 + 2 * cfg.extra_inputs + (cfg.bigram_rows > 0)
    ) * D  # embedding, x0; into the last norm; the head's dx
    for layer in tg.topology(cfg):
        total += (3 + cfg.mlp_ratio) * D  # into mix; the MLP's: x, normed, relu^2
        has_value = layer.value_embed is not None
        if layer.attends:  # into norm, normed; the product of q, k and v; these three; y, y gated
            total += (10 + layer.paired + has_value) * D  # y turned back; the value
            if cfg.exclusive and not layer.paired:  # y less its own part, v
                total += (1 + has_value) * D
    if cfg.mudd_layers:  # into each, after the last; the weights of x0 and earlier outputs
        layers = len(cfg.windows)
        total += (cfg.mudd_layers + 1) * D + sum(range(layers - cfg.mudd_layers + 1, layers + 1))
    return total


def validation_values(cfg: tg.Config) -> int:
    """Activations a token at the peak of a validation, in the attention or the MLP of some layer.

    Nothing is kept for a backward pass, but x0, the extra streams, looked-up values and outputs that a skip
    or the backout asks for stay to the end.
    """
    tables, extras = len(tg.value_tables(cfg)), cfg.extra_inputs + (cfg.bigram_rows > 0)
    held, peak = 2 + extras + tables, 0  # 2: x0, the stream; all in widths of the stream
    for layer in tg.topology(cfg):
        if layer.attends:
            # The normed stream; the product of q, k and v; these three as attention takes them, y.
            peak = max(peak, held + 8 + (layer.value_embed is not None) + layer.paired)  # y, too, turns back
        peak = max(peak, held + 2 + cfg.mlp_ratio)  # normed, relu^2, their product
        held += bool(layer.skip_sender or layer.backout or cfg.mudd_layers)
    return peak * cfg.model_dim


def planned_memory(cfg: tg.Config, world_size: int) -> dict[str, int]:
    """Bytes on each GPU when the forward pass of its longest sequence ends; their sum is the expected peak.

    In training or in a validation, whichever holds more.
    """
    optimizer = on_paper(cfg, world_size)
    tokens = max(1, cfg.join) * tg.most_tokens(cfg)
    head = optimizer.params["lm_head"]
    D, V = head.shape
    weights = sum(p.nbytes for p in optimizer.params.values())
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    training = tokens * kept_values(cfg) * head.itemsize + head.nbytes
    validating = cfg.val_seq_len * validation_values(cfg) * head.itemsize
    logits = min(tokens, tg.HEAD_CHUNK["cuda"]) * V
    return {
        "weights": weights,
        "gradients": weights,
        "head's chunk": (2 * tokens * D + logits) * head.itemsize + 8 * head.numel(),
        "optimizer states": states,
        "activations": max(training, validating),
    }


@dataclass
class UpdateCost:
    """Of a GPU's mean step: FLOPs of the optimizer, bytes that it and the gradients move, bytes sent to
    others.
    """

    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0


def update_cost(cfg: tg.Config, world_size: int, tied: bool, tokens: int) -> UpdateCost:
    """tokens: of a micro-batch. Moved, at least: the update's states and weights, written and read;
    matrices, read in both passes; gradients, written. No bigram twice: text has fewer rows.
    """
    optimizer, cost, here = on_paper(cfg, world_size), UpdateCost(), cfg.micro_batches // world_size
    for name, p in optimizer.params.items():
        rows = optimizer.padded_rows(name, p.detach())
        shard = optimizer.local_shard(name, rows)
        state = sum(t.nbytes for t in optimizer.state[name].values())
        muon = optimizer.is_muon(name)
        turn = 1 if muon else (not tied or name != "embed") / cfg.adam_every  # of steps, on which it moves
        if muon:
            cost.flops += polar_express_flops(shard)
        passes = 3 if muon or name == "lm_head" else 1
        cost.moved += here * p.nbytes * passes + turn * (2 * state + 3 * shard.nbytes)
        reduced = rows.nbytes
        if name == "bigram_embed":
            touched = min(cfg.adam_every * here * tokens * (cfg.ngrams - 1), len(p))
            reduced = touched * (8 + p[0].nbytes)  # rows, with an index each
        cost.sent += turn * (reduced + rows.nbytes) * (1 - 1 / world_size)
    return cost


def polar_express_flops(matrices: Tensor) -> int:
    short, long = sorted(matrices.shape[1:])
    return len(tg.POLAR_EXPRESS) * len(matrices) * (4 * short**2 * long + 2 * short**3)


@dataclass(frozen=True)
class StageWork:
    """Of a GPU's mean step between two steps of a run."""

    stage: tg.Stage
    tokens: int  # of a micro-batch
    flops: dict[str, int]  # of the model, by part
    cost: UpdateCost


def stage_work(cfg: tg.Config, world_size: int, begin: int, end: int) -> StageWork:
    """Documents are as long as the stage allows."""
    schedule, here = tg.Schedule(cfg), cfg.micro_batches // world_size
    stage = schedule.stage(begin)
    tied = cfg.untie_share > 0 and (begin + end) / 2 < schedule.untie_step
    tokens = torch.full((stage.batch_tokens // cfg.micro_batches,), -1)
    tokens[:: stage.max_doc_len] = cfg.bos_id
    candidates = schedule.candidates(begin)
    flops = tg.step_flops(cfg, here * [(tokens, tokens)], stage.windows, candidates)
    return StageWork(stage, len(tokens), flops, update_cost(cfg, world_size, tied, len(tokens)))


def planned_stage(
    cfg: tg.Config, gpu: str, world_size: int, begin: int, end: int
) -> dict[str, int | float | str]:
    """A column of the table: FLOPs, bytes and least time of a GPU's mean step, then seconds of the whole
    stage.

    At the floor products, memory and link overlap.
    """
    spec, work = GPUS[gpu], stage_work(cfg, world_size, begin, end)
    stage, flops, cost = work.stage, work.flops, work.cost
    activations = cfg.micro_batches // world_size * work.tokens * kept_values(cfg) * 2  # bfloat16
    moved = 2 * activations + cost.moved
    rest = ((moved / spec.bandwidth / 1e12, "memory"), (cost.sent / spec.link / 1e9, "link"))
    model, never_fp8 = sum(flops.values()), flops["attention"] + cost.flops
    floors = {}
    for dtype, rate in (("bf16", spec.bf16), ("FP8", spec.fp8 or spec.bf16)):
        products = (model + cost.flops - never_fp8) / rate + never_fp8 / spec.bf16
        floors[dtype] = max((products / 1e12, "products"), *rest)
    steps = end - begin
    column: dict[str, int | float | str] = {"steps": steps, "tokens a step": stage.batch_tokens}
    column |= {f"TFLOP {part}": count / 1e12 for part, count in flops.items()}
    column |= {
        "TFLOP optimizer": cost.flops / 1e12,
        "GB moved at least": moved / 1e9,
        "GB sent at most": cost.sent / 1e9,
    }
    column |= {f"ms floor in {dtype}": f"{1e3 * time:.2f} {bound}" for dtype, (time, bound) in floors.items()}
    column |= {f"s floor in {dtype}": steps * time for dtype, (time, _) in floors.items()}
    for percent in (60, 40):
        at_rate = model / spec.bf16 / percent / 1e10
        column[f"s at {percent} % of bf16"] = steps * max(floors["bf16"][0], at_rate)
    return column


def run_seconds(cfg: tg.Config, gpu: str, count: int) -> tuple[float, float]:
    """Of training on so many GPUs: with all communication hidden behind work, and with none."""
    spec = GPUS[gpu]
    link = spec.link if count <= NODE else NODE_LINK
    hidden = exposed = 0.0
    for begin, end in tg.Schedule(cfg).spans:
        planned = stage_work(cfg, count, begin, end)
        cost, model = planned.cost, sum(planned.flops.values())
        work = (model / REACHED + cost.flops) / spec.bf16 / 1e12 + cost.moved / spec.bandwidth / 1e12
        sending = cost.sent / link / 1e9
        hidden += (end - begin) * max(work, sending)
        exposed += (end - begin) * (work + sending)
    return hidden, exposed


def print_scaling(cfg: tg.Config, gpu: str) -> None:
    print(f"{cfg.preset} on {gpu}, a run's training time at {100 * REACHED:.0f} % of bf16's peak, seconds:")
    print(" GPUs  nodes  micro-batches  communication hidden  not hidden      of perfect")
    alone = None
    for count in (1, 2, 4, 8, 16, 32, 64):
        spread = replace(cfg, micro_batches=math.lcm(cfg.micro_batches, count))
        uneven = [stage.batch_tokens for stage in cfg.stages if stage.batch_tokens % spread.micro_batches]
        if uneven:
            print(f"{count:5} cannot share the {uneven[0]:,} tokens of a step")
            continue
        hidden, exposed = run_seconds(spread, gpu, count)
        alone = alone or hidden
        shares = f"{100 * alone / (count * exposed):.0f} to {100 * alone / (count * hidden):.0f} %"
        nodes = -(-count // NODE)
        print(f"{count:5} {nodes:6} {spread.micro_batches:14} {hidden:21.1f} {exposed:11.1f} {shares:>15}")


def print_plan(cfg: tg.Config, count: int, gpu: str) -> None:
    spec, memory, optimizer = GPUS[gpu], planned_memory(cfg, count), on_paper(cfg, count)
    sizes: Counter[str] = Counter()
    for name, p in optimizer.params.items():
        group = name.rstrip("_0123456789") if optimizer.specs[name].sharded else "gates and scalars"
        sizes[group] += p.numel()
    columns = [planned_stage(cfg, gpu, count, *part) for part in tg.Schedule(cfg).spans]
    rates = f"{spec.bf16} TFLOP/s in bf16, {spec.fp8} in FP8, {spec.memory} GB at {spec.bandwidth} TB/s"
    print(f"{cfg.preset} on {count} x {gpu}: {rates}, {spec.link} GB/s to others; by stage:")
    groups = ", ".join(f"{group} {size:,}" for group, size in sizes.items())
    print(f"parameters {sizes.total():,}: {groups}")
    peak = sum(memory.values())
    fits = "fits" if peak <= spec.memory * 1e9 else "DOES NOT FIT"
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in memory.items())
    passes = f"{cfg.join} of {cfg.micro_batches // count} micro-batches a pass"
    print(f"peak memory {peak / 1e9:.1f} GB with {passes}, {fits}: {parts}")
    forms = {int: ",", float: ",.2f", str: ""}
    for label, value in columns[0].items():
        print(f"{label:20}", *(f"{column[label]:>16{forms[type(value)]}}" for column in columns))
    totals = []
    for label in columns[0]:
        if label.startswith("s "):
            totals.append(f"{sum(column[label] for column in columns):.1f} {label}")
    print(f"{cfg.num_steps:,} steps, {tokens_needed(cfg):,} tokens: {', '.join(totals)}")


if __name__ == "__main__":
    command(main)
