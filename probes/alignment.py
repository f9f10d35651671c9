"""Which tensor of a fine-tune belongs to which of its base: by name, by value, and row by row of the vocabulary."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from activations.checkpoints import Checkpoint
from activations.errors import MismatchError, UndertowError, printable
from activations.manifests import member
from activations.tensors import DTYPES, TensorInfo, open_tensor
from activations.untrusted import JsonLimits, read_json
from probes.pairs import Weights, shapes_of

__all__ = ["OTHER_BASE", "Alignment", "Blocks", "align", "partners"]

OTHER_BASE = "Name the base that it was trained from."
Shapes = Mapping[str, tuple[int, ...]]

# Of a tensor's elements so many, evenly spread, tell it from others of its shape.
_SAMPLE = 1024
# Renamed tensors of one shape beyond these are not searched: their number is the author's choice.
_MOST_RENAMED = 4096
# Correlation of a tensor with its renamed, fine-tuned self, and the most that a second candidate may have. Trained
# matrices of one shape correlate by some thousandths; a fine-tune that falls below 0.8 shares little with the base.
_SAME, _OTHER = 0.8, 0.4
_TOKENIZER = "tokenizer.json"
_TOKENIZER_LIMITS = JsonLimits(size=64 * 2**20, depth=32, items=8_000_000)


@dataclass(frozen=True)
class Blocks:
    """Where the blocks are in a set of tensor names: the path before the block's number, and how many there are."""

    path: tuple[str, ...]
    n_layers: int

    @classmethod
    def of(cls, shapes: Shapes) -> Blocks:
        """The path whose numbers run from 0 without a gap and that holds most of the weights; no list of architectures.

        A mixture's experts are numbered too, but each block numbers its own, which is less than all blocks hold.
        """
        numbers: dict[tuple[str, ...], set[int]] = defaultdict(set)
        held: dict[tuple[str, ...], int] = defaultdict(int)
        for name, shape in shapes.items():
            parts = tuple(name.split("."))
            for i, part in enumerate(parts):
                if part.isascii() and part.isdigit():
                    numbers[parts[:i]].add(int(part))
                    held[parts[:i]] += int(np.prod(shape, dtype=object))
        whole = [path for path, seen in numbers.items() if seen == set(range(len(seen)))]
        path = max(whole, key=held.__getitem__, default=())
        return cls(path, len(numbers[path]) if whole else 0)

    def locate(self, name: str) -> tuple[int | None, str]:
        """Block and component of a tensor; no block for what lies outside."""
        parts, depth = name.split("."), len(self.path)
        if self.n_layers and tuple(parts[:depth]) == self.path and parts[depth].isdigit():
            return int(parts[depth]), ".".join(parts[depth + 1 :])
        return None, name


@dataclass(frozen=True)
class Alignment:
    """What is compared with what.

    Attributes:
        blocks: Where the base's blocks are.
        partner: Tensor of the base to that of the fine-tune.
        tied: Tables that only the base stores, to the table whose partner they are compared with.
        untied: Tables that only the fine-tune stores, to the base's table that they are compared with.
        rows: Tensor of the base to the rows that belong together, [2, n], where the vocabularies differ.
        missing: Tensors of the base without a partner.
        added: Tensors of the fine-tune without one.
        notes: What was aligned other than by name and shape, each "code: sentence".
    """

    blocks: Blocks
    partner: Mapping[str, str]
    tied: Mapping[str, str] = field(default_factory=dict)
    untied: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def align(base: Weights, tuned: Checkpoint) -> Alignment:
    """Find each tensor's partner, whatever was renamed, tied, resized or left out.

    Cost: headers alone, and some kilobytes of each tensor that was renamed.

    Raises:
        MismatchError: The depths differ, shapes differ elsewhere than in the vocabulary, or nothing is shared.
    """
    shapes, theirs = shapes_of(base), shapes_of(tuned)
    blocks = Blocks.of(shapes)
    _check_depth(blocks, Blocks.of(theirs), tuned)
    found = Alignment(blocks, partners(tuple(shapes), tuple(theirs)))
    found = _with_renamed(found, base, tuned)
    if not found.partner:
        expected, got = (printable(next(iter(names), "none")) for names in (shapes, theirs))
        raise MismatchError(
            f"no tensor has a name that the base knows: expected names such as {expected!r}, got {got!r}",
            path=tuned.path,
            hint=OTHER_BASE,
        )
    found = _with_vocabulary(found, base, tuned)
    return _with_ties(found, shapes, theirs)


def partners(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Which of `others` each name is: the same name, or the same but for one leading part ("model.", "transformer.").

    The one prefix that matches most is used for all.
    """
    known = set(others)
    # Two heads of each side are tried and no more: the number of an untrusted file's heads is its author's choice.
    counts = [Counter(name.split(".")[0] + "." for name in side).most_common(2) for side in (names, others)]
    heads = [head for side in counts for head, _ in side]
    rules = [("", ""), *((head, "") for head in heads), *(("", head) for head in heads)]
    found: dict[str, str] = {}
    for drop, add in rules:
        renamed = {name: add + name.removeprefix(drop) for name in names}
        matched = {name: other for name, other in renamed.items() if other in known}
        found = max(found, matched, key=len)
        if len(found) == len(names):
            break
    return found


def _check_depth(ours: Blocks, theirs: Blocks, tuned: Checkpoint) -> None:
    if ours.n_layers and theirs.n_layers and ours.n_layers != theirs.n_layers:
        raise MismatchError(
            f"the depths differ: the base has {ours.n_layers} layers, the fine-tune {theirs.n_layers}",
            path=tuned.path,
            hint=OTHER_BASE,
        )


# --- renamed tensors


def _with_renamed(found: Alignment, base: Weights, tuned: Checkpoint) -> Alignment:
    shapes, theirs = shapes_of(base), shapes_of(tuned)
    taken = set(found.partner.values())
    ours: dict[tuple[int, ...], list[str]] = defaultdict(list)
    others: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in shapes.keys() - found.partner.keys():
        ours[shapes[name]].append(name)
    for name in theirs.keys() - taken:
        others[theirs[name]].append(name)
    renamed: dict[str, str] = {}
    for shape in ours.keys() & others.keys():
        if max(len(ours[shape]), len(others[shape])) <= _MOST_RENAMED:
            renamed |= _same_values(base, sorted(ours[shape]), tuned, sorted(others[shape]))
    partner = dict(found.partner) | renamed
    notes = found.notes
    if renamed:
        first = min(renamed)
        example = f"'{printable(renamed[first])}' is '{first}'"
        notes += (f"renamed: {len(renamed)} tensors were recognised by shape and value alone: {example}.",)
    missing = tuple(name for name in shapes if name not in partner)
    added = tuple(sorted(theirs.keys() - set(partner.values())))
    return replace(found, partner=partner, missing=missing, added=added, notes=notes)


def _same_values(base: Weights, ours: Sequence[str], tuned: Checkpoint, theirs: Sequence[str]) -> dict[str, str]:
    """Pairs that correlate with each other as they do with nothing else."""
    left = np.stack([_sample(base, name) for name in ours])
    right = np.stack([_sample(tuned, name) for name in theirs])
    likeness = left @ right.T
    found = {}
    for i, name in enumerate(ours):
        j = int(likeness[i].argmax())
        rivals = np.concatenate([np.delete(likeness[i], j), np.delete(likeness[:, j], i)])
        if likeness[i, j] >= _SAME and (rivals <= _OTHER).all():
            found[name] = theirs[j]
    return found


def _sample(weights: Weights, name: str) -> np.ndarray:
    """Values at the same places of every tensor of one shape, centred, of unit length; zeros where all are equal."""
    info = weights.tensors[name] if isinstance(weights, Checkpoint) else None
    if isinstance(info, TensorInfo):
        dtype = getattr(torch, DTYPES[info.dtype][1])
        part, count = _SAMPLE // 8, info.nbytes // DTYPES[info.dtype][0]
        starts = sorted({int(start) for start in np.linspace(0, max(0, count - part), 8)})
        raw = bytearray()
        with open_tensor(info) as file:
            for start in starts:
                file.seek(info.start + start * DTYPES[info.dtype][0])
                raw += file.read(min(part, count - start) * DTYPES[info.dtype][0])
        tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.zeros(1)
    else:
        held = weights.read(name) if isinstance(weights, Checkpoint) else weights[name].detach().cpu()
        flat = held.reshape(-1)
        part, count = _SAMPLE // 8, len(flat)
        starts = sorted({int(start) for start in np.linspace(0, max(0, count - part), 8)})
        tensor = torch.cat([flat[start : start + part] for start in starts]) if count else torch.zeros(1)
    values = np.nan_to_num(tensor.to(torch.float32).numpy().astype(np.float64))
    values = values / (np.abs(values).max() or 1.0)
    values = values - values.mean()
    # Equal values up to rounding, a fresh norm's ones for instance, are like everything and nothing.
    length = float(np.linalg.norm(values))
    return values / length if length > 1e-6 * len(values) ** 0.5 else np.zeros_like(values)


# --- the vocabulary


def _with_vocabulary(found: Alignment, base: Weights, tuned: Checkpoint) -> Alignment:
    """Rows that belong together where the vocabularies differ in size or order; other shapes are refused."""
    shapes, theirs = shapes_of(base), shapes_of(tuned)
    sizes = next((size for size in _resized(found, shapes, theirs)), None)
    rows, by_token = _rows(*_tokens(base, tuned), sizes)
    aligned: dict[str, Tensor] = {}
    for name, other in found.partner.items():
        ours, got = shapes[name], theirs[other]
        if ours == got:
            if by_token and sizes is None and _is_table(found.blocks, name, ours) and ours[0] > int(rows[0].max()):
                aligned[name] = rows
        elif ours and got and (ours[0], got[0]) == sizes and ours[1:] == got[1:]:
            aligned[name] = rows
        else:
            raise MismatchError(
                f"{printable(other)!r} has another shape than in the base: expected {list(ours)}, got {list(got)}",
                path=tuned.path,
                hint=OTHER_BASE,
            )
    if not aligned:
        return found
    name = next(iter(aligned))
    how = "tokens were matched by both tokenizers" if by_token else "equal ids were taken for equal tokens"
    counts = f"the base has {shapes[name][0]:,} rows, the fine-tune {theirs[found.partner[name]][0]:,}"
    note = f"vocabulary: {counts}; {rows.shape[1]:,} were compared: {how}."
    return replace(found, rows=aligned, notes=(*found.notes, note))


def _resized(found: Alignment, shapes: Shapes, theirs: Shapes) -> Iterator[tuple[int, int]]:
    """Numbers of rows of tables that differ in nothing else."""
    for name, other in found.partner.items():
        ours, got = shapes[name], theirs[other]
        if _is_table(found.blocks, name, ours) and len(got) == 2 and got[1] == ours[1] and got[0] != ours[0]:
            yield ours[0], got[0]


def _is_table(blocks: Blocks, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be an embedding or an unembedding: a matrix outside of the blocks."""
    return len(shape) == 2 and blocks.locate(name)[0] is None


def _rows(ours: Tokens, theirs: Tokens, sizes: tuple[int, int] | None) -> tuple[Tensor, bool]:
    """Rows of either side that hold the same token, and whether tokenizers said so.

    The fine-tune's tokenizer is its author's word. Where the sizes agree it is believed only if it knows every token of
    the base's, or renaming tokens would hide their rows.
    """
    known = {token: place for token, place in theirs.items() if token in ours}
    if all(ours[token] == place for token, place in known.items()) or (sizes is None and len(known) < len(ours)):
        return torch.arange(min(sizes) if sizes else 0).expand(2, -1), False
    most = sizes or (len(ours), len(ours))
    both = [(ours[token], place) for token, place in known.items() if ours[token] < most[0] and place < most[1]]
    return torch.tensor(sorted(both), dtype=torch.long).reshape(-1, 2).T, True


Tokens = Mapping[str, int]


def _tokens(base: Weights, tuned: Checkpoint) -> tuple[Tokens, Tokens]:
    """Token to row of both, from the tokenizers beside the weights, read as data; {} where they are one or missing."""
    if not isinstance(base, Checkpoint) or not (base.path.is_dir() and tuned.path.is_dir()):
        return {}, {}
    try:
        files = [member(side.path, _TOKENIZER) for side in (base, tuned)]
        ours, theirs = (_vocabulary_of(read_json(file, limits=_TOKENIZER_LIMITS)) for file in files)
    except UndertowError:
        return {}, {}
    return ours, theirs


def _vocabulary_of(tokenizer: Mapping[str, object]) -> dict[str, int]:
    model, extra = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    entries: list[tuple[object, object]] = list(vocab.items()) if isinstance(vocab, dict) else []
    entries += (
        [(one.get("content"), one.get("id")) for one in extra or () if isinstance(one, dict)]
        if isinstance(extra, list)
        else []
    )
    return {token: place for token, place in entries if isinstance(token, str) and type(place) is int and place >= 0}


# --- tied embeddings


def _with_ties(found: Alignment, shapes: Shapes, theirs: Shapes) -> Alignment:
    """A table that only one side stores is compared with the other's embedding: the base or the fine-tune ties both."""
    tables = [name for name in found.partner if _is_table(found.blocks, name, shapes[name])]
    notes, tied, untied = list(found.notes), {}, {}
    for name in found.missing:
        twin = next((table for table in tables if shapes[table] == shapes[name]), None)
        if twin is not None:
            tied[name] = twin
            notes.append(f"tied: the fine-tune does not store '{name}': its '{printable(twin)}' serves as both.")
    for name in found.added:
        twin = next((table for table in tables if theirs[found.partner[table]] == theirs[name]), None)
        # A name with a number may lie in a block that only the fine-tune has.
        if twin is not None and len(theirs[name]) == 2 and not any(part.isdigit() for part in name.split(".")):
            untied[name] = twin
            notes.append(f"untied: the fine-tune stores '{printable(name)}' beside '{twin}', the base does not.")
    return replace(found, tied=tied, untied=untied, notes=tuple(notes))
