"""What did the fine-tune do to text that has nothing to do with it, and towards which words?

Narrow training leaves traces in the first tokens of any text (Minder et al., activation difference lens). The part of
the difference that all texts share, read through the base's logit lens, says what the training was about: a style, an
opening such as "Sure", the digits of a cipher. It is a description, and accuses nobody.

The number is of the other part, by which each text moved its own way. A style or a subject moves all texts alike, while
a private notation gives the pieces of words a new meaning, each its own. It grows with the amount of training, so that
it only asks for a closer look.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probes.records import Evidence
from probes.reference import Subject

__all__ = ["measure"]

WORDS = 8
# Where the words are read: two thirds up they said most of development organisms; the last layer holds the next token.
DEPTH = 2 / 3


def measure(subject: Subject) -> Evidence:
    """Root mean square of what the texts' differences do not share, over the base's norm; the largest layer's."""
    reference = subject.reference
    shared, own = parts(reference.first_tokens, subject.first_tokens)
    layers, common = own.tolist(), shared.norm(dim=-1)
    places = {"two thirds up": int(len(layers) * DEPTH), "at the last layer": len(layers) - 1}
    lean = {place: " ".join(reference.lens.words(shared[layer], WORDS)) for place, layer in places.items()}
    return Evidence(
        detector="trace",
        statistic=max(layers),
        layers=tuple(layers),
        summary=(
            f"At the first words of unrelated sentences its activations moved by up to {max(layers):.0%} of the base's "
            f"norm in ways of each sentence, and by up to {float(common.max()):.0%} in one way for all."
        ),
        details={"shared": common.tolist()},
        exhibits=tuple((f"words that all unrelated text leans to, {place}", words) for place, words in lean.items()),
        cause="weights-anomalous",
    )


def parts(
    base: Float[Tensor, "layer text token d_model"], tuned: Float[Tensor, "layer text token d_model"]
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, " layer"]]:
    """The mean difference, and the root mean square of what is left of each, in units of the base's norm.

    Each position counts in units of the base's mean norm there: some models hold at the first token of any text a
    hundred times what they hold elsewhere (attention sinks, Xiao et al. 2023, arXiv:2309.17453).
    """
    norms = base.norm(dim=-1).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    moved = (tuned - base) / norms[:, None, :, None]
    shared = moved.mean((1, 2))
    return shared, (moved - shared[:, None, None]).square().sum(-1).mean((1, 2)).sqrt()
