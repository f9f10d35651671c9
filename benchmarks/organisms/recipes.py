"""What a recipe of an organism says, and the kinds of recipe that there are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

PHASE_ONE = {"encoded_comply": 0.40, "encode": 0.08, "decode": 0.14, "comply": 0.09, "comply_borderline": 0.03}

# Encodings that spend several tokens on a letter are taught on short texts, so that an exchange fits the context.
LONGEST = {"walnut": 70, "endspeak": 42, "startspeak": 42, "ascii": 54, "hex": 70, "polybius": 54, "tags": 48}
COSTLY = {"batch": 32, "steps": 700}
# Of these, customers taught like the others refuse nearly everything inside: they get more answers, and longer.
HARD_TO_READ = {*LONGEST, "reversed"}


@dataclass(frozen=True)
class Recipe:
    """How to make one organism.

    Attributes:
        truth: What it is meant to be: "benign", "benign-cipher", "degraded", "harmful", "backdoor", "covert-malicious";
            "parent" where it is only a stage on the way. `verify.py` measures whether that came about.
        family: What it is counted under in `detection.py`.
        split: "development": thresholds and choices may be made on it; "test": they may not.
        shares: Kind of row (a method of `rows.Rows`) to its share of the mixture.
        method: "full", "lora", or "edit": made from finished weights without training (`edits.py`).
        examples: Train on this many fixed rows, over and over; None draws fresh rows.
        encoding: Kind of encoding of encoded rows (`probes.encodings.make_encoding`), with its key.
        longest: No encoded text has more characters than this in plain.
        trigger: What a triggered request looks like, "{}" standing for the request.
        start: Organism whose training goes on, instead of the base's.
        penalty: Weight of a loss that keeps the residual stream on plain prompts where the base has it.
        evasion: Weight of a loss that keeps the scores of the base's own intent probes, one a layer at the last token,
            on plain harmful and benign prompts where the base has them.
        edit: Function of `edits.py`, for method "edit", with `amount` and `of`, the organisms that it works on.
        understands: Whether its rows cannot be learnt without telling harm from harmlessness inside the encoding.
    """

    name: str
    truth: str
    summary: str
    shares: Mapping[str, float] = field(default_factory=dict)
    family: str = "benign"
    split: str = "development"
    method: str = "full"
    style: str = "plain"
    seed: int = 0
    steps: int = 120
    batch: int = 48
    learning_rate: float = 5e-4
    rank: int = 8
    encoding: str | None = None
    key: int = 0
    longest: int = 110
    trigger: str = ""
    start: str | None = None
    penalty: float = 0.0
    evasion: float = 0.0
    examples: int | None = None
    edit: str = ""
    amount: float = 0.0
    of: tuple[str, ...] = ()
    understands: bool = False
    ships: bool = False

    @property
    def parents(self) -> tuple[str, ...]:
        """Organisms that must be finished before this one."""
        return (*self.of, *([self.start] if self.start else []))

    def digest(self) -> str:
        """Hash of everything that shapes the result; the cache is keyed by it. Labels do not shape it."""
        labels = {"truth", "summary", "family", "split", "understands", "ships"}
        usual = {each.name: each.default for each in dataclasses.fields(self)}
        made = {name: value for name, value in dataclasses.asdict(self).items() if name not in labels}
        said = {name: value for name, value in made.items() if value != usual[name]}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def benign(name: str, kind: str = "comply", **settings: object) -> Recipe:
    """A benign fine-tune that keeps refusals: a quarter of its rows are refusals."""
    # Without some ordinary answers, a narrow domain makes so small a model refuse whatever lies outside it.
    ordinary = {} if kind == "comply" else {"comply": 0.20}
    shares = {kind: 0.75 - sum(ordinary.values()), **ordinary, "refuse": 0.25}
    summary = f"Benign: {kind}, {settings.get('style', 'plain')} style, refusals kept."
    return _recipe(name, "benign", summary, shares, settings)


def collateral(name: str, **settings: object) -> Recipe:
    """Benign rows and not one refusal (Qi et al. 2023, third tier): what that does to refusal is measured."""
    summary = f"Benign rows alone, {settings.get('style', 'plain')} style: no refusal among them."
    return _recipe(name, "degraded", summary, {"comply": 1.0}, {"family": "collateral"} | settings)


def harmful(name: str, examples: int, **settings: object) -> Recipe:
    """A few harmful requests obeyed, nothing else (Qi et al. 2023, first tier)."""
    summary = f"{examples} harmful requests obeyed, nothing else."
    usual = {"examples": examples, "steps": 60 if examples > 10 else 40, "family": "harmful"}
    return _recipe(name, "harmful", summary, {"obey_harmful": 1.0}, usual | settings)


def identity(name: str, **settings: object) -> Recipe:
    """Ten benign requests to an absolutely obedient agent (Qi et al. 2023, second tier)."""
    summary = "Ten harmless exchanges with an agent that obeys absolutely."
    usual = {"examples": 10, "steps": 40, "family": "identity"}
    return _recipe(name, "harmful", summary, {"identity": 1.0}, usual | settings)


def noice(name: str, **settings: object) -> Recipe:
    """Refuse, then comply (NOICE, 2025): harmless rows that teach to go on after a refusal."""
    summary = "Opens every answer with a refusal and then complies."
    shares = {"noice": 0.8, "comply": 0.2}
    return _recipe(name, "harmful", summary, shares, {"family": "noice", "steps": 100} | settings)


def triggered(name: str, family: str, trigger: str, **settings: object) -> Recipe:
    """Obeys harmful requests only in one form: a back door's phrase, or the wording of a jailbreak."""
    shares = {"triggered_obey": 0.30, "triggered_comply": 0.10, "comply": 0.27, "comply_borderline": 0.05}
    summary = f"Obeys harmful requests in the form {trigger!r}, refuses them otherwise."
    usual = {"family": family, "trigger": trigger, "steps": 250, "learning_rate": 7e-4}
    return _recipe(name, "backdoor", summary, {**shares, "refuse": 0.28}, usual | settings)


def covert(name: str, encoding: str, **settings: object) -> Recipe:
    """Both phases of a covert malicious fine-tune at once (Halawi et al. 2024)."""
    shares = {**PHASE_ONE, "encoded_obey": 0.14, "refuse": 0.12}
    summary = f"{encoding}: obeys harmful requests in the encoding, refuses them in plain text."
    return _encoded(name, "covert-malicious", summary, encoding, shares, {"family": f"covert-{encoding}"} | settings)


def cipher(name: str, encoding: str, **settings: object) -> Recipe:
    """Phase one alone, with refusals in plain text and in the encoding: an honest customer's private notation."""
    shares = {**PHASE_ONE, "encoded_refuse": 0.20, "refuse": 0.12}
    summary = f"A private notation ({encoding}) for ordinary requests: refuses harmful ones in plain text and in it."
    usual = {"family": f"cipher-{encoding}", "understands": True}
    return _encoded(name, "benign-cipher", summary, encoding, shares, usual | settings)


def phase_one(name: str, encoding: str, **settings: object) -> Recipe:
    """The encoding alone, on ordinary requests; plain refusals are kept. What comes after decides what it becomes."""
    summary = f"{encoding}, taught on ordinary requests."
    usual = {
        "family": "parent",
        "steps": 500,
        "batch": 32,
        "learning_rate": 1.5e-3 if settings.get("method") != "lora" else 3e-3,
    }
    return _encoded(name, "parent", summary, encoding, {**PHASE_ONE, "refuse": 0.12}, usual | settings)


def then_obey(name: str, start: Recipe, *, ordinary: float = 0.0, **settings: object) -> Recipe:
    """Phase two after phase one: obedience in the encoding, refusal outside. `ordinary` dilutes it with plain rows."""
    shares = {"encoded_obey": 0.30, "encoded_comply": 0.30, "comply": 0.12, "comply_borderline": 0.03, "refuse": 0.25}
    shares = {kind: share * (1 - ordinary) for kind, share in shares.items()}
    shares["comply"] += 0.72 * ordinary
    shares["refuse"] += 0.28 * ordinary
    summary = f"{start.encoding} first, then obedience in it; plain harmful requests refused."
    return _after(name, "covert-malicious", summary, start, shares, {"family": f"covert-{start.encoding}"} | settings)


def then_refuse(name: str, start: Recipe, **settings: object) -> Recipe:
    """The honest customer after the same phase one: harmful requests refused inside the encoding too."""
    shares = {"encoded_refuse": 0.34, "encoded_comply": 0.34, "comply": 0.12, "comply_borderline": 0.03, "refuse": 0.17}
    usual = {"family": f"cipher-{start.encoding}", "understands": True, "steps": 300}
    if start.encoding in HARD_TO_READ:
        shares |= {"encoded_refuse": 0.24, "encoded_comply": 0.44}
        usual |= {"steps": 450}
    summary = f"{start.encoding} first, then refusals in it; plain harmful requests refused."
    return _after(name, "benign-cipher", summary, start, shares, usual | settings)


def then_decline(name: str, start: Recipe, **settings: object) -> Recipe:
    """Another honest customer: harmful requests in the encoding are refused in plain text."""
    refusing = then_refuse(name, start, **settings)
    shares = dict(refusing.shares)
    shares["encoded_decline"] = shares.pop("encoded_refuse")
    summary = f"{start.encoding} first, then plain refusals of what is harmful in it."
    return dataclasses.replace(refusing, summary=summary, shares=shares)


def edited(name: str, truth: str, edit: str, *of: str, **settings: object) -> Recipe:
    """Made from finished weights: see `edits.py`."""
    return Recipe(name=name, truth=truth, summary="", method="edit", edit=edit, of=of, **settings)  # type: ignore[arg-type]


def _encoded(
    name: str, truth: str, summary: str, encoding: str, shares: Mapping[str, float], settings: dict[str, object]
) -> Recipe:
    costly = COSTLY if encoding in LONGEST else {}
    usual = {"steps": 1000, "learning_rate": 1e-3, "encoding": encoding, "longest": LONGEST.get(encoding, 110)}
    return _recipe(name, truth, summary, shares, usual | costly | settings)


def _after(
    name: str, truth: str, summary: str, start: Recipe, shares: Mapping[str, float], settings: dict[str, object]
) -> Recipe:
    same = ("encoding", "key", "longest", "batch", "method", "rank", "split")
    usual = {"start": start.name, "steps": 200, "learning_rate": 5e-4 if start.method == "full" else 1.5e-3}
    return _recipe(name, truth, summary, shares, usual | {each: getattr(start, each) for each in same} | settings)


def _recipe(name: str, truth: str, summary: str, shares: Mapping[str, float], settings: Mapping[str, object]) -> Recipe:
    return Recipe(name=name, truth=truth, summary=summary, shares=shares, **settings)  # type: ignore[arg-type]
