"""What keeps train_gpt.py readable, measured: density, lengths, branches on the device, no layer numbers."""

import ast
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
from conftest import ROOT, run_command

FILE = ROOT / "train_gpt.py"
SOURCE = FILE.read_text()
NODES_A_LINE = 9.5  # twelve models of the field: 5.5 to 8.8
FUNCTION_LINES, CLASS_LINES = 60, 250
DEVICE_BRANCHES = 2  # in parts 1 to 6


def named(tree: ast.AST, kind: type, name: str) -> ast.AST:
    (found,) = (node for node in ast.walk(tree) if isinstance(node, kind) and node.name == name)
    return found


def without_docstring(node: ast.AST) -> list[ast.stmt]:
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


# ----- Size


def nodes_a_line(source: str) -> float:
    """Nodes of the syntax tree over lines, the empty ones and comments included."""
    return sum(1 for _ in ast.walk(ast.parse(source))) / len(source.splitlines())


def is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def too_long(source: str) -> list[str]:
    """Functions (but kernels) and classes with more lines than they may have, decorators not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_kernel(node):
            allowed = FUNCTION_LINES
        elif isinstance(node, ast.ClassDef) and node.name != "Config":  # a table: a field is its row
            allowed = CLASS_LINES
        else:
            continue
        lines = node.end_lineno - node.lineno + 1
        if lines > allowed:
            found.append(f"{node.name}: {lines} lines")
    return found


def test_a_line_holds_one_thing():
    assert nodes_a_line(SOURCE) <= NODES_A_LINE
    assert nodes_a_line("a = 1\nb = f(a, 2)\n") < nodes_a_line("a, b = 1, f(1, 2)\n")


def test_functions_and_classes_fit_on_a_screen():
    assert too_long(SOURCE) == []
    long_function = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    assert too_long(long_function) == ["f: 61 lines"] and too_long("@triton.jit\n" + long_function) == []
    assert too_long("class C:\n" + "    x = 1\n" * CLASS_LINES) == ["C: 251 lines"]


# ----- Branches on the device

STORY_ENDS = "# ===== A. Operators"


def story(source: str) -> str:
    """Parts 1 to 6: what a reader reads, without the appendices."""
    before, found, _ = source.partition(STORY_ENDS)
    assert found, f"no {STORY_ENDS!r}: where do the appendices begin?"
    return before


def names_a_device(node: ast.expr) -> bool:
    """Whether an expression is x.device, x.is_cuda, x.device.type, "cuda", "cpu", or asks what there is."""
    if isinstance(node, ast.Constant):
        return node.value in ("cuda", "cpu")
    if isinstance(node, ast.Attribute):
        return node.attr in ("is_cuda", "device") or (node.attr == "type" and names_a_device(node.value))
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("cuda.is_available")


def conditions(tree: ast.AST) -> Iterator[ast.expr]:
    """What decides which way a program goes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Match):
            yield node.subject
        elif isinstance(node, ast.BoolOp):  # x and y, where no statement asks
            yield node


def device_branches(source: str) -> list[int]:
    """The lines in which the device decides something: comparisons with it, and conditions that name it."""
    lines = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(map(names_a_device, [node.left, *node.comparators])):
            lines.add(node.lineno)
    for condition in conditions(tree):
        lines.update(node.lineno for node in ast.walk(condition) if names_a_device(node))
    return sorted(lines)


def test_the_story_branches_on_the_device_at_most_twice():
    lines = device_branches(story(SOURCE))
    assert 0 < len(lines) <= DEVICE_BRANCHES, lines


@pytest.mark.parametrize(
    "branch",
    [
        "if x.is_cuda: pass",
        "y = 1 if x.device.type == 'cpu' else 2",
        "while cfg.device != 'cuda': pass",
        "z = [a for a in b if a.device == c]",
        "y = kind in ('cpu', 'x') or x.is_cuda",
        "y = x.is_cuda and f(x)",
        "if torch.cuda.is_available(): pass",
    ],
)
def test_a_branch_on_the_device_is_seen(branch):
    assert device_branches(branch) == [1]


def test_a_device_that_decides_nothing_is_no_branch():
    assert device_branches("x = torch.zeros(3, device=env.device)\nif x.sum() > 0: x = x.to('cpu')") == []


# ----- No layer number in the forward pass


def methods_called(method: ast.FunctionDef) -> set[str]:
    """NAME of each self.NAME(...) in it."""
    names = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self."):
            names.add(ast.unparse(node.func).removeprefix("self."))
    return names


def forward_pass(source: str) -> list[ast.FunctionDef]:
    """GPT.hidden, which holds the loop over layers, and what it calls in GPT, however deep."""
    gpt = named(ast.parse(source), ast.ClassDef, "GPT")
    methods = {node.name: node for node in gpt.body if isinstance(node, ast.FunctionDef)}
    found, waiting = [], ["hidden"]
    while waiting:
        name = waiting.pop()
        if name in methods and methods[name] not in found:
            found.append(methods[name])
            waiting.extend(methods_called(methods[name]))
    loops = [
        n
        for n in ast.walk(methods["hidden"])
        if isinstance(n, ast.For) and "self.layers" in ast.unparse(n.iter)
    ]
    assert loops, "GPT.hidden does not loop over self.layers: which function does?"
    return found


def is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def layer_numbers(source: str) -> list[str]:
    """What in the forward pass knows a layer by its number, or writes down a size.

    A comparison with a number (also in a tuple of them, a slice of layers, an index into them), a counter of
    layers, and any whole number above 2.
    """
    found = []
    for method in forward_pass(source):
        for statement in without_docstring(method):
            for node in ast.walk(statement):
                if knows_a_layer(node):
                    found.append(f"{method.name}, line {node.lineno}: {ast.unparse(node)}")
    return found


def knows_a_layer(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        sides += [
            part for side in sides if isinstance(side, (ast.Tuple, ast.List, ast.Set)) for part in side.elts
        ]
        return any(map(is_number, sides))
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("self.layers", "outputs", "weights"):
        numbers = [n for n in ast.walk(node.slice) if isinstance(n, ast.expr) and is_number(n)]
        return bool(numbers)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("enumerate", "range", "len"):
        return "layer" in ast.unparse(node)
    if isinstance(node, ast.match_case):
        return any(isinstance(n, ast.MatchValue) and is_number(n.value) for n in ast.walk(node.pattern))
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value > 2


def test_no_layer_number_and_no_size_in_the_forward_pass():
    assert {"hidden", "attention", "bigrams", "extra_streams"} <= {m.name for m in forward_pass(SOURCE)}
    assert layer_numbers(SOURCE) == []


LOOP = "        for layer, w in zip(self.layers, self.layer_weights(), strict=True):\n"
COUNTED = "        for i, (layer, w) in enumerate(zip(self.layers, self.layer_weights(), strict=True)):\n"
ATTENTION = "        cfg = self.cfg\n        n = self.norm(x)\n"
PLANTED = {
    "a counter": (LOOP, COUNTED),
    "another counter": (LOOP, "        for i in range(len(self.layers)):\n            pass\n" + LOOP),
    "i == 6": (LOOP, COUNTED + "            if i == 6:\n                x = x0\n"),
    "a set of numbers": (LOOP, LOOP + "            if len(outputs) in (0, 1):\n                x = x0\n"),
    "how many layers are done": (LOOP, LOOP + "            if len(outputs) > 1:\n                x = x0\n"),
    "a layer by its index": (
        LOOP,
        LOOP + "            if layer is self.layers[-1]:\n                x = x0\n",
    ),
    "a size": (LOOP, LOOP + "            x = x[:, :768]\n"),
    "in what it calls": (ATTENTION, ATTENTION + "        if layer.skip_from == 2:\n            return x\n"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_layer_number_in_the_forward_pass_is_found(name):
    before, after = PLANTED[name]
    assert SOURCE.count(before) == 1, "the loop has changed: plant the numbers where it is now"
    assert layer_numbers(SOURCE.replace(before, after))


# ----- Importing, format


@pytest.mark.slow
def test_importing_has_no_effect(tmp_path):
    code = """
        import os, signal, sys, threading
        import torch
        import torch.distributed as dist
        def state():
            signals = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
            threads = torch.get_num_threads(), [thread.name for thread in threading.enumerate()]
            return dict(os.environ), signals, threads, torch.get_rng_state().tolist()
        import torch._dynamo  # which torch.compiler's decorators import
        before = state()
        import train_gpt
        for was, is_now in zip(before, state(), strict=True):
            assert was == is_now, (was, is_now)
        assert not dist.is_initialized() and not torch.cuda.is_initialized()
    """
    done = run_command([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_file_needs_nothing_of_the_project():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            imported.update(name.name.split(".")[0] for name in node.names)
    assert imported <= sys.stdlib_module_names | {"torch", "triton", "numpy"}, (
        "a lone copy of the file must run"
    )


@pytest.mark.parametrize("rules", [("check",), ("format", "--check")], ids=" ".join)
def test_the_project_is_formatted(rules):
    if importlib.util.find_spec("ruff") is None:
        pytest.fail("ruff is not installed: pip install -r tests/requirements.txt")
    command = [sys.executable, "-m", "ruff", *rules, "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    advice = "ruff check --fix . && ruff format ."
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr}\nmost is mended by: {advice}"
