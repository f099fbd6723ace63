"""Fetch FineWeb as GPT-2 tokens: the validation shard and the first N training shards, 100M tokens each.

    python -m data.fineweb [N] [--dataset 10B|100B] [--out DIR]     9 shards are enough for the short track

Fetches only what is missing, and goes on in the middle of a file where it was stopped. A file gets its final
name when it is whole, checked and on disk. HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN work as everywhere with
huggingface_hub.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, arguments, command, need, one_line, os_reason, path_flag, shown
from data.shards import (
    INTERRUPTED,
    VOCAB,
    alone_in,
    make_folder,
    move,
    say,
    sha256,
    shard_is_whole,
    write_once,
)

HERE = Path(__file__).resolve().parent
TRAIN_SHARDS = {"10B": 103, "100B": 1029}
SHARD_TOKENS = 100_000_000
VOCAB_SIZE, BOS_ID = 50257, 50256
AT_ONCE = 4  # files
WAITS = (1, 2, 4, 8, 16, 32)  # seconds after each failure in a row that brought nothing new; then it gives up
LONGEST_WAIT = 300  # seconds, if the hub names a time
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    add = parser.add_argument
    add("shards", nargs="?", type=int, default=9, metavar="N", help="training shards (default 9)")
    add("--dataset", choices=TRAIN_SHARDS, default="10B")
    add("--out", type=path_flag, metavar="DIR", help="default: data/fineweb10B or data/fineweb100B")
    args = parser.parse_intermixed_args(argv)
    fetch(args.shards, args.dataset, args.out or HERE / f"fineweb{args.dataset}")


def fetch(shards: int, dataset: str, out: Path) -> None:
    """Makes `out` hold the validation shard and the first training shards."""
    most = TRAIN_SHARDS[dataset]
    need(1 <= shards <= most, f"{shown(shards)} shards: FineWeb {dataset} has 1 to {most} training shards")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    missing = [name for name in names if not shard_is_whole(out / name)]
    for name in missing:
        if (out / name).exists():
            say(f"{out / name}: not a whole shard, fetching it again")
    if missing:
        say(f"{out}: {len(missing)} of {len(names)} shards are missing, fetching")
        with alone_in(make_folder(out)):
            Fetch(f"kjj0/fineweb{dataset}-gpt2", out, missing).run()
    add_vocab(out)
    say(f"{out}: complete, {shards} training shards")


class Broken(Exception):
    """An answer that is not the whole file: what is wrong with it, in one line."""


class WrongContent(Broken):
    """A file that is whole and not the right one."""


@dataclass(frozen=True)
class Remote:
    """What the hub says of a file before sending it."""

    url: str
    size: int | None
    sha256: str | None  # None: the hub has no content hash for it

    @property
    def tag(self) -> str:  # of the unfinished file's name: only the same content is gone on with
        return (self.sha256 or str(self.size))[:16]


class Fetch:
    """Fetches the named shards of a dataset into `out`, AT_ONCE at a time, by way of out/.staging."""

    def __init__(self, repo: str, out: Path, names: list[str]):
        self.repo, self.out, self.names = repo, out, names
        self.staging = make_folder(out / ".staging")  # same disk as `out`: the move at the end is one step
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.have = dict.fromkeys(names, 0)  # bytes that are here
        self.finished = 0

    def run(self) -> None:
        from tqdm import tqdm

        try:  # a hub out of reach is said once, not by all threads
            with readable_settings():
                from huggingface_hub.utils import logging

                logging.set_verbosity_error()  # its warnings name signed addresses
                first = self.persist(self.names[0], self.look_up)
        except UserError:
            self.clear_staging()  # nothing is in it yet
            raise
        total = len(self.names) * (first.size or 0)  # shards are of equal size, but for the last
        self.check_disk(total)
        self.bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)  # None: only on a terminal
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            fetches = [pool.submit(self.persist, name, self.fetch_file) for name in self.names]
            for done in wait(fetches, return_when=FIRST_EXCEPTION).done:
                done.result()
        except Exception:  # nobody may write when this folder is free again
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:  # Ctrl-C: start no more and wait for nobody
            self.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self.bar.close()
        self.clear_staging()

    def unfinished(self) -> list[Path]:
        return [
            path for path in self.staging.iterdir() if re.fullmatch(r"fineweb_\w+\.bin\.\w+\.part", path.name)
        ]

    def clear_staging(self) -> None:
        """Unfinished files of another revision, and the folder, unless somebody keeps other things there."""
        for path in self.unfinished():
            path.unlink()
        if not any(self.staging.iterdir()):
            self.staging.rmdir()

    def check_disk(self, total: int) -> None:
        wanted = total - sum(path.stat().st_size for path in self.unfinished())
        free = shutil.disk_usage(self.out).free
        need(
            wanted <= free,
            f"{shown(self.out)}: {len(self.names)} shards need {wanted / 1e9:.1f} GB, the disk has "
            f"{free / 1e9:.1f} GB free; make room, fetch fewer, or choose another disk with --out",
        )

    def persist(self, name: str, attempt):
        """attempt(name), again with growing waits while the failure is one that may pass."""
        failures = wrong = most = 0
        while True:
            try:
                if self.stop.is_set():
                    raise Broken("stopped")
                return attempt(name)
            except Exception as error:
                if not about_the_fetch(error):
                    raise
                failures = 1 if self.have[name] > most else failures + 1  # since something new came
                most = max(most, self.have[name])
                wrong += isinstance(error, WrongContent)
                if self.stop.is_set() or final(error) or wrong == 2 or failures > len(WAITS):
                    place = shown(self.out / name)
                    raise UserError(f"{place}: not fetched from {self.repo}: {reason(error)}") from error
                pause = min(max(WAITS[failures - 1], asked_wait(error)), LONGEST_WAIT)
                self.say(f"{name}: {reason(error)}; again in {pause} s")
            self.stop.wait(pause)

    def look_up(self, name: str) -> Remote:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        found = get_hf_file_metadata(hf_hub_url(self.repo, name, repo_type="dataset"))
        revision = found.commit_hash  # not a later version of the file
        url = hf_hub_url(self.repo, name, repo_type="dataset", revision=revision)
        content = found.etag if re.fullmatch("[0-9a-f]{64}", found.etag or "") else None
        return Remote(url, found.size, content)

    def fetch_file(self, name: str) -> None:
        remote = self.look_up(name)
        part = self.staging / f"{name}.{remote.tag}.part"
        self.receive(name, remote, part)
        try:
            check(part, remote)
        except WrongContent:
            part.unlink()
            self.count(name, -self.have[name])
            raise
        move(part, self.out / name)
        self.finished += 1
        self.say(f"{name}: {self.have[name] / 1e6:.1f} MB, {self.finished} of {len(self.names)}")

    def receive(self, name: str, remote: Remote, part: Path) -> None:
        """The rest of the file, behind what an earlier attempt left."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        if not remote.size:  # nothing tells where a rest would end
            part.unlink(missing_ok=True)
        had = part.stat().st_size if part.exists() else 0
        self.count(name, had - self.have[name])
        if had == remote.size:
            return
        headers = build_hf_headers() | {"Range": f"bytes={had}-", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", remote.url, headers=headers, timeout=timeout) as answer:
            hf_raise_for_status(answer)
            with open(part, "ab") as file:
                if had and answer.status_code != 206:  # a server that knows no ranges sends it from the start
                    file.truncate(0)
                    self.count(name, -had)
                for chunk in answer.iter_bytes():
                    if self.stop.is_set():
                        raise Broken("stopped")
                    file.write(chunk)
                    file.flush()  # a kill leaves what was counted
                    self.count(name, len(chunk))
        if remote.size and self.have[name] < remote.size:
            raise Broken(f"the connection ended after {self.have[name]} of {remote.size} bytes")

    def count(self, name: str, new: int) -> None:
        with self.lock:
            self.have[name] += new
            self.bar.update(new)

    def say(self, line: str) -> None:
        with self.lock:
            say(line)


def check(part: Path, remote: Remote) -> None:
    """Size, the hub's hash, and what a loader asks of a shard; WrongContent says what does not hold."""
    import train_gpt

    size = part.stat().st_size
    if remote.size not in (None, size):
        raise WrongContent(f"{size} bytes came, the hub promised {remote.size}")
    if remote.sha256 and sha256(part) != remote.sha256:
        raise WrongContent("what came has another sha256 than the hub promised")
    try:
        train_gpt.read_shard(part, VOCAB_SIZE, BOS_ID)
    except train_gpt.UserError as error:
        raise WrongContent("what came is no shard: " + str(error).removeprefix(f"{part}: ")) from error


# Which errors may pass, and how they are said


@contextlib.contextmanager
def readable_settings() -> Iterator[None]:
    """What the hub's library makes of the environment when it is imported and first asks."""
    settings = "HF_TOKEN, the HF_HUB_... variables and the proxy (HTTP_PROXY, ALL_PROXY ...)"
    try:
        yield
    except UnicodeError:
        raise UserError(f"the hub's library cannot send one of these settings: check {settings}") from None
    except (ImportError, ValueError) as error:
        said = f"the hub's library cannot use the settings that it finds ({one_line(str(error), 150)})"
        raise UserError(f"{said}: check {settings}") from None


def about_the_fetch(error: Exception) -> bool:
    """The hub, the network or the disk; anything else is a bug, or a closed pipe (| head)."""
    if isinstance(error, BrokenPipeError):
        return False
    libraries = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2")
    return isinstance(error, (Broken, OSError)) or type(error).__module__.split(".")[0] in libraries


def status_of(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def final(error: Exception) -> bool:
    """Would be the same the next time: the disk, offline mode, a file or address that is not there."""
    from huggingface_hub import errors

    status = status_of(error)
    return (
        getattr(error, "errno", None) is not None
        or isinstance(error, errors.OfflineModeIsEnabled)
        or type(error).__name__ in ("UnsupportedProtocol", "InvalidURL", "LocalProtocolError")
        or status is not None
        and 400 <= status < 500
        and status not in (408, 425, 429)
    )


def asked_wait(error: Exception) -> int:
    """Seconds that the hub asks for before the next request."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return int(asked) if asked.isdecimal() else 0


def reason(error: Exception) -> str:
    """One line. Not the hub's own text, which runs over many and may hold a signed address."""
    from huggingface_hub import errors

    if isinstance(error, Broken):
        return str(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, or put the shards there yourself"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub knows no such dataset, or HF_TOKEN is wrong for it"
    if isinstance(error, errors.RemoteEntryNotFoundError) or status_of(error) in (404, 410):
        return "the hub has no such file in this dataset"
    if status_of(error):
        return f"the hub answers with status {status_of(error)}"
    if getattr(error, "errno", None) in DISK:
        return f"{os.strerror(error.errno)}; a shard takes 200 MB, make room and run this again"
    if isinstance(error, OSError) and error.errno is not None:
        return os_reason(error)
    if type(error).__name__ in ("UnsupportedProtocol", "InvalidURL", "LocalProtocolError"):
        return "no request can be made with this HF_ENDPOINT, HF_TOKEN or proxy (HTTP_PROXY, ALL_PROXY ...)"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
        return "the hub cannot be reached; check the network or HF_ENDPOINT"
    if type(error).__name__.endswith("Timeout"):
        return "the hub does not answer"
    return f"the connection broke ({type(error).__name__})"


def add_vocab(out: Path) -> None:
    """GPT-2's vocabulary beside the shards, for bits per byte and samples. Training can do without it."""
    from data.bpe import load_vocab, write_token_bytes
    from data.corpus import gpt2_vocab

    try:
        write_once(out / VOCAB, gpt2_vocab(out))
        write_token_bytes(out, load_vocab(out / VOCAB))
    except UserError as error:
        print(
            f"note: {shown(out)} has no vocabulary, so bits per byte will be missing: {error}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    command(main, INTERRUPTED)
