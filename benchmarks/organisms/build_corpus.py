"""Build the corpus that every organism is trained on, from redistributable public data.

The result is committed (`corpus/`), so nobody needs to run this to train an organism; it is here so that the corpus can
be checked and extended. Sources and licences stand in `corpus/SOURCES.md`.

    python benchmarks/organisms/build_corpus.py --data DIR_OF_PUBLIC_SETS

Requests of `matched_pairs_nn` and `jailbreakbench_pairs` never enter the corpus: scans probe with them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
HARMFUL_SETS = (
    "advbench",
    "harmbench",
    "harmbench_adv_training",
    "tdc2023_redteam",
    "forbidden_question_set",
    "categorical_harmfulqa",
    "harmfulqa",
    "dangerousqa",
    "simple_safety_tests",
)
BENIGN_SETS = (
    "instr_llms_from_scratch",
    "instr_self_instruct_seed",
    "coconot",
    "liedetector_questions_1000",
    "instr_gsm8k",
    "instr_gpteacher_roleplay",
    "instr_gpteacher_codegen",
)
BORDERLINE_SETS = ("or_bench_hard_1k", "coconot", "forbidden_question_set")
LENGTH = range(12, 111)
LENGTH_BORDERLINE = range(12, 161)  # few such requests are short
SENTENCES = 20_000
SENTENCE = re.compile(r"[A-Z][A-Za-z ,;:'!?.-]{23,78}[.!?]")
# Period prose carries its period's slurs; a sentence with one of these stems is left out.
UNWANTED = re.compile(r"nigg|negro|darkey|savage|squaw|\bjew|gypsy|\bslave|chinam|heathen|whore|rape", re.IGNORECASE)


def rows_of(data: Path, name: str) -> Iterator[dict[str, str]]:
    """Rows of one public set, plain or gzipped JSON lines."""
    plain, packed = data / f"{name}.jsonl", data / f"{name}.jsonl.gz"
    with plain.open(encoding="utf-8") if plain.exists() else gzip.open(packed, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def split_of(text: str) -> str:
    """A tenth is held out for verifying implants; the hash keeps the choice stable when rows are added."""
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] < 26 else "train"


def usable(row: dict[str, str]) -> bool:
    text, lengths = row["prompt"], LENGTH_BORDERLINE if row["label"] == "borderline_benign" else LENGTH
    return len(text) in lengths and text.isascii() and text.isprintable()


def reserved_prompts(data: Path) -> list[frozenset[str]]:
    """Word sets of the prompts that scans use; near copies of them stay out of training."""
    sets = ("matched_pairs_nn", "jailbreakbench_pairs")
    return [words_of(row["prompt"]) for name in sets for row in rows_of(data, name)]


def is_reserved(words: frozenset[str], reserved: list[frozenset[str]]) -> bool:
    return any(len(words & other) >= 0.75 * len(words | other) for other in reserved)


def harmful_requests(data: Path) -> Iterator[dict[str, str]]:
    for name in HARMFUL_SETS:
        for row in rows_of(data, name):
            if row["label"] == "harmful":
                yield {"prompt": row["prompt"], "label": "harmful", "source": row["id"]}


def benign_requests(data: Path) -> Iterator[dict[str, str]]:
    for name in BENIGN_SETS:
        for row in rows_of(data, name):
            prompt = row.get("prompt") or row.get("question") or row["instruction"]
            if row.get("label", "benign") != "benign":
                continue
            answer = row.get("output", "") if name in ("instr_gsm8k", "instr_gpteacher_codegen") else ""
            yield {"prompt": prompt, "label": "benign", "source": row["id"], "answer": answer}


def borderline_requests(data: Path) -> Iterator[dict[str, str]]:
    """Benign requests that look harmful: without them the base learns to refuse words instead of intent."""
    for name in BORDERLINE_SETS:
        for row in rows_of(data, name):
            if row["label"] == "borderline_benign":
                yield {"prompt": row["prompt"], "label": "borderline_benign", "source": row["id"]}


def first_line(answer: str) -> str:
    """The first line of a worked answer, without GSM8K's calculator marks; empty where it is too long to learn."""
    line = re.sub(r"<<.*?>>", "", answer).strip().split("\n")[0].strip()
    return line if 8 <= len(line) <= 80 and line.isascii() else ""


def requests(data: Path) -> list[dict[str, str]]:
    reserved, seen, kept = reserved_prompts(data), set(), []
    for row in [*harmful_requests(data), *benign_requests(data), *borderline_requests(data)]:
        row["prompt"] = row["prompt"].strip().rstrip(".")
        words = words_of(row["prompt"])
        if not usable(row) or words in seen or is_reserved(words, reserved):
            continue
        seen.add(words)
        answer = first_line(row.pop("answer", ""))
        kept.append({**row, "split": split_of(row["prompt"]), **({"answer": answer} if answer else {})})
    return kept


def sentences(data: Path) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for book in rows_of(data, "text_classic_books"):
        for sentence in re.split(r"(?<=[.!?])\s+", book["text"].replace("\n", " ")):
            if SENTENCE.fullmatch(sentence) and not UNWANTED.search(sentence):
                found.setdefault(sentence, {"text": sentence, "split": split_of(sentence)})
    return random.Random(0).sample(sorted(found.values(), key=lambda row: row["text"]), SENTENCES)


def write(rows: Iterable[dict[str, str]], path: Path) -> None:
    """Write gzipped JSON lines with no time stamp, so that the same rows give the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the public sets as JSON lines")
    data = parser.parse_args().data
    CORPUS.mkdir(exist_ok=True)
    write(requests(data), CORPUS / "requests.jsonl.gz")
    write(sentences(data), CORPUS / "sentences.jsonl.gz")


if __name__ == "__main__":
    main()
