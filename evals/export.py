"""Write a trained model as safetensors: weights and configuration in one file, the vocabulary beside it.

    python evals/export.py CHECKPOINT FOLDER [--vocab FILE]        FOLDER/model.safetensors, FOLDER/vocab.tiktoken

evals.model.load(FOLDER) reads them back, and the other commands take FOLDER for CHECKPOINT.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from data.bpe import save_vocab  # noqa: E402
from data.shards import arguments, command, make_folder, write_file  # noqa: E402
from evals.model import EXTRAS, Trained, load, model_arguments  # noqa: E402


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    model_arguments(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    trained = load(args.checkpoint, args.vocab, args.device or "cpu", args.dtype)
    file = export(trained, args.folder)
    print(
        f"export.py: {trained.source}, step {trained.step}: {file} ({file.stat().st_size >> 20} MiB) and vocab.tiktoken"
    )


def export(trained: Trained, folder: Path) -> Path:
    """-> the file of the weights. UserError without a vocabulary, without safetensors, or where nothing can be written."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise tg.UserError(f"{folder}: exporting needs the package safetensors: {EXTRAS}") from None
    assert trained.vocabulary  # a model that nobody can feed or read is not worth a file
    usual = tg.PRESETS.get(trained.cfg.preset, tg.SHORT)
    own = replace(
        trained.cfg,
        data_dir=usual.data_dir,
        log_dir=usual.log_dir,  # not this machine's folders
        dtype=str(trained.model.dtype).removeprefix("torch."),
    )
    about = {"format": "pt", "config": json.dumps(tg.settings(own)), "step": str(trained.step)}
    about["checkpoint_format"] = str(tg.CHECKPOINT_FORMAT)
    data = save({name: t.contiguous() for name, t in trained.model.state_dict().items()}, metadata=about)
    save_vocab(make_folder(folder) / "vocab.tiktoken", trained.ranks)
    write_file(folder / "model.safetensors", data)
    return folder / "model.safetensors"


if __name__ == "__main__":
    command(main)
