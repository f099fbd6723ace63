"""What a checkpoint's embedding tables look like to linear algebra (seed 000), over training if there are several.

    python records/embeddings.py CHECKPOINT... [--tables value_embed] [--format text|markdown|csv]

A CHECKPOINT is a file that train_gpt.py --save_every wrote; loading it runs no code. Of each table E, (V, D), rows of the
vocabulary only: M = E^T E / V, its D x D second moments (the mean is not taken out), with eigenvalues l_1 >= .. >= l_D.

    condition   l_1 / l_D
    spikiness   l_1 / median of l
    off-diag    the largest |M_ij| / sqrt(M_ii M_jj), i != j
    top 64      share of the sum of l in the largest 64 (D / 12 of them in the seed's tables); --top changes it
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from records.logs import UserError, arguments, command, extra, need  # noqa: E402
from records.tables import FORMATS, table  # noqa: E402


@dataclass(frozen=True)
class Spectrum:
    condition: float
    spikiness: float
    off_diagonal: float
    top_share: float


def spectrum(rows, top: int = 64) -> Spectrum:
    """rows (V, D), a numpy array -> the four figures of its second moments, in float64; nan for a table of zeros."""
    numpy = extra("numpy")
    rows = numpy.asarray(rows, dtype=numpy.float64)
    assert rows.ndim == 2 and top > 0, f"{rows.shape}, top {top}"
    moments = rows.T @ rows / len(rows)
    values = numpy.linalg.eigvalsh(moments)[::-1].clip(0)
    if not values[0] > 0:
        return Spectrum(math.nan, math.nan, math.nan, math.nan)
    size = numpy.sqrt(moments.diagonal())
    scale = numpy.outer(size, size)
    related = numpy.divide(abs(moments), scale, out=numpy.zeros_like(moments), where=scale > 0)
    numpy.fill_diagonal(related, 0)
    smallest, median = float(values[-1]), float(numpy.median(values))
    ratio = lambda x: float(values[0]) / x if x > 0 else math.inf  # noqa: E731
    return Spectrum(
        ratio(smallest), ratio(median), float(related.max()), float(values[:top].sum() / values.sum())
    )


def load(path: Path) -> tuple[dict, dict, int]:
    """A checkpoint's tensors, configuration and step. UserError if it is none; runs no code (weights_only)."""
    torch = extra("torch")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content["model"], json.loads(content["config"]), int(content["step"])
    except Exception as error:  # noqa: BLE001, half a file can fail in many ways
        raise UserError(f"{path}: no whole checkpoint of train_gpt.py ({type(error).__name__})") from None


def tables_of(path: Path, beginning: str) -> list[tuple[str, int, object]]:
    """(name, step, rows of the vocabulary as float32 numpy) of the tables whose name begins so. lm_head is turned."""
    torch = extra("torch")
    tensors, config, step = load(path)
    found = []
    for name, tensor in tensors.items():
        if name.startswith(beginning) and isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
            rows = tensor.T if name == "lm_head" else tensor
            if name != "bigram_embed":  # rows beyond the vocabulary pad to a multiple of 128
                rows = rows[: int(config["vocab_size"])]
            found.append((name, step, rows.float().numpy()))
    names = ", ".join(
        name for name, tensor in tensors.items() if name.endswith(("embed", "head")) or "_embed_" in name
    )
    need(found, f"{path}: no table begins with {beginning}; there are {names}")
    return found


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--tables",
        default="value_embed",
        metavar="NAME",
        help="tables whose name begins so (default value_embed)",
    )
    parser.add_argument(
        "--top", type=int, default=64, metavar="N", help="eigenvalues of the last column (default 64)"
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    args = parser.parse_args(argv)
    need(args.top >= 1, f"--top {args.top}: at least 1")
    found = [one for path in args.checkpoints for one in tables_of(path, args.tables)]
    rows = []
    for name, step, values in sorted(found, key=lambda one: one[:2]):
        s = spectrum(values, args.top)
        rows.append(
            [
                name,
                str(step),
                f"{values.shape[0]} x {values.shape[1]}",
                f"{s.condition:.4g}",
                f"{s.spikiness:.4g}",
                f"{s.off_diagonal:.3f}",
                f"{100 * s.top_share:.1f} %",
            ]
        )
    print(
        table(
            ["table", "step", "rows", "condition", "spikiness", "off-diag", f"top {args.top}"],
            rows,
            args.format,
        )
    )


if __name__ == "__main__":
    command(main)
