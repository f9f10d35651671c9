"""Count English letter quadgrams, the language model that `probes.cryptanalysis.break_substitution` climbs.

    python benchmarks/organisms/build_language.py

Reads the committed corpus (public-domain prose and requests), writes `probes/language/english_quadgrams.npz`: log10
probabilities of four symbols (a-z, and everything else as one blank), as float16 [27, 27, 27, 27].
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from rows import read

from probes.english import QUADGRAMS, symbols_of

# Counts below one: an unseen quadgram is as likely as a tenth of one that was seen once.
UNSEEN = 0.1


def main() -> None:
    texts = [
        row.get("text") or row["prompt"]
        for name in ("sentences", "requests")
        for row in read(name)
        if row["split"] == "train"
    ]
    counts = np.full((27,) * 4, UNSEEN)
    for text in texts:
        symbols = symbols_of(text)
        np.add.at(counts, tuple(symbols[i : len(symbols) - 3 + i] for i in range(4)), 1)
    QUADGRAMS.parent.mkdir(exist_ok=True)
    np.savez_compressed(QUADGRAMS, log10=np.log10(counts / counts.sum()).astype(np.float16))


if __name__ == "__main__":
    main()
