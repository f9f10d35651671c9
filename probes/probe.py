"""What a linear probe is: a direction with its bias and scaling, for every layer, where it came from, and its file.

A probe file is a safetensors file: five F32 tensors with one row a layer, `directions`, `means`, `scales`
[layer, d_model] and `biases`, `gains` [layer]. Its metadata has one key, the schema "undertow.probe/1", whose value is
a JSON object with everything else: one key, because safetensors writes several in an order that changes from run to
run. It is read as an untrusted file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from pydantic_core import PydanticSerializationError

from activations.errors import ProbeError
from probes.records import replace_file

if TYPE_CHECKING:
    from activations.models import Model
    from activations.tensors import Header

__all__ = ["SCHEMA", "LayerMetrics", "Method", "Probe", "ProbeSet"]

SCHEMA = "undertow.probe/1"

Method = Literal["logistic", "mean_difference", "lda"]

# float32 rounds the norm of a unit direction by about 1e-7 times the square root of its length; a file further off than
# this was not written by us.
_UNIT_NORM_TOLERANCE = 1e-3
# Smaller ones lose digits in float32, and what is divided by them overflows.
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
# What `fit_probes` takes where nobody says otherwise.
_USUAL_L2 = 1e-2

# Prompts that are standardised at a time, so that scoring copies no layer.
_ROWS = 128

_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Probe:
    """A linear read-out of one layer.

    Attributes:
        direction: Unit norm, in standardised coordinates.
        bias: Added to the projection.
        mean: Subtracted from an activation before anything else.
        scale: Divides what is left, so that every dimension has unit variance on the training prompts.
        gain: Multiplies the projection on `direction`; the norm of the logistic weights, 1 for a mean difference.
        threshold: The score that at most 1 % of the benign training prompts exceeded when held out; None where they are
            too few to tell.
    """

    direction: Float[np.ndarray, " d_model"]
    bias: float
    mean: Float[np.ndarray, " d_model"]
    scale: Float[np.ndarray, " d_model"]
    gain: float = 1.0
    threshold: float | None = None

    @property
    def residual_direction(self) -> Float[np.ndarray, " d_model"]:
        """The unit direction along which the score grows fastest in the residual stream itself, scaling undone.

        Raises:
            ProbeError: The direction is zero, NaN or infinite.
        """
        steepest = np.asarray(self.direction, dtype=np.float64) / self.scale
        length = np.linalg.norm(steepest)
        if not 0 < length < np.inf:
            raise ProbeError(f"the probe's direction has the length {length}: it points nowhere")
        return np.asarray(steepest / length)

    def score(self, activations: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, " prompt"]:
        """Decision values: log odds for a logistic probe; above 0 reads as harmful."""
        along = np.empty(len(activations), dtype=np.float32)
        for start in range(0, len(activations), _ROWS):
            some = slice(start, start + _ROWS)
            standardised = np.subtract(activations[some], self.mean, dtype=np.float32)
            standardised /= self.scale
            along[some] = standardised @ self.direction
        return np.asarray(self.gain * along + self.bias)


class LayerMetrics(BaseModel):
    """How well a probe separates held-out prompts, beside what needs no knowledge of intent to reach.

    Attributes:
        auroc: Of cross-validated scores, folds keeping groups together.
        interval: Its 95 % interval, which knows the groups.
        null_shuffled: Cross-validated AUROC under shuffled labels, one value a shuffle.
        null_random_directions: The best AUROC, either sign, of 1000 random directions.
        words_baseline: Cross-validated AUROC of a model that sees the prompts' words alone; None where not measured.
        threshold: See `Probe.threshold`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    auroc: _Share
    interval: tuple[_Share, _Share]
    null_shuffled: tuple[_Share, ...]
    null_random_directions: _Share
    words_baseline: _Share | None = None
    threshold: float | None = None


class _Card(BaseModel):
    """The JSON part of a probe file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hook_points: tuple[str, ...]
    method: Method
    pooling: str
    base_fingerprint: str
    template_hash: str
    prompts_hash: str
    prompts_name: str
    metrics: tuple[LayerMetrics, ...]
    l2: tuple[PositiveFloat, ...] = ()


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """A probe for each layer of one base, fitted on one set of prompts.

    Attributes:
        directions: Unit norm rows; this and the next four as in `Probe`, stacked.
        hook_points: Where each layer's activations were taken, `blocks.0.hook_resid_post` and so on.
        method: How the probes were fitted.
        pooling: How token positions became one activation a prompt.
        base_fingerprint: Content hash of the base; empty where not known.
        template_hash: Hash of the chat template that the prompts went through; empty where not known.
        prompts_hash: Content hash of the training prompts.
        prompts_name: Their name.
        metrics: One entry a layer, or none where nothing was held out.
        l2: Strength of the penalty at each layer; () where the method has none, or an older version wrote the file.
    """

    directions: Float[np.ndarray, "layer d_model"]
    biases: Float[np.ndarray, " layer"]
    means: Float[np.ndarray, "layer d_model"]
    scales: Float[np.ndarray, "layer d_model"]
    gains: Float[np.ndarray, " layer"]
    hook_points: tuple[str, ...]
    method: Method
    pooling: str = "last"
    base_fingerprint: str = ""
    template_hash: str = ""
    prompts_hash: str = ""
    prompts_name: str = ""
    metrics: tuple[LayerMetrics, ...] = field(default=())
    l2: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.hook_points)

    def __getitem__(self, layer: int) -> Probe:
        """The probe of one row; negative rows count from the last."""
        if not -len(self) <= layer < len(self):
            raise ProbeError(f"layer {layer} of the probe does not exist: it has layers 0-{len(self) - 1}")
        return Probe(
            direction=self.directions[layer],
            bias=float(self.biases[layer]),
            mean=self.means[layer],
            scale=self.scales[layer],
            gain=float(self.gains[layer]),
            threshold=self.metrics[layer].threshold if self.metrics else None,
        )

    @property
    def d_model(self) -> int:
        """Length of one activation."""
        return int(self.directions.shape[1])

    @property
    def best_layer(self) -> int:
        """The row with the highest cross-validated AUROC, the earliest of equals.

        Raises:
            ProbeError: The probes were fitted without held-out folds.
        """
        if not self.metrics:
            raise ProbeError("no layer is known to be the best: the probes were fitted without held-out folds")
        return int(np.argmax([layer.auroc for layer in self.metrics]))

    def strength(self, layer: int) -> float:
        """The penalty to fit one row anew with: its own, or where none is known that of `fit_probes`."""
        return self.l2[layer] if self.l2 else _USUAL_L2

    def score(self, activations: Float[np.ndarray, "layer prompt d_model"]) -> Float[np.ndarray, "layer prompt"]:
        """Decision values of every layer's probe on that layer's activations.

        Raises:
            ProbeError: The activations have other layers or another width than the probes.
        """
        expected, got = (len(self), self.d_model), (activations.shape[0], activations.shape[-1])
        if activations.ndim != 3 or expected != got:
            raise ProbeError(
                f"activations have shape {activations.shape}: expected [{len(self)} layers, prompts, {self.d_model}]",
                hint="Extract the hook points that the probe was trained on.",
            )
        return np.stack([self[layer].score(values) for layer, values in enumerate(activations)])

    def check_fits(self, model: Model) -> None:
        """Refuse to read a model with probes that were fitted on another.

        Raises:
            ProbeError: The probe names another base, chat template, layers or width than `model` has, or none.
        """
        from activations.tokens import template_hash

        known = set(model.hook_points.names())
        strangers = [name for name in self.hook_points if name not in known]
        if strangers:
            raise ProbeError(
                f"the probe reads {strangers[0]!r}, which {model.name!r} does not have: "
                f"it has layers 0-{model.n_layers - 1}",
                hint=_RETRAIN,
            )
        template = template_hash(model.tokenizer) if model.tokenizer is not None else ""
        for what, expected, got in (
            ("activations of width", model.d_model, self.d_model),
            ("the base with fingerprint", model.fingerprint, self.base_fingerprint),
            ("the chat template with hash", template, self.template_hash),
        ):
            if expected != got:
                raise ProbeError(
                    f"the probe was trained for another model than {model.name!r}: "
                    f"expected {what} {expected or 'none'}, got {got or 'none'}",
                    hint=_RETRAIN,
                )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the probe file, replacing an older one in one step.

        Raises:
            ProbeError: `load` would refuse it, as a probe with a zero direction.
        """
        from safetensors.numpy import save

        path = Path(path)
        tensors = {name: np.ascontiguousarray(getattr(self, name), dtype=np.float32) for name in _TENSORS}
        try:
            card = _Card(**{name: getattr(self, name) for name in _Card.model_fields})
            text = card.model_dump_json(exclude=None if self.l2 else {"l2"})
        except (ValidationError, PydanticSerializationError) as fault:
            raise ProbeError(f"these probes are none that a file can hold: {fault}", path=path) from None
        _check_arrays(tensors, card, path)
        replace_file(path, save(tensors, metadata={SCHEMA: text}))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeSet:
        """Read a probe file, trusting nothing in it.

        Raises:
            PathMissingError: There is no such file.
            CorruptFileError: It is no well-formed safetensors file.
            ProbeError: It is one, but no probe of this schema, or its parts disagree.
        """
        from activations.tensors import read_header, read_tensor

        path = Path(path)
        header = read_header(path)
        card = _read_card(header, path)
        if set(header.tensors) != set(_TENSORS) or any(info.dtype != "F32" for info in header.tensors.values()):
            raise ProbeError(f"a probe file holds the F32 tensors {', '.join(_TENSORS)} and no other", path=path)
        arrays = {name: read_tensor(header.tensors[name]).numpy() for name in _TENSORS}
        _check_arrays(arrays, card, path)
        parts: dict[str, Any] = {**arrays, **{name: getattr(card, name) for name in _Card.model_fields}}
        return cls(**parts)


_TENSORS = ("biases", "directions", "gains", "means", "scales")

_RETRAIN = "Train one on this base with `undertow train BASE -o FILE.probe`."


def _read_card(header: Header, path: Path) -> _Card:
    if SCHEMA not in header.metadata:
        got = ", ".join(map(repr, sorted(header.metadata)[:3])) or "no metadata"
        raise ProbeError(f"not a probe file that this version reads: expected {SCHEMA!r}, got {got}", path=path)
    try:
        return _Card.model_validate_json(header.metadata[SCHEMA])
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"])) or "card"
        raise ProbeError(f"the probe's card is damaged at {where!r}: {first['msg']}", path=path) from None


def _check_arrays(arrays: dict[str, np.ndarray], card: _Card, path: Path) -> None:
    """Shapes that agree with the card, each layer once, finite values, positive scales, unit directions."""
    layers, width = len(card.hook_points), arrays["directions"].shape[-1:]
    for name, array in arrays.items():
        expected = (layers,) if name in ("biases", "gains") else (layers, *width)
        if array.shape != expected or 0 in expected:
            raise ProbeError(f"{name} has shape {array.shape}: expected {expected} for {layers} hook points", path=path)
        if not np.isfinite(array).all():
            raise ProbeError(f"{name} holds NaN or infinite values", path=path)
    for name, given in (("metrics", card.metrics), ("l2", card.l2)):
        if len(given) not in (0, layers):
            raise ProbeError(f"{name} are given for {len(given)} layers: expected {layers} or none", path=path)
    if len(set(card.hook_points)) < layers:
        raise ProbeError("a hook point stands there twice", path=path)
    if not (arrays["scales"] >= _SMALLEST_SCALE).all():
        raise ProbeError("scales holds values that are not positive", path=path)
    if np.abs(np.linalg.norm(arrays["directions"].astype(np.float64), axis=1) - 1).max() > _UNIT_NORM_TOLERANCE:
        raise ProbeError("directions holds rows that are not of unit length", path=path)
