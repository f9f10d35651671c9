"""Do the weights write along harm and refusal more than a difference of their spectrum would by chance?

The output and the down projection of a layer write to the residual stream, and D, the difference of such a matrix from
the base's, adds D x to it. Measured is the share of D's energy within the span of the base's directions of harm (its
intent probe) and of refusal (mean difference of harmful and benign prompts) at that layer. Chance are rotations of D
that keep its singular values and point anywhere. Needs no prompt: a fine-tune that behaves while it is watched is read.

On development organisms fine-tunes on harmful requests and abliteration lie 30 to 67 deviations out and those that
comply after a refusal 7 to 9, benign ones up to 7. It says that refusal was written to, not that it was meant: random
directions with the covariance of the base's activations part them as well, at 26 to 34. Covert ones do not part from
honest customers' encodings (AUROC 0.5), nor identity shifts from benign fine-tunes (0.6). Matrices that read the stream
are left out: benign fine-tunes change those along refusal more than harmful ones do (AUROC 0.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations.adapters import LoraPair
from activations.checkpoints import Checkpoint
from activations.errors import printable
from activations.hook_points import layer_of
from activations.models import Model
from activations.tensors import read_tensor
from probes.alignment import partners
from probes.causal import mean_difference
from probes.detectors.weight_spectrum import uncompared, weights_of
from probes.pairs import Pair, PairReader, Weights, shapes_of
from probes.records import Evidence
from probes.reference import Reference, Subject
from probes.weight_records import TensorDiff

__all__ = ["measure"]

# Directions closer to the span of the others than this are rounding.
_DEGENERATE = 1e-6
# Sums of fourth powers of large matrices are estimates: a spectrum is called no flatter than they can tell, or what
# they err by would pass for a deviation. A Gaussian matrix four times as wide as high has 0.25.
_FLATTEST = 0.05
# Tokens are named whose rows moved this many times as far as a usual row: the most moved rows of benign fine-tunes on
# all kinds of text lie at two to five. The word list of a reader is short.
_STANDS_OUT, _MOST_TOKENS = 3.0, 8


class Overlap(NamedTuple):
    """One matrix' difference beside a subspace of its outputs.

    Attributes:
        energy: Squared Frobenius norm of the difference.
        inside: Of that, what lies in the subspace.
        effective_rank: Participation ratio of its energies, see `TensorDiff`.
    """

    energy: float
    inside: float
    effective_rank: float


def measure(subject: Subject) -> Evidence:
    """Largest deviation over changed layers of the share inside, in standard deviations of random rotations.

    0 where nothing that writes was changed. None where some tensors cannot be compared, or where the base's probes give
    no direction.

    Cost: reads the changed matrices that write once more, one product with two columns; of an adapter products of its
    rank. Memory: the largest such matrix, as stored.
    """
    reference, difference = subject.reference, weights_of(subject)
    if difference.missing and difference.added:
        return Evidence(detector="weight-overlap", summary=uncompared(difference))
    spans = subspaces(reference)
    if not spans:
        return Evidence(detector="weight-overlap", summary="The base's probes read no place that a layer writes to.")
    changed = {tensor.name: tensor for tensor in difference.tensors if tensor.norm > 0}
    writers = writers_of(reference)
    found = {layer: list(overlaps(subject, writers[layer], span, changed)) for layer, span in spans.items()}
    beside = {layer: against_rotations(some, *spans[layer].shape) for layer, some in found.items() if some}
    tokens = [text for tensor in changed.values() for text in moved_tokens(tensor, reference.base)]
    return Evidence(
        detector="weight-overlap",
        statistic=max((deviations for _, deviations in beside.values()), default=0.0),
        layers=tuple(beside.get(layer, (0.0, 0.0))[1] for layer in range(reference.base.n_layers)),
        summary=summary_of(beside, spans),
        details={
            "layers": list(beside),
            "share": [share for share, _ in beside.values()],
            "share_by_chance": [chance(spans[layer]) for layer in beside],
            "changed_matrices": [len(found[layer]) for layer in beside],
        },
        exhibits=(("tokens whose rows moved far more than the rest", ", ".join(tokens)),) if tokens else (),
        cause="alignment-degraded",
    )


def summary_of(beside: Mapping[int, tuple[float, float]], spans: Mapping[int, Float[Tensor, "d_model rank"]]) -> str:
    """The layer furthest beyond chance, in words."""
    if not beside:
        return "No matrix that writes to the residual stream differs from the base's."
    worst = max(beside, key=lambda layer: beside[layer][1])
    share, deviations = beside[worst]
    return (
        f"Of what its change writes into layer {worst}, {share:.1%} lies along the base's directions of harm and "
        f"refusal, {chance(spans[worst]):.1%} by chance: {deviations:.1f} standard deviations."
    )


def chance(span: Float[Tensor, "d_model rank"]) -> float:
    """Expected share inside a subspace."""
    width, rank = span.shape
    return rank / width


# --- the subspace


def subspaces(reference: Reference) -> dict[int, Float[Tensor, "d_model rank"]]:
    """For each layer an orthonormal basis of harm and refusal in the base's residual stream, in float64.

    Harm is the direction along which the intent probe's score grows fastest; refusal, as Arditi et al. 2024
    (arXiv:2406.11717, section 2.3) take it, the mean of harmful minus that of benign prompts.
    """
    probes, labels = reference.probes, reference.battery.intent.labels
    steepest = probes.directions.astype(np.float64) / probes.scales
    vectors: dict[int, list[np.ndarray]] = {}
    for place, hook_point in enumerate(probes.hook_points):
        refusal = mean_difference(reference.intent.values[place], labels)
        vectors.setdefault(layer_of(hook_point), []).extend((steepest[place], refusal))
    bases = {layer: orthonormal(np.stack(some)) for layer, some in vectors.items()}
    return {layer: basis for layer, basis in bases.items() if basis.shape[1]}


def orthonormal(vectors: Float[np.ndarray, "vector d_model"]) -> Float[Tensor, "d_model rank"]:
    """A basis of what vectors span, each counted alike; those of zeros count for nothing."""
    lengths = np.linalg.norm(vectors, axis=1)
    sound = (lengths > 0) & np.isfinite(lengths)
    units = torch.from_numpy(vectors[sound] / lengths[sound, None])
    left, values, _ = torch.linalg.svd(units.T, full_matrices=False)
    basis: Tensor = left[:, values > _DEGENERATE]
    return basis


# --- differences inside it


class Writer(NamedTuple):
    """A matrix with which a layer writes to the residual stream.

    Attributes:
        path: Of its module in the network.
        stored: Name of its tensor among the base's.
        flipped: Stored as [in, out], as GPT-2's are.
    """

    path: str
    stored: str
    flipped: bool


def writers_of(reference: Reference) -> dict[int, list[Writer]]:
    """Those of each layer whose weights the base's files hold."""
    base = reference.base
    paths = {id(module): path for path, module in base.hf.named_modules()}
    modules = [(layer, module) for layer in range(base.n_layers) for module in base.hook_points.writers(layer)]
    names = [f"{paths[id(module)]}.weight" for _, module in modules]
    stored = partners(names, tuple(shapes_of(reference.weights)))
    found: dict[int, list[Writer]] = {layer: [] for layer in range(base.n_layers)}
    for (layer, module), name in zip(modules, names, strict=True):
        if name in stored:
            found[layer].append(Writer(paths[id(module)], stored[name], not isinstance(module, nn.Linear)))
    return found


def overlaps(
    subject: Subject,
    writers: Sequence[Writer],
    span: Float[Tensor, "d_model rank"],
    changed: Mapping[str, TensorDiff],
) -> Iterator[Overlap]:
    """The changed ones of some matrices beside a subspace of their outputs."""
    checkpoint, pairs = subject.checkpoint, subject.checkpoint.lora_pairs()
    for writer in writers:
        tensor = changed.get(writer.stored)
        if tensor is None:
            continue
        if checkpoint.kind == "adapter":
            inside = inside_of_product(pairs[writer.path], span)
        else:
            inside = inside_of_tensor(subject.reference.weights, tensor, checkpoint, span, flipped=writer.flipped)
        yield Overlap(tensor.norm**2, inside, tensor.effective_rank)


def inside_of_product(pair: LoraPair, span: Float[Tensor, "d_model rank"]) -> float:
    """Energy of `scale * B A` inside a subspace of its outputs; the product is never formed."""
    a, b = (read_tensor(info).to(torch.float64) for info in (pair.a, pair.b))
    return pair.scale**2 * float(((span.T @ b) @ a).square().sum())


def inside_of_tensor(
    base: Weights, tensor: TensorDiff, tuned: Checkpoint, span: Float[Tensor, "d_model rank"], *, flipped: bool
) -> float:
    """The same of a difference of stored tensors, block by block, in float64; `flipped` where columns are outputs."""
    with PairReader() as reader:
        return inside_of_pair(reader.read(base, tensor.name, tuned, tensor.partner or tensor.name), span, flipped)


def inside_of_pair(pair: Pair, span: Float[Tensor, "d_model rank"], flipped: bool) -> float:
    total, along = 0.0, torch.zeros(span.shape[1], pair.shape[1], dtype=torch.float64)
    for rows, before, after in pair.blocks():
        change = after.to(torch.float64) - before.to(torch.float64)
        if flipped:
            total += float((change @ span).square().sum())
        else:
            along += span[rows].T @ change
    return total if flipped else float(along.square().sum())


# --- chance


def against_rotations(overlaps: Sequence[Overlap], width: int, rank: int) -> tuple[float, float]:
    """Share of the matrices' energy inside, and its deviation from random rotations of each.

    A Haar rotation sends a singular direction into a subspace of dimension k of d with a share of Beta(k/2, (d-k)/2):
    mean k/d, variance v = 2 k (d-k) / (d^2 (d+2)). The shares of d orthogonal directions sum to k, so any two have the
    covariance -v / (d-1). With energies w_i that sum to 1 the whole share has the mean k/d and the variance
    v (d sum w_i^2 - 1) / (d-1), and sum w_i^2 is one over the effective rank: no rotation has to be drawn.

    Args:
        overlaps: Of the matrices, rotated each by itself.
        width: d, of the outputs.
        rank: k, of the subspace.

    Returns:
        The share in 0..1, and standard deviations; a matrix that did not change counts for nothing, none are (0, 0).
    """
    energy = sum(one.energy for one in overlaps)
    if not energy or rank == width:
        return 0.0, 0.0
    share = sum(one.inside for one in overlaps) / energy
    single = 2 * rank * (width - rank) / (width**2 * (width + 2))
    excess = [max(width / max(1.0, one.effective_rank) - 1, _FLATTEST) / (width - 1) for one in overlaps]
    spread = sum((one.energy / energy) ** 2 * more for one, more in zip(overlaps, excess, strict=True))
    return share, (share - rank / width) / math.sqrt(single * spread)


# --- tokens


def moved_tokens(tensor: TensorDiff, model: Model) -> list[str]:
    """Tokens whose rows of an embedding or unembedding moved several times as far as those not named by the diff.

    Each with the movement over the row's own norm. Of an adapter, whose rows are never formed, none.
    """
    others = tensor.shape[0] - len(tensor.rows)
    if not tensor.rows or others <= 0:
        return []
    usual = math.sqrt(max(0.0, tensor.norm**2 - math.fsum(row.norm**2 for row in tensor.rows)) / others)
    far = [row for row in tensor.rows if row.norm > _STANDS_OUT * usual and row.row < len(model.tokenizer)]
    return [
        f"'{printable(model.tokenizer.decode([row.row]))}' ({row.norm / row.base_norm:.0%})"
        for row in far[:_MOST_TOKENS]
        if row.base_norm > 0
    ]
