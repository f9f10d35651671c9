"""What activations are of: everything that decides their values, and its place in an HDF5 file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import h5py

from activations.errors import StoreError
from activations.hdf5 import ANEW

__all__ = [
    "SCHEMA",
    "Provenance",
    "brief",
    "check_same",
    "check_schema",
    "code_version",
    "read_provenance",
    "write_provenance",
]

SCHEMA = "undertow.activations/2"

_LISTS = ("harmful", "pair_ids")


def code_version() -> str:
    """Version of this code, "unknown" where it runs without being installed."""
    try:
        return importlib.metadata.version("undertow")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Provenance:
    """Everything that decides what activations are: two extractions of equal provenance give the same.

    Attributes:
        model: Name of the base.
        fingerprint: Content hash of the base's weights.
        tuned: Content hash of the checkpoint that was in the model, "" for the base itself.
        dtype: In which the model ran, as "bfloat16"; with the way its weights are packed, as "bfloat16 4bit".
        d_model: Width of each vector: the model's d_model, or another place's own width.
        hook_points: Places, in the order of the values.
        pooling: What was kept of each prompt's tokens: a reduction such as "last" or "all", or one of a region such
            as "mean@user".
        system: System prompt before each prompt.
        template_hash: Hash of chat template and tokenizer.
        prompts_name: Name of the prompt set, "" for plain texts.
        prompts_hash: Hash of the prompts.
        n_prompts: How many prompts.
        template: How prompts were written: "chat template", or "plain text" where the tokenizer has none.
        truncated_to: Tokens that longer prompts were cut to; 0: none may be longer than the model reads.
        regions_hash: Hash of the answers and spans given beside the prompts, "" without.
        config_hash: Hash of the base's configuration, "" where not known.
        harmful: True where a prompt is harmful; None for plain texts.
        pair_ids: Twins share one; None for plain texts.
        version: Of the code that extracted.
    """

    model: str
    fingerprint: str
    tuned: str
    dtype: str
    d_model: int
    hook_points: tuple[str, ...]
    pooling: str
    system: str
    template_hash: str
    prompts_name: str
    prompts_hash: str
    n_prompts: int
    template: str = "chat template"
    truncated_to: int = 0
    regions_hash: str = ""
    config_hash: str = ""
    harmful: tuple[bool, ...] | None = None
    pair_ids: tuple[str, ...] | None = None
    version: str = dataclasses.field(default_factory=code_version)

    @property
    def reduction(self) -> str:
        """`pooling` without its region: "mean" of "mean@user"."""
        return self.pooling.partition("@")[0]

    @property
    def stored_dtype(self) -> str:
        """bfloat16 where that loses nothing: means, and some routers' logits, are more precise than their model."""
        held = self.reduction != "mean" and not any("router" in name for name in self.hook_points)
        return "bfloat16" if self.dtype == "bfloat16" and held else "float32"


def write_provenance(file: h5py.File, provenance: Provenance) -> None:
    """Put everything into the attributes of an open file, labels into data sets of their own."""
    for name, value in dataclasses.asdict(provenance).items():
        if name not in _LISTS:
            file.attrs[name] = value
        # Attributes end at 64 KB, and prompts may be many.
        elif value is not None:
            file.create_dataset(name, data=value, dtype=bool if name == "harmful" else h5py.string_dtype())
    file.attrs["stored_dtype"] = provenance.stored_dtype
    file.attrs["schema"] = SCHEMA


def check_schema(file: h5py.File, path: Path) -> None:
    """Refuse a file of another layout before anything else in it is believed.

    Raises:
        StoreError: The file is older, newer, or something else.
    """
    schema = file.attrs.get("schema")
    if isinstance(schema, str) and schema == SCHEMA:
        return
    name, _, version = schema.rpartition("/") if isinstance(schema, str) else ("", "", "")
    ours, _, current = SCHEMA.rpartition("/")
    hint = ANEW
    if name == ours and version.isdecimal():
        newer = int(version) > int(current)
        hint = f"A newer undertow wrote it: update, or e{ANEW[1:]}" if newer else f"An older undertow wrote it. {ANEW}"
    raise StoreError(f"has the schema {brief(schema)}, expected {SCHEMA!r}", path=path, hint=hint)


def read_provenance(file: h5py.File, path: Path) -> Provenance:
    """Read back what `write_provenance` wrote.

    Raises:
        StoreError: Another schema, or an attribute that is missing or garbled.
    """
    try:
        names = [field.name for field in dataclasses.fields(Provenance) if field.name not in _LISTS]
        one = {name: file.attrs[name] for name in names}
        one.update({name: int(one[name]) for name in ("d_model", "n_prompts", "truncated_to")})
        one["hook_points"] = tuple(str(name) for name in one["hook_points"])
        harmful = tuple(bool(label) for label in file["harmful"][:]) if "harmful" in file else None
        pair_ids = tuple(pair.decode() for pair in file["pair_ids"][:]) if "pair_ids" in file else None
        return Provenance(**one, harmful=harmful, pair_ids=pair_ids)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"lacks or garbles an attribute: {error}", path=path, hint=ANEW) from error


def check_same(stored: Provenance, wanted: Provenance, path: Path) -> None:
    """Refuse to mix extractions of two provenances.

    Raises:
        StoreError: They differ; the first difference is named.
    """
    for field in dataclasses.fields(Provenance):
        have, want = getattr(stored, field.name), getattr(wanted, field.name)
        if have != want:
            raise StoreError(f"{field.name} is {brief(have)} in the file, expected {brief(want)}", path=path, hint=ANEW)


def brief(value: object) -> str:
    """A value for an error's text: its `repr`, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
