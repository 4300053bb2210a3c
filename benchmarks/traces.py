"""What a trace of jax's profiler says: which operations took the time, by name, by kind and by part of the program.

Works on traces of GPUs (kernels of each stream), TPUs (line "XLA Ops") and CPUs (XLA's thunks).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# First match in the name of a kernel or XLA operation. Kernels are those of cuDNN, cuBLAS and XLA.
KINDS = (
    ("attention", r"fmha|flash|attention"),
    ("copy", r"memcpy|memset|copy"),
    ("convolution", r"conv|cudnn|fprop|dgrad|wgrad|implicit_gemm"),
    ("matrix product", r"gemm|dot|cutlass|nvjet|xmma|matmul"),
    ("collective", r"nccl|all-reduce|all-gather|reduce-scatter"),
    ("reduction", r"reduce"),
)
# First match in the path that jax gives an operation. The loss's own arithmetic has no module's name.
PARTS = (
    ("decoder: convolutions", r"Decoder.*conv_general_dilated"),
    ("decoder: norms", r"Decoder.*norm"),
    ("decoder: rest", r"Decoder"),
    ("denoiser", r"MMDiT"),
    ("optimizer and averages", r"apply_gradients|adam|ema"),
    ("loss: windows of the mask", r"reduce_window"),
)
_WRAPPERS = re.compile(r"^(while|call|conditional)")  # their time is that of what they hold
_HLO = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", re.MULTILINE)


def capture(run: Callable[[], Any], folder: Path, times: int = 1) -> None:
    """Run it so often under the profiler, which writes into `folder`."""
    import jax

    with jax.profiler.trace(str(folder)):
        for _ in range(times):
            run()


def summary(folder: Path, hlo: str = "", count: int = 15) -> dict[str, Any]:
    """The newest trace in `folder`: seconds and shares of the longest operations, of kinds and of parts.

    hlo: text of the compiled program, where its parts are wanted. Overlapping operations count in full each, so that
    the sum may be more than the time that passed. Raises ValueError where the trace holds no operation.
    """
    names = dict(_HLO.findall(hlo))
    tops, calls, kinds, parts = Counter(), Counter(), Counter(), Counter()
    for kernel, operation, seconds in operations(newest(folder)):
        tops[kernel] += seconds
        calls[kernel] += 1
        path = names.get(operation, "")
        kind = _first(KINDS, kernel)
        # A library's fusion is called by its library; the path says what it computes.
        kinds[_first(KINDS, path.rpartition("/")[2]) if kind is None else kind] += seconds
        parts[_first(PARTS, path)] += seconds
    total = sum(tops.values())
    if not total:
        raise ValueError(f"{folder}: the trace holds no operation")

    def shares(counter: Mapping[str | None, float]) -> dict[str, float]:
        ordered = sorted(counter.items(), key=lambda item: -item[1])
        return {name or "other": round(value / total, 4) for name, value in ordered}

    return {
        "seconds": round(total, 6),
        "top": [
            {"name": name[:120], "part": names.get(name, "")[-120:], "seconds": round(value, 6)}
            | {"share": round(value / total, 4), "calls": calls[name]}
            for name, value in tops.most_common(count)
        ],
        "kinds": shares(kinds),
        **({"parts": shares(parts)} if hlo else {}),
    }


def newest(folder: Path) -> Path:
    """The newest .xplane.pb below `folder`. Raises FileNotFoundError where there is none."""
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder}: no trace")
    return found[-1]


def operations(path: Path) -> Iterator[tuple[str, str, float]]:
    """(name of the kernel or operation, name of the XLA operation, seconds) of everything that a device ran."""
    import jax

    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    lines = [line for plane in devices for line in plane.lines if line.name.startswith(("Stream", "XLA Ops"))]
    on_host = not lines
    if on_host:
        lines = [line for plane in planes if plane.name.startswith("/host:CPU") for line in plane.lines]
    for line in lines:
        for event in line.events:
            operation = str(dict(event.stats).get("hlo_op", ""))
            if (operation or not on_host) and not _WRAPPERS.match(operation):
                yield event.name, operation, event.duration_ns / 1e9


def _first(table, text: str) -> str | None:
    return next((name for name, pattern in table if re.search(pattern, text, re.IGNORECASE)), None)
