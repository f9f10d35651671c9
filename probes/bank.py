"""The benign reference: what every detector measures on fine-tunes of one base that are known to be harmless.

Only the numbers are kept, never the weights, so a bank of hundreds is a small JSON file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from activations.checkpoints import Checkpoint
from activations.errors import BankError, OptionError, PathMissingError
from probes.detectors import DETECTORS
from probes.records import Evidence, Kind
from probes.reference import Reference

__all__ = ["Bank", "Member", "load_bank", "refuse_twins", "settings_of"]

LARGEST = 64 * 2**20


class Member(BaseModel):
    """One benign fine-tune.

    Attributes:
        name: Its name, for people.
        kind: `full` or `adapter`; the two move weights differently, so each is read against its own kind.
        content_hash: Of its tensors.
        statistics: Detector to its statistic; a detector that could not measure is absent.
        layers: Detector to its per-layer profile.
        synthetic: Whether `undertow calibrate --synthesize` made it; banks from before that was possible lack this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    kind: Kind
    content_hash: str
    statistics: Mapping[str, float]
    layers: Mapping[str, tuple[float, ...]]
    synthetic: bool = False

    @classmethod
    def of(cls, name: str, kind: Kind, content_hash: str, evidence: tuple[Evidence, ...]) -> Member:
        """Keep what the detectors measured on a benign checkpoint."""
        return cls(
            name=name,
            kind=kind,
            content_hash=content_hash,
            statistics={e.detector: e.statistic for e in evidence if e.statistic is not None},
            layers={e.detector: e.layers for e in evidence if e.layers},
        )


class Bank(BaseModel):
    """The benign fine-tunes of one base, and under which settings they were measured."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True, serialize_by_alias=True
    )

    schema_version: Literal["undertow.bank/1"] = Field(default="undertow.bank/1", alias="schema")
    base_fingerprint: str
    settings: Mapping[str, str]
    members: tuple[Member, ...]

    def of_kind(self, kind: Kind) -> tuple[Member, ...]:
        """The members that a checkpoint of this kind is read against."""
        return tuple(member for member in self.members if member.kind == kind)

    @property
    def synthetic(self) -> int:
        """How many members were synthesized: more alike than what people make, so a narrower range."""
        return sum(member.synthetic for member in self.members)

    def check_fits(self, reference: Reference) -> None:
        """Refuse to read one base's checkpoints against another's bank, or other prompts' numbers.

        Raises:
            BankError: The base, the prompts or the probe differ, with the first difference named.
        """
        expected = {"base": reference.base.fingerprint, **settings_of(reference)}
        got = {"base": self.base_fingerprint, **self.settings}
        for what in sorted(expected.keys() | got.keys()):
            if expected.get(what) != got.get(what):
                raise BankError(
                    f"the bank was measured with another {what}: expected {expected.get(what)}, got {got.get(what)}",
                    hint="Make one for this base with `undertow calibrate BASE BENIGN... -o FILE.bank`.",
                )

    def described(self, name: str) -> dict[str, object]:
        """What a report says of it: how many members of each kind the verdicts rest on, and how many are synthetic."""
        counts = {kind: len(self.of_kind(kind)) for kind in ("full", "adapter")}
        return {"name": name, "members": counts} | ({"synthetic": self.synthetic} if self.synthetic else {})

    def save(self, path: Path) -> Path:
        """Write the bank as JSON, replacing an older one in one step."""
        from probes.records import write_json

        write_json(self, path)
        return path


def settings_of(reference: Reference) -> dict[str, str]:
    """Everything but the base that the numbers in a bank depend on."""
    probes = reference.probes
    return {
        "prompts": reference.battery.content_hash,
        "template": probes.template_hash,
        "probe prompts": probes.prompts_hash,
        "probe method": f"{probes.method}, {probes.pooling} token, {', '.join(probes.hook_points)}",
        "dtype": str(reference.base.dtype),
        "detector version": ", ".join(sorted(f"{detector.name} {detector.version}" for detector in DETECTORS)),
    }


def load_bank(path: str | Path) -> Bank:
    """Read a bank file.

    Raises:
        PathMissingError: There is no such file.
        BankError: It is no bank of this schema, or too large to be one.
    """
    path = Path(path)
    if not path.is_file():
        raise PathMissingError("no bank file lies here", path=path, hint="Make one with `undertow calibrate`.")
    if path.stat().st_size > LARGEST:
        raise BankError(f"a bank of {path.stat().st_size} bytes: expected at most {LARGEST}", path=path)
    try:
        return Bank.model_validate_json(path.read_bytes())
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BankError(f"not a bank that this version reads, at {where}: {first['msg']}", path=path) from None


def refuse_twins(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse a checkpoint that is given twice, under whatever name."""
    seen: dict[str, Checkpoint] = {}
    for checkpoint in checkpoints:
        first = seen.setdefault(checkpoint.content_hash(), checkpoint)
        if first is not checkpoint:
            raise OptionError(
                f"'{checkpoint.name}' has the weights of '{first.name}': expected each benign fine-tune once",
                path=checkpoint.path,
                hint=f"Leave one out, or train another: the other one is {first.path}.",
            )
