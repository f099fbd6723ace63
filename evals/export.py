"""Write a trained model as safetensors: weights and configuration in one file, the vocabulary beside it.

    python -m evals.export CHECKPOINT FOLDER [--vocab FILE]

It makes FOLDER/model.safetensors and FOLDER/vocab.tiktoken.

evals.model.load(FOLDER) reads them back, and the other commands take FOLDER for CHECKPOINT. What is in
FOLDER already stays: a file of the same name that holds something else is an error.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import train_gpt as tg
from cli import UserError, arguments, command, need, path_flag, shown
from data.shards import holds, make_folder, vocab_file, write_once
from evals.model import EXTRAS, Trained, load, model_arguments


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    model_arguments(parser)
    parser.add_argument("folder", type=path_flag, metavar="FOLDER")
    args = parser.parse_intermixed_args(argv)
    trained = load(args.checkpoint, args.vocab, args.device or "cpu", args.dtype)
    file = export(trained, args.folder)
    size = file.stat().st_size >> 20
    print(f"export.py: {trained.source}, step {trained.step}: {shown(file)} ({size} MiB) and vocab.tiktoken")


def export(trained: Trained, folder: Path) -> Path:
    """-> the file of the weights. UserError without a vocabulary or safetensors, or where nothing can be
    written.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError(f"{folder}: exporting needs the package safetensors: {EXTRAS}") from None
    _ = trained.vocabulary  # UserError: a model that nobody can feed or read is not worth a file
    usual = tg.PRESETS.get(trained.cfg.preset, tg.SHORT)
    own = replace(
        trained.cfg,
        data_dir=usual.data_dir,  # not this machine's folders
        log_dir=usual.log_dir,
        dtype=str(trained.model.dtype).removeprefix("torch."),
    )
    about = {"format": "pt", "config": json.dumps(tg.settings(own)), "step": str(trained.step)}
    about["checkpoint_format"] = str(tg.CHECKPOINT_FORMAT)
    data = save({name: t.contiguous() for name, t in trained.model.state_dict().items()}, metadata=about)
    make_folder(folder)
    files = {folder / "model.safetensors": data, folder / "vocab.tiktoken": vocab_file(trained.ranks)}
    for file, content in files.items():  # both are looked at before one is written
        other = os.path.lexists(file) and not holds(file, content)
        need(not other, f"{file}: is already there and holds something else; choose another folder")
    for file, content in files.items():
        write_once(file, content)
    return folder / "model.safetensors"


if __name__ == "__main__":
    command(main)
