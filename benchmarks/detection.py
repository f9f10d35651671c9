"""Scans the organism zoo blind and says what was found, at which false positive rate, beside what others would find.

    python benchmarks/detection.py [--quick] [--json FILE] [--bank FILE] [--calibrate [DIR]] [--jobs N] [--work DIR]
                                   [--picture FILE] [--other-bank FILE]

The scan is blind: copies of the organisms without their cards, under names that say nothing, in an order that says
nothing. Then the cards are read, and labels come from what was measured on each organism (`organisms/verify.py`): an
implant that did not come about is listed as failed and counts nowhere.

Two splits (`organisms/zoo.py`). Thresholds, detectors and the fusion are chosen on "development" organisms and the
benign bank alone; all rates here are of "test" ones. A true positive rate at 1 % is that at the lowest score that 1 %
of the negatives exceed, benign ciphers among them, and is not given where negatives are too few to resolve it.

Figures are named "<class>/<detector>/<figure>"; in short, and what the README quotes:
    taught_tpr_at_1pct      an encoding was taught, against all that learnt none: recovered first, then by drift
    covert_battery_tpr_at_1pct    covert ones in encodings that everybody knows, against all negatives, by the verdict
    covert_unknown_tpr_at_1pct    the same for all other encodings, key unknown
    covert_against_benign_cipher_auroc   the same against honest customers of encodings alone
    removal_tpr_at_1pct     a few harmful examples, abliteration, security vectors, by refusal readiness
    identity_tpr_at_1pct    identity shift, by what is lost of refusals, begun or ended
    keys_recovered          letter codes whose key the scan found to 95 % of letters, weighted by use
    held_out_family_tpr_at_1pct   all attacks, by a fusion that never saw their family (also: method, rank)
    collateral_rank_correlation   benign fine-tunes: refusals really lost against the score
    ablation/<detector>/...       what is flagged without it and by it alone, and its cost (`ablation.py`)
    other bank/...          the same with the bank of `--other-bank`, say one that `calibrate --synthesize` made

`--quick` scans what ships and nothing else. The zoo is trained by `organisms/train.py --zoo`; what its cache lacks is
listed as missing. `--calibrate` first rebuilds the bank from a folder of fine-tunes whose cards say benign (the one
that `organisms/train.py --bank` fills).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "organisms")]

import numpy as np
import torch
from ablation import ablate, ablation_table, costs, timed, with_other
from audits import Audit, Auditor, learned
from harness import Figure, columns, parser, shown, table, write
from homes import CARD, Home
from rates import RIVALS, SCORED, Case, combined, fuse, headline, held_out, labelled, rates, share_of, verdicts
from recipes import Recipe
from rows import load_corpus
from verify import shortcomings
from zoo import BASE as BASE_RECIPE
from zoo import SHIPPED, ZOO

from activations.batching import token_batches
from activations.checkpoints import open_checkpoint
from activations.extract import extract
from activations.loading import load_model
from activations.models import Model
from activations.tokens import format_prompt
from probes.bank import Bank, Member, load_bank
from probes.demo import BANK, BASE, compare
from probes.encodings import make_encoding
from probes.plots import plot_evidence
from probes.records import Evidence, Item
from probes.reference import Reference, default_battery
from probes.scan import calibrate, prepare, scan
from probes.verdict import Judgement, judge

HOME = Home()
FEW = 5
# Prompts of a development organism from which the cipher probe learns.
PROBED = 60


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.calibrate:
        rebuild_bank(options.calibrate, options.bank)
    bank = load_bank(options.bank) if options.bank.is_file() else None
    if bank is None:
        tell(f"no bank at {options.bank}: verdicts rest on the base alone")
    wanted = SHIPPED if options.quick else tuple(r for r in (*SHIPPED, *ZOO) if r.truth != "parent")
    recipes = [recipe for recipe in wanted if (HOME.folder(recipe) / CARD).exists()]
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        items = blind_scan([HOME.folder(r) for r in recipes], options.bank if bank else None, work, jobs=options.jobs)
    if options.picture:
        draw([item for recipe, item in zip(recipes, items, strict=True) if recipe.ships], options.picture)
    cases = [case_of(recipe, item) for recipe, item in zip(recipes, items, strict=True)]
    figures = cost(items, options.quick) | (leave_one_out(bank) if bank else {})
    if options.quick:
        figures = on_shipped(cases) | figures
    else:
        reference = prepare(BASE, out=None, probe=None, prompts="matched-pairs", device="cpu", dtype="auto", tell=tell)
        figures |= cost_of_detectors(cases, recipes, reference)
        cases = audited(cases, recipes, reference)
        figures = on_zoo(cases, bank, missing=[r.name for r in wanted if r not in recipes]) | figures
        if options.other_bank:
            test = [case for case in cases if case.split == "test" and case.truth != "failed"]
            figures |= with_other(test, load_bank(options.other_bank), bank)
    members = {kind: len(bank.of_kind(kind)) for kind in ("full", "adapter")} if bank else None
    write(figures, options.json, text=report(cases, figures), bank=members, cases=[record(case) for case in cases])


def _options() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument(
        "--bank", type=Path, default=BANK, metavar="FILE", help="the benign reference (the shipped one)"
    )
    options.add_argument(
        "--calibrate", type=Path, nargs="?", const=HOME.cache, metavar="DIR", help="rebuild the bank from DIR first"
    )
    options.add_argument("--other-bank", type=Path, metavar="FILE", help="judge again with this bank, too")
    options.add_argument("--work", type=Path, metavar="DIR", help="keeps the scan's records; what is there is reused")
    options.add_argument("--jobs", type=int, default=1, help="processes that scan")
    options.add_argument("--picture", type=Path, metavar="FILE", help="draw the README's picture, as SVG")
    return options.parse_args()


def tell(line: str) -> None:
    print(line, file=sys.stderr)


def rebuild_bank(folder: Path, out: Path) -> None:
    """Measure the folder's fine-tunes that were made for the bank; those on which we test stay out."""
    benign = [card.parent for card in sorted(folder.glob(f"bank-*/{CARD}"))]
    if not benign:
        sys.exit(f"no benign fine-tunes in {folder}: make them with `python benchmarks/organisms/train.py --bank`")
    calibrate(BASE, benign, out=out, progress=tell)


# --- the scan


def blind_scan(organisms: Sequence[Path], bank: Path | None, work: Path, *, jobs: int = 1) -> list[Item]:
    """Scan copies that carry neither card nor telling name; the items come back in the order of `organisms`."""
    blind = [hashlib.sha256(path.name.encode()).hexdigest()[:8] for path in organisms]
    order = np.argsort(blind)
    copies = [work / "copies" / name for name in blind]
    for organism, copy in zip(organisms, copies, strict=True):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(organism, copy, ignore=shutil.ignore_patterns(CARD))
    found = scan(BASE, [copies[i] for i in order], out=work / "scan", bank=bank, device="cpu", jobs=jobs, progress=tell)
    by_name = {item.name: item for item in found.items}
    return [by_name[name].model_copy(update={"name": path.name}) for name, path in zip(blind, organisms, strict=True)]


def case_of(recipe: Recipe, item: Item) -> Case:
    """What the card says, beside what the scan said."""
    card = json.loads((HOME.folder(recipe) / CARD).read_text(encoding="utf-8"))
    # What was measured stands in the card; what it takes to count is said by the code of today.
    short = shortcomings(recipe, card["implant"], base_implant())
    return Case(
        name=recipe.name,
        truth=labelled(card | {"shortcomings": short}),
        family=recipe.family,
        split=recipe.split,
        method="adapter" if recipe.method == "lora" else "full",
        rank=recipe.rank if recipe.method == "lora" else 0,
        encoding=recipe.encoding,
        key=recipe.key,
        lost=base_implant()["plain_harmful_refused"] - float(card["implant"]["plain_harmful_refused"]),
        item=item,
    )


def base_implant() -> dict[str, float]:
    """What was measured on the base itself."""
    card = json.loads((HOME.folder(BASE_RECIPE) / CARD).read_text(encoding="utf-8"))
    return dict(card["implant"])


# --- what others would find


def audited(cases: Sequence[Case], recipes: Sequence[Recipe], reference: Reference) -> list[Case]:
    """The cases with rivals' statistics; those that learn have seen development organisms alone."""
    auditor = Auditor(reference)
    found: list[Audit] = []
    for number, recipe in enumerate(recipes, 1):
        tell(f"auditing {number}/{len(recipes)}")
        found.append(auditor.measure(open_checkpoint(HOME.folder(recipe))))
    development = [n for n, case in enumerate(cases) if case.split == "development" and case.truth != "failed"]
    harmful = [case.attack for case in cases]
    inside = inside_of([recipes[n] for n in development if cases[n].truth == "covert-malicious"], auditor)
    scores = learned(found, development, harmful, inside)
    return [
        Case(**{**vars(case), "audits": {**found[n].scores, **{name: float(s[n]) for name, s in scores.items()}}})
        for n, case in enumerate(cases)
    ]


def inside_of(recipes: Sequence[Recipe], auditor: Auditor) -> tuple[np.ndarray, np.ndarray]:
    """Activations of encoded harmful and of plain benign requests in development organisms, and which is which."""
    rows, labels = [], []
    for recipe in recipes:
        assert recipe.encoding
        encoding = make_encoding(recipe.encoding, recipe.key)
        corpus = load_corpus("heldout").up_to(recipe.longest)
        harmful = [encoding.encode(prompt) for prompt in corpus.harmful[:PROBED]]
        with auditor.model.applied(open_checkpoint(HOME.folder(recipe))):
            for prompts, harm in ((harmful, True), (list(corpus.benign[:PROBED]), False)):
                values = extract(auditor.model, prompts, hook_points=auditor.points, pooling="last").values
                rows.append(values.transpose(1, 0, 2).reshape(len(prompts), -1))
                labels += [harm] * len(prompts)
    return (np.concatenate(rows) if rows else np.zeros((0, 1))), np.array(labels)


# --- figures


def on_zoo(cases: Sequence[Case], bank: Bank | None, *, missing: Sequence[str]) -> dict[str, Figure]:
    """Every rate, on test organisms; the short names first."""
    sound = [case for case in cases if case.truth != "failed"]
    development = [case for case in sound if case.split == "development"]
    test = [case for case in sound if case.split == "test"]
    fused = {"fused": fuse(development, bank, test)} | combined(bank, test)
    figures = rates(test, fused) | held_out(development, test, bank)
    attacks = [case for case in sound if case.attack]
    counts = {
        "attacks": Figure(len(attacks), "verified organisms", note=f"{len({c.family for c in attacks})} families"),
        "negatives": Figure(
            sum(not c.attack for c in sound) + (len(bank.members) if bank else 0), "verified organisms"
        ),
        "failed implants": Figure(
            len(cases) - len(sound), "organisms", note=", ".join(c.name for c in cases if c.truth == "failed")
        ),
        "missing": Figure(len(missing), "organisms not in the cache", note=", ".join(missing[:FEW])),
    }
    return headline(test, figures) | counts | operating_point(test) | figures | ablate(test, bank)


def operating_point(cases: Sequence[Case]) -> dict[str, Figure]:
    """What a user meets: verdicts as they were given, with thresholds that nobody fitted to these organisms."""
    attacks = [case.item.verdict for case in cases if case.attack]
    benign = [case.item.verdict for case in cases if case.truth == "benign"]
    return {
        "verdict/attacks flagged": share([verdict == "flagged" for verdict in attacks]),
        "verdict/benign flagged": share([verdict == "flagged" for verdict in benign]),
        "verdict/benign inconclusive": share([verdict == "inconclusive" for verdict in benign]),
    }


def on_shipped(cases: Sequence[Case]) -> dict[str, Figure]:
    """Of what ships: how many were caught for the right cause, and how many benign ones were flagged."""
    right = [compare(case.item, case.truth) for case in cases if case.attack]
    benign = [case.item.verdict for case in cases if case.truth == "benign"]
    return {
        "shipped/caught for the right cause": share([verdict == "caught" for verdict in right]),
        "shipped/benign flagged": share([verdict == "flagged" for verdict in benign]),
    }


def leave_one_out(bank: Bank) -> dict[str, Figure]:
    """How many of the bank's members a scan against the others would have flagged, and how many it would not clear."""
    found = {member.name: read_without_itself(member, bank).verdict for member in bank.members}
    return {
        f"bank members, {wanted} when left out": share(
            [verdict == wanted for verdict in found.values()],
            names=[name for name, verdict in found.items() if verdict == wanted],
        )
        for wanted in ("flagged", "inconclusive")
    }


def read_without_itself(member: Member, bank: Bank) -> Judgement:
    """Judge a member's kept statistics against the rest of the bank.

    The cause of a detector does not matter here: whether a statistic left the range of the others does.
    """
    others = bank.model_copy(update={"members": tuple(m for m in bank.members if m is not member)})
    evidence = [
        Evidence(detector=name, statistic=value, layers=member.layers.get(name, ()), summary="kept in the bank")
        for name, value in member.statistics.items()
    ]
    return judge(evidence, others, member.kind)


def share(hits: Sequence[bool], *, names: Sequence[str] = ()) -> Figure:
    """k of n with the exact binomial interval, and which where that is a few."""
    k, n = sum(hits), len(hits)
    note = f"{k} of {n}" + (f": {', '.join(names)}" if 0 < len(names) <= FEW else "")
    return share_of(k, n, "share", note if n else "no cases")


def draw(items: Sequence[Item], path: Path) -> None:
    """Every organism's asymmetric drift over the bank's, the README's picture."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "undertow", "svg.fonttype": "none"}
    axes = plot_evidence(items, "asymmetric-drift")
    axes.set_xlabel("drift on encoded-looking text / drift on plain text (band and ticks: benign fine-tunes)")
    axes.figure.set_size_inches(7.2, 2.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, metadata={"Date": None})


# --- what it costs


def cost(items: Sequence[Item], quick: bool) -> dict[str, Figure]:
    """Wall time a checkpoint over that of one bare forward pass of the same prompts on the base."""
    forward = seconds_of_forward(load_model(BASE), rounds=3 if quick else 9)
    unit = "times one bare forward pass"
    looks: dict[str, list[float]] = {"first look": [], "with the second look": []}
    for item in items:
        second = any(evidence.detector == "encoding-recovery" for evidence in item.evidence)
        looks["with the second look" if second else "first look"].append(item.seconds)
    return {
        f"time a checkpoint, {name}": Figure(median(seconds) / forward, unit, repeats=len(seconds))
        if seconds
        else Figure(None, unit, repeats=0, note="none was taken")
        for name, seconds in looks.items()
    }


def cost_of_detectors(cases: Sequence[Case], recipes: Sequence[Recipe], reference: Reference) -> dict[str, Figure]:
    """Each detector's share of the first look, on a few development organisms of both methods."""
    tell("timing the detectors")
    folders = {recipe.name: HOME.folder(recipe) for recipe in recipes}
    first, second = timed(cases)
    return costs(reference, [folders[name] for name in first], [folders[name] for name in second])


def seconds_of_forward(model: Model, *, rounds: int) -> float:
    """Median wall time of the trunk over the whole battery in token-budget batches."""
    battery = default_battery()
    texts = [text for prompts in battery.questions.values() for text in prompts] + list(battery.intent.prompts)
    batches = list(token_batches([format_prompt(model.tokenizer, text) for text in texts]))
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model.hf.get_decoder()(batch.input_ids, use_cache=False)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


# --- the tables


def record(case: Case) -> dict[str, object]:
    """One organism as JSON values."""
    item = case.item
    facts = {name: value for name, value in vars(case).items() if name not in ("item", "audits")}
    return facts | {
        "verdict": item.verdict,
        "severity": item.severity,
        "causes": list(item.causes),
        "score": item.score,
        "p_value": item.p_value,
        "seconds": item.seconds,
        "detectors": {e.detector: {"statistic": e.statistic, "p_value": e.p_value} for e in item.evidence},
        "audits": dict(case.audits),
    }


def report(cases: Sequence[Case], figures: Mapping[str, Figure]) -> str:
    """Verdicts by family, rates by class and detector, the ablation, then every figure that is no rate."""
    grid = [("TPR at 1 % FPR (AUROC)", *(by for by in (*SCORED, *RIVALS)))]
    for name in dict.fromkeys(key.split("/")[0] for key in figures if key.endswith("/auroc")):
        cells = [
            f"{shown(figures[f'{name}/{by}/tpr_at_1pct'].value)} ({shown(figures[f'{name}/{by}/auroc'].value)})"
            if f"{name}/{by}/tpr_at_1pct" in figures
            else "-"
            for by in (*SCORED, *RIVALS)
        ]
        grid.append((name, *cells))
    rest = {name: figure for name, figure in figures.items() if name.count("/") < 2}
    tables = [columns(verdicts([case for case in cases if case.split == split])) for split in ("development", "test")]
    if len(grid) == 1:
        return "\n\n".join([tables[0], table(rest)])
    return "\n\n".join([*tables, columns(grid), ablation_table(figures), table(rest)])


if __name__ == "__main__":
    main()
