"""What each detector adds and what it costs: every organism judged again without it, and by it alone.

No organism is scanned again. The rule that ships (`probes.verdict.judge`) reads the evidence that the scan kept, less
what is left out. The second look is kept only where a detector that is still there would have asked for it; so a
detector alone is credited with what the second look that it asked for found. The second look alone is read wherever any
detector asked for it. Organisms that could not be scanned count nowhere.

The fused p-value is paid for by all detectors that decide: with one fewer the others may flag more than before.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from harness import Clock, Figure, bootstrap, columns, shown
from rates import CLASSES, Case, Cases, Which, separated, share_of

from activations.checkpoints import Checkpoint, open_checkpoint
from probes.bank import Bank
from probes.detectors import DETECTORS, FOLLOW_UPS, FollowUp
from probes.records import Evidence, Item
from probes.reference import Reference, Subject
from probes.scan import measured
from probes.verdict import RANKS, Judgement, judge

FIRST = tuple(detector.name for detector in DETECTORS)
SECOND = tuple(dict.fromkeys(look.name for look in FOLLOW_UPS.values()))
ABLATED = (*FIRST, *SECOND)
ALL = "ablation/all"
OTHER = "other bank"
CIPHERS = "covert told from benign cipher without it (by it alone), AUROC"
TOLD = "covert_against_benign_cipher_auroc"
# The classes of the rates, but for the two halves of "covert".
COUNTED: Mapping[str, Which] = {"attacks": lambda case: case.attack} | {
    name: which for name, which in CLASSES.items() if not name.startswith("covert-")
}
COVERT, CIPHER = "covert-malicious", "benign-cipher"
NONE = Figure(None, "")
# The first look as a whole.
WHOLE = "first look"
# How many names a note holds.
FEW = 5
# How many organisms of each method costs are taken on: of the first look, and of the second.
TIMED, TIMED_SECOND = 3, 1


# --- judged again


def ablate(cases: Cases, bank: Bank | None) -> dict[str, Figure]:
    """Shares flagged with all detectors, without each, and by each alone; of every class, and of benign ones.

    Names: "ablation/<detector>/<class>/flagged_without" and "_alone", "ablation/<detector>/benign_flagged_without",
    "benign_inconclusive_without", "covert_against_benign_cipher_auroc_without" (AUROC of the verdict's score) and the
    same "_alone"; with all of them "ablation/all/..." and no ending.
    """
    cases = [case for case in cases if case.item.status == "scanned"]
    whole = [read(case.item, bank, ABLATED) for case in cases]
    figures = tally(ALL, "", cases, whole, whole)
    for name in ABLATED:
        rest = [other for other in ABLATED if other != name]
        without = [read(case.item, bank, rest) for case in cases]
        if name in FIRST:
            alone = [read(case.item, bank, (name, *SECOND)) for case in cases]
        else:
            alone = [read(case.item, bank, (name,), asking=FIRST) for case in cases]
        figures |= tally(f"ablation/{name}", "_without", cases, without, whole)
        figures |= tally(f"ablation/{name}", "_alone", cases, alone, whole)
    return figures


def with_other(cases: Cases, other: Bank, bank: Bank | None) -> dict[str, Figure]:
    """What is flagged of each class, and of benign ones, where `other` takes the place of the bank of the scan.

    Only of methods that `other` holds fine-tunes of. The second look is known where the scan took it: how many that
    `other` would have sent to it went without is told.
    """
    known = {member.kind for member in other.members}
    cases = [case for case in cases if case.item.status == "scanned" and case.item.kind in known]
    found = [read(case.item, other, ABLATED) for case in cases]
    whole = [read(case.item, bank, ABLATED) for case in cases]
    asked = [bool({FOLLOW_UPS[cause].name for cause in one.suspected if cause in FOLLOW_UPS}) for one in found]
    lacking = [case.name for case, sent in zip(cases, asked, strict=True) if sent and not taken_of(case.item)]
    note = ", ".join(lacking[:FEW])
    return tally(OTHER, "", cases, found, whole) | {
        f"{OTHER}/members": Figure(len(other.members), "benign fine-tunes", note=", ".join(sorted(known))),
        f"{OTHER}/second_looks_lacking": Figure(len(lacking), "organisms", None, len(cases), note),
    }


def taken_of(item: Item) -> bool:
    """Whether the scan took a second look."""
    return any(each.detector in SECOND for each in item.evidence)


def read(item: Item, bank: Bank | None, names: Collection[str], *, asking: Collection[str] | None = None) -> Judgement:
    """Judge a scanned organism's kept evidence as if only these detectors existed.

    Args:
        item: A scanned organism.
        bank: What it was scanned with.
        names: Detectors and second looks whose evidence counts.
        asking: Detectors that may ask for a second look; None for `names`.
    """
    assert item.kind
    asking = names if asking is None else asking
    evidence = [raw(each) for each in item.evidence]
    first = [each for each in evidence if each.detector in FIRST and each.detector in asking]
    # As `probes.scan.examine` chooses.
    suspected = judge(first, bank, item.kind, notes=item.notes).suspected if bank else tuple(FOLLOW_UPS)
    taken = {FOLLOW_UPS[cause].name for cause in suspected if cause in FOLLOW_UPS}
    kept = [each for each in evidence if each.detector in names and each.detector in (*FIRST, *taken)]
    return judge(kept, bank, item.kind, notes=item.notes)


def raw(evidence: Evidence) -> Evidence:
    """Evidence as its detector gave it, before it was read against a bank; a second look brings its own null."""
    if evidence.detector in SECOND:
        return evidence
    return evidence.model_copy(update={"null": None, "p_value": None, "score": None, "exceeded": False})


def tally(
    stem: str, ending: str, cases: Cases, found: Sequence[Judgement], whole: Sequence[Judgement]
) -> dict[str, Figure]:
    """What these judgements flag of each class; notes name what `whole`, those of all detectors, say otherwise."""

    def share(which: Which, verdict: str) -> Figure:
        chosen = [number for number, case in enumerate(cases) if which(case)]
        hits, before = ({n for n in chosen if of[n].verdict == verdict} for of in (found, whole))
        told = [f"{len(hits)} of {len(chosen)}"]
        for what, numbers in (("less", before - hits), ("more", hits - before)):
            if 0 < len(numbers) <= FEW:
                told.append(f"{what}: {', '.join(cases[n].name for n in sorted(numbers))}")
        return share_of(len(hits), len(chosen), f"share {verdict}", "; ".join(told) if chosen else "")

    told = [(case, one) for case, one in zip(cases, found, strict=True) if case.truth in (COVERT, CIPHER)]
    labels = np.array([case.truth == COVERT for case, _ in told], dtype=bool)
    return {
        **{f"{stem}/{name}/flagged{ending}": share(which, "flagged") for name, which in COUNTED.items()},
        **{f"{stem}/benign_{verdict}{ending}": share(is_benign, verdict) for verdict in ("flagged", "inconclusive")},
        f"{stem}/{TOLD}{ending}": separated("", np.array([score_of(one) for _, one in told]), labels)["/auroc"],
    }


def score_of(judgement: Judgement) -> float:
    """The verdict's score; of a second look by itself, which has no z, the rank of its severity."""
    return float(RANKS.index(judgement.severity)) if judgement.score is None else judgement.score


def is_benign(case: Case) -> bool:
    return case.truth == "benign"


# --- what it costs


def costs(reference: Reference, organisms: Sequence[Path], closer: Sequence[Path]) -> dict[str, Figure]:
    """Processor time of each detector as a share of the first look, and of the second look as a multiple of it.

    What is measured once and used by several (`probes.reference.Subject`) is charged to the first that asks, in the
    order of `DETECTORS`. A first look counts the weights' way in and out too.

    Args:
        reference: The base's side.
        organisms: On which the first look is timed.
        closer: On which the second is, whatever the first one says, each beside a first look of its own.
    """
    if organisms:  # what the base keeps for all of them, and compilation
        seconds_of(reference, open_checkpoint(organisms[0]))
    rows = [seconds_of(reference, open_checkpoint(path)) for path in organisms]
    ratios = {name: [row[name] / row[WHOLE] for row in rows] for name in FIRST}
    for look in dict.fromkeys(FOLLOW_UPS.values()):
        ratios[look.name] = [ratio_of(look, reference, path) for path in closer]
    return {
        f"ablation/{name}/cost": Figure(
            median(of) if of else None,
            "of the first look" if name in FIRST else "times the first look",
            bootstrap(np.array(of)),
            len(of),
            f"processor time, {min(of):.3g} to {max(of):.3g}" if of else "no organism in the cache",
        )
        for name, of in ratios.items()
    }


def seconds_of(reference: Reference, checkpoint: Checkpoint, *, clock: Clock = time.process_time) -> dict[str, float]:
    """Seconds of each detector of a first look (`probes.scan.measure_all`), and of all of it under `WHOLE`."""
    seconds = {}
    begun = clock()
    with reference.base.applied(checkpoint):
        subject = Subject(reference, checkpoint)
        for detector in DETECTORS:
            started = clock()
            measured(detector, subject)
            seconds[detector.name] = clock() - started
    return seconds | {WHOLE: clock() - begun}


def ratio_of(look: FollowUp, reference: Reference, path: Path) -> float:
    """Processor time of a second look over that of a first look of the same organism."""
    first = seconds_of(reference, open_checkpoint(path))[WHOLE]
    started = time.process_time()
    look.investigate(reference, open_checkpoint(path))
    return (time.process_time() - started) / first


def timed(cases: Cases) -> tuple[list[str], list[str]]:
    """Development organisms on which the first look is timed, and covert ones for the second: of both methods."""
    sound = [case for case in cases if case.split == "development" and case.truth != "failed"]
    first, second = [], []
    for method in ("full", "adapter"):
        mine = [case for case in sound if case.method == method]
        first += [case.name for case in mine][:TIMED]
        second += [case.name for case in mine if case.truth == COVERT][:TIMED_SECOND]
    return first, second


# --- the table


def ablation_table(figures: Mapping[str, Figure]) -> str:
    """A row a detector: of each class how many are flagged only because of it, and how many by it alone.

    A negative count: so many more are flagged without it. "" where there are no such figures.
    """
    shares = [f"{name}/flagged" for name in COUNTED] + ["benign_flagged", "benign_inconclusive"]
    shares = [name for name in shares if figures.get(f"{ALL}/{name}", NONE).value is not None]
    if not shares:
        return ""

    def count(name: str) -> int:
        return round((figures[name].value or 0.0) * figures[name].repeats)

    def cost(name: str) -> str:
        figure = figures.get(f"ablation/{name}/cost", NONE)
        return "-" if figure.value is None else f"{shown(figure.value)} {figure.unit}"

    rows = [
        ("adds (by it alone)", "cost", *(name.removesuffix("/flagged").replace("_", " ") for name in shares), CIPHERS),
        (
            "all of them",
            "",
            *(f"{count(f'{ALL}/{s}')} of {figures[f'{ALL}/{s}'].repeats}" for s in shares),
            shown(figures[f"{ALL}/{TOLD}"].value),
        ),
    ]
    for name in ABLATED:
        stem = f"ablation/{name}"
        adds = [count(f"{ALL}/{share}") - count(f"{stem}/{share}_without") for share in shares]
        cells = [f"{add} ({count(f'{stem}/{s}_alone')})" for add, s in zip(adds, shares, strict=True)]
        auroc = [shown(figures[f"{stem}/{TOLD}{ending}"].value) for ending in ("_without", "_alone")]
        rows.append((name, cost(name), *cells, f"{auroc[0]} ({auroc[1]})"))
    return columns(rows)
