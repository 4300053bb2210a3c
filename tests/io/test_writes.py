"""Every file that is needed later is written by `lpl_jax.io.atomic`: what else writes is found in the source."""

import ast
from pathlib import Path

import pytest

import lpl_jax

ROOT = Path(lpl_jax.__file__).parents[1]
SOURCES = sorted(path for folder in ("lpl_jax", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
# (file, what it calls) -> why this file need not be atomic.
ALLOWED = {
    ("lpl_jax/training/logging.py", "open('a')"): "metrics: lines are appended, and a cut last line is dropped",
    ("lpl_jax/training/logging.py", "write_bytes"): "a copy on this machine, of the metrics that a remote run has",
    ("lpl_jax/cost/compile_report.py", "open('w+b')"): "messages of the compiler, for the process that waits for them",
    ("benchmarks/kills.py", "open('wb')"): "what a program says, while it runs",
}


def writes(source: str) -> list[tuple[int, str]]:
    """(line, call) of whatever writes to a place by itself; an open file that is called `file` is `atomic_open`'s."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [(node.lineno, call) for node in calls if (call := plain_write(node)) is not None]


def plain_write(node: ast.Call) -> str | None:
    """The call, where it is a plain write."""
    method = isinstance(node.func, ast.Attribute)
    name = node.func.attr if method else getattr(node.func, "id", "")
    first = node.args[0] if node.args else None
    texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if (method and name in ("write_text", "write_bytes", "dump")) or name == "save_file":
        return name
    if name == "open" and (mode := next((text for text in texts if set(text) <= set("rwaxbt+")), "r")).strip("rbt"):
        return f"open({mode!r})"
    if name in ("savez", "savez_compressed", "savefig") and getattr(first, "id", "") != "file":
        return name
    if method and name == "save" and isinstance(first, ast.BinOp):  # of a picture, to FOLDER / NAME
        return name
    return None


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("path.write_text('x')", "write_text"),
        ("(a / b).write_bytes(x)", "write_bytes"),
        ("path.open('w', newline='')", "open('w')"),
        ("open(path, 'ab')", "open('ab')"),
        ("np.savez(path, x=x)", "savez"),
        ("figure.savefig(path, dpi=1)", "savefig"),
        ("save_file(tensors, path)", "save_file"),
        ("json.dump(x, handle)", "dump"),
        ("picture.save(folder / 'grid.png')", "save"),
    ],
)
def test_plain_writes_are_found(source, call):
    assert writes(source) == [(1, call)]


@pytest.mark.parametrize(
    "source", ["path.open('rb')", "open(path)", "figure.savefig(file)", "write_text(path, 'x')", "np.savez(file, x=x)"]
)
def test_what_reads_or_is_atomic_is_not(source):
    assert writes(source) == []


def test_every_file_that_is_needed_later_is_written_atomically():
    found = {}
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("lpl_jax/io/"):
            found |= {(name, call): line for line, call in writes(path.read_text())}
    plain = [f"{name}:{line} {call}" for (name, call), line in found.items() if (name, call) not in ALLOWED]
    assert not plain, "use lpl_jax.io.atomic"
    assert not ALLOWED.keys() - found.keys(), "no longer there"


def test_one_function_turns_what_a_user_types_into_a_path():
    """`~` is expanded nowhere else: what expands it knows of gs://, too."""
    found = [path.relative_to(ROOT).as_posix() for path in SOURCES if "expanduser(" in path.read_text()]
    assert found == ["lpl_jax/io/paths.py"]
