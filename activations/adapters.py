"""LoRA adapters in PEFT's format: settings that stay within bounds, and tensors paired as they are multiplied.

An adapter adds `scale * B @ A` to a weight of the base. Its settings decide the scale and nothing else here: which
modules it changes is read from the tensors, no pattern in the settings is ever compiled, and no model they name is
ever opened. What would change the model in another way (DoRA, biases, whole modules) is refused rather than ignored,
since a verdict about half a fine-tune would be about another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from activations.errors import AdapterError, printable
from activations.tensors import TensorInfo

__all__ = ["AdapterSettings", "LoraPair", "is_adapter_tensor", "pair_tensors", "parse_settings", "unknown_settings"]

# Above every hidden size in use, so above every rank that saves anything.
_MOST_RANK = 65_536
# Letters of module paths. A dot in PEFT's pattern matches any character, and no other letter here is special.
_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")
_PREFIX = "base_model.model."
# Ends of a tensor's name to its side of the pair, and whether it belongs to an embedding.
_SIDES = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
_FLOATS = {"F16", "BF16", "F32", "F64"}

# Settings that change the forward pass beyond scale * B @ A, or the base's weights, when they are switched on.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Settings that say where an adapter sits, how it was trained or who wrote the file: its tensors and the base decide.
_NO_EFFECT = {
    "auto_mapping",  # reported as a request to run code
    "base_model_name_or_path",  # reported by itself
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Initialisations that leave the base's weights as they are; others (PiSSA, OLoRA, LoftQ, CorDA) change the base too.
_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva")

_AS_SAVED = "Ask for the adapter as PEFT's save_pretrained writes it."
_MERGE = "Merge it into its base with the tool that made it, and scan the merged model."


@dataclass(frozen=True)
class AdapterSettings:
    """What of `adapter_config.json` decides the size of an adapter's change, under PEFT's names.

    Attributes:
        r: Rank of every module that no pattern names.
        lora_alpha: Numerator of the scale, likewise.
        use_rslora: Divide by the square root of the rank instead of the rank.
        rank_pattern: Rank by the end of a module's path.
        alpha_pattern: Numerator of the scale by the end of a module's path.
        fan_in_fan_out: The base stores these weights as [in, out] (GPT-2's Conv1D).
        base_model: What the author says it was trained on; reported, never opened.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    base_model: str

    def rank(self, module: str) -> int:
        """The rank these settings give to a module."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """The factor before `B @ A` for a module."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class LoraPair:
    """The change of one weight: `scale * B @ A`.

    Attributes:
        a: [rank, in].
        b: [out, rank].
        scale: The factor before the product.
        rank: Rows of A, columns of B.
        fan_in_fan_out: The weight is stored as [in, out], so the product is transposed before it is added.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    rank: int
    fan_in_fan_out: bool


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor's name is that of one side of a LoRA pair."""
    return name.endswith(tuple(_SIDES))


def parse_settings(raw: Mapping[str, object], path: Path) -> AdapterSettings:
    """Take the settings of an adapter from the JSON object of its `adapter_config.json`.

    Args:
        raw: The object.
        path: Where it comes from, for the errors.

    Raises:
        AdapterError: A setting is missing, out of bounds, of the wrong type, or unsupported.
    """
    if raw.get("peft_type") != "LORA":
        _refuse(
            path,
            f"peft_type is {_shown(raw.get('peft_type'))}: expected 'LORA', the only kind that is read",
            hint=_MERGE,
        )
    _refuse_unsupported(raw, path)
    return AdapterSettings(
        r=_rank(raw.get("r"), "r", path),
        lora_alpha=_alpha(raw.get("lora_alpha"), "lora_alpha", path),
        use_rslora=_flag(raw, "use_rslora", path),
        rank_pattern={key: _rank(rank, key, path) for key, rank in _patterns(raw, "rank_pattern", path).items()},
        alpha_pattern={key: _alpha(alpha, key, path) for key, alpha in _patterns(raw, "alpha_pattern", path).items()},
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", path),
        base_model=base if isinstance(base := raw.get("base_model_name_or_path"), str) else "",
    )


def unknown_settings(raw: Mapping[str, object]) -> list[str]:
    """Settings that are switched on and that this version of the code does not know, sorted."""
    known = {*AdapterSettings.__dataclass_fields__, *_UNSUPPORTED, *_NO_EFFECT, "init_lora_weights"}
    return sorted(key for key, value in raw.items() if value and key not in known)


def pair_tensors(tensors: Mapping[str, TensorInfo], settings: AdapterSettings, path: Path) -> dict[str, LoraPair]:
    """Pair the tensors of an adapter by the base's module that they change.

    Args:
        tensors: All tensors of the adapter.
        settings: Its settings.
        path: The adapter, for the errors.

    Returns:
        Module path in the base ("model.layers.0.self_attn.q_proj") to its pair, sorted.

    Raises:
        AdapterError: A tensor is no side of a LoRA pair, a side is missing, or the shapes contradict each other or
            the settings.
    """
    sides: dict[str, dict[tuple[str, bool], TensorInfo]] = {}
    for name, info in tensors.items():
        module, side = _parse_name(name, path)
        if any(side[0] == taken for taken, _ in sides.setdefault(module, {})):
            _refuse(path, f"two tensors claim side {side[0].upper()} of the module '{printable(module)}'")
        sides[module][side] = info
    if not sides:
        _refuse(path, "the adapter holds no tensors: expected pairs named *.lora_A.weight and *.lora_B.weight")
    return {module: _pair(module, sides[module], settings, path) for module in sorted(sides)}


def _pair(module: str, sides: Mapping[tuple[str, bool], TensorInfo], settings: AdapterSettings, path: Path) -> LoraPair:
    where = f"the module '{printable(module)}'"
    embedding = any(is_embedding for _, is_embedding in sides)
    a, b = sides.get(("a", embedding)), sides.get(("b", embedding))
    if a is None or b is None:
        _refuse(path, f"{where} has one side of a LoRA pair: expected both A and B, of one kind")
    for side, info in (("A", a), ("B", b)):
        if len(info.shape) != 2 or info.dtype not in _FLOATS:
            _refuse(path, f"{where}: {side} has shape {list(info.shape)}, dtype {info.dtype}: expected a float matrix")
    rank = settings.rank(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        shapes = f"A {list(a.shape)} and B {list(b.shape)}"
        _refuse(
            path, f"{where}: the settings say rank {rank}, expected A [{rank}, in] and B [out, {rank}], got {shapes}"
        )
    return LoraPair(a, b, settings.scale(module), rank, settings.fan_in_fan_out or embedding)


def _parse_name(name: str, path: Path) -> tuple[str, tuple[str, bool]]:
    end = next((end for end in _SIDES if name.endswith(end)), None)
    if end is None:
        expected = "expected *.lora_A.weight or *.lora_B.weight and nothing else"
        _refuse(path, f"the tensor '{printable(name)}' is no side of a LoRA pair: {expected}", hint=_MERGE)
    return name.removesuffix(end).removeprefix(_PREFIX), _SIDES[end]


def _refuse_unsupported(raw: Mapping[str, object], path: Path) -> None:
    active = [key for key in _UNSUPPORTED if raw.get(key)]
    if raw.get("bias", "none") not in ("none", None):
        active.append("bias")
    if active:
        _refuse(
            path,
            f"its settings use {', '.join(active)}, which changes more than scale * B @ A: unsupported",
            hint=_MERGE,
        )
    init = raw.get("init_lora_weights")
    if not any(init is kept or (isinstance(init, str) and init == kept) for kept in _INITS_THAT_KEEP_THE_BASE):
        _refuse(
            path,
            f"init_lora_weights is {_shown(init)}, which changes the base's weights as well: unsupported",
            hint=_MERGE,
        )


def _pattern(patterns: Mapping[str, object], module: str) -> str:
    """The first pattern that PEFT would find for a module: one that matches a whole end of its path; "" for none."""
    return next((pattern for pattern in patterns if _matches_end(pattern, module)), "")


def _matches_end(pattern: str, module: str) -> bool:
    before, end = module[: -len(pattern)], module[-len(pattern) :]
    whole = len(end) == len(pattern) and (not before or before.endswith("."))
    return whole and all(want in (".", got) for want, got in zip(pattern, end, strict=True))


def _patterns(raw: Mapping[str, object], key: str, path: Path) -> dict[str, object]:
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        _refuse(path, f"{key} should map ends of module paths to numbers, got {type(patterns).__name__}")
    for pattern in patterns:
        if not _LITERAL.fullmatch(pattern):
            _refuse(
                path, f"{key} has the regular expression {_shown(pattern)}: expected the literal end of a module path"
            )
    return patterns


def _rank(value: object, key: str, path: Path) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_RANK:
        _refuse(
            path, f"the rank '{printable(key)}' is {_shown(value)}: expected a whole number from 1 to {_MOST_RANK:,}"
        )
    return value


def _alpha(value: object, key: str, path: Path) -> float:
    # Past float32's largest value the scaled product could only overflow.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3.4e38:
        _refuse(path, f"the alpha '{printable(key)}' is {_shown(value)}: expected a finite number")
    return float(value)


def _flag(raw: Mapping[str, object], key: str, path: Path) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        _refuse(path, f"{key} is {_shown(value)}: expected true or false")
    return value


def _shown(value: object) -> str:
    return printable(repr(value), limit=80)


def _refuse(path: Path, message: str, *, hint: str = _AS_SAVED) -> NoReturn:
    raise AdapterError(message, path=path, hint=hint)
