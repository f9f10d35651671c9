"""What the surface of prompts gives away: models that see length, style or words, on the splits that probes get.

A probe that does no better than these may read nothing else.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from probes.folds import Groups, checked_labels, deal_folds, plain_text, refuse_copied_texts, refuse_shared
from probes.metrics import Difference, auroc, auroc_difference, auroc_interval, group_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Baseline", "leads", "surface_baselines", "token_counter"]

# A word of none of these is a class of its own.
_FIRST_WORDS = {
    "question": "what what's how why who whom whose when where which",
    "auxiliary": "can could will would shall should may might must is are am was were do does did has have had",
    "request": "write give create make list describe explain tell show provide develop generate teach design compose "
    "outline suggest help find name identify post draft produce instruct convince summarize discuss edit rewrite",
    "first person": "i i'm i've i'd my we our me",
    "article": "a an the this that these those there",
}
_CLASSES = [frozenset(words.split()) for words in _FIRST_WORDS.values()]

_QUOTES = "\"'`“”‘’«»"
_PUNCTUATION = frozenset(string.punctuation) | frozenset(_QUOTES)

# From texts to one row each: a dense array, or a sparse one of word counts.
_Reader = Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Baseline:
    """How well something separates prompts without reading a model.

    Attributes:
        name: What it sees: "length", "characters per token", "style" or "words".
        auroc: Of held-out scores.
        interval: Its 95 % interval, which knows the groups.
        scores: Log odds of each prompt, by a fit that did not see it.
    """

    name: str
    auroc: float
    interval: tuple[float, float]
    scores: Float[np.ndarray, " prompt"]


def surface_baselines(
    texts: Sequence[str],
    labels: Bool[np.ndarray, " prompt"] | Sequence[bool],
    groups: Groups | None = None,
    *,
    count_tokens: Callable[[str], int] | None = None,
    trained_on: tuple[Sequence[str], Bool[np.ndarray, " other"] | Sequence[bool]] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, Baseline]:
    """Logistic regression on the surface of prompts, each scored by a fit that did not see it.

    The folds are those that `fit_probes` deals with the same labels, groups, `folds` and `seed`. "length" sees
    characters and words, plain and as logarithms; "style" shares of punctuation, capitals and digits, quotes, line
    breaks, question marks and the class of the first word; "words" tf-idf of words, as `words_baseline` does.

    Args:
        texts: The prompts.
        labels: True where one is harmful.
        groups: Prompts that must stay together, as pair ids.
        count_tokens: Gives "characters per token" too; see `token_counter`.
        trained_on: Other prompts and their labels to fit on, as a probe is fitted on one set and tested on another;
            nothing is cross-validated then.
        folds: Of the cross-validation.
        seed: Of the folds.

    Returns:
        Name to baseline.

    Raises:
        LabelError: Only one class is present, labels or groups are not one for each prompt, fewer than two groups hold
            one of the classes, or a prompt stands on both sides of a split.
        OptionError: `folds` is no whole number from 2 on.
    """
    truth, members = checked_labels(labels, len(texts)), group_numbers(groups, len(texts))
    every, known, splits = list(texts), truth, []
    if trained_on is not None:
        other = list(trained_on[0])
        known = np.concatenate([truth, checked_labels(trained_on[1], len(other))])
        refuse_shared(map(plain_text, texts), map(plain_text, other), "the training set and in the test set")
        splits = [(np.arange(len(texts), len(texts) + len(other)), np.arange(len(texts)))]
        every += other
    else:
        refuse_copied_texts([plain_text(text) for text in texts], members)
        dealt = deal_folds(truth, members, folds, np.random.default_rng(seed))
        splits = [(np.flatnonzero(dealt != f), np.flatnonzero(dealt == f)) for f in range(int(dealt.max()) + 1)]
    found = {}
    for name, read in _readers(count_tokens).items():
        scores = _held_out(read(every), known, splits, words=name == "words")[: len(texts)]
        interval = auroc_interval(scores, truth, groups=members)
        found[name] = Baseline(name, auroc(scores, truth), interval, scores)
    return found


def leads(
    scores: Float[np.ndarray, " prompt"],
    baselines: Mapping[str, Baseline],
    labels: Bool[np.ndarray, " prompt"] | Sequence[bool],
    groups: Groups | None = None,
    *,
    level: float = 0.95,
) -> dict[str, Difference]:
    """By how much a probe's AUROC exceeds each baseline's on the same prompts.

    A probe beats the surface where every one is `clear` of 0. That each must be keeps the rate of false claims at or
    below that of one comparison, so nothing is taken off for their number.

    Args:
        scores: Of the probe, by fits that did not see the prompts.
        baselines: Of the same prompts in the same order.
        labels: True where a prompt is harmful.
        groups: As in `auroc_interval`.
        level: Confidence of each interval.

    Raises:
        LabelError, NonFiniteError, OptionError: As in `auroc_difference`.
    """
    truth = np.asarray(labels, dtype=bool)
    return {
        name: auroc_difference(scores, baseline.scores, truth, groups=groups, level=level)
        for name, baseline in baselines.items()
    }


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """How many tokens a tokenizer makes of a text alone, without template or special tokens."""
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _readers(count_tokens: Callable[[str], int] | None) -> dict[str, _Reader]:
    readers: dict[str, _Reader] = {"length": _length}
    if count_tokens is not None:
        readers["characters per token"] = lambda texts: np.array(
            [[len(text) / max(1, count_tokens(text))] for text in texts]
        )
    return readers | {"style": _style, "words": _words}


def _length(texts: Sequence[str]) -> Float[np.ndarray, "prompt 4"]:
    counts = np.array([(len(text), len(text.split())) for text in texts], dtype=np.float64)
    return np.concatenate([counts, np.log1p(counts)], axis=1)


def _style(texts: Sequence[str]) -> Float[np.ndarray, "prompt feature"]:
    return np.array([_style_of(text) for text in texts], dtype=np.float64)


def _style_of(text: str) -> list[float]:
    length = max(1, len(text))
    words = text.lower().split()
    first = words[0].strip(string.punctuation) if words else ""
    return [
        sum(char in _PUNCTUATION for char in text) / length,
        sum(char.isupper() for char in text) / length,
        sum(char.isdigit() for char in text) / length,
        sum(char in _QUOTES for char in text) / length,
        float("\n" in text),
        float(text.count("?")),
        float(text.rstrip().endswith("?")),
        float(text.rstrip().endswith(".")),
        float(text[:1].isupper()),
        *(float(first in members) for members in _CLASSES),
    ]


def _words(texts: Sequence[str]) -> Any:
    """Counts of words, hashed, so that a text without any word is no special case."""
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=2**16, norm=None, alternate_sign=False).transform(texts)


def _held_out(
    columns: Any, labels: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]], *, words: bool
) -> Float[np.ndarray, " prompt"]:
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.zeros(len(labels))
    for kept, tested in splits:
        scaling = TfidfTransformer() if words else StandardScaler()
        model = make_pipeline(scaling, LogisticRegression(max_iter=1000)).fit(columns[kept], labels[kept])
        scores[tested] = model.decision_function(columns[tested])
    return scores
