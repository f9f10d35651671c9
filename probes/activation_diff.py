"""How the residual stream moved, layer by layer, and what chance would have made of it: arrays in, never a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from activations.errors import NonFiniteError, OptionError
from probes.metrics import group_numbers
from probes.train import Groups, checked_labels, shuffled_labels

__all__ = ["ActivationDiff", "adjusted_p", "debiased_cka", "diff_activations", "linear_cka", "procrustes_residual"]


@dataclass(frozen=True, eq=False)
class ActivationDiff:
    """How activations of the same prompts differ between base and fine-tune, each number one a layer.

    Attributes:
        mean_shift: Norm of the mean difference over the mean norm of the base's activations.
        mean_shift_null: The same with the sign of each prompt's difference drawn at random, one row a draw: what
            differences without a common direction would give.
        drift: Mean of 1 - cosine of base and fine-tune, from 0 (same direction) to 2.
        cka: Linear centred kernel alignment, 1 where both are equal up to rotation and scale (Kornblith et al. 2019,
            arXiv:1905.00414, equation 5); NaN where one side is the same for every prompt.
        harm_shift: Norm of the harmful prompts' mean difference minus the benign ones', over the mean norm of the
            base's activations; None without labels.
        harm_shift_null: The same under shuffled labels, one row a shuffle; None without labels.
        direction: Where the mean difference points, of unit length; zeros where there is none. [layer, d_model]
        norm_ratio: Mean norm of the fine-tune's activations over the mean norm of the base's.
        cka_debiased: CKA with unbiased estimates, which few prompts of many dimensions do not raise (Song et al. 2012,
            equation 5; Nguyen, Raghu and Kornblith 2020, arXiv:2010.15327, equation 3); NaN below four prompts.
        procrustes: Share of the base's variance that no rotation and scaling of the fine-tune's activations explains,
            from 0 (the same but for those) to 1 (Schoenemann 1966); NaN where one side does not vary.
        class_shift: "harmful" and "benign" to the norm of that class' mean difference, over the mean norm of the base's
            activations; {} without labels.
        along: "all", "harmful" and "benign" to the mean difference along each layer's probe direction, in standard
            deviations of the base's activations within their classes; {} without directions.
    """

    mean_shift: Float[np.ndarray, " layer"]
    mean_shift_null: Float[np.ndarray, "draw layer"]
    drift: Float[np.ndarray, " layer"]
    cka: Float[np.ndarray, " layer"]
    harm_shift: Float[np.ndarray, " layer"] | None = None
    harm_shift_null: Float[np.ndarray, "draw layer"] | None = None
    direction: Float[np.ndarray, "layer d_model"] | None = None
    norm_ratio: Float[np.ndarray, " layer"] | None = None
    cka_debiased: Float[np.ndarray, " layer"] | None = None
    procrustes: Float[np.ndarray, " layer"] | None = None
    class_shift: Mapping[str, Float[np.ndarray, " layer"]] = field(default_factory=dict)
    along: Mapping[str, Float[np.ndarray, " layer"]] = field(default_factory=dict)

    @property
    def mean_shift_p(self) -> Float[np.ndarray, " layer"]:
        """p-values of `mean_shift`, corrected for the number of layers (see `adjusted_p`)."""
        return adjusted_p(self.mean_shift, self.mean_shift_null)

    @property
    def harm_shift_p(self) -> Float[np.ndarray, " layer"] | None:
        """p-values of `harm_shift`, corrected for the number of layers; None without labels."""
        if self.harm_shift is None or self.harm_shift_null is None:
            return None
        return adjusted_p(self.harm_shift, self.harm_shift_null)

    def to_dict(self) -> dict[str, object]:
        """Everything but draws and directions as JSON values; of each null the median and the 95 % quantile."""
        names = ("mean_shift", "drift", "cka", "norm_ratio", "cka_debiased", "procrustes")
        record: dict[str, object] = {
            name: _json(values) for name in names if (values := getattr(self, name)) is not None
        }
        for name in ("class_shift", "along"):
            record |= {f"{name}_{rows}": _json(values) for rows, values in getattr(self, name).items()}
        record |= {"mean_shift_null": _quantiles(self.mean_shift_null), "mean_shift_p": _json(self.mean_shift_p)}
        if self.harm_shift is not None and self.harm_shift_null is not None and self.harm_shift_p is not None:
            record |= {"harm_shift": _json(self.harm_shift), "harm_shift_p": _json(self.harm_shift_p)}
            record["harm_shift_null"] = _quantiles(self.harm_shift_null)
        return record


def diff_activations(
    base: Float[np.ndarray, "layer prompt d_model"],
    tuned: Float[np.ndarray, "layer prompt d_model"],
    labels: Bool[np.ndarray, " prompt"] | None = None,
    *,
    groups: Groups | None = None,
    directions: Float[np.ndarray, "layer d_model"] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> ActivationDiff:
    """Compare activations of the same prompts in base and fine-tune.

    Cost: a few passes over each layer, and one product of [draws, prompt] with it for each null.

    Args:
        base: Pooled activations of the base.
        tuned: Those of the fine-tune, same prompts in the same order.
        labels: True where a prompt is harmful; None skips the harm-specific shift.
        groups: Prompts that belong together, as pair ids; labels are shuffled, and signs drawn, by group.
        directions: One of each layer, such as a probe's `residual_direction`, of any length but 0; None skips them.
        draws: Random draws of each null; p-values reach down to 1 / (draws + 1).
        seed: Of the draws.

    Raises:
        OptionError: The shapes differ or are not [layer, prompt, d_model], something is empty, `draws` is below 1, or
            there is not one direction a layer.
        LabelError: Labels or groups are not one for each prompt, or only one class is present.
        NonFiniteError: An activation is NaN or infinite.
    """
    _check(base, tuned)
    if draws < 1:
        raise OptionError(f"draws is {draws}: expected 1 or more")
    prompts = base.shape[1]
    if directions is not None and np.shape(directions) != (base.shape[0], base.shape[2]):
        raise OptionError(f"directions have shape {np.shape(directions)}: expected {(base.shape[0], base.shape[2])}")
    members = group_numbers(groups, prompts)
    rng = np.random.default_rng(seed)
    signs = np.concatenate([np.ones((1, prompts)), rng.choice([-1.0, 1.0], (draws, members.max() + 1))[:, members]])
    contrasts, classes = [signs / prompts], {"all": np.ones(prompts, dtype=bool)}
    if labels is not None:
        truth = checked_labels(labels, prompts)
        shuffles = [shuffled_labels(truth, members, rng) for _ in range(draws)]
        contrasts.append(_class_contrast(np.stack([truth, *shuffles])))
        classes |= {"harmful": truth, "benign": ~truth}
    norms = np.stack(
        [_contrast_norms(*layer, np.concatenate(contrasts)) for layer in zip(base, tuned, strict=True)], -1
    )
    shift, harm = norms[: draws + 1], norms[draws + 1 :]
    layers = [_layer(*layer, classes) for layer in zip(base, tuned, strict=True)]
    along = (
        [_along(*layer, classes) for layer in zip(base, tuned, directions, strict=True)]
        if directions is not None
        else []
    )
    return ActivationDiff(
        mean_shift=shift[0],
        mean_shift_null=shift[1:],
        drift=np.array([layer.drift for layer in layers]),
        cka=np.array([linear_cka(*layer) for layer in zip(base, tuned, strict=True)]),
        harm_shift=harm[0] if len(harm) else None,
        harm_shift_null=harm[1:] if len(harm) else None,
        direction=np.stack([layer.direction for layer in layers]),
        norm_ratio=np.array([layer.norm_ratio for layer in layers]),
        cka_debiased=np.array([debiased_cka(*layer) for layer in zip(base, tuned, strict=True)]),
        procrustes=np.array([procrustes_residual(*layer) for layer in zip(base, tuned, strict=True)]),
        class_shift={name: np.array([layer.shifts[name] for layer in layers]) for name in classes if name != "all"},
        along={name: np.array([layer[name] for layer in along]) for name in classes} if along else {},
    )


def adjusted_p(
    values: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draw layer"]
) -> Float[np.ndarray, " layer"]:
    """p-values that hold for all layers at once: each layer against the largest of every draw, in null medians.

    Westfall and Young's single-step maxT. At p = 0.05 "some layer shifted" is wrong in one of twenty comparisons, not
    in one of twenty layers.
    """
    typical = np.median(null, axis=0)
    unit = np.where(typical > 0, typical, 1.0)
    largest = (null / unit).max(axis=1, initial=0.0)
    exceeding = (largest[:, None] >= values / unit).sum(axis=0)
    return np.asarray((1 + exceeding) / (1 + len(null)))


def linear_cka(base: Float[np.ndarray, "prompt d_model"], tuned: Float[np.ndarray, "prompt d_model"]) -> float:
    """Linear CKA of two sets of activations of the same prompts; NaN where one does not vary."""
    x, y = (side.astype(np.float64) - side.mean(axis=0, dtype=np.float64) for side in (base, tuned))
    if x.shape[0] < x.shape[1]:  # the Gram matrices over prompts hold the same norms, and are smaller
        x, y = x @ x.T, y @ y.T
        shared, own = (x * y).sum(), np.linalg.norm(x) * np.linalg.norm(y)
    else:
        shared, own = (np.linalg.norm(x.T @ y) ** 2), np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(shared / own) if own > 0 else float("nan")


def debiased_cka(base: Float[np.ndarray, "prompt d_model"], tuned: Float[np.ndarray, "prompt d_model"]) -> float:
    """Linear CKA from unbiased estimates of HSIC; may be a little outside of 0..1, NaN below four prompts."""
    if len(base) < 4:
        return float("nan")
    grams = []
    for side in (base, tuned):
        # The estimate does not ask for it, but large means would cost digits.
        rows = side.astype(np.float64) - side.mean(axis=0, dtype=np.float64)
        gram = rows @ rows.T
        np.fill_diagonal(gram, 0.0)
        grams.append(gram)
    own = _unbiased_hsic(grams[0], grams[0]) * _unbiased_hsic(grams[1], grams[1])
    return float(_unbiased_hsic(*grams) / np.sqrt(own)) if own > 0 else float("nan")


def procrustes_residual(base: Float[np.ndarray, "prompt d_model"], tuned: Float[np.ndarray, "prompt d_model"]) -> float:
    """Share of the base's variance that the best rotation and scaling of the fine-tune leaves unexplained."""
    x, y = (side.astype(np.float64) - side.mean(axis=0, dtype=np.float64) for side in (base, tuned))
    own = np.linalg.norm(x) * np.linalg.norm(y)
    if not own > 0:
        return float("nan")
    if len(x) < x.shape[1]:  # roots of the Gram matrices have the same singular values, and are smaller
        x, y = (_root(side @ side.T) for side in (x, y))
    shared = np.linalg.svd(x.T @ y, compute_uv=False).sum()
    return float(np.clip(1 - (shared / own) ** 2, 0.0, 1.0))


def _root(gram: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T)


def _unbiased_hsic(k: np.ndarray, other: np.ndarray) -> float:
    """Song et al. 2012, equation 5, of Gram matrices with zero diagonals."""
    n = len(k)
    both, sums = (k * other).sum(), (k.sum(axis=0), other.sum(axis=0))
    middle = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return float((both + middle - 2 / (n - 2) * (sums[0] @ sums[1])) / (n * (n - 3)))


@dataclass(frozen=True)
class _Layer:
    direction: np.ndarray
    norm_ratio: float
    drift: float
    shifts: dict[str, float]


def _layer(base: np.ndarray, tuned: np.ndarray, classes: Mapping[str, np.ndarray]) -> _Layer:
    change = tuned.astype(np.float64) - base
    means = {name: change[rows].mean(axis=0) for name, rows in classes.items()}
    length = float(np.linalg.norm(means["all"]))
    sizes = [float(np.linalg.norm(side.astype(np.float64), axis=1).mean()) for side in (base, tuned)]
    unit = sizes[0] or 1.0
    return _Layer(
        means["all"] / length if length else np.zeros(base.shape[1]),
        sizes[1] / unit,
        _drift(base, tuned),
        {name: float(np.linalg.norm(mean)) / unit for name, mean in means.items()},
    )


def _along(
    base: np.ndarray, tuned: np.ndarray, direction: np.ndarray, classes: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Mean difference along a direction, in the base's standard deviations within its classes."""
    places = [side.astype(np.float64) @ (direction / np.linalg.norm(direction)) for side in (base, tuned)]
    parts = [rows for name, rows in classes.items() if name != "all"] or [classes["all"]]
    spread = np.sqrt(np.mean([places[0][rows].var() for rows in parts]))
    return {
        name: float((places[1] - places[0])[rows].mean() / spread) if spread > 0 else float("nan")
        for name, rows in classes.items()
    }


def _class_contrast(labels: Bool[np.ndarray, "draw prompt"]) -> Float[np.ndarray, "draw prompt"]:
    """Weights that take the benign mean from the harmful one."""
    harmful = labels.sum(axis=1, keepdims=True)
    return np.asarray(np.where(labels, 1 / harmful, -1 / (labels.shape[1] - harmful)))


def _contrast_norms(base: np.ndarray, tuned: np.ndarray, contrasts: np.ndarray) -> Float[np.ndarray, " contrast"]:
    change = tuned.astype(np.float64) - base
    size = np.linalg.norm(base.astype(np.float64), axis=1).mean()
    return np.asarray(np.linalg.norm(contrasts @ change, axis=1) / (size if size > 0 else 1.0))


def _drift(base: np.ndarray, tuned: np.ndarray) -> float:
    x, y = base.astype(np.float64), tuned.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = np.divide((x * y).sum(axis=1), lengths, out=np.ones_like(lengths), where=lengths > 0)
    return float(1 - np.minimum(cosine, 1.0).mean())


def _check(base: np.ndarray, tuned: np.ndarray) -> None:
    if base.ndim != 3 or base.shape != tuned.shape or 0 in base.shape:
        raise OptionError(
            f"activations of base and fine-tune have shapes {base.shape} and {tuned.shape}: "
            "expected the same [layer, prompt, d_model]"
        )
    for name, side in (("base", base), ("fine-tune", tuned)):
        if not np.isfinite(side).all():
            raise NonFiniteError(f"the {name}'s activations hold NaN or infinite values")


def _json(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _quantiles(null: np.ndarray) -> dict[str, list[float | None]]:
    return {"median": _json(np.median(null, axis=0)), "q95": _json(np.quantile(null, 0.95, axis=0))}
