"""What a diff of weights costs: its rate beside reading and loading the same files, its memory, and an adapter's time.

`localisation.py --cost` runs it; the figures are explained there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from harness import Figure, Timings, bootstrap, interleaved, peak_growth
from safetensors.torch import load_file, save_file

import probes.adapter_diff as adapter_diff
import probes.pairs as pairs
from activations.checkpoints import Checkpoint, open_checkpoint
from activations.tensors import TensorInfo
from probes.weight_diff import diff_weights

KIB, MIB = 2**10, 2**20
# Of the plain reads that the diff is compared with: what fits a processor's cache is read fastest.
BUFFERS = (512 * KIB, MIB, 16 * MIB)
# GB that stay free beside the synthetic pair.
SPARE = 10.0
# Sides of the matrices of a block of Llama 3 8B, in widths.
BLOCK_SHAPES = {
    "self_attn.q_proj": (1, 1),
    "self_attn.k_proj": (0.25, 1),
    "self_attn.v_proj": (0.25, 1),
    "self_attn.o_proj": (1, 1),
    "mlp.gate_proj": (3.5, 1),
    "mlp.up_proj": (3.5, 1),
    "mlp.down_proj": (1, 3.5),
}


def cost(work: Path, gigabytes: float, *, quick: bool) -> dict[str, Figure]:
    """What a diff costs on a synthetic pair, and on an adapter."""
    free, needed = shutil.disk_usage(work).free, (1.5 * gigabytes + SPARE) * 1e9
    if free < needed:
        sys.exit(
            f"{work} has {free / 1e9:.0f} GB free: the pair, a copy of its base and {SPARE:g} GB beside them take "
            f"{needed / 1e9:.0f} GB."
        )
    pair = synthetic_pair(work, gigabytes)
    figures = speed(*pair[:2], rounds=2 if quick else 4) | memory(*pair)
    for side in pair[:2]:
        shutil.rmtree(side.path)
    return figures | adapter(work)


def speed(base: Checkpoint, tuned: Checkpoint, *, rounds: int) -> dict[str, Figure]:
    """The diff of a pair, every tensor changed, beside reading and loading it; and of the base beside a copy."""
    files = [*files_of(base), *files_of(tuned)]
    size = sum(file.stat().st_size for file in files)
    twin = open_checkpoint(shutil.copytree(base.path, base.path.with_name("twin")))
    one, many = (plain_reads(files, threads) for threads in (1, pairs.count_workers()))
    readers, diffs = one | many, diffs_of(base, tuned, twin)
    clocks = time.perf_counter, time.process_time
    warm, own = (interleaved(readers | diffs, rounds=rounds, clock=clock) for clock in clocks)
    fastest = quickest(warm, readers)
    slow = interleaved(
        {
            fastest: readers[fastest],
            "spectra": lambda: diff_weights(base, tuned),
            "load": lambda: [loaded(file) for file in files],
            "diff": diffs["diff"],
        },
        rounds=1,
        warm_up=0,
    )
    # From the disk, of one thread and of many the reader that is the fastest from memory.
    best = {name: readers[name] for name in (quickest(warm, one), quickest(warm, many))}
    cold = from_disk([*files, *files_of(twin)], best | diffs, rounds=rounds)
    shutil.rmtree(twin.path)
    unit = f"of the rate of {fastest}"
    return {
        **compared("diff_vs_read", cold, best, f"{size / 1e9:.3g} GB in all, from the disk, wall time"),
        **compared("diff_vs_read_warm", warm, readers, "files in memory, wall time"),
        **compared("diff_vs_read_warm_cpu", own, readers, "files in memory, processor time of all threads"),
        "diff_vs_read_warm_spectra": slow.ratio(fastest, "spectra", unit=unit, note="files in memory, one round"),
        "diff_vs_load": slow.ratio("load", "diff", unit="times ours", note="both state dicts, files in memory"),
        **rates("cold", cold, size),
        **rates("warm", warm, size),
    }


def files_of(side: Checkpoint) -> list[Path]:
    return sorted({info.file for info in side.tensors.values() if isinstance(info, TensorInfo)})


def plain_reads(files: Sequence[Path], threads: int) -> dict[str, Callable[[], object]]:
    """Rivals that read the files and do nothing else, with buffers of several sizes."""

    def reading(size: int) -> Callable[[], object]:
        buffers = [bytearray(size) for _ in range(threads)]
        return lambda: read_all(files, buffers)

    return {f"{threads} thread{'s' * (threads > 1)}, {size // KIB} KiB": reading(size) for size in BUFFERS}


def diffs_of(base: Checkpoint, tuned: Checkpoint, twin: Checkpoint) -> dict[str, Callable[[], object]]:
    """The diff without spectra, by what is compared; `twin` is a copy of the base in files of its own."""

    def first() -> None:
        pairs.NORMS.forget()
        diff_weights(base, tuned, spectra=False)

    return {
        "diff": lambda: diff_weights(base, tuned, spectra=False),
        "diff, first": first,
        "diff, equal": lambda: diff_weights(base, twin, spectra=False),
    }


def compared(name: str, times: Timings, readers: Iterable[str], note: str) -> dict[str, Figure]:
    """The rate of each diff over that of the fastest reader."""
    fastest = quickest(times, readers)
    return {
        name + end: times.ratio(fastest, diff, unit=f"of the rate of {fastest}", note=f"{note}; {what}")
        for diff, end, what in (
            ("diff", "", "every tensor changed, the base's norms known"),
            ("diff, first", "_first", "every tensor changed, the base's norms not known"),
            ("diff, equal", "_equal", "the base beside a copy of it, its norms known"),
        )
    }


def quickest(times: Timings, names: Iterable[str]) -> str:
    return min(names, key=lambda name: times.typical(name).value or 0.0)


def rates(state: str, times: Timings, size: int) -> dict[str, Figure]:
    """GB/s of everything that was timed, both sides of the pair counted."""
    return {
        f"{state} rate of {name}": Figure(size / 1e9 / (times.typical(name).value or 1.0), "GB/s")
        for name in times.seconds
    }


def memory(base: Checkpoint, tuned: Checkpoint, largest: int) -> dict[str, Figure]:
    """Growth of the process while it compares, beyond two tensors."""
    figures = {}
    for name, spectra in (("peak_extra_mb_norms", False), ("peak_extra_mb", True)):
        grown = peak_growth(lambda spectra=spectra: diff_weights(base, tuned, spectra=spectra))
        beyond = None if grown is None else (grown * MIB - 2 * largest) / 1e6
        figures[name] = Figure(beyond, "MB", note=f"beyond two tensors of {largest / 1e6:.0f} MB")
    return figures


def synthetic_pair(work: Path, gigabytes: float) -> tuple[Checkpoint, Checkpoint, int]:
    """A sharded pair in bf16, shaped as Llama 3 8B from 1 GB on, every tensor changed; with the largest's bytes.

    Whole blocks fill it up to the size; shards hold up to 1 GB, so that no more is in memory here.
    """
    width = 4096 if gigabytes >= 1 else 512
    shapes = {name: tuple(int(side * width) for side in sides) for name, sides in BLOCK_SHAPES.items()}
    table = (int(width * (4 if gigabytes < 5 else 31.3125)), width)  # 128,256 tokens
    layers = max(2, int((gigabytes * 1e9 / 4 - math.prod(table)) / sum(map(math.prod, shapes.values()))))
    names = {"model.embed_tokens.weight": table} | {
        f"model.layers.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in shapes.items()
    }
    random, shards = torch.Generator().manual_seed(0), sharded(names, gigabytes * 1e9 / 2)
    for name, scale in (("base", 0.0), ("tuned", 1e-3)):
        folder, index = work / name, dict[str, str]()
        folder.mkdir()
        for number, shard in enumerate(shards):
            file = f"model-{number:05}.safetensors"
            seeds = {tensor: list(names).index(tensor) for tensor in shard}
            save_file({one: values(names[one], seeds[one], scale, random) for one in shard}, folder / file)
            index |= dict.fromkeys(shard, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return open_checkpoint(work / "base"), open_checkpoint(work / "tuned"), 2 * max(map(math.prod, names.values()))


def sharded(names: dict[str, tuple[int, ...]], total: float) -> list[list[str]]:
    """Names in order, in at least two shards of about 1 GB."""
    most, shards, held = min(1e9, total / 2), [[]], 0.0
    for name, shape in names.items():
        if shards[-1] and held + 2 * math.prod(shape) > most:
            shards.append([])
            held = 0.0
        shards[-1].append(name)
        held += 2 * math.prod(shape)
    return shards


def values(shape: tuple[int, int], seed: int, scale: float, random: torch.Generator) -> torch.Tensor:
    own = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (own + scale * torch.randn(shape, generator=random) if scale else own).to(torch.bfloat16)


def read_all(files: Sequence[Path], buffers: Sequence[bytearray]) -> None:
    """Read every file once: a thread for each buffer takes the next one that nobody has."""
    turns = iter(files)

    def work(buffer: bytearray) -> None:
        for file in turns:
            read(file, buffer)

    with ThreadPoolExecutor(len(buffers)) as threads:
        list(threads.map(work, buffers))


def read(file: Path, buffer: bytearray) -> None:
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def from_disk(files: Sequence[Path], rivals: Mapping[str, Callable[[], object]], *, rounds: int) -> Timings:
    """Times once the system has forgotten what it holds of the files: how a checkpoint is met for the first time.

    Every other round goes in the opposite order, as in `interleaved`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds):
        for name in list(rivals) if turn % 2 == 0 else list(rivals)[::-1]:
            for file in files:
                forget(file)
            started = time.perf_counter()
            rivals[name]()
            seconds[name].append(time.perf_counter() - started)
    return Timings(seconds)


def forget(file: Path) -> None:
    """Have the system drop a file from its page cache."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loaded(file: Path) -> list[torch.Tensor]:
    """A state dict in memory of its own: safetensors alone maps the file and reads nothing yet."""
    return [tensor.clone() for tensor in load_file(file).values()]


def adapter(work: Path, *, rank: int = 16, rounds: int = 7) -> dict[str, Figure]:
    """The time for an adapter once the base's norms are known, as they are from its second adapter on."""
    shapes = {name: tuple(int(side * 4096) for side in sides) for name, sides in BLOCK_SHAPES.items()}
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(32) for name, shape in shapes.items()}
    random, folder = torch.Generator().manual_seed(0), work / "adapter"
    folder.mkdir()
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": torch.randn(shape, generator=random)
        for path, (out, into) in shapes.items()
        for side, shape in (("A", (rank, into)), ("B", (out, rank)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": ["all-linear"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    base = {f"{path}.weight": torch.empty(shape, device="meta") for path, shape in shapes.items()}
    seconds = []
    known = adapter_diff._base_norm
    adapter_diff._base_norm = lambda *_: 1.0  # such a base is 16 GB; its norms are read once, and not timed
    try:
        for turn in range(rounds + 1):
            started = time.perf_counter()
            diff_weights(base, open_checkpoint(folder))
            seconds += [time.perf_counter() - started] if turn else []
    finally:
        adapter_diff._base_norm = known
    note = "float32 file, opened and read each time; the base's norms known"
    return {"adapter_seconds": Figure(float(np.median(seconds)), "seconds", bootstrap(np.array(seconds)), rounds, note)}
