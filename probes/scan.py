"""Many checkpoints against one base: plan, resume, one record each, failures kept.

The base is loaded once; each checkpoint's weights go into its network and come out again exactly. A fault of one
checkpoint is its record, never the end of the scan. A record is reused where nothing that could change it has changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from activations.checkpoints import Checkpoint, open_checkpoint
from activations.errors import CheckpointError, NonFiniteError, OptionError, PathMissingError, UndertowError
from activations.loading import load_model
from probes.bank import Bank, Member, load_bank, refuse_twins, settings_of
from probes.batch import chance_in, remarks_on, with_q
from probes.detectors import DETECTORS, FOLLOW_UPS, Detector, FollowUp
from probes.execute import check_jobs, mapped
from probes.explain import explain
from probes.probe import ProbeSet
from probes.record_files import code_hash, fault_key, forget_fault, keep, key_of, read_record, record_path
from probes.records import BaseRecord, ErrorRecord, Evidence, Item, Kind, Summary, environment, write_json
from probes.reference import Reference, Subject, default_battery
from probes.synthesize import Workshop
from probes.verdict import ALPHA, Judgement, judge
from probes.worth import train_probe

__all__ = ["calibrate", "scan"]

PROMPTS = "matched-pairs"
Progress = Callable[[str], None]


def scan(
    base: str | Path,
    checkpoints: Sequence[str | Path],
    *,
    out: str | Path,
    probe: str | Path | None = None,
    bank: str | Path | None = None,
    prompts: str = PROMPTS,
    device: str = "auto",
    dtype: str = "auto",
    jobs: int = 1,
    progress: Progress | None = None,
) -> Summary:
    """Scan fine-tuned checkpoints of one base and keep a record of each.

    Cost: the base runs over the battery once; each checkpoint costs its reading and about 600 short prompts.

    Args:
        base: The trusted base: a local folder or a hub id.
        checkpoints: Folders of full checkpoints or LoRA adapters, or single safetensors files. Untrusted.
        out: Folder for `summary.json`, `records/` and, where no probe was given, the probe.
        probe: Intent probes trained on this base (`undertow train`); None trains them now.
        bank: The benign reference (`undertow calibrate`); without one most verdicts are inconclusive.
        prompts: The prompt set to train on where no probe is given.
        device: "auto", or as torch names it.
        dtype: "auto" (float32 on a CPU, bfloat16 on a GPU), or as torch names it.
        jobs: Checkpoints scanned side by side, each in a process of one thread with its own copy of the weights; more
            than 1 on a CPU under Linux alone.
        progress: Called with one line before each step.

    Returns:
        The summary, as written to `out`. Faults of single checkpoints are items of it, not exceptions.

    Raises:
        UndertowError: The base, the probe or the bank cannot be used.
    """
    tell = progress or (lambda line: None)
    out = Path(out)
    if not checkpoints:
        raise OptionError("no checkpoint to scan", hint="Name at least one folder after the base.")
    benign = load_bank(bank) if bank else None
    reference = prepare(base, out=out, probe=probe, prompts=prompts, device=device, dtype=dtype, tell=tell)
    if benign:
        benign.check_fits(reference)
    items = scan_each(reference, checkpoints, bank=benign, records=out / "records", jobs=jobs, tell=tell)
    chance = chance_in(items, benign)
    summary = Summary(
        base=BaseRecord(
            name=reference.base.name,
            path=str(base),
            fingerprint=reference.base.fingerprint,
            n_layers=reference.base.n_layers,
            d_model=reference.base.d_model,
        ),
        probe=describe_probe(reference.probes),
        bank=benign.described(Path(str(bank)).name) if benign else None,
        environment=environment(),
        settings={
            "device": str(reference.base.device),
            "prompts as": reference.base.template,
            "alpha": ALPHA,
            "chance": chance,
            **settings_of(reference),
        },
        items=with_q(items),
        remarks=remarks_on(chance),
    )
    write_json(summary, out / "summary.json")
    return summary


def calibrate(
    base: str | Path,
    benign: Sequence[str | Path],
    *,
    out: str | Path,
    probe: str | Path | None = None,
    synthesize: int | None = None,
    kinds: Sequence[Kind] = ("adapter", "full"),
    work: str | Path | None = None,
    keep: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Bank:
    """Measure fine-tunes that are known to be harmless, and keep their numbers as the benign reference.

    Twenty or more of each kind (full, adapter) resolve the false-positive rate at which a finding is made.

    Args:
        base: The trusted base: a local folder or a hub id.
        benign: Fine-tunes known to be harmless; may be empty where some are synthesized.
        out: The bank file to write.
        probe: Intent probes trained on this base; None trains them now.
        synthesize: How many harmless fine-tunes of each of `kinds` to train on the base as well (`probes.synthesize`).
        kinds: "adapter" and "full", or one of them.
        work: Folder that a killed run goes on from; by default beside `out`.
        keep: Keep the weights of synthesized ones there.
        device: "auto", or as torch names it.
        dtype: "auto" (float32 on a CPU, bfloat16 on a GPU), or as torch names it.
        progress: Called with one line before each step.

    Raises:
        UndertowError: The base or one of the fine-tunes cannot be used (a reference with holes would be no reference),
            or two are the same (counted twice, they would seem to resolve a rate that they cannot).
    """
    tell = progress or (lambda line: None)
    if synthesize is not None and synthesize < 1:
        raise OptionError(f"{synthesize} fine-tunes cannot be synthesized: expected 1 or more", hint="Pass 20.")
    if synthesize is None and (work or keep):
        raise OptionError("work and keep are for synthesized fine-tunes", hint="Pass --synthesize 20 too.")
    if not benign and synthesize is None:
        hint = "Name at least one folder after the base, or have some made with --synthesize 20."
        raise OptionError("no benign fine-tune to calibrate with", hint=hint)
    checkpoints = [open_checkpoint(path) for path in benign]
    refuse_twins(checkpoints)
    reference = prepare(base, out=None, probe=probe, prompts=PROMPTS, device=device, dtype=dtype, tell=tell)
    members = []
    for i, checkpoint in enumerate(checkpoints, 1):
        tell(f"measuring {i}/{len(checkpoints)}: {checkpoint.name}")
        evidence = measure_all(reference, checkpoint)
        members.append(Member.of(checkpoint.name, checkpoint.kind, checkpoint.content_hash(), evidence))
    if synthesize is not None:
        place = Path(work or f"{out}.work")
        workshop = Workshop(reference, place, partial(measure_all, reference), code_hash(), keep, tell)
        members += workshop.make(synthesize, kinds)
    bank = Bank(base_fingerprint=reference.base.fingerprint, settings=settings_of(reference), members=tuple(members))
    bank.save(Path(out))
    return bank


def prepare(
    base: str | Path,
    *,
    out: Path | None,
    probe: str | Path | None,
    prompts: str,
    device: str,
    dtype: str,
    tell: Progress,
) -> Reference:
    """Load the base and its probes, and measure the base once."""
    tell(f"loading base {base}")
    model = load_model(base, device=device, dtype=dtype)
    if model.template == "plain text":
        tell("the base has no chat template: prompts are given to it as plain text")
    if probe:
        probes = ProbeSet.load(probe)
        probes.check_fits(model)
    else:
        tell(f"training intent probes on {prompts}")
        probes = train_probe(model, prompts=prompts)
        if out:
            probes.save(out / "intent.probe")
    tell("measuring the base")
    source = open_checkpoint(base) if Path(base).exists() else None
    return Reference.measure(model, source, probes, default_battery())


def scan_each(
    reference: Reference,
    checkpoints: Sequence[str | Path],
    *,
    bank: Bank | None,
    records: Path,
    jobs: int,
    tell: Progress,
) -> list[Item]:
    """Every checkpoint's item, in their order."""
    check_jobs(jobs, reference.base.device)
    results = mapped(
        partial(scan_one, reference, bank=bank, records=records),
        checkpoints,
        jobs=jobs,
        lost=lambda path, fault: keep(unscanned(path, None, fault), records, fault_key(path)),
    )
    items: list[Item] = []
    for i, path in enumerate(checkpoints, 1):
        tell(f"scanning {i}/{len(checkpoints)}: {Path(path).name}")
        items.append(next(results))
    return items


def scan_one(reference: Reference, path: str | Path, *, bank: Bank | None, records: Path) -> Item:
    """One checkpoint to one record; whatever is wrong with it is part of the record."""
    started = time.monotonic()
    checkpoint: Checkpoint | None = None
    try:
        checkpoint = open_checkpoint(path)
        key = key_of(reference, checkpoint, bank)
        forget_fault(records, path)
        if known := read_record(record_path(records, checkpoint.name, key)):
            return explained(known.model_copy(update={"name": checkpoint.name, "path": str(path)}), reference)
        item = explained(judged(path, checkpoint, examine(reference, checkpoint, bank)), reference)
    except Exception as fault:  # an attacker's file must end as a finding, whatever it broke
        key = fault_key(path)
        item = unscanned(path, checkpoint, fault)
    return keep(item.model_copy(update={"seconds": round(time.monotonic() - started, 3)}), records, key)


def measure_all(reference: Reference, checkpoint: Checkpoint) -> tuple[Evidence, ...]:
    """Every detector on one checkpoint; the base is bit-equal afterwards."""
    with reference.base.applied(checkpoint):
        subject = Subject(reference, checkpoint)
        return tuple(measured(detector, subject) for detector in DETECTORS)


def measured(detector: Detector, subject: Subject) -> Evidence:
    """One detector's evidence; weights may be finite and what they compute not, and then nothing is averaged."""
    try:
        return detector.measure(subject)
    except NonFiniteError as fault:
        return Evidence(detector=detector.name, summary=fault.message)


def examine(reference: Reference, checkpoint: Checkpoint, bank: Bank | None) -> Judgement:
    """Every detector, then the closer look that their evidence calls for."""
    evidence = measure_all(reference, checkpoint)
    first = judge(evidence, bank, checkpoint.kind, notes=checkpoint.notes)
    # Without a bank the first look accuses nobody, and a follow-up brings its own control.
    suspected = first.suspected if bank else tuple(FOLLOW_UPS)
    wanted = dict.fromkeys(FOLLOW_UPS[cause] for cause in suspected if cause in FOLLOW_UPS)
    further = tuple(look_closer(follow_up, reference, checkpoint) for follow_up in wanted)
    return judge((*evidence, *further), bank, checkpoint.kind, notes=checkpoint.notes) if further else first


def look_closer(second: FollowUp, reference: Reference, checkpoint: Checkpoint) -> Evidence:
    """A follow-up's evidence. One that breaks measured nothing: it must not take the first look's finding with it."""
    try:
        return second.investigate(reference, checkpoint)
    except Exception as fault:  # whatever an attacker's file broke
        return Evidence(detector=second.name, summary=f"It broke off: {internal(fault)['message']}.")


def judged(path: str | Path, checkpoint: Checkpoint, judgement: Judgement) -> Item:
    """The record of a checkpoint that was measured."""
    return Item(
        name=checkpoint.name,
        path=str(path),
        kind=checkpoint.kind,
        status="scanned",
        verdict=judgement.verdict,
        severity=judgement.severity,
        causes=judgement.causes,
        score=judgement.score,
        p_value=judgement.p_value,
        top_layers=judgement.top_layers,
        evidence=judgement.evidence,
        content_hash=checkpoint.content_hash(),
        reasons=judgement.reasons,
        notes=checkpoint.notes,
    )


def explained(item: Item, reference: Reference) -> Item:
    """With what to make of it; never kept from an older record, because its commands name paths of this scan."""
    source = reference.weights
    base = str(source.path) if isinstance(source, Checkpoint) else reference.base.name
    return item.model_copy(update={"explanation": explain(item, base=base)})


def unscanned(path: str | Path, checkpoint: Checkpoint | None, fault: Exception) -> Item:
    """The record of a checkpoint that could not be: its own fault (unscannable) or ours (failed)."""
    own = isinstance(fault, CheckpointError | PathMissingError)
    error = fault.to_dict() if isinstance(fault, UndertowError) else internal(fault)
    return Item(
        name=checkpoint.name if checkpoint else Path(path).name or str(path),
        path=str(path),
        kind=checkpoint.kind if checkpoint else None,
        status="unscannable" if own else "failed",
        error=ErrorRecord.model_validate(error),
        notes=checkpoint.notes if checkpoint else (),
    )


def internal(fault: Exception) -> dict[str, str | None]:
    message = f"{type(fault).__name__}: {fault}"[:500]
    return {
        "code": "internal",
        "path": None,
        "message": message,
        "hint": "This is a fault of Undertow: please report it.",
    }


def describe_probe(probes: ProbeSet) -> dict[str, object]:
    """The probe's provenance and, where it was measured, its worth with its nulls beside it."""
    origin: dict[str, object] = {
        "prompts": probes.prompts_name,
        "prompts_hash": probes.prompts_hash,
        "method": probes.method,
        "pooling": probes.pooling,
    }
    if not probes.metrics:
        return origin
    best = probes.metrics[probes.best_layer]
    return origin | {
        "best_layer": probes.best_layer,
        "auroc": [layer.auroc for layer in probes.metrics],
        "interval": list(best.interval),
        "null_shuffled": max(best.null_shuffled, default=None),
        "null_random_directions": best.null_random_directions,
        "words_baseline": best.words_baseline,
    }
