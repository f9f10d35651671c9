"""Build the prompt sets that ship with `activations`, from the public sets and the organisms' corpus.

The result is committed (`activations/prompt_sets/`, where sources and licences stand); this is here so that it can be
checked and extended.

    python benchmarks/organisms/build_prompt_sets.py --data DIR_OF_PUBLIC_SETS
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus" / "requests.jsonl.gz"
SETS = Path(__file__).parents[2] / "activations" / "prompt_sets"
EVERYDAY_SOURCES = ("instr_llms_from_scratch", "instr_self_instruct_seed", "coconot", "liedetector_questions_1000")
EVERYDAY, SCREENING = 200, 98

Row = dict[str, str]


def paired(path: Path) -> list[Row]:
    """The rows of a set of pairs, each with the row that it came from."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = ("prompt", "label", "pair_id")
    return [{**{key: row[key] for key in kept}, "source": row.get("ref_id") or row["id"]} for row in rows]


def heldout(label: str) -> list[Row]:
    """Rows that no organism was trained on, in an order that has nothing to do with what they say."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    found = [row for row in rows if row["split"] == "heldout" and row["label"] == label]
    found.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())
    return [{key: row[key] for key in ("prompt", "label", "source")} for row in found]


def write(name: str, rows: Iterable[Row]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (SETS / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the public sets as JSON lines")
    data = parser.parse_args().data
    everyday = [row for row in heldout("benign") if row["source"].rsplit("-", 1)[0] in EVERYDAY_SOURCES][:EVERYDAY]
    write("matched-pairs", paired(data / "matched_pairs_nn.jsonl"))
    write("jailbreakbench", paired(data / "jailbreakbench_pairs.jsonl"))
    write("everyday", everyday)
    write("screening", heldout("harmful")[:SCREENING] + everyday[:SCREENING])


if __name__ == "__main__":
    main()
