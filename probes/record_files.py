"""Which file a record has, and when an older one may be used again: only where nothing that could change it has."""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from activations.checkpoints import Checkpoint
from probes.bank import Bank, settings_of
from probes.records import Item, environment, write_json
from probes.reference import Reference

__all__ = ["code_hash", "fault_key", "forget_fault", "keep", "key_of", "read_record", "record_path"]


def key_of(reference: Reference, checkpoint: Checkpoint, bank: Bank | None) -> str:
    """Hash of everything that can change a record: checkpoint, base, settings, bank, code."""
    probes = reference.probes
    configs = (reference.base.hf.config, reference.base.hf.generation_config)
    parts_of_probe = (probes.directions, probes.biases, probes.means, probes.scales, probes.gains)
    parts = {
        "checkpoint": checkpoint.content_hash(),
        "notes": checkpoint.notes,
        "base": reference.base.fingerprint,
        "settings": settings_of(reference),
        "base settings": [str(reference.base.device), *(config and config.to_json_string() for config in configs)],
        "probe": hashlib.sha256(b"".join(part.tobytes() for part in parts_of_probe)).hexdigest(),
        "bank": bank.model_dump_json() if bank else None,
        "versions": environment(),
        "code": code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def code_hash() -> str:
    """Hash of our own code and tables: a version alone stays the same while somebody changes a constant."""
    digest = hashlib.sha256()
    packages = [Path(str(files(name))) for name in ("activations", "probes")]
    for file in sorted(file for home in packages for kind in ("*.py", "*.npz") for file in home.rglob(kind)):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def fault_key(path: str | Path) -> str:
    """What could not be read has no content to be known by, so its record goes by its path."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()


def forget_fault(records: Path, path: str | Path) -> None:
    """Remove the record of an earlier scan that could not read this path: it can be read now."""
    for stale in records.glob(f"*-{fault_key(path)}.json"):
        stale.unlink()


def record_path(records: Path, name: str, key: str) -> Path:
    """A record's file; the name is untrusted, so only harmless characters of it are kept.

    The whole key, because an attacker who may choose two checkpoints finds two whose keys begin alike.
    """
    return records / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:80].lstrip('.')}-{key}.json"


def read_record(path: Path) -> Item | None:
    """A finished record; None where there is none that can be read, and then the checkpoint is scanned again."""
    try:
        item = Item.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return item if item.status == "scanned" else None


def keep(item: Item, records: Path, key: str) -> Item:
    """Write an item's record, and give the item back."""
    write_json(item, record_path(records, item.name, key))
    return item
