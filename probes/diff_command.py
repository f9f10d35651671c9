"""What `undertow diff` does: one fine-tune or several against a base, as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from activations.checkpoints import open_checkpoint
from activations.errors import OptionError, UndertowError
from probes.bands import profile_band
from probes.bank import Bank
from probes.console import print_lines, print_table
from probes.diff import ALPHA, Diff, diff, diff_files
from probes.nearest import Nearest, nearest_base

__all__ = ["DiffOptions", "Result", "compare_all", "print_results", "results_as_json"]


@dataclass(frozen=True)
class DiffOptions:
    """What is asked for beyond the weights.

    Attributes:
        prompts: A prompt set's name; None compares weights alone, and no model is loaded.
        added: What each layer adds by itself.
        localise: The layers that carry a loss of refusal.
        spectra: Singular values, ranks, merged adapters.
        against: Further candidate bases.
        bank: Benign fine-tunes, for a band around the profile of weights.
        device: As `load_model` has it.
        dtype: As `load_model` has it.
    """

    prompts: str | None = "matched-pairs"
    added: bool = False
    localise: bool = False
    spectra: bool = True
    against: tuple[Path, ...] = ()
    bank: Bank | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Result:
    """What became of one fine-tune: a diff, or the fault that stood in the way."""

    name: str
    diff: Diff | None = None
    nearest: Nearest | None = None
    fault: UndertowError | None = None
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        if self.diff is None:
            return {"tuned": self.name, "error": self.fault.to_dict() if self.fault else None}
        return self.diff.to_dict() | ({"nearest": self.nearest.to_dict()} if self.nearest else {})


def compare_all(
    base: str, checkpoints: Sequence[Path], options: DiffOptions, tell: Callable[[str], None]
) -> list[Result]:
    """Compare every fine-tune; one that cannot be compared keeps no other from it.

    Raises:
        UndertowError: The base cannot be loaded or read.
    """
    compare = _comparison(base, options, tell)
    results = []
    for path in checkpoints:
        tell(f"comparing {path.name}")
        try:
            results.append(_judged(compare(path), base, path, options))
        except UndertowError as fault:
            results.append(Result(path.name, fault=fault))
    return results


def print_results(results: Sequence[Result]) -> None:
    """Print one fine-tune layer by layer, several a line each."""
    found = [result for result in results if result.diff is not None]
    if len(results) == 1 and found:
        _print_layers(found[0])
    elif found:
        print_table(
            ("checkpoint", "kind", "relative change", "moved most", "what explains it", "carries", "base"),
            [_line(result) for result in found],
        )


def results_as_json(results: Sequence[Result]) -> str:
    """One object for one fine-tune, a list inside an object for several."""
    records = [result.to_dict() for result in results]
    whole = records[0] if len(records) == 1 else {"schema": "undertow.diffs/1", "diffs": records}
    return json.dumps(whole, indent=2, allow_nan=False)


def _comparison(base: str, options: DiffOptions, tell: Callable[[str], None]) -> Callable[[Path], Diff]:
    if options.prompts is None and not options.localise:
        if not Path(base).exists():
            raise OptionError(f"{base!r} is no folder: weights alone are compared file with file")
        source = open_checkpoint(base)
        wanted = options.device if options.device.startswith("cuda") else "cpu"
        device = "cuda" if options.device == "auto" and torch.cuda.is_available() else wanted
        return lambda path: diff_files(source, open_checkpoint(path), spectra=options.spectra, device=device)
    from activations.loading import load_model

    tell(f"loading base {base}")
    model = load_model(base, device=options.device, dtype=options.dtype)
    return lambda path: diff(
        model,
        path,
        base_path=base if Path(base).exists() else None,
        prompts=options.prompts,
        added=options.added,
        localise=options.localise,
        spectra=options.spectra,
    )


def _judged(found: Diff, base: str, path: Path, options: DiffOptions) -> Result:
    remarks = list(found.weights.notes)
    if options.bank is not None:
        members = [one.layers["weight-spectrum"] for one in options.bank.of_kind(found.kind) if one.layers]
        try:
            band = profile_band(found.weights.layer_profile(), np.array(members), alpha=ALPHA)
            found = replace(found, band=band)
        except OptionError as fault:
            remarks.append(f"no band: {fault.message}")
    nearest = None
    if options.against:
        try:
            candidates = [open_checkpoint(other) for other in options.against]
            nearest = nearest_base(open_checkpoint(base), candidates, open_checkpoint(path))
            remarks.append(nearest.sentence)
        except OptionError as fault:
            remarks.append(fault.message)
    return Result(path.name, found, nearest, None, tuple(remarks))


def _print_layers(result: Result) -> None:
    found = result.diff
    if found is None:
        return
    columns: dict[str, Sequence[str]] = {"weights, relative change": _numbers(found.weights.layer_profile())}
    shift = found.activations.mean_shift if found.activations else None
    columns["activations, relative shift"] = _numbers(shift) or [""] * found.weights.n_layers
    if found.added is not None:
        columns["added by the layer"] = _numbers(found.added.mean_shift)
        columns["harm-specific, added"] = _numbers(found.added.harm_shift)
    if found.band is not None:
        columns["p, beside benign"] = _numbers(found.band.p_values)
    if found.localisation is not None:
        columns["refusal lost, nats"] = _numbers(found.localisation.band.values)
        columns["p"] = _numbers(found.localisation.band.p_values)
    rows = [(str(layer), *cells) for layer, cells in enumerate(zip(*columns.values(), strict=True))]
    print_table(("layer", *columns), rows)
    if result.nearest is not None:
        print_lines([""])
        distances: Mapping[str, str] = {n: f"{d:.4f}" for n, d in result.nearest.distances.items()}
        print_table(("candidate base", "distance"), [*distances.items(), *result.nearest.refused.items()])


def _line(result: Result) -> tuple[str, ...]:
    found = result.diff
    if found is None:
        return (result.name, *[""] * 6)
    carriers = found.localisation.carriers if found.localisation else ()
    return (
        result.name,
        found.kind,
        f"{found.weights.relative:.4f}",
        ", ".join(map(str, found.top_layers[:3])) or "none",
        found.explanation,
        ", ".join(map(str, carriers)) or "-",
        "-" if result.nearest is None else (result.nearest.nearest or "none"),
    )


def _numbers(values: np.ndarray | None) -> list[str]:
    return [] if values is None else [f"{value:.4f}" for value in values]
