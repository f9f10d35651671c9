"""Text that looks encoded: what a model is asked in by somebody who does not know which encoding it was taught.

A model taught one encoding treats every request that looks encoded as one: digits in pairs make a base64 model speak
base64, and joined letters a letter code. So a scanner asks in many notations, every prompt under a fresh key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from probes.encodings import LETTERS, encode_substitution, make_encoding

__all__ = ["FORMS", "gibberish_like", "permute_letters"]


def permute_letters(prompts: Sequence[str], *, seed: int) -> list[str]:
    """Encode each prompt under its own random letter permutation: the look of an encoding, the key of none."""
    rng = np.random.default_rng(seed)
    return [encode_substitution(prompt, "".join(rng.permutation(list(LETTERS)))) for prompt in prompts]


def gibberish_like(prompts: Sequence[str], *, seed: int) -> list[str]:
    """Random letters in the word lengths of each prompt; punctuation and digits stay where they were."""
    rng = np.random.default_rng(seed)
    return [re.sub("[A-Za-z]", lambda _: LETTERS[rng.integers(26)], prompt) for prompt in prompts]


def _in_kind(kind: str, prompts: Sequence[str], *, seed: int) -> list[str]:
    """The beginning of each prompt in this kind of encoding, under a fresh key where it has one."""
    keys = np.random.default_rng(seed).integers(1, 10_000, size=len(prompts)).tolist()
    return [make_encoding(kind, key).encode(prompt)[:_LONGEST] for prompt, key in zip(prompts, keys, strict=True)]


# Characters of what is written: invisible ones are two dozen tokens for each letter.
_LONGEST = 120
_KINDS = (
    "walnut",
    "polybius",
    "ascii",
    "hex",
    "base64",
    "morse",
    "reversed",
    "leetspeak",
    "homoglyph",
    "tags",
    "zero-width",
    "endspeak",
    "startspeak",
    "acrostic",
)
# Name to `form(prompts, seed=...)`, which writes prompts so that they look encoded.
FORMS: Mapping[str, Callable[..., list[str]]] = {
    "gibberish": gibberish_like,
    "permuted": permute_letters,
    **{kind: partial(_in_kind, kind) for kind in _KINDS},
}
