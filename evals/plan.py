"""What a run takes on GPUs that nobody has rented yet: parameters, FLOPs, bytes, and the least time of a step.

    python train_gpt.py --preset short --plan 8xH100

Counts of this project's model and optimizer, rates of data sheets; nothing is measured, no GPU is needed.
"""

import re
from collections import Counter
from dataclasses import replace

import torch

from data.prepare import tokens_needed
from train_gpt import (
    GPT,
    HEAD_CHUNK,
    POLAR_EXPRESS,
    Config,
    Optimizer,
    Ranks,
    Schedule,
    need,
    pick_dtype,
    step_flops,
    topology,
)

GPUS = {  # vendors' data sheets, no sparsity: TFLOP/s in bf16 (sums in float32), FP8; GB, TB/s; GB/s to others, one way
    "H100": (989, 1979, 80, 3.35, 450),  # SXM, NVLink
    "H200": (989, 1979, 141, 4.8, 450),  # SXM, NVLink
    "A100": (312, 0, 80, 2.039, 300),  # SXM with 80 GB, NVLink; no FP8
    "L40S": (362, 733, 48, 0.864, 32),  # PCIe 4.0
    "RTX4090": (165.2, 330.3, 24, 1.008, 32),  # PCIe 4.0
    "RTX5090": (209.5, 419, 32, 1.792, 64),  # PCIe 5.0
}


def on_paper(cfg: Config, ranks: int) -> Optimizer:
    """Parameters and states as the first of so many GPUs has them, on meta tensors."""
    with torch.device("meta"):
        optimizer = Optimizer(
            cfg, GPT(cfg, pick_dtype(replace(cfg, device="cuda"))), Ranks(0, 1, torch.device("meta"))
        )
    optimizer.ranks.size = ranks  # only now: there are no processes to connect
    optimizer.state = {name: optimizer.new_state(name) for name in optimizer.params}
    return optimizer


def kept_values(cfg: Config) -> int:
    """Activations a token that are kept for the backward pass, compiled and with this file's kernels: what enters a piece
    and its products; what is pointwise is computed again. A test counts the real ones; eager mode keeps twice as many."""
    D, W = cfg.model_dim, cfg.num_heads * cfg.head_dim
    total = (
        4 + 2 * cfg.extra_inputs + (cfg.bigram_rows > 0)
    ) * D  # embedding, x0; into the last norm; the head's dx
    for row in topology(cfg):  # into norm, normed; project's product; q, k, y, y gated
        attending = (
            2 * D + (7 + 2 * row.paired + (row.value_embed is not None) * (2 - row.paired)) * W
        )  # v, y copied
        total += (3 + cfg.mlp_ratio) * D + (
            row.window != "none"
        ) * attending  # into mix; the MLP's: x, normed, relu^2
    return total


def validation_values(cfg: Config) -> int:
    """Activations a token at the peak of a validation, in the last layer's MLP. Nothing is kept for a
    backward pass, but every layer's output may still be asked for (skips, backout), as may x0, what is added
    to the stream, and looked-up values."""
    D, W, rows = cfg.model_dim, cfg.num_heads * cfg.head_dim, topology(cfg)
    tables = len({row.value_embed for row in rows} - {None})
    attending = [row for row in rows if row.window != "none"]
    # of the last attention: its normed input; q, k, y, and v, which without a value embedding is a part of
    # their product
    attention = D + (4 if attending[-1].value_embed else 6) * W if attending else 0
    added = cfg.extra_inputs + (cfg.bigram_rows > 0)
    mlp = (1 + cfg.mlp_ratio) * D  # the MLP's: normed, relu^2
    return (2 + added + len(rows)) * D + tables * W + attention + mlp  # 2: x0, the stream


def planned_memory(cfg: Config, ranks: int) -> dict[str, int]:
    """Bytes on each GPU when the forward pass of its longest sequence ends, in training or in a validation,
    whichever holds more. Their sum is the expected peak."""
    optimizer, tokens = (
        on_paper(cfg, ranks),
        max(stage.batch_tokens for stage in cfg.stages) // cfg.micro_batches,
    )
    head, weights = optimizer.params["lm_head"], sum(p.nbytes for p in optimizer.params.values())
    chunk = (
        2 * tokens * len(head) + min(tokens, HEAD_CHUNK["cuda"]) * head.size(1)
    ) * head.itemsize + 8 * head.numel()
    training = tokens * kept_values(cfg) * head.itemsize + head.nbytes
    validating = cfg.val_seq_len * validation_values(cfg) * head.itemsize
    return {
        "weights": weights,
        "gradients": weights,
        "head's chunk": chunk,
        "optimizer states": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        "activations": max(training, validating),
    }


def planned_stage(cfg: Config, gpu: str, ranks: int, begin: int, end: int) -> dict[str, int | float | str]:
    """A column of the table: FLOPs, bytes and least time of a GPU's mean step, then seconds of the whole stage.

    Documents as long as the stage allows and no bigram twice: text has less. Moved, at least: activations and the update's
    states and weights, written and read; matrices, read in both passes; gradients, written. At the floor all overlap.
    """
    bf16, fp8, _, bandwidth, link = GPUS[gpu]
    optimizer, schedule, here, update, sent = (
        on_paper(cfg, ranks),
        Schedule(cfg),
        cfg.micro_batches // ranks,
        0,
        0.0,
    )
    stage, tied = schedule.stage(begin), (begin + end) / 2 < schedule.untie_step * (cfg.untie_share > 0)
    tokens = torch.full((stage.batch_tokens // cfg.micro_batches,), -1)
    tokens[:: stage.max_doc_len] = cfg.bos_id
    flops = step_flops(cfg, here * [(tokens, tokens)], stage.windows)
    moved = 2 * here * len(tokens) * kept_values(cfg) * optimizer.params["lm_head"].itemsize
    for name, p in optimizer.params.items():
        units, muon = optimizer.units(name, p.detach()), optimizer.specs[name].optimizer == "muon"
        own, state = optimizer.own(name, units), sum(t.nbytes for t in optimizer.state[name].values())
        turn = 1 if muon else (not tied or name != "embed") / cfg.adam_every
        if muon:
            short, long = sorted(own.shape[1:])
            update += len(POLAR_EXPRESS) * len(own) * (4 * short**2 * long + 2 * short**3)
        moved += here * p.nbytes * (3 if muon or name == "lm_head" else 1) + turn * (
            2 * state + 3 * own.nbytes
        )
        touched = min(cfg.adam_every * here * len(tokens), len(p)) * (
            8 + p[0].nbytes
        )  # rows, with an index each
        sent += (
            turn * ((touched if name == "bigram_embed" else units.nbytes) + units.nbytes) * (1 - 1 / ranks)
        )
    steps, model, other = end - begin, sum(flops.values()), flops["attention"] + update  # other: never in FP8
    rest = (moved / bandwidth / 1e12, "memory"), (sent / link / 1e9, "link")
    floors = {
        dtype: max((((model + update - other) / rate + other / bf16) / 1e12, "products"), *rest)
        for dtype, rate in (("bf16", bf16), ("FP8", fp8 or bf16))
    }
    return {
        "steps": steps,
        "tokens a step": stage.batch_tokens,
        **{f"TFLOP {part}": n / 1e12 for part, n in flops.items()},
        "TFLOP optimizer": update / 1e12,
        "GB moved at least": moved / 1e9,
        "GB sent at most": sent / 1e9,
        **{f"ms floor in {dtype}": f"{1e3 * time:.2f} {bound}" for dtype, (time, bound) in floors.items()},
        **{f"s floor in {dtype}": steps * time for dtype, (time, _) in floors.items()},
        **{f"s at {p} % of bf16": steps * max(floors["bf16"][0], model / bf16 / p / 1e10) for p in (60, 40)},
    }


def plan(cfg: Config, order: str) -> None:
    """Prints what a run takes on GPUs such as 8xH100. UserError: an unknown GPU, or a number that cannot share the work."""
    count, gpu = re.match(r"(?:(\d+) ?X ?)?(.*)", order.upper()).groups("1")
    need(gpu in GPUS and int(count) > 0, f"--plan {order}: write 8xH100, say; the GPUs are {', '.join(GPUS)}")
    need(
        cfg.micro_batches % int(count) == 0,
        f"--micro_batches {cfg.micro_batches}: {count} GPUs cannot share them",
    )
    memory, optimizer, sizes = planned_memory(cfg, int(count)), on_paper(cfg, int(count)), Counter()
    for name, p in optimizer.params.items():
        sizes[name.rstrip("_0123456789") if optimizer.specs[name].sharded else "gates and scalars"] += (
            p.numel()
        )
    peak, room, ends = sum(memory.values()), GPUS[gpu][2] * 1e9, [0, *Schedule(cfg).ends]
    columns = [
        planned_stage(cfg, gpu, int(count), *steps) for steps in zip(ends, ends[1:]) if steps[0] < steps[1]
    ]
    print(
        "{} on {} x {}: {} TFLOP/s in bf16, {} in FP8, {} GB at {} TB/s, {} GB/s to others; by stage:".format(
            cfg.preset, count, gpu, *GPUS[gpu]
        )
    )
    print(f"parameters {sizes.total():,}:", ", ".join(f"{group} {size:,}" for group, size in sizes.items()))
    print(
        f"peak memory {peak / 1e9:.1f} GB,",
        "fits:" if peak <= room else "DOES NOT FIT:",
        ", ".join(f"{part} {size / 1e9:.2f}" for part, size in memory.items()),
    )
    for label, value in columns[0].items():
        form = {int: ",", float: ",.2f", str: ""}[type(value)]
        print(f"{label:20}", *(f"{column[label]:>16{form}}" for column in columns))
    seconds = {
        label: sum(column[label] for column in columns) for label in columns[0] if label.startswith("s ")
    }
    print(
        f"{cfg.num_steps:,} steps, {tokens_needed(cfg):,} tokens:",
        ", ".join(f"{n:.1f} {s}" for s, n in seconds.items()),
    )
