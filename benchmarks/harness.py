"""What every benchmark shares: who measured, fair timing of rivals, the result file, the options, the printed table.

A number without its machine, versions and commit cannot be compared with anything, so `write` puts them beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SCHEMA = "undertow.benchmark/1"
ROOT = Path(__file__).resolve().parent.parent

Clock = Callable[[], float]


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: None where it could not be measured; `note` says why.
        unit: In words ("times ours", "share", "MiB").
        interval: 95 % interval; None where there is none.
        repeats: How many times it was measured, or of how many cases it is a share.
        note: What a reader must know before quoting it.
    """

    value: float | None
    unit: str
    interval: tuple[float, float] | None = None
    repeats: int = 1
    note: str = ""


@dataclass(frozen=True)
class Timings:
    """Seconds of each rival, one entry a round; entry i of all of them was measured in the same round."""

    seconds: Mapping[str, Sequence[float]] = field(repr=False)

    def ratio(self, name: str, to: str, *, unit: str, note: str = "") -> Figure:
        """How many times as long `name` takes as `to`: the median over rounds of the ratio within a round.

        The interval resamples rounds (bootstrap percentiles), so below six rounds it is about their range.
        """
        ratios = np.divide(self.seconds[name], self.seconds[to])
        return Figure(float(np.median(ratios)), unit, bootstrap(ratios), len(ratios), note)

    def typical(self, name: str) -> Figure:
        """Median seconds a round. Belongs to one machine; compare ratios instead."""
        rounds = self.seconds[name]
        return Figure(median(rounds), "seconds", None, len(rounds))


def interleaved(
    rivals: Mapping[str, Callable[[], object]], *, rounds: int, clock: Clock = time.perf_counter, warm_up: int = 1
) -> Timings:
    """Time rivals in one process, each once a round, every other round in the opposite order.

    A machine that grows slower, or a neighbour that comes and goes, then hits all of them alike; only rounds are
    compared. `time.process_time` as the clock leaves the neighbour out, and also waiting for disks and devices.

    Args:
        rivals: Name to what is timed; take care that each does the same work.
        rounds: How many times each is timed; an even number lets both orders count alike.
        clock: In seconds.
        warm_up: Untimed rounds before, for caches and compilation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for turn in range(-warm_up, rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            started = clock()
            rivals[name]()
            if turn >= 0:
                seconds[name].append(clock() - started)
    return Timings(seconds)


def finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call, and on "cuda" a wait for what it has started there."""
    if device != "cuda":
        return call

    def waiting() -> None:
        import torch

        call()
        torch.cuda.synchronize()

    return waiting


def matmul_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """Floating point operations a second of one large square matrix product, the best of some."""
    import torch

    side, times = (8192, 20) if device == "cuda" else (1536, 5)
    one = torch.randn(side, side, device=device, dtype=dtype)
    timings = interleaved({"": finished(lambda: one @ one, device)}, rounds=times, clock=clock)
    return float(2 * side**3 / min(timings.seconds[""]))


def bootstrap(values: np.ndarray, *, draws: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of the median; None below three values, which say nothing of their spread."""
    if len(values) < 3:
        return None
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(np.median(np.asarray(values)[rows], axis=1), (0.025, 0.975))
    return float(low), float(high)


def peak_growth(call: Callable[[], object], *, device: str = "cpu") -> float | None:
    """MiB by which this process grew at most while `call` ran; None where the system cannot tell.

    Reads Linux' high-water mark of resident memory, which can be reset, after freed memory was given back. Good to a
    few MiB. On "cuda" it is the device's memory instead, which torch counts.
    """
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak
        before = _resident("VmRSS")
        call()
        return max(0.0, _resident("VmHWM") - before) / 1024
    except (OSError, AttributeError, ValueError):
        return None


def peak_of_process() -> float | None:
    """Most MiB of memory that this process ever had resident; None where the system cannot tell."""
    try:
        return _resident("VmHWM") / 1024
    except (OSError, ValueError):
        return None


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [line for line in lines if line.startswith(f"{which}:")]
    if not found:
        raise ValueError(f"no {which} here")
    return int(found[0].split()[1])


def machine() -> dict[str, object]:
    """What the numbers were measured on; nothing that names its owner."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": usable,
        "memory_gib": _memory_gib(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def versions() -> dict[str, str | None]:
    """Python, Undertow and every package that can change a number."""
    from probes.records import environment

    here = environment()
    return {"python": here["python"], "undertow": here["undertow"], **here["packages"]}


def commit(root: Path = ROOT) -> str | None:
    """The commit of the checkout at `root`, "-dirty" behind it where the code differs; None outside a checkout.

    Differs: a tracked file was changed, or a Python file is not tracked. Results lying about change nothing.

    A release unpacked somewhere inside another project's checkout is outside: that commit would not be ours.
    """
    top, head = _git(root, "rev-parse", "--show-toplevel"), _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not top or not head or Path(top).resolve() != root.resolve():
        return None
    status = (_git(root, "status", "--porcelain", "--untracked-files=all") or "").splitlines()
    changed = [line for line in status if not line.startswith("??") or line.rstrip('"').endswith(".py")]
    return f"{head}-dirty" if changed else head


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; add your own to it."""
    shared = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shared.add_argument("--quick", action="store_true", help="smaller and fewer; minutes on two cores")
    shared.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")
    return shared


def write(figures: Mapping[str, Figure], json_path: Path | None, *, text: str = "", **details: object) -> None:
    """Print the figures and, where a path is given, write them with everything needed to read them later.

    Args:
        figures: Name to figure.
        json_path: The result file; None prints only.
        text: What to print where the plain table of all figures is not the best view of them.
        **details: Further JSON values under keys of their own, such as a table of cases.
    """
    print(text or table(figures))
    if json_path is None:
        return
    result = {
        "schema": SCHEMA,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        **details,
    }
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def table(figures: Mapping[str, Figure]) -> str:
    """Figures as aligned plain text."""
    rows = [(name, shown(f.value), span(f.interval), f.unit, f.note) for name, f in figures.items()]
    return columns([("figure", "value", "95 % interval", "unit", "note"), *rows])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under each other, each column as wide as its widest cell but the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def span(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{shown(interval[0])} to {shown(interval[1])}"
