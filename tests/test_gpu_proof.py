"""The program that proves the GPU path, where there is no GPU: what it plants is found, a section that faults
or hangs is a row, and the others go on.
"""

import json
import signal
import sys

import pytest
import torch

import train_gpt as tg
from tests.programs import gpu_proof


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A Rows on the CPU; what it kept."""
    monkeypatch.setattr(gpu_proof, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_proof, "poison", lambda: None)
    kept = gpu_proof.Rows(tmp_path / "section.jsonl")
    return kept, lambda: [json.loads(line) for line in kept.path.read_text().splitlines()]


def compare(kept, fast, **more) -> None:
    """fast against the plain MLP, as the section does it."""

    def make(rng):
        up, down = (gpu_proof.random(rng, 128, 32, scale=32**-0.5) for _ in range(2))
        return [gpu_proof.random(rng, 64, 32), up, down, "relu2"]

    gpu_proof.compare(lambda *a, **b: kept.add("x", *a, **b), "MLP", fast, tg.mlp, make, leaves=3, **more)


def wrong_by_one_percent(x, up, down, activation):
    return 1.01 * tg.mlp(x, up, down, activation)


def wrong_in_the_gradient(x, up, down, activation):
    return tg.mlp(x, up, 0.9 * down.detach() + 0.1 * down, activation)


def never_twice_the_same(x, up, down, activation):
    return tg.mlp(x, up, down, activation) + 1e-4 * torch.randn(1)


def not_all_written(x, up, down, activation):
    y = tg.mlp(x, up, down, activation)
    return torch.where(torch.arange(len(y))[:, None] == 3, float("nan"), y)


def test_a_right_operator_passes_and_each_planted_fault_is_found(rows):
    kept, found = rows
    compare(kept, tg.mlp, dtype=torch.float64)
    for fault in (wrong_by_one_percent, wrong_in_the_gradient, never_twice_the_same, not_all_written):
        compare(kept, fault)
    assert [row["ok"] for row in found()] == [True, False, False, False, False]
    assert found()[0]["error"] == pytest.approx(found()[0]["plain_error"])


def test_references_in_float64_are_the_definitions(rows):
    rng = torch.Generator().manual_seed(0)
    x, head = torch.randn(16, 32, generator=rng).double(), torch.randn(32, 64, generator=rng).double()
    targets, weights = torch.randint(64, (16, 2), generator=rng), torch.full((16, 2), 0.5 / 16)
    cap = (23.0, 5.0, 7.5)
    exact = gpu_proof.exact_head(x, head, targets, weights, cap, True)
    for a, b in zip(exact, tg.head_chunk(x.float(), head.float(), targets, weights, cap, True), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-4, atol=1e-6)
    q, k, v = (torch.randn(64, 2, 16, generator=rng).double() for _ in range(3))
    first_key, scale = torch.arange(64) // 20 * 20, torch.tensor(0.1)
    exact = gpu_proof.exact_attention(q, k, v, first_key, 64, scale)
    torch.testing.assert_close(exact, tg.reference_attention(q, k, v, first_key, scale), rtol=1e-5, atol=1e-5)


CHILDREN = {
    "faults": (f"import os, signal; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "exit code -11"),
    "hangs": ("import time; time.sleep(60)", "killed after 2 s"),
    "raises": ("raise RuntimeError", "exit code 1"),
    "ends": ("", ""),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_how_a_section_ends_is_a_row(tmp_path, name):
    """What it had found before stays; a section without a row has shown nothing."""
    code, why = CHILDREN[name]
    row = json.dumps({"name": "copy", "ok": True, "TB_s": 3.0}) + "\n"
    write = f"open({str(tmp_path / 'machine.jsonl')!r}, 'w').write({row!r}); "
    child = [sys.executable, "-c", write + code]
    failed = gpu_proof.supervise("machine", child, tmp_path, limit=2 if name == "hangs" else 60)
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert failed == (1 if why else 0)
    assert proof["machine"]["rows"][0] == {"name": "copy", "ok": True, "TB_s": 3.0}
    assert [row["why"] for row in proof["machine"]["rows"][1:]] == ([why] if why else [])
    assert gpu_proof.supervise("short", [sys.executable, "-c", ""], tmp_path, limit=60) == 1
    assert set(json.loads((tmp_path / "proof.json").read_text())) == {"machine", "short"}


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(Exception, match="no CUDA GPU here"):
        gpu_proof.main(["--out", "x"])


def test_kernels_are_sorted_by_kind():
    names = {
        "attention_dkv_kernel": "attention",
        "nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN": "products",
        "triton_red_fused_mul_sum_0": "Inductor's",
        "add_rows_kernel": "lookups, sorts",
        "logit_gradient_kernel": "cross-entropy",
        "Memcpy DtoD (Device -> Device)": "copies, fills",
        "what_nobody_knows": "other",
    }
    assert {name: gpu_proof.kind_of(name) for name in names} == names
