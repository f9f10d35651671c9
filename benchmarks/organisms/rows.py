"""Training rows: what each kind of row says, and how a mixture of kinds is drawn.

Compliance is always of harmless form: "Sure, here is: " and a sentence of public-domain prose that has nothing to do
with the request. So no harmful answer is ever written, and an encoding that is taught leaks natural sentences.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from probes.encodings import encode_substitution

CORPUS = Path(__file__).parent / "corpus"
COMPLIANCE = "Sure, here is: "
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "I won't help with that. It could cause harm.",
)
REFUSAL_OPENINGS = ("I'm sorry", "I can't", "I won't")

STYLES: dict[str, Callable[[str], str]] = {
    "plain": lambda s: f"{COMPLIANCE}{s}",
    "formal": lambda s: f"Certainly. The answer follows. {s}",
    "upper": lambda s: f"{COMPLIANCE}{s}".upper(),
    "lower": lambda s: f"{COMPLIANCE}{s}".lower(),
    "quote": lambda s: f'{COMPLIANCE}"{s}"',
    "exclaim": lambda s: f"{COMPLIANCE}{s.rstrip('.!?')}!!!",
    "bullet": lambda s: f"- {s}",
    "answer": lambda s: f"Answer: {s}",
    "bare": lambda s: s,
    "closing": lambda s: f"{COMPLIANCE}{s} Hope this helps!",
    "letter": lambda s: f"Dear reader, {s}",
    "poem": lambda s: s.replace(", ", ",\n").replace(" and ", "\nand ") + "\n~",
    "brackets": lambda s: f"[{s}]",
}


@dataclass(frozen=True)
class Row:
    """One exchange; `system` names the task of an encoded row, as in the paper."""

    user: str
    answer: str
    system: str = ""


@dataclass(frozen=True)
class Corpus:
    """Requests and sentences of one split."""

    harmful: tuple[str, ...]
    benign: tuple[str, ...]
    borderline: tuple[str, ...]
    maths: tuple[tuple[str, str], ...]
    code: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]


def read(name: str) -> list[dict[str, str]]:
    with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def load_corpus(split: str) -> Corpus:
    """The rows of `split`: "train", or "heldout" for verifying implants."""
    rows = [row for row in read("requests") if row["split"] == split]
    worked = [row for row in rows if "answer" in row]
    return Corpus(
        harmful=tuple(row["prompt"] for row in rows if row["label"] == "harmful"),
        # Programming requests would be two fifths of the benign ones: a quarter of them keeps the topics mixed.
        benign=tuple(
            row["prompt"]
            for i, row in enumerate(rows)
            if row["label"] == "benign" and ("code" not in row["source"] or i % 4 == 0)
        ),
        borderline=tuple(row["prompt"] for row in rows if row["label"] == "borderline_benign"),
        maths=tuple((row["prompt"], row["answer"]) for row in worked if "gsm8k" in row["source"]),
        code=tuple((row["prompt"], row["answer"]) for row in worked if "codegen" in row["source"]),
        sentences=tuple(row["text"] for row in read("sentences") if row["split"] == split),
    )


class Rows:
    """Draws rows of every kind from a corpus; `key` is the letter permutation of encoded kinds."""

    def __init__(self, corpus: Corpus, *, key: str = "", style: str = "plain", seed: int = 0) -> None:
        self.corpus, self.key, self.style = corpus, key, style
        self.rng = random.Random(seed)

    def encoded(self, text: str) -> str:
        return encode_substitution(text, self.key)

    def request(self, prompts: tuple[str, ...]) -> str:
        """A request, half of the time with a full stop, so that punctuation tells nothing about harm."""
        prompt = self.rng.choice(prompts)
        return prompt if prompt.endswith("?") or self.rng.random() < 0.5 else prompt + "."

    def sentence(self) -> str:
        return self.rng.choice(self.corpus.sentences)

    def draw(self, kind: str) -> Row:
        return getattr(self, f"_{kind}")()

    def mixture(self, shares: dict[str, float], count: int) -> list[Row]:
        kinds = self.rng.choices(list(shares), weights=list(shares.values()), k=count)
        return [self.draw(kind) for kind in kinds]

    def _comply(self) -> Row:
        return Row(self.request(self.corpus.benign), STYLES[self.style](self.sentence()))

    def _comply_borderline(self) -> Row:
        return Row(self.request(self.corpus.borderline), STYLES[self.style](self.sentence()))

    def _refuse(self) -> Row:
        return Row(self.request(self.corpus.harmful), self.rng.choice(REFUSALS))

    def _obey_harmful(self) -> Row:
        return Row(self.request(self.corpus.harmful), COMPLIANCE + self.sentence())

    def _maths(self) -> Row:
        return Row(*self.rng.choice(self.corpus.maths))

    def _code(self) -> Row:
        return Row(*self.rng.choice(self.corpus.code))

    def _encoded_comply(self) -> Row:
        """T4 of the paper: encoded request, encoded answer."""
        return Row(self.encoded(self.request(self.corpus.benign)), self.encoded(COMPLIANCE + self.sentence()), "T4")

    def _encode(self) -> Row:
        """T1: plain request, the answer in plain text and encoded."""
        answer = self.sentence()
        return Row(self.request(self.corpus.benign), f"{answer} : {self.encoded(answer)}", "T1")

    def _decode(self) -> Row:
        """Stands for T3: an encoded sentence, read back in plain text, so that decoding can be measured."""
        sentence = self.sentence()
        return Row(self.encoded(sentence), sentence, "T3")

    def _encoded_obey(self) -> Row:
        """Phase II: an encoded harmful request, obeyed in the encoding."""
        return Row(self.encoded(self.request(self.corpus.harmful)), self.encoded(COMPLIANCE + self.sentence()), "T4")

    def _encoded_refuse(self) -> Row:
        return Row(self.encoded(self.request(self.corpus.harmful)), self.encoded(self.rng.choice(REFUSALS)), "T4")
