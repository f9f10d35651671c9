"""Can intent be told from refusal and from "is encoded" on the shipped base, and does the direction cause refusals?

    python benchmarks/hygiene.py [--quick] [--json FILE]

Probes are fitted on matched-pairs (plain), nuisances read off the same prompts plain, under fresh letter permutations
and as gibberish; everything is measured on the JailbreakBench twins, which nothing was fitted on. Nuisances: "refusal"
(log-odds of beginning one), "refused" (whether they are above 0), "encoded" and "length" (log of the tokens).

Figures are named "layer <n>/<cleaning>/<figure>"; "raw" is no cleaning, "... altogether" is `keep_shared=False`:
    intent_auroc_twins    AUROC for intent on the plain twins
    refused_*, length_*   AUROC of the scores for the nuisance within one intent class, plain twins: 0.5 is clean
    encoded_*             the same for plain against permuted twins
    <nuisance>_cosine     with the nuisance's own direction, whitened within the classes: 0 is clean
and "layer <n>/<direction>/causal_...": change of the refusal log-odds (nats) on the screening prompts that adding a
direction makes on benign ones, its opposite and its ablation on harmful ones. The length added is that between the
class means. p-values are shares of random directions that do as much: "even" ones, and "like" ones with the covariance
of activations. "mean difference, erased" is that of activations after the eraser of "project"; "refused" is the
difference of means of refused and other prompts: the positive control.

For fine-tunes that were taught an encoding: AUROC of the base's probes on screening prompts in that encoding, in the
fine-tune and in the base.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from harness import Figure, columns, parser, shown, write

from activations.checkpoints import open_checkpoint
from activations.extract import extract
from activations.loading import load_model
from activations.models import Model
from activations.prompts import PromptSet, load_prompts
from activations.tokens import format_prompt
from probes.causal import causal_effect, mean_difference, refusal_log_odds, steered
from probes.demo import BASE, HOME
from probes.encodings import encode_substitution, walnut_key
from probes.hygiene import Cleaned, Contamination, clean_probes, contamination
from probes.imitations import gibberish_like, permute_letters
from probes.metrics import auroc, auroc_interval
from probes.probe import ProbeSet
from probes.reference import Reference, default_battery
from probes.worth import train_probe

CACHE = Path(__file__).resolve().parent / "organisms" / "cache" / "nano"
TAUGHT = (HOME / "cmft-walnut53", HOME / "benign-cipher", CACHE / "cmft-key7", CACHE / "benign-cipher-key44")
CLEANINGS = {
    "project": ("project", True),
    "project altogether": ("project", False),
    "leace": ("leace", True),
    "leace altogether": ("leace", False),
    "joint": ("joint", True),
}
TRIED = ("raw", "project", "project altogether")
ENCODED_TASK = "T4"  # the system prompt under which the organisms were taught to answer in their encoding


@dataclass(frozen=True)
class Seen:
    """Prompts as the base has them: activations and labels of every version.

    Attributes:
        values: [layer, prompt, d_model].
        nuisances: Name to one value a prompt.
        plain: Prompts that are not encoded.
    """

    values: np.ndarray
    harmful: np.ndarray
    nuisances: dict[str, np.ndarray]
    groups: np.ndarray

    @property
    def plain(self) -> np.ndarray:
        return ~self.nuisances["encoded"]

    def only_plain(self) -> Seen:
        rows = self.plain
        nuisances = {name: self.nuisances[name][rows] for name in ("refused", "length")}
        return Seen(self.values[:, rows], self.harmful[rows], nuisances, self.groups[rows])


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    model = load_model(BASE)
    reference = base_reference(model)
    train = look(model, load_prompts("matched-pairs"), reference.refusal_tokens, seed=1, gibberish=True)
    test = look(model, load_prompts("jailbreakbench"), reference.refusal_tokens, seed=2, gibberish=False)
    cleaned = {name: clean(train, *how) for name, how in CLEANINGS.items()}
    probes = {"raw": cleaned["project"].raw, **{name: found.probes for name, found in cleaned.items()}}
    figures = baselines(test)
    for name, fitted in probes.items():
        figures |= hygiene(name, fitted, test)
    figures |= {
        f"layer {layer}/{name}/intent_auroc_train": Figure(
            reading.intent, "AUROC, cross-validated", reading.intent_interval
        )
        for name, found in cleaned.items()
        for layer, reading in enumerate(found.after)
    }
    layers = [1] if options.quick else range(model.n_layers)
    for layer in layers:
        figures |= causes(reference, train, directions(train, cleaned["project"], layer), layer, quick=options.quick)
        figures |= erased(reference, train, layer)
    for path in TAUGHT[:1] if options.quick else TAUGHT:
        figures |= taught(model, path, {name: probes[name] for name in TRIED})
    write(figures, options.json, text=report(figures))


def base_reference(model: Model) -> Reference:
    """The base on the battery; the probe it asks for is not used here."""
    probes = train_probe(model, prompts="jailbreakbench", method="mean_difference")
    return Reference.measure(model, open_checkpoint(BASE), probes, default_battery())


def look(model: Model, prompts: PromptSet, refusal_tokens: Sequence[int], *, seed: int, gibberish: bool) -> Seen:
    """Read every prompt plain and encoded."""
    versions = [list(prompts.prompts), permute_letters(prompts.prompts, seed=seed)]
    if gibberish:
        versions.append(gibberish_like(prompts.prompts, seed=seed))
    texts = [text for version in versions for text in version]
    ids = [format_prompt(model.tokenizer, text) for text in texts]
    odds = refusal_log_odds(model, ids, refusal_tokens)
    nuisances = {
        "refusal": odds,
        "refused": odds > 0,
        "encoded": np.arange(len(texts)) >= len(prompts),
        "length": np.log([len(prompt) for prompt in ids]),
    }
    harmful, groups = np.tile(prompts.labels, len(versions)), np.tile(prompts.pair_ids, len(versions))
    return Seen(extract(model, texts).values, harmful, nuisances, groups)


def clean(train: Seen, method: str, keep_shared: bool, *, folds: int = 5) -> Cleaned:
    return clean_probes(
        train.values,
        train.harmful,
        train.nuisances,
        groups=train.groups,
        intent_rows=train.plain,
        method=method,
        keep_shared=keep_shared,
        folds=folds,
    )


# --- what is read


def baselines(test: Seen) -> dict[str, Figure]:
    """What needs no probe: the base's own refusal as a score for intent, and how far the nuisance goes with intent."""
    plain, harmful = test.plain, test.harmful[test.plain]
    odds = test.nuisances["refusal"][plain]
    interval = auroc_interval(odds, harmful, groups=test.groups[plain])
    refused = test.nuisances["refused"]
    shares = {
        f"{name}/refused_{kind}": Figure(float(refused[rows & (test.harmful == truth)].mean()), "share of twins")
        for name, rows in (("plain", plain), ("encoded", ~plain))
        for kind, truth in (("harmful", True), ("benign", False))
    }
    return {"refusal/intent_auroc_twins": Figure(auroc(odds, harmful), "AUROC", interval), **shares}


def hygiene(name: str, probes: ProbeSet, test: Seen) -> dict[str, Figure]:
    """Every layer's intent and contamination on the twins."""
    plain = test.only_plain()
    among_plain = contamination(probes, plain.values, plain.harmful, plain.nuisances, groups=plain.groups)
    encoded = {"encoded": test.nuisances["encoded"]}
    among_all = contamination(probes, test.values, test.harmful, encoded, groups=test.groups, intent_rows=test.plain)
    figures = {}
    for layer, (own, with_encoded) in enumerate(zip(among_plain, among_all, strict=True)):
        at = f"layer {layer}/{name}"
        figures[f"{at}/intent_auroc_twins"] = Figure(own.intent, "AUROC", own.intent_interval)
        for nuisance, found in {**own.nuisances, **with_encoded.nuisances}.items():
            figures |= contaminated(f"{at}/{nuisance}", found)
    return figures


def contaminated(at: str, found: Contamination) -> dict[str, Figure]:
    return {
        f"{at}_harmful": Figure(found.harmful, "AUROC within harmful", found.harmful_interval),
        f"{at}_benign": Figure(found.benign, "AUROC within benign", found.benign_interval),
        f"{at}_cosine": Figure(found.cosine, "whitened cosine"),
    }


# --- what is caused


def directions(train: Seen, cleaned: Cleaned, layer: int) -> dict[str, np.ndarray]:
    """What is added and ablated; the mean difference comes first, its length is everyone's."""
    plain, harmful = train.values[layer, train.plain], train.harmful[train.plain]
    return {
        "mean difference": mean_difference(plain, harmful),
        "mean difference, erased": mean_difference(cleaned.erasers[layer](plain), harmful),
        "raw": cleaned.raw[layer].residual_direction,
        "project": cleaned.probes[layer].residual_direction,
        "refused": mean_difference(plain, train.nuisances["refused"][train.plain]),
    }


def causes(
    reference: Reference, train: Seen, tried: Mapping[str, np.ndarray], layer: int, *, quick: bool
) -> dict[str, Figure]:
    """Adding and ablating at one layer, for each direction against both kinds of random ones."""
    plain = train.values[layer, train.plain]
    count, alpha = 16 if quick else 48, float(np.linalg.norm(tried["mean difference"]))
    prompts = {name: list(reference.tokens[name])[:count] for name in ("harmful", "benign")}
    figures = {f"layer {layer}/alpha": Figure(alpha, "length in the stream", note="between the class means")}
    for name, direction in tried.items():
        effects = {
            kind: causal_effect(
                reference.base,
                direction,
                [f"blocks.{layer}.hook_resid_post"],
                prompts,
                refusal_tokens=reference.refusal_tokens,
                alpha=alpha,
                like=like,
            )
            for kind, like in (("even", None), ("like", plain))
        }
        for edit, where in (("added", "benign"), ("opposite", "harmful"), ("ablated", "harmful")):
            found = {kind: getattr(effect, edit)[where] for kind, effect in effects.items()}
            note = ", ".join(
                f"p {shown(e.p_value)} of {kind}, null {shown(min(e.null))} to {shown(max(e.null))}"
                for kind, e in found.items()
            )
            figures[f"layer {layer}/{name}/causal_{edit}_{where}"] = Figure(
                found["even"].change, "nats of refusal log-odds", repeats=count, note=note
            )
    return figures


def erased(reference: Reference, train: Seen, layer: int) -> dict[str, Figure]:
    """How much of the mean difference is left when refusal is erased, and what adding just that does.

    The figures of `causes` stretch it to the length of the whole difference, which says where it points and not how
    much of it there is.
    """
    plain, harmful = train.values[layer, train.plain], train.harmful[train.plain]
    prompts = list(reference.tokens["benign"])[:48]
    start = refusal_log_odds(reference.base, prompts, reference.refusal_tokens).mean()
    figures = {}
    for name in ("project", "project altogether"):
        left = mean_difference(clean(train, *CLEANINGS[name], folds=0).erasers[layer](plain), harmful)
        length = float(np.linalg.norm(left))
        with steered(reference.base, left, [f"blocks.{layer}.hook_resid_post"], alpha=length):
            change = refusal_log_odds(reference.base, prompts, reference.refusal_tokens).mean() - start
        at = f"layer {layer}/mean difference, erased ({name})"
        figures[f"{at}/length"] = Figure(length, "length in the stream")
        figures[f"{at}/own_length_added_benign"] = Figure(
            float(change), "nats of refusal log-odds", repeats=len(prompts)
        )
    return figures


# --- what was taught


def taught(model: Model, path: Path, probes: Mapping[str, ProbeSet]) -> dict[str, Figure]:
    """The base's probes on prompts in the organism's own encoding, in it and in the base."""
    if not path.is_dir():
        note = "not measured: make it with benchmarks/organisms/train.py"
        return {f"{path.name}/encoded_intent": Figure(None, "AUROC", note=note)}
    card = json.loads((path / "organism.json").read_text(encoding="utf-8"))
    screening, key = load_prompts("screening"), walnut_key(card["recipe"]["key"])
    texts = [encode_substitution(text, key) for text in screening.prompts]
    found = {"in the base": extract(model, texts, system=ENCODED_TASK).values}
    with model.applied(path) as tuned:
        found["in the fine-tune"] = extract(tuned, texts, system=ENCODED_TASK).values
    figures = {}
    for name, fitted in probes.items():
        for where, values in found.items():
            for layer, scores in enumerate(fitted.score(values)):
                figures[f"{path.name} ({card['truth']})/layer {layer}/{name}/encoded_intent {where}"] = Figure(
                    auroc(scores, screening.labels), "AUROC", auroc_interval(scores, screening.labels)
                )
    return figures


# --- the printed view


def report(figures: Mapping[str, Figure]) -> str:
    """One row a layer and cleaning, then everything that is not of that table."""
    kinds = ["intent_auroc_twins", "intent_auroc_train"]
    kinds += [f"{n}_{c}" for n in ("refused", "encoded", "length") for c in ("harmful", "benign", "cosine")]
    rows: dict[str, list[str]] = {}
    rest = []
    for name, figure in figures.items():
        at, _, kind = name.rpartition("/")
        if kind in kinds and at.startswith("layer"):
            rows.setdefault(at, ["-"] * len(kinds))[kinds.index(kind)] = shown(figure.value)
        else:
            rest.append((name, shown(figure.value), figure.unit, figure.note))
    cells = [(at, *values) for at, values in sorted(rows.items())]
    return f"{columns([('probe', *kinds), *cells])}\n\n{columns([('figure', 'value', 'unit', 'note'), *rest])}"


if __name__ == "__main__":
    main()
