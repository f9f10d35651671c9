"""How far did the weights move, in which layers, and along how many directions?

Size follows the steps and the rate of training more than its intent, so this alone accuses nobody: out of the benign
range it asks for a closer look. The profile over layers says where to look.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from activations.errors import printable
from probes.diff import WeightDiff, diff_weights
from probes.records import Evidence
from probes.reference import Subject

__all__ = ["measure", "uncompared", "weights_of"]

_KNOWN: WeakKeyDictionary[Subject, WeightDiff] = WeakKeyDictionary()


def measure(subject: Subject) -> Evidence:
    """Frobenius norm of the weight difference over the base's, per layer; the statistic is the largest layer's.

    Of an adapter both norms are those of the tensors that it changes. None where some tensors cannot be compared.
    """
    difference = weights_of(subject)
    if difference.missing and difference.added:
        return Evidence(detector="weight-spectrum", summary=uncompared(difference))
    profile = difference.layer_profile().tolist()
    changed = [tensor for tensor in difference.tensors if tensor.norm > 0]
    ranks = sorted(tensor.stable_rank for tensor in changed)
    return Evidence(
        detector="weight-spectrum",
        statistic=max(profile, default=0.0),
        layers=tuple(profile),
        summary=(
            f"{len(changed)} tensors differ from the base, by up to {max(profile, default=0.0):.1%} of a layer's norm."
        ),
        details={
            "relative_norm": difference.relative,
            "median_stable_rank": ranks[len(ranks) // 2] if ranks else 0.0,
            "most_changed_tensors": [
                tensor.name for tensor in sorted(changed, key=lambda tensor: -tensor.relative)[:3]
            ],
        },
        cause="weights-anomalous",
    )


def weights_of(subject: Subject) -> WeightDiff:
    """The difference of weights, measured once for all detectors that ask while the subject lives."""
    if subject not in _KNOWN:
        _KNOWN[subject] = diff_weights(subject.reference.weights, subject.checkpoint)
    return _KNOWN[subject]


def uncompared(difference: WeightDiff) -> str:
    """Weights under other names than the base's run, but are compared with nothing: they may hide any change."""
    return (
        f"{len(difference.missing)} tensors of the base have no partner of their name here, and "
        f"{len(difference.added)} have names that the base does not know, such as '{printable(difference.added[0])}'."
    )
