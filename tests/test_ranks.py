"""Several processes compute what one does, with gloo: the optimizer, sparse rows, runs, how they start."""

import functools
import hashlib
import itertools
import os
import pickle
import re
import shlex
import sys
import traceback
import zlib
from dataclasses import replace
from datetime import timedelta
from multiprocessing import connection, get_context

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    LATER_SWITCHES,
    ROOT,
    TINY_STAGES,
    assert_user_error,
    group_environments,
    run_command,
    tiny,
)

import train_gpt as tg

FILE = ROOT / "train_gpt.py"

# One world of processes for all tests


class World:
    """Processes that wait for work. Forked from one that has torch: eight start in the time of one."""

    SIZE = 8

    def __init__(self):
        self.context, self.processes = get_context("forkserver"), []
        self.context.set_forkserver_preload(["train_gpt", "pytest"])

    def run(self, size: int, function, *args) -> list:
        """What function(*args) returns on each of `size` ranks, as torchrun would have started them."""
        if not self.processes:
            self.pipes, theirs = zip(*[self.context.Pipe() for _ in range(self.SIZE)], strict=True)
            self.processes = [self.context.Process(target=work, args=(pipe,), daemon=True) for pipe in theirs]
            for process in self.processes:
                process.start()
        # As on a very crowded machine: one thread each, however many cores there are.
        crowded = {"LOCAL_WORLD_SIZE": str(10**6)}
        waiting, results = dict(zip(self.pipes[:size], range(size), strict=True)), [None] * size
        for pipe, environment in zip(waiting, group_environments(size), strict=True):
            pipe.send((environment | crowded, function, args))
        try:
            while waiting:
                ready = connection.wait(waiting, timeout=240)  # seconds; a slow machine is no hang
                assert ready, f"ranks {list(waiting.values())} hang in {function.__name__}"
                for pipe in ready:
                    good, result = pickle.loads(pipe.recv_bytes())
                    assert good, f"rank {waiting[pipe]}: {result}"
                    results[waiting.pop(pipe)] = result
        except BaseException:
            self.stop()  # the others may wait for one that failed; the next test starts anew
            raise
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def work(pipe) -> None:
    """A process of the world."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, as long as the process lives
    tg.matrix_ceiling = lambda *_: 1e9  # seconds of large products, for a figure that no test here looks at
    while True:
        environment, function, args = pipe.recv()
        os.environ.update({name: str(value) for name, value in environment.items()})
        try:
            result = True, function(*args)
        except BaseException:
            result = False, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(result))


@pytest.fixture(scope="module")
def world():
    world = World()
    yield world
    world.stop()


def join() -> tg.DistEnv:
    """Any number of ranks: micro-batches are not the optimizer's matter."""
    cfg = tiny(micro_batches=int(os.environ["WORLD_SIZE"]))
    return tg.DistEnv.join(cfg, tg.Cpu(cfg).device)


def digest(t: torch.Tensor) -> str:
    return hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy()).hexdigest()[:16]


# The optimizer

# 16 and 10 matrices, tables of 256 and 1280 rows, a head of 32: three ranks divide none, four not all.
CONFIG = tiny(
    windows="slss-", paired_heads="p....", value_embeds=".01..", skips=".a.a.", backout="..b..", model_dim=32
)
MICRO_BATCHES, UNTIE_STEP = 12, 5


def gradients(p: torch.Tensor, name: str, step: int, n: int, exact: bool) -> tuple[torch.Tensor, np.ndarray]:
    """Micro-batch n's gradient of a parameter, and the rows of the bigram table that it touches.

    exact: multiples of 1/64, so small that two steps' sum over all micro-batches, embedding and head together
    (96 / 64), is exact even in bfloat16, in whatever order.
    """
    rng = torch.Generator().manual_seed(zlib.crc32(f"{name} {step} {n}".encode()))
    g = torch.randint(-2, 3, p.shape, generator=rng) / 64 if exact else torch.randn(p.shape, generator=rng)
    rows = np.empty(0, dtype=np.int64)
    if name == "bigram_embed":
        rows = torch.randint(len(p), (40,), generator=rng).unique()
        g, rows = torch.zeros_like(g).index_copy(0, rows, g[rows]), rows.numpy()
    return g.to(p.dtype), rows


def trained(
    dtype: torch.dtype,
    steps: range,
    begin: dict | None = None,
    exact: bool = True,
    dense: bool = False,
    **changes,
):
    """Yields model and optimizer after each step, on this rank's share of 12 micro-batches' gradients."""
    env, cfg = join(), replace(CONFIG, **changes)
    model = tg.GPT(cfg, dtype, tg.Cpu(cfg).choose_kernels(cfg, env, {}))
    optimizer = tg.Optimizer(cfg, model, env)
    if begin:
        model.load_state_dict(begin["model"])
        for (name, key), whole in begin["state"].items():
            optimizer.load_state(name, key, whole)
        optimizer.tied = begin["tied"]
    if dense:
        optimizer.sparse_grad = None
    for step in steps:
        touched = []
        for n in range(env.rank, MICRO_BATCHES, env.world_size):
            for name, p in model.named_parameters():
                g, rows = gradients(p, name, step, n, exact)
                p.grad = g if p.grad is None else p.grad + g
                touched.append(rows)
        if optimizer.sparse_grad:
            optimizer.sparse_grad.exchange_indices(np.concatenate(touched), last=step % 2 == 1)
        optimizer.step(step, lr_mul=0.5, momentum=0.9, untie=step == UNTIE_STEP)
        yield model, optimizer


def whole_states(optimizer: tg.Optimizer) -> dict[tuple[str, str], torch.Tensor]:
    places = [(name, key) for name, state in optimizer.state.items() for key in state]
    return {(name, key): optimizer.whole_state(name, key).clone() for name, key in places}


def parameters_by_step(
    dtype: torch.dtype, steps: range, begin: dict | None = None
) -> tuple[list[dict], dict]:
    """Digests of all parameters after each step, and of the whole state after the last."""
    digests = []
    for model, optimizer in trained(dtype, steps, begin):  # noqa: B007, the last one is used below
        digests.append({name: digest(p) for name, p in model.named_parameters()})
    return digests, {place: digest(whole) for place, whole in whole_states(optimizer).items()}


def assert_same_bits(
    results: list[tuple[list[dict], dict]], expected: tuple[list[dict], dict], size: int
) -> None:
    """On every rank, after every step."""
    for rank, (digests, state) in enumerate(results):
        for step, (found, wanted) in enumerate(zip(digests, expected[0], strict=True)):
            differing = [name for name in wanted if found[name] != wanted[name]]
            assert not differing, f"rank {rank} of {size}, after step {step}: {differing}"
        differing = [place for place in expected[1] if state[place] != expected[1][place]]
        assert not differing and state.keys() == expected[1].keys(), (
            f"state on rank {rank} of {size}: {differing}"
        )


@functools.cache
def alone(world: World, dtype: torch.dtype) -> tuple[list[dict], dict]:
    """Eight steps on one rank."""
    [result] = world.run(1, parameters_by_step, dtype, range(8))
    return result


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SIZES = pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), 4])


@DTYPES
@SIZES
def test_parameters_and_state_are_those_of_one_rank_to_the_last_bit_on_every_rank_after_every_step(
    world, size, dtype
):
    """Where the sum over micro-batches is exact, nothing depends on the number of ranks.

    Not the padding, not which matrices are updated together, not the gathering, not the tied head; with all
    replicas alike.
    """
    results = world.run(size, parameters_by_step, dtype, range(8))
    assert_same_bits(results, alone(world, dtype), size)


@DTYPES
def test_what_those_steps_did_is_worth_comparing(world, dtype):
    """Every parameter moved on every turn of its own, and three ranks do need padding."""
    digests, state = alone(world, dtype)
    model = tg.GPT(CONFIG, dtype)
    for name, spec in model.specs.items():
        moves = range(8) if spec.optimizer == "muon" else range(1, 8, 2)
        assert len({digests[step][name] for step in moves}) == len(moves), name
    assert digests[5]["embed"] != digests[7]["embed"]
    counts = [bank.shape[:2].numel() for bank in (model.qkvo, model.mlp)]
    counts += [len(table) for table in (model.embed, model.lm_head, model.bigram_embed)]
    assert all(count % 3 for count in counts) and any(count % 4 for count in counts)
    assert {key for _, key in state} == {"momentum_buffer", "second_moment"} | (
        {"mantissa_lo"} if dtype == torch.bfloat16 else set()
    )


def ties(dtype: torch.dtype) -> list[tuple[bool, bool, list[bool]]]:
    """After each step: tied still; embedding and head alike; their states alike (the head's not 0)."""
    seen = []
    for model, optimizer in trained(dtype, range(8)):
        states = whole_states(optimizer)
        heads = [(states["embed", key], states["lm_head", key]) for key in optimizer.state["lm_head"]]
        alike = [torch.equal(embed, head.T) and bool(head.any()) for embed, head in heads]
        seen.append((optimizer.tied, torch.equal(model.embed, model.lm_head.T), alike))
    return seen


@DTYPES
@SIZES
def test_the_embedding_is_the_heads_transpose_until_the_untie_step_and_inherits_its_state_then(
    world, size, dtype
):
    """Though ranks share one by rows of the vocabulary, the other by dimensions of the model."""
    for seen in world.run(size, ties, dtype):
        states = 2 if dtype == torch.float32 else 3
        tied, alike, state_alike = zip(*seen, strict=True)
        assert tied == (True,) * UNTIE_STEP + (False,) * (8 - UNTIE_STEP)
        assert alike == (True,) * 7 + (False,)  # Adam's next step is 7; each has its own gradient then
        assert state_alike[1:UNTIE_STEP] == ([False] * states,) * (UNTIE_STEP - 1)
        assert state_alike[UNTIE_STEP:7] == ([True] * states,) * 2 and state_alike[7] == [False] * states


def saved_after(dtype: torch.dtype, steps: range) -> dict:
    *_, (model, optimizer) = trained(dtype, steps)
    return {"model": model.state_dict(), "state": whole_states(optimizer), "tied": optimizer.tied}


def state_given_back(dtype: torch.dtype, begin: dict) -> bool:
    """load_state, then whole_state, by an optimizer whose own state was another."""
    *_, (_, optimizer) = trained(dtype, range(2))
    for (name, key), whole in begin["state"].items():
        optimizer.load_state(name, key, whole)
    found = whole_states(optimizer)
    return all(torch.equal(found.pop(place), whole) for place, whole in begin["state"].items()) and not found


@pytest.mark.parametrize(
    "steps, dtype",
    [
        pytest.param(4, torch.bfloat16, id="tied-bfloat16"),
        pytest.param(6, torch.float32, id="untied-float32"),
        pytest.param(4, torch.float32, id="tied-float32", marks=pytest.mark.slow),
        pytest.param(6, torch.bfloat16, id="untied-bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_state_of_four_ranks_goes_on_on_any_number_of_them(world, steps, dtype):
    """whole_state gives back what load_state got; the next steps are those of a run that never stopped."""
    begin = world.run(4, saved_after, dtype, range(steps))[0]
    digests, state = alone(world, dtype)
    for size in (1, 2, 3):
        assert world.run(size, state_given_back, dtype, begin) == [True] * size
        assert_same_bits(
            world.run(size, parameters_by_step, dtype, range(steps, 8), begin), (digests[steps:], state), size
        )


# Sparse rows of the bigram table

ROWS, DIM = 101, 16  # owners have 51 rows or 26, and the last is short


def exchange(cases: list) -> list[tuple[torch.Tensor, ...]]:
    """For each case (rows that each rank touches on the even and on the odd step) one exchange.

    All go through one SparseGradient.
    -> this rank's gradient, its rows of the sum by SparseGradient and by reduce_scatter, and the bytes that
    left it.
    """
    env, results = join(), []
    sparse, rng = tg.SparseGradient(env, ROWS, timedelta(seconds=60)), torch.Generator().manual_seed(env.rank)
    for touched in cases:
        grad = torch.zeros(sparse.rows_per_rank * env.world_size, DIM)
        for turn, rows in enumerate(touched[env.rank]):
            sparse.exchange_indices(np.array(rows, dtype=np.int32), last=turn == 1)
            grad[sorted(set(rows))] += torch.randn(len(set(rows)), DIM, generator=rng)
        results.append((grad, sparse.reduce_scatter(grad)(), env.reduce_scatter(grad)(), sparse.bytes_sent))
    return results


def exchange_cases(size: int) -> dict[str, list]:
    draw = lambda seed: np.random.default_rng(seed).integers(0, ROWS, 30).tolist()  # noqa: E731, with repetitions
    low, high, some = list(range(10)), list(range(ROWS - 10, ROWS)), [7, 50, 51, 100]
    return {
        "random": [(draw(2 * rank), draw(2 * rank + 1)) for rank in range(size)],
        "only on the even step": [(draw(rank), []) for rank in range(size)],
        "only on the odd step": [([], draw(rank)) for rank in range(size)],
        "the same rows on every rank": [(some, some) for _ in range(size)],
        "only the first owner's": [(low, low[5:]) for _ in range(size)],
        "only the last owner's": [(high, high[:5]) for _ in range(size)],
        "nothing on one rank": [([], []) if rank == size - 1 else (draw(rank), some) for rank in range(size)],
        "nothing on any rank": [([], [])] * size,
        "all rows": [(list(range(ROWS)), [])] * size,
        "uneven": [(list(range(7**rank % ROWS)), [ROWS - 1 - rank]) for rank in range(size)],
        # Nothing was left behind.
        "random again": [(draw(100 + 2 * rank), draw(101 + 2 * rank)) for rank in range(size)],
    }


@pytest.mark.parametrize("size", [2, 4])
def test_sparse_rows_add_up_to_what_reduce_scatter_gives_to_the_last_bit(world, size):
    """Gradients are random: a sum in another order is another sum. Digests compare bits, so -0.0 differs."""
    cases = exchange_cases(size)
    by_rank = world.run(size, exchange, list(cases.values()))
    for (case, touched), results in zip(cases.items(), zip(*by_rank, strict=True), strict=True):
        total = functools.reduce(torch.add, [grad for grad, *_ in results], torch.zeros_like(results[0][0]))
        backwards = functools.reduce(torch.add, [grad for grad, *_ in results[::-1]], torch.zeros_like(total))
        for rank, (grad, sparse, dense, sent) in enumerate(results):
            expected = total.chunk(size)[rank]
            assert digest(sparse) == digest(dense) == digest(expected), f"{case}: rank {rank}"
            leaving = {row for turn in touched[rank] for row in turn if row // len(expected) != rank}
            assert sent == len(leaving) * (8 + 4 * DIM), (
                f"{case}: rank {rank}: index and values of rows that leave it"
            )
            if "random" in case:
                assert sent < 0.9 * grad.nbytes * (size - 1) / size, "more than reduce_scatter sends"
        if case == "the same rows on every rank" and size > 2:
            assert not torch.equal(total, backwards), "order did not matter: this test compares too little"


def bigram_table(dtype: torch.dtype, dense: bool) -> dict[str, str]:
    *_, (model, optimizer) = trained(dtype, range(4), exact=False, dense=dense)
    return {"p": digest(model.bigram_embed)} | {
        key: digest(optimizer.whole_state("bigram_embed", key)) for key in optimizer.state["bigram_embed"]
    }


@DTYPES
@SIZES
def test_the_table_is_the_same_whether_all_rows_travel_or_only_those_touched(world, size, dtype):
    results = [world.run(size, bigram_table, dtype, dense) for dense in (False, True)]
    assert results[0] == results[1] and all(result == results[0][0] for result in results[0])


def moved_rows(dtype: torch.dtype) -> tuple[str, ...]:
    """Digests of the table, and of all that is remembered of it, where only rows with a gradient move."""
    *_, (model, optimizer) = trained(dtype, range(8), bigram_by_row=True)
    states = whole_states(optimizer)
    assert 0 < states["bigram_embed", "moves"].count_nonzero() < len(model.bigram_embed)
    return digest(model.bigram_embed), *(
        digest(states["bigram_embed", key]) for key in ("second_moment", "moves")
    )


@DTYPES
def test_rows_that_move_are_those_of_one_rank(world, dtype):
    [alone] = world.run(1, moved_rows, dtype)
    for size in (2, 3):
        assert world.run(size, moved_rows, dtype) == [alone] * size


# Whole runs


def train(cfg: tg.Config, changed: bool = False, dense: bool = False) -> tuple[list[float], dict[str, str]]:
    """Training losses and the last validation's, and digests of all parameters.

    changed: on step 1 one of the micro-batches has its tokens in another order.
    """
    trainer, losses, calls = tg.Trainer(cfg, {}), [], itertools.count()
    train_step, load_batches = trainer.train_step, trainer.loader.load_batches

    def shuffled_once(*args):
        batches = list(load_batches(*args))
        if next(calls) == 1:
            tokens, targets = batches[3]
            both = np.append(tokens, targets[-1])
            batches[3] = tg.split_targets(np.random.default_rng(0).permutation(both))
        return batches

    def remembering(*args):
        result = train_step(*args)
        losses.append(result[0].item())
        return result

    trainer.train_step = remembering
    if changed:
        trainer.loader.load_batches = shuffled_once
    if dense:
        trainer.optimizer.sparse_grad = None
    losses.append(trainer.fit())
    return losses, {name: digest(p) for name, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def run_config(tiny_data, tmp_path_factory) -> tg.Config:
    """Six steps of eight micro-batches of 128 tokens, in both stages, tied until step 5; all layers."""
    stages = tuple(replace(stage, batch_tokens=1024) for stage in TINY_STAGES)
    return tiny(
        windows="sls",
        paired_heads="p..",
        value_embeds=".0.",
        skips="a.a",
        backout=".b.",
        stages=stages,
        num_steps=6,
        micro_batches=8,
        val_every=0,
        data_dir=str(tiny_data),
        log_dir=str(tmp_path_factory.mktemp("logs")),
        **LATER_SWITCHES | dict(mudd_layers=2, bigram_by_row=True),
    )


TOLERANCE = (
    2e-3  # nats. Rounding made up to 0.0008 with three seeds, one micro-batch in another order 0.011 to 0.017
)


@pytest.mark.parametrize("sizes", [(1, 2, 4), pytest.param((1, 8), marks=pytest.mark.slow)], ids=str)
def test_loss_curves_of_several_processes_agree_closer_than_one_changed_micro_batch_would_let_them(
    world, run_config, sizes
):
    """Not bit for bit.

    Each micro-batch's own gradient is the same bits on whichever rank, and all that follows the sum over them
    is (the tests above, where sums are exact). But a rank first adds up its own
    micro-batches, then the ranks' sums are added: float32 additions in an order that depends on how many
    there are, ((g0 + g2) + g4) + ((g1 + g3) + g5) for two, g0 + g1 + g2 + g3 + g4 + g5 for one or six. Muon's
    bfloat16 and Adam's division by small numbers then widen the last bit's difference. A number of ranks
    gives the same bits every time.
    """
    curves = {}
    for size in sizes:
        results = world.run(size, train, run_config)
        if size == 2:
            assert results == world.run(size, train, run_config), f"two runs on {size} ranks differ"
        assert all(digests == results[0][1] for _, digests in results), f"replicas of {size} ranks differ"
        assert all(losses == results[0][0] for losses, _ in results)
        curves[size] = np.array(results[0][0])
    [(changed, _)] = world.run(1, train, run_config, True)
    apart = {size: np.abs(curve - curves[1]).max() for size, curve in curves.items()}
    assert max(apart.values()) < TOLERANCE, apart
    after = np.abs(changed - curves[1])[2:]  # its own step's loss is another anyhow
    assert after.max() > 3 * TOLERANCE, after
    assert curves[1][-1] < curves[1][0] - 0.5, "it did not learn"


@pytest.mark.parametrize("num_steps", [2, 20])
def test_two_processes_start_from_the_same_counts(world, run_config, num_steps):
    """And go on with the rows that either touched, or in a second part of the run from counts again."""
    starts = dict(spectral=10.0, untie_share=0.0, embed_std=0.1, ngram_start=8.0)
    cfg = replace(run_config, **starts, bigram_by_row=True, epochs=2, num_steps=num_steps)
    assert len(tg.parts_of_run(cfg, tg.Schedule(cfg))) == (2 if num_steps > 2 else 1)
    [(alone, _)], both = world.run(1, train, cfg), world.run(2, train, cfg)
    assert both[0] == both[1]
    assert np.abs(np.array(both[0][0]) - alone).max() < TOLERANCE, (alone, both[0][0])


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_run_announces_every_row_that_its_tokens_touch(world, run_config, size):
    """Else a gradient would stay behind: with all rows travelling the run is the same to the last bit."""
    assert world.run(size, train, run_config) == world.run(size, train, run_config, False, True)


# How they start

SMALL = shlex.split("""
    --preset cpu --no-compile --dtype float32 --model_dim 32 --head_dim 16 --val_seq_len 1024
    --windows sl --paired_heads p. --value_embeds 0. --skips .. --backout .. --spectral 0 --batch_mul 0.25
    --val_tokens 2048
""")


def torchrun(processes: int, *flags, **options):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    return run_command([*launcher, FILE, *flags], **options)


def test_torchrun_with_two_processes_computes_what_one_does_and_writes_one_log(world, tmp_path, corpus_dir):
    flags = [*SMALL, "--data_dir", corpus_dir, "--num_steps", 3, "--val_every", 0, "--micro_batches", 8]
    [(alone, _)] = world.run(
        1, train, tg.parse_config([*map(str, flags), "--log_dir", str(tmp_path / "alone")])[0]
    )
    result = torchrun(2, *flags, "--log_dir", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"(?:val|train)_loss:(\S+)", result.stdout)]
    assert len(losses) == 4 and losses == pytest.approx(alone, abs=2e-3)
    [log] = (tmp_path / "two").glob("*.txt")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert (
        f"2 process(es), {max(1, cores // 2)} thread(s) each" in log.read_text()
        and "warm-up: " in log.read_text()
    )


def test_a_number_of_processes_that_does_not_divide_the_micro_batches_is_one_line(tmp_path):
    # As torchrun starts its third.
    env = {
        "RANK": "2",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
    }
    flags = ["--preset", "cpu", "--micro_batches", 8, "--log_dir", tmp_path / "logs"]
    assert_user_error(run_command([sys.executable, FILE, *flags], **env), "--micro_batches 8", "3 processes")
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_torchrun_shows_that_line_among_its_own(tmp_path):
    result = torchrun(2, "--preset", "cpu", "--micro_batches", 1, "--log_dir", tmp_path / "logs")
    lines = [line for line in result.stderr.splitlines() if "train_gpt.py: error:" in line]
    assert result.returncode != 0 and lines and all("--micro_batches 1" in line for line in lines), (
        result.stderr
    )
    assert re.search(r"exitcode\s*: 2\b", result.stderr) and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    "cores, near, threads", [(2, 2, 1), (2, 4, 1), (2, 8, 1), (16, 2, 8), (16, 3, 5), (64, 8, 8)]
)
def test_processes_of_one_machine_share_its_cores(cores, near, threads, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(near))
    tg.Cpu(tiny())
    assert chosen == [threads]


def test_cores_are_counted_where_a_system_has_no_affinity(monkeypatch):
    """macOS."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    tg.Cpu(tiny())
    assert chosen == [5]


def test_a_process_alone_keeps_the_threads_that_it_was_given(monkeypatch):
    monkeypatch.setattr(
        torch, "set_num_threads", lambda count: pytest.fail("a lone process took other threads")
    )
    assert tg.DistEnv.join(tiny(), tg.Cpu(tiny()).device).world_size == 1
