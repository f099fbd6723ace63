"""data.fineweb against tests/hub.py: each fault ends with whole files, or one line and a non-zero exit."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CLEAN_ENV, ROOT, assert_user_error, run_command
from hub import SECRET, Fault, Hub

from cli import UserError
from data import fineweb, shards
from train_gpt import read_shard

VAL = "fineweb_val_000000.bin"
COMMAND = [sys.executable, "-m", "data.fineweb"]


def train(i: int) -> str:
    return f"fineweb_train_{i:06d}.bin"


def shard(seed: int, tokens: int = 300_000) -> bytes:
    content = np.random.default_rng(seed).integers(0, 50256, tokens).astype("<u2")
    content[::999] = fineweb.BOS_ID
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    return header.tobytes() + content.tobytes()


FILES = {VAL: shard(0)} | {train(i): shard(i) for i in range(1, 7)}
SIZE = len(FILES[VAL])


@pytest.fixture
def hub(monkeypatch, request):
    """The test server as this process's hub, and failures that are tried again at once."""
    from huggingface_hub import constants

    with Hub(dict(FILES), **getattr(request, "param", {})) as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        monkeypatch.setattr(fineweb, "WAITS", (0, 0, 0))
        monkeypatch.setattr(fineweb, "add_vocab", lambda out: None)
        yield server


def assert_whole(out, count: int, also: tuple = ()) -> None:
    """The validation shard and `count` training shards, byte for byte, and nothing else."""
    names = [VAL] + [train(i) for i in range(1, count + 1)]
    assert sorted(os.listdir(out)) == sorted([*names, *also])
    assert all((out / name).read_bytes() == FILES[name] for name in names)


def assert_fails(out, count: int, *words: str) -> str:
    """One line with the words; what has a final name is right."""
    with pytest.raises(UserError) as error:
        fineweb.fetch(count, "10B", out)
    message = str(error.value)
    assert "\n" not in message and SECRET not in message and "http" not in message, message
    assert all(word in message for word in words), message
    assert all(path.read_bytes() == FILES[path.name] for path in out.glob("*.bin"))
    return message


def test_fetches_several_at_a_time_and_only_what_is_missing(hub, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    hub.faults = {("GET", name): [Fault("slow")] for name in FILES}
    fineweb.main(["5", "--out", str(out)])
    assert_whole(out, 5)
    assert 2 <= hub.most_at_once <= fineweb.AT_ONCE and len(hub.fetched()) == 6
    printed = capsys.readouterr()
    assert "6 of 6 shards are missing" in printed.out and f"{train(5)}: 0.6 MB" in printed.out
    assert "6 of 6\n" in printed.out and "complete" in printed.out and printed.err == ""
    hub.asked.clear()
    fineweb.main(["5", "--out", str(out)])
    assert hub.asked == []
    (out / train(1)).unlink()
    (out / train(2)).write_bytes(FILES[train(2)][:-2])  # copied by something that stopped
    fineweb.main(["6", "--out", str(out)])
    assert sorted(hub.fetched()) == [train(1), train(2), train(6)]
    assert_whole(out, 6)


def test_both_data_sets(hub, tmp_path, monkeypatch):
    for dataset in ("10B", "100B"):
        monkeypatch.setattr(fineweb, "HERE", tmp_path)
        fineweb.main(["1", "--dataset", dataset])
        assert_whole(tmp_path / f"fineweb{dataset}", 1)


FAULTS = {
    "cut": [Fault("cut", after=200_000)],
    "cut again and again": [Fault("cut", after=50_000)] * 9,  # more often than it tries without anything new
    "reset": [Fault("reset", after=200_000)],
    "stalled": [Fault("stall", after=200_000)],
    "wrong bytes": [Fault("wrong", after=300_000)],
    "cut, then wrong": [Fault("cut", after=200_000), Fault("wrong", after=300_000)],
    "cut, then no ranges": [Fault("cut", after=200_000), Fault("no_ranges")],
    "429": [Fault("status", status=429, headers={"Retry-After": "0"})],
    "503": [Fault("status", status=503)] * 3,
    "500, 502, 504": [Fault("status", status=status) for status in (500, 502, 504)],
    "408": [Fault("status", status=408)],
}


@pytest.mark.parametrize(
    "method, name", [("GET", name) for name in FAULTS] + [("HEAD", "429"), ("HEAD", "503"), ("HEAD", "408")]
)
def test_what_passes_ends_with_whole_files(hub, tmp_path, capsys, name, method):
    hub.faults[method, train(2)] = list(FAULTS[name])
    fineweb.fetch(3, "10B", tmp_path)
    assert_whole(tmp_path, 3)
    assert hub.faults[method, train(2)] == [], "the fault was not met"
    printed = capsys.readouterr()
    failing = sum(fault.kind != "no_ranges" for fault in FAULTS[name])
    assert printed.out.count(f"{train(2)}: ") == failing + 1 and SECRET not in printed.out + printed.err
    first = [first for method, asked, first in hub.asked if (method, asked) == ("GET", train(2))]
    if name in ("cut", "stalled"):
        assert first == [0, 200_000], "a broken transfer goes on where it ended"
    if name == "wrong bytes":
        assert first == [0, 0], "wrong bytes are not gone on with"


def test_what_stays_broken_ends_with_one_line(hub, tmp_path):
    """And the next call, with the fault gone, fetches the rest."""
    for fault, words in [
        (Fault("status", status=503), ["503"]),
        (Fault("status", status=429), ["429"]),
        (Fault("status", status=404), ["no such file"]),
        (Fault("status", status=403), ["403"]),
        (Fault("wrong", after=90_000), ["sha256"]),
        (Fault("cut"), ["connection broke"]),
    ]:
        out = tmp_path / f"{fault.kind}{fault.status}"
        hub.asked.clear()
        hub.faults["GET", train(2)] = [fault] * 20
        assert_fails(out, 2, str(out / train(2)), "kjj0/fineweb10B-gpt2", *words)
        most = 1 if fault.status in (403, 404) else 2 if fault.kind == "wrong" else 1 + len(fineweb.WAITS)
        assert hub.fetched().count(train(2)) == most
        hub.faults.clear()
        fineweb.fetch(2, "10B", out)
        assert_whole(out, 2)


def test_gone(hub, tmp_path):
    del hub.files[train(2)]
    assert_fails(tmp_path, 3, train(2), "no such file")
    assert hub.fetched().count(train(2)) == 0


@pytest.mark.parametrize("hub", [{"hashes": False}], indirect=True)
def test_without_the_hubs_hash_the_shard_itself_is_checked(hub, tmp_path):
    good = hub.files[train(1)]
    large = good[:1024] + b"\xff\xff" + good[1026:]
    for content, word in [
        (b"<html>sorry</html>" * 100, "magic"),
        (good[:-2], "header promises"),
        (large, "65535"),
        (good[:500], "header"),
        (good[:4] + b"\2" + good[5:], "version"),
    ]:
        hub.files[train(1)] = content
        assert_fails(tmp_path, 1, train(1), "no shard", word)
        assert not list((tmp_path / ".staging").glob(f"{train(1)}*")), (
            "it would be taken for a good beginning"
        )
    hub.files[train(1)] = good
    fineweb.fetch(1, "10B", tmp_path)
    assert_whole(tmp_path, 1)


def test_a_hash_that_is_met_by_no_shard(hub, tmp_path):
    hub.files[train(1)] = b"not what a loader can read" * 99
    assert_fails(tmp_path, 1, "not a token shard")


def test_waits_grow_and_the_hub_may_ask_for_more(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    assert tuple(sorted(fineweb.WAITS)) == fineweb.WAITS and fineweb.WAITS[-1] >= 30
    waits = []
    fetch = fineweb.Fetch("kjj0/fineweb10B-gpt2", tmp_path, [VAL])
    monkeypatch.setattr(fetch.stop, "wait", waits.append)

    class Answer:
        status_code, headers = 429, {"Retry-After": "7"}

    failure = fineweb.Broken("nothing came")
    failure.response = Answer()

    def attempt(name):
        raise failure

    with pytest.raises(UserError, match="nothing came"):
        fetch.persist(VAL, attempt)
    assert waits == [7, 7, 7, 8, 16, 32]
    assert "again in 7 s" in capsys.readouterr().out


def test_a_bug_is_not_taken_for_a_broken_connection(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "check", lambda part, remote: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fineweb.fetch(1, "10B", tmp_path)


def test_a_closed_pipe_is_not_taken_for_a_broken_connection(hub, tmp_path, monkeypatch):
    """`| head -1`: cli.command ends quietly, nothing is tried again."""

    def closed(line):
        raise BrokenPipeError

    monkeypatch.setattr(fineweb, "say", closed)
    fetch = fineweb.Fetch("kjj0/fineweb10B-gpt2", tmp_path, [VAL])
    with pytest.raises(BrokenPipeError):
        fetch.run()
    assert hub.fetched() == [VAL]


def test_what_somebody_keeps_in_the_folders_stays(hub, tmp_path):
    (tmp_path / ".staging").mkdir()
    (tmp_path / ".staging" / "notes").write_text("mine")
    fineweb.main(["--out", str(tmp_path), "1"])
    assert os.listdir(tmp_path / ".staging") == ["notes"]
    assert_whole(tmp_path, 1, also=(".staging",))


# The disk


def test_where_no_hub_is_in_reach_nothing_is_left(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_fails(tmp_path / "out", 1, "HF_HUB_OFFLINE is set")
    assert os.listdir(tmp_path / "out") == []


def test_too_little_room_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: SimpleNamespace(free=SIZE))
    assert_fails(tmp_path, 2, str(tmp_path), "GB free", "--out")
    assert hub.fetched() == []


def test_a_file_that_cannot_grow(hub, tmp_path):
    """RLIMIT_FSIZE: writing fails as on a full disk, with an error of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
        assert_fails(tmp_path, 1, os.strerror(errno.EFBIG), "make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.glob("*.bin"))
    fineweb.fetch(1, "10B", tmp_path)
    assert_whole(tmp_path, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk(hub, tmp_path):
    (tmp_path / ".staging").mkdir()
    content = shards.sha256(FILES[train(1)])
    (tmp_path / ".staging" / f"{train(1)}.{content[:16]}.part").symlink_to("/dev/full")
    assert_fails(tmp_path, 1, train(1), os.strerror(errno.ENOSPC), "make room")
    assert not (tmp_path / train(1)).exists()


def test_two_at_once_do_not_share_a_folder(hub, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert_fails(tmp_path, 1, str(tmp_path), "another process")
    os.close(handle)
    fineweb.fetch(1, "10B", tmp_path)


# The command as a person runs it


@pytest.mark.slow
def test_killed_and_interrupted_then_run_again(tmp_path):
    """Two processes are stopped within files, a third fetches the rest. Only the hub gets the token."""
    with Hub(dict(FILES)) as hub:
        env = CLEAN_ENV | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_notForAnyFile",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        out = tmp_path / "out"
        out.mkdir()
        (out / "vocab.tiktoken").write_bytes(b"")  # no pip in this test: it would want to fetch it
        for end, code, new, reached in [
            (signal.SIGKILL, -9, 123_456, 123_456),
            (signal.SIGINT, 130, 50_000, 173_456),
        ]:
            hub.faults = {("GET", name): [Fault("stall", after=new)] for name in (VAL, train(1))}
            process = subprocess.Popen(
                [*map(str, COMMAND), "1", "--out", str(out)],
                env=env,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            until = time.monotonic() + 60
            while [path.stat().st_size for path in (out / ".staging").glob("*.part")] != [reached, reached]:
                assert process.poll() is None and time.monotonic() < until, process.communicate()
                time.sleep(0.02)
            process.send_signal(end)
            stdout, stderr = process.communicate(timeout=30)
            assert process.returncode == code, stderr
            assert stderr.count("\n") == (end == signal.SIGINT) and "Traceback" not in stderr
            assert not list(out.glob("*.bin")) and "hf_notForAnyFile" not in stdout + stderr
        hub.asked.clear()
        last = run_command(
            [*COMMAND, "1", "--out", out],
            HF_ENDPOINT=hub.endpoint,
            HF_HUB_OFFLINE="0",
            PIP_NO_INDEX="1",
            HF_HOME=str(tmp_path / "home"),
        )
        assert last.returncode == 0 and "note: " in last.stderr and last.stderr.count("\n") == 1, last.stderr
        assert_whole(out, 1, also=("vocab.tiktoken",))
        got = sorted(asked for asked in hub.asked if asked[0] == "GET")
        assert got == [("GET", train(1), 173_456), ("GET", VAL, 173_456)]
        assert ("127.0.0.1", "Bearer hf_notForAnyFile") in hub.tokens
        assert not any(token for host, token in hub.tokens if host == "localhost"), (
            "the token went to another host"
        )
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(b"hf_notForAnyFile" in path.read_bytes() for path in written)


def test_offline_ends_with_one_line(tmp_path):
    done = run_command([*COMMAND, "1", "--out", tmp_path], HF_HUB_OFFLINE="1")
    assert_user_error(done, "HF_HUB_OFFLINE", str(tmp_path / VAL))
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize(
    "name, value",
    [("HF_HUB_DOWNLOAD_TIMEOUT", "10s"), ("HF_TOKEN", "hf_é"), ("ALL_PROXY", "socks5://127.0.0.1:9")],
)
def test_settings_that_the_hubs_library_cannot_use(tmp_path, name, value):
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "", name: value}
    done = run_command([*COMMAND, "1", "--out", tmp_path / "out"], **settings)
    assert_user_error(done, "HF_TOKEN", "HF_HUB_", "ALL_PROXY")
    assert "hf_" not in done.stderr and os.listdir(tmp_path / "out") == []


def test_no_hub_at_all(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    assert_fails(tmp_path, 1, "cannot be reached", "HF_ENDPOINT")


@pytest.mark.parametrize(
    "flags",
    [
        ["0"],
        ["104"],
        ["1030", "--dataset", "100B"],
        ["nine"],
        ["--dataset", "1B"],
        ["--what"],
        ["--out", ""],
        ["9" * 400],
        ["9" * 5000],
        ["1", "--out", "n" * 300],
        ["1", "--out", "/dev/null"],
    ],
)
def test_wrong_flags(hub, flags):
    with pytest.raises(UserError) as error:
        fineweb.main(flags)
    assert "\n" not in str(error.value) and hub.asked == []


def test_fetched_shards_are_read_as_they_were_sent(hub, tmp_path):
    fineweb.fetch(1, "10B", tmp_path)
    tokens = read_shard(tmp_path / train(1), fineweb.VOCAB_SIZE, fineweb.BOS_ID)
    assert len(tokens) == 300_000 and (tokens[::999] == fineweb.BOS_ID).all()
