"""The plainest form of two operators of train_gpt.py: what their fast versions, for CPUs and GPUs, are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from train_gpt import Cap


def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, scale: Tensor | float) -> Tensor:
    """q, k, v (T, H, d); query i sees keys lo[i] .. i, lo (T,) holds document starts and window -> (T, H, d)."""
    key = torch.arange(len(k), device=k.device)
    visible = (key >= lo[:, None]) & (key <= key[:, None])  # (T, T)
    scores = torch.einsum("qhd,khd->hqk", q * scale, k).float().masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).to(v.dtype), v)


def head_loss(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: Cap) -> Tensor:
    """x (T, D), head (D, V), targets (T,): sum over k of weights[k] * cross-entropy with the token k + 1 ahead, over T."""
    logits, T = (x @ head).float(), len(targets)
    if cap[0]:
        logits = cap[0] * torch.sigmoid((logits + cap[1]) / cap[2])
    losses = [F.cross_entropy(logits[: T - k], targets[k:], reduction="sum") for k in range(len(weights))]
    return (torch.stack(losses) * weights).sum() / T
