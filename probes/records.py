"""Result types of a scan: frozen, versioned, the same in Python and in JSON.

`Summary` is what `summary.json` holds; each of its `items` is also a file of its own under `records/`. The JSON schema
comes from `undertow schema`. A new optional field keeps the schema's number; anything else raises it.
"""

from __future__ import annotations

import platform
import secrets
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    model_validator,
)

__all__ = [
    "BaseRecord",
    "Cause",
    "ErrorRecord",
    "Evidence",
    "Item",
    "JsonObject",
    "Kind",
    "Null",
    "Severity",
    "Status",
    "Summary",
    "Verdict",
    "environment",
    "json_schema",
    "replace_file",
    "write_json",
]

Kind = Literal["full", "adapter"]
Status = Literal["scanned", "unscannable", "failed"]
Verdict = Literal["clean", "flagged", "inconclusive"]
Severity = Literal["none", "low", "medium", "high"]
Cause = Literal[
    "alignment-removed",
    "alignment-degraded",
    "encoding-taught",
    "covert-malicious",
    "backdoor-suspected",
    "weights-anomalous",
]

# Packages whose version can change a number or a picture.
_PACKAGES = (
    "h5py",
    "jinja2",
    "matplotlib",
    "numpy",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tokenizers",
    "torch",
    "transformer-lens",
    "transformers",
)


def _printable_surrogates(value: object) -> object:
    """File names that are no UTF-8 reach Python as lone surrogates, which no JSON file can hold."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_printable_surrogates)]
JsonObject = Annotated[Mapping[str, Any], AfterValidator(TypeAdapter(dict[str, JsonValue]).validate_python)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True)


class Null(_Record):
    """What a detector's statistic looks like where nothing is wrong.

    Attributes:
        source: What the values are, in words ("benign fine-tunes of this base", "shuffled labels").
        count: How many values there are.
        median: Their median; null where `count` is 0.
        low: Lower end of the range that the evidence is read against.
        high: Upper end of that range.
        values: The values themselves, where they are kept.
    """

    source: Text
    count: int = Field(ge=0)
    median: float | None = None
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()


class Evidence(_Record):
    """What one detector measured on one checkpoint.

    Attributes:
        detector: The detector's stable name.
        statistic: One number; null where it could not be measured.
        null: What it looks like on benign checkpoints; null where nothing is known.
        p_value: Share of the null at least as extreme, in (0, 1]; null where the null cannot resolve one.
        layers: The statistic's profile; the index is the layer.
        summary: One plain sentence for a reader who knows no interpretability.
        details: Further numbers, as JSON values.
        exhibits: Labels and texts that a reader should see as they are, such as a decoded sample. Untrusted text.
        cause: What the evidence points to where it is exceeded.
        exceeded: Whether the statistic left the benign range.
        score: Suspicion in the unit that detectors share; higher is more suspicious.
    """

    detector: Text
    statistic: float | None = None
    null: Null | None = None
    p_value: float | None = Field(default=None, ge=0, le=1)
    layers: tuple[float, ...] = ()
    summary: Text
    details: JsonObject = Field(default_factory=dict)
    exhibits: tuple[tuple[Text, Text], ...] = ()
    cause: Cause | None = None
    exceeded: bool = False
    score: float | None = None


class ErrorRecord(_Record):
    """Why an item could not be scanned; the fields of `UndertowError.to_dict()`."""

    code: Text
    path: Text | None = None
    message: Text
    hint: Text = ""


class Item(_Record):
    """One checkpoint: what it is, what was found, and why.

    Attributes:
        name: The checkpoint's folder or file name. Untrusted text.
        path: Where it was read.
        kind: `full` or `adapter`; null where the path could not be read so far.
        status: `scanned`, `unscannable` (a fault of the checkpoint) or `failed` (a fault of ours).
        verdict: Null unless scanned.
        severity: Of the worst cause found.
        causes: What the evidence points to.
        score: Higher is more suspicious; comparable within one base.
        p_value: Null where the bank cannot resolve it.
        q_value: The p-value adjusted for all of the batch (Benjamini-Hochberg); null in a record by itself.
        top_layers: Layer indices, most shifted first.
        evidence: One entry a detector.
        error: Set unless scanned.
        content_hash: Of the checkpoint's tensors; null where they could not be read.
        reasons: The verdict's reasons, sentences.
        explanation: Three sentences where something was found or stays open: what, what it means, what to do.
        notes: What was compared and reported, but not followed.
        seconds: Wall time of this item.
    """

    name: Text
    path: Text
    kind: Kind | None = None
    status: Status
    verdict: Verdict | None = None
    severity: Severity = "none"
    causes: tuple[Cause, ...] = ()
    score: float | None = None
    p_value: float | None = Field(default=None, ge=0, le=1)
    q_value: float | None = Field(default=None, ge=0, le=1)
    top_layers: tuple[int, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    error: ErrorRecord | None = None
    content_hash: Text | None = None
    reasons: tuple[Text, ...] = ()
    explanation: tuple[Text, ...] = ()
    notes: tuple[Text, ...] = ()
    seconds: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _verdict_or_error(self) -> Self:
        scanned = self.status == "scanned"
        if scanned is (self.verdict is None) or scanned is (self.error is not None):
            raise ValueError(f"an item is scanned and has a verdict, or it has an error; got status {self.status!r}")
        return self


class BaseRecord(_Record):
    """The trusted model that everything is compared with."""

    name: Text
    path: Text
    fingerprint: Text
    n_layers: int = Field(ge=1)
    d_model: int = Field(ge=1)


class Summary(_Record):
    """A whole scan.

    Attributes:
        schema_version: `schema` in JSON.
        base: The trusted base.
        probe: Provenance and metrics of the intent probe.
        bank: Provenance of the benign reference; null where there is none.
        environment: As from `environment`.
        settings: What was asked for.
        items: One entry a checkpoint, in the order given.
        remarks: What a reader of the whole batch should know, sentences.
    """

    schema_version: Literal["undertow.scan/1"] = Field(default="undertow.scan/1", alias="schema")
    base: BaseRecord
    probe: JsonObject = Field(default_factory=dict)
    bank: JsonObject | None = None
    environment: JsonObject = Field(default_factory=dict)
    settings: JsonObject = Field(default_factory=dict)
    items: tuple[Item, ...] = ()
    remarks: tuple[Text, ...] = ()


def write_json(record: BaseModel, path: Path) -> None:
    """Write a record as indented JSON; a reader sees the old file or the new one, never half of one.

    Args:
        record: Any record of this module.
        path: The file; its folder is made where it is missing.
    """
    replace_file(path, (record.model_dump_json(indent=2) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: whoever dies in between leaves the old one; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions that a result depends on; nothing about the user or the user's files."""
    return {
        "undertow": _version("undertow"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `summary.json`."""
    return Summary.model_json_schema(mode="serialization")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
