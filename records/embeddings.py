"""What a checkpoint's embedding tables look like to linear algebra (seed 000), over training if several.

    python -m records.embeddings CHECKPOINT... [--tables value_embed] [--format text|markdown|csv]

A CHECKPOINT is a file that train_gpt.py --save_every wrote; loading it runs no code. Of each table E, (V,
D), rows of the vocabulary only: M = E^T E / V, its D x D second moments (the mean is not taken out), with
eigenvalues l_1 >= .. >= l_D.

    condition   l_1 / l_D
    spikiness   l_1 / median of l
    off-diag    the largest |M_ij| / sqrt(M_ii M_jj), i != j
    top 64      share of the sum of l in the largest 64, D / 12 in the seed's tables; --top changes it
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, arguments, command, need, one_line, path_flag
from records.files import extra, file_kind, number_flag, say
from records.tables import FORMATS, table


@dataclass(frozen=True)
class Spectrum:
    condition: float
    spikiness: float
    off_diagonal: float
    top_share: float


def spectrum(rows, top: int = 64) -> Spectrum:
    """rows (V, D), a numpy array -> the figures of its second moments, in float64; nan for zeros."""
    numpy = extra("numpy")
    rows = numpy.asarray(rows, dtype=numpy.float64)
    assert rows.ndim == 2, f"{rows.shape}"
    assert top > 0, f"top {top}"
    moments = rows.T @ rows / len(rows)
    values = numpy.linalg.eigvalsh(moments)[::-1].clip(0)
    if not values[0] > 0:
        return Spectrum(math.nan, math.nan, math.nan, math.nan)
    size = numpy.sqrt(moments.diagonal())
    scale = numpy.outer(size, size)
    related = numpy.divide(abs(moments), scale, out=numpy.zeros_like(moments), where=scale > 0)
    numpy.fill_diagonal(related, 0)
    largest, smallest, median = float(values[0]), float(values[-1]), float(numpy.median(values))
    return Spectrum(
        condition=largest / smallest if smallest > 0 else math.inf,
        spikiness=largest / median if median > 0 else math.inf,
        off_diagonal=float(related.max()),
        top_share=float(values[:top].sum() / values.sum()),
    )


def load(path: Path) -> tuple[dict, int, int]:
    """A checkpoint's tensors, size of the vocabulary and step. UserError if it is none; runs no code."""
    extra("torch")
    import train_gpt as tg

    need(
        file_kind(path) == "file",
        f"{path}: no whole checkpoint of train_gpt.py (there is no file of that name)",
    )
    try:
        content = tg.load_whole(path)
        if not isinstance(content, dict):
            raise TypeError
        tensors, config = content["model"], json.loads(content["config"])
        known = (tensors.items(), int(config["vocab_size"]), int(content["step"]))
    except Exception as error:  # half a file, or a made-up one, can fail in many ways
        raise UserError(f"{path}: no whole checkpoint of train_gpt.py ({type(error).__name__})") from None
    sizes = known[1] > 0 and known[2] >= 0
    need(sizes, f"{path}: no whole checkpoint of train_gpt.py (vocabulary {known[1]}, step {known[2]})")
    return dict(known[0]), known[1], known[2]


def tables_of(path: Path, beginning: str) -> list[tuple[str, int, object]]:
    """(name, step, rows of the vocabulary, float32) of the tables whose name begins so. lm_head is turned."""
    tensors, vocab_size, step = load(path)
    import train_gpt as tg

    found = []
    for name, tensor in tensors.items():
        is_table = tg.is_plain(tensor) and tensor.dim() == 2 and tensor.is_floating_point()
        if not str(name).startswith(beginning) or not is_table:
            continue
        rows = tensor.T if name == "lm_head" else tensor
        if name != "bigram_embed":  # rows beyond the vocabulary pad to a multiple of 128
            rows = rows[:vocab_size]
        rows = rows.float()
        need(
            rows.numel() and rows.isfinite().all(),
            f"{path}: {name} is empty, or holds numbers that are not finite",
        )
        found.append((str(name), step, rows.numpy()))
    names = [str(name) for name in tensors]
    tables = [name for name in names if name.endswith(("embed", "head")) or "_embed_" in name]
    shown = one_line(", ".join(tables), 300) or "none"
    need(found, f"{path}: no table begins with {beginning}; there are {shown}")
    return found


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=path_flag, metavar="CHECKPOINT")
    parser.add_argument("--tables", default="value_embed", metavar="NAME", help="tables whose name begins so")
    parser.add_argument(
        "--top",
        type=number_flag(1, 10**6, whole=True),
        default=64,
        metavar="N",
        help="eigenvalues (default 64)",
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    args = parser.parse_intermixed_args(argv)
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
    head = ["table", "step", "rows", "condition", "spikiness", "off-diag", f"top {args.top}"]
    say(table(head, rows, args.format))


if __name__ == "__main__":
    command(main)
