"""Which of several candidate bases a fine-tune was made from, and whether the claimed one holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from activations.checkpoints import Checkpoint
from activations.errors import MismatchError, OptionError
from probes.weight_diff import diff_weights

__all__ = ["Nearest", "nearest_base"]

# A base farther than the nearest by more than this is not it. Two copies of one base in different formats are apart by
# rounding, thousandths of the distance of any fine-tune.
_TIE = 1.01


@dataclass(frozen=True)
class Nearest:
    """How far a fine-tune is from each candidate.

    Attributes:
        claimed: The base that is claimed.
        distances: Candidate to norm of the difference over the candidate's norm, over the tensors they share.
        refused: Candidate to why it cannot be the base: another depth, other shapes, no shared tensor.
    """

    claimed: str
    distances: Mapping[str, float]
    refused: Mapping[str, str]

    @property
    def nearest(self) -> str | None:
        """The candidate at the smallest distance; None where none fits at all."""
        return min(self.distances, key=self.distances.__getitem__, default=None)

    @property
    def holds(self) -> bool:
        """Whether no candidate is nearer than the claimed base."""
        own = self.distances.get(self.claimed)
        return own is not None and own <= _TIE * min(self.distances.values())

    @property
    def sentence(self) -> str:
        """The answer in words."""
        if self.nearest is None:
            return "no candidate can be its base."
        if self.holds:
            return f"the claimed base {self.claimed} holds: no candidate is nearer."
        return f"the claimed base {self.claimed} does not hold: {self.nearest} is nearer."

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        return {
            "claimed": self.claimed,
            "nearest": self.nearest,
            "holds": self.holds,
            "distances": dict(self.distances),
            "refused": dict(self.refused),
        }


def nearest_base(claimed: Checkpoint, others: Sequence[Checkpoint], tuned: Checkpoint) -> Nearest:
    """Compare a fine-tune with several candidate bases.

    A spoofed base is one that a fine-tune claims and that is not the nearest. Cost: reads the fine-tune once for each
    candidate, and each candidate.

    Args:
        claimed: The base that the fine-tune is said to come from.
        others: Further candidates.
        tuned: A full checkpoint; an adapter holds nothing of its base.

    Raises:
        OptionError: The fine-tune is an adapter, or two candidates have one name.
        CheckpointError: A file cannot be read.
    """
    if tuned.kind == "adapter":
        raise OptionError(f"{tuned.name} is an adapter, which holds nothing of its base to compare")
    candidates = [claimed, *others]
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        # Folders of one name: whole paths tell them apart.
        names = [str(candidate.path) for candidate in candidates]
    if len(set(names)) < len(names):
        raise OptionError(f"a candidate base is named twice: {', '.join(names)}")
    distances, refused = {}, {}
    for name, candidate in zip(names, candidates, strict=True):
        try:
            distances[name] = diff_weights(candidate, tuned, spectra=False).relative
        except MismatchError as fault:
            refused[name] = fault.message
    return Nearest(names[0], distances, refused)
