"""Labelled prompts, and splits that keep pairs together."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from activations.errors import LabelError, OptionError, PathMissingError, PromptError, printable

__all__ = ["PromptSet", "load_prompts", "shipped_licences", "shipped_prompt_sets", "texts_hash"]

_SHIPPED = Path(__file__).parent / "prompt_sets"

# True where the label means harmful. A borderline prompt looks harmful and is not: the twin of a harmful one.
_LABELS = {"harmful": True, "benign": False, "borderline_benign": False}

# Faults of a file named in one message, each cut to a length with which all of them fit into it.
_MOST_FAULTS, _LONGEST_FAULT = 20, 85


@dataclass(frozen=True)
class PromptSet:
    """Prompts with what is known of their intent.

    Attributes:
        name: What a report calls the set.
        prompts: The user's turn of each conversation.
        harmful: True where a prompt asks for harm.
        pair_ids: Prompts that share an id are twins (alike but for the intent); an unpaired one has an id of its own.
        licence: Under which terms the set may be passed on: every licence of its sources, by name.
        sources: Where each prompt comes from, "" where not known; () where nothing is said of any.

    Raises:
        PromptError: No prompts, or the columns differ in length.
    """

    name: str
    prompts: tuple[str, ...]
    harmful: tuple[bool, ...]
    pair_ids: tuple[str, ...]
    licence: str = field(default="", compare=False)
    sources: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        lengths = {len(self.prompts), len(self.harmful), len(self.pair_ids)}
        if len(lengths) > 1 or 0 in lengths:
            raise PromptError(
                f"prompt set {self.name!r} has {len(self.prompts)} prompts, {len(self.harmful)} labels and "
                f"{len(self.pair_ids)} pair ids: expected the same number of each, and at least one",
                hint="Give each prompt a label and a pair id.",
            )
        if self.sources and len(self.sources) != len(self.prompts):
            raise PromptError(
                f"prompt set {self.name!r} has {len(self.sources)} sources for {len(self.prompts)} prompts: "
                "expected one for each, or none",
                hint="Give each prompt a source, or none of them.",
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def labels(self) -> Bool[np.ndarray, " prompt"]:
        """True where a prompt is harmful, as an array."""
        return np.array(self.harmful, dtype=bool)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of prompts, labels and pairs in their order; the name does not count."""
        return _json_hash([prompt, harmful, pair] for prompt, harmful, pair in self._rows())

    def where(self, *, harmful: bool) -> tuple[str, ...]:
        """The prompts of one class."""
        return tuple(prompt for prompt, label, _ in self._rows() if label == harmful)

    def select(self, rows: Iterable[int], *, name: str = "") -> PromptSet:
        """Some rows, in the order given."""
        kept = list(rows)
        columns = (tuple(column[row] for row in kept) for column in (self.prompts, self.harmful, self.pair_ids))
        prompts, harmful, pair_ids = columns
        sources = tuple(self.sources[row] for row in kept) if self.sources else ()
        return PromptSet(name or self.name, prompts, harmful, pair_ids, self.licence, sources)  # type: ignore[arg-type]

    def split(self, fraction: float, *, seed: int = 0) -> tuple[PromptSet, PromptSet]:
        """Split at random, twins on the same side.

        Args:
            fraction: Share of the pairs (and of the unpaired prompts) in the first set, between 0 and 1.
            seed: Which random split.

        Raises:
            OptionError: `fraction` leaves one side empty.
        """
        pairs = sorted(set(self.pair_ids))
        count = round(fraction * len(pairs))
        if not 0 < count < len(pairs):
            raise OptionError(
                f"a split at {fraction} leaves one side of {self.name!r} ({len(pairs)} pairs) empty",
                hint="Pass a fraction nearer to 0.5.",
            )
        chosen = {pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:count]}
        rows = range(len(self))
        return (
            self.select(row for row in rows if self.pair_ids[row] in chosen),
            self.select(row for row in rows if self.pair_ids[row] not in chosen),
        )

    def require_both(self) -> PromptSet:
        """Return the set itself if it has prompts of both classes.

        Raises:
            LabelError: It has not.
        """
        count = sum(self.harmful)
        if count in (0, len(self)):
            only, lacking = ("harmful", "benign") if count else ("benign", "harmful")
            raise LabelError(
                f"prompt set {self.name!r} has only {only} prompts: expected {lacking} ones too",
                hint=f"Add prompts labelled {lacking}.",
            )
        return self

    def _rows(self) -> Iterator[tuple[str, bool, str]]:
        return zip(self.prompts, self.harmful, self.pair_ids, strict=True)


def shipped_prompt_sets() -> tuple[str, ...]:
    """Names of the prompt sets that come with the package."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.jsonl")))


def shipped_licences() -> dict[str, str]:
    """Each source of the shipped prompt sets, with its licence and the notice that this asks for."""
    table: dict[str, str] = json.loads((_SHIPPED / "licences.json").read_text(encoding="utf-8"))
    return table


def load_prompts(name_or_path: str | Path) -> PromptSet:
    """Load a shipped prompt set by name, or a JSONL or CSV file of your own.

    A file has the columns `prompt`, `label` (harmful, benign or borderline_benign) and optionally `pair_id`, which
    twins share, and `source`. Where the sets shipped come from stands in `prompt_sets/SOURCES.md`.

    Raises:
        PathMissingError: Neither a shipped set nor a file has that name.
        PromptError: Lines are broken; the message names the first 20, and how many more there are.
        LabelError: The file has prompts of one class only (shipped sets may).
    """
    shipped = _SHIPPED / f"{name_or_path}.jsonl"
    if str(name_or_path) in shipped_prompt_sets():
        return _prompt_set(str(name_or_path), shipped)
    path = Path(name_or_path)
    if not path.is_file():
        raise PathMissingError(
            f"no prompt set {str(name_or_path)!r}: expected a file, or one of {', '.join(shipped_prompt_sets())}",
            path=path,
            hint="Name a shipped set, or a .jsonl or .csv file with the columns prompt and label.",
        )
    return _prompt_set(printable(path.stem), path).require_both()


def texts_hash(texts: Sequence[str]) -> str:
    """SHA-256 of plain texts in their order."""
    return _json_hash(texts)


def _json_hash(rows: Iterable[object]) -> str:
    """SHA-256 of a JSON list, never written out whole."""
    digest = hashlib.sha256(b"[")
    for i, row in enumerate(rows):
        digest.update((", " if i else "").encode() + json.dumps(row).encode())
    digest.update(b"]")
    return digest.hexdigest()


def _prompt_set(name: str, path: Path) -> PromptSet:
    rows: list[tuple[str, bool, str, str]] = []
    faults: list[str] = []
    for line, row in _read(path):
        try:
            rows.append(_checked(row, line))
        except _LineError as fault:
            faults.append(str(fault))
    if faults:
        raise _broken(_listed(faults, len(rows)), path)
    if not rows:
        raise PromptError("the prompt set is empty: expected one prompt a line", path=path, hint="Add prompts to it.")
    sources = tuple(source for *_, source in rows)
    return PromptSet(
        name,
        tuple(prompt for prompt, *_ in rows),
        tuple(harmful for _, harmful, _, _ in rows),
        _pair_ids([pair for _, _, pair, _ in rows]),
        licence=_licence(sources) if path.parent == _SHIPPED else "",
        sources=sources if any(sources) else (),
    )


def _pair_ids(given: Sequence[str]) -> tuple[str, ...]:
    """The ids given, and in place of "" a name that no other prompt has."""
    taken, named = set(given), []
    for i, pair in enumerate(given):
        name = pair or f"unpaired-{i}"
        while not pair and name in taken:
            name += "+"
        named.append(name)
    return tuple(named)


def _licence(sources: Sequence[str]) -> str:
    """The licences of rows such as "advbench-00018", each once and without its notice."""
    table = shipped_licences()
    return ", ".join(sorted({table[source.rpartition("-")[0]].partition(",")[0] for source in sources}))


class _LineError(Exception):
    """One line of a prompt set cannot be read."""


def _checked(row: object, line: int) -> tuple[str, bool, str, str]:
    if isinstance(row, _LineError):
        raise row
    if not isinstance(row, dict):
        raise _LineError(f"line {line} is no object with the fields prompt and label")
    if None in row:
        raise _LineError(f"line {line} has more fields than the header: a prompt with a comma needs quotes")
    prompt, label, pair, source = (row.get(name) for name in ("prompt", "label", "pair_id", "source"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise _LineError(f"line {line} has no prompt: expected text under 'prompt'")
    if not prompt.isascii() and prompt.encode(errors="ignore").decode() != prompt:
        raise _LineError(f"line {line} has a prompt that is no text: it holds half a surrogate pair")
    if not isinstance(label, str) or label not in _LABELS:
        shown = printable(repr(label), limit=24)
        raise _LineError(f"line {line} has the label {shown}: expected one of {', '.join(_LABELS)}")
    return prompt, _LABELS[label], _name(pair, "pair_id", line), _name(source, "source", line)


def _name(given: object, column: str, line: int) -> str:
    """Text, or a number as text, without the spaces around it that would tell twins apart; "" where there is none."""
    number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
    if not (given is None or number or isinstance(given, str)):
        shown = printable(repr(given), limit=24)
        raise _LineError(f"line {line} has the {column} {shown}: expected text, a whole number, or nothing")
    name = "" if given is None else str(given).strip()
    if name.encode(errors="ignore").decode() != name:
        raise _LineError(f"line {line} has a {column} that is no text: it holds half a surrogate pair")
    return name


def _read(path: Path) -> Iterator[tuple[int, object]]:
    """Line number and row of a CSV file (by its ending), or of JSON lines; a `_LineError` in place of what is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(f"the prompt set cannot be read as UTF-8 text: {error}", path) from error
    return _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text)


def _csv_rows(text: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = [printable(str(name), limit=24) for name in reader.fieldnames or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            yield 1, _LineError(f"line 1, the header, has the column {twice!r} more than once")
            return
        if reader.fieldnames is not None and not {"prompt", "label"} <= set(names):
            columns = printable(", ".join(names)) or "none"
            yield 1, _LineError(f"line 1, the header, has the columns {columns}: expected prompt and label among them")
            return
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:  # where the next row begins is not known: the last fault that is named
        number = reader.reader.line_num  # the line at fault; that of the DictReader is the last one it gave
        yield number, _LineError(f"line {number} is no CSV: {error}")


def _json_rows(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, _LineError(f"line {number} is no JSON: {error}")


def _listed(faults: Sequence[str], good: int) -> str:
    """One fault as it is; of several each one cut, with their number first and those left out last."""
    if len(faults) == 1:
        return faults[0]
    named = [printable(fault, limit=_LONGEST_FAULT) for fault in faults[:_MOST_FAULTS]]
    more = [f"and {len(faults) - len(named)} more"] if len(faults) > len(named) else []
    return f"{len(faults)} of {len(faults) + good} lines are broken: " + "; ".join(named + more)


def _broken(message: str, path: Path) -> PromptError:
    return PromptError(message, path=path, hint="Fields: prompt, label (harmful, benign, borderline_benign), pair_id.")
