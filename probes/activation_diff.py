"""How the residual stream moved, layer by layer, and what chance would have made of it: arrays in, never a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from activations.errors import NonFiniteError, OptionError
from probes.metrics import group_numbers
from probes.train import Groups, checked_labels, shuffled_labels

__all__ = ["ActivationDiff", "diff_activations"]


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
    """

    mean_shift: Float[np.ndarray, " layer"]
    mean_shift_null: Float[np.ndarray, "draw layer"]
    drift: Float[np.ndarray, " layer"]
    cka: Float[np.ndarray, " layer"]
    harm_shift: Float[np.ndarray, " layer"] | None = None
    harm_shift_null: Float[np.ndarray, "draw layer"] | None = None

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
        """Everything but the draws as JSON values; of each null the median and the 95 % quantile."""
        record: dict[str, object] = {name: _json(getattr(self, name)) for name in ("mean_shift", "drift", "cka")}
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
        draws: Random draws of each null; p-values reach down to 1 / (draws + 1).
        seed: Of the draws.

    Raises:
        OptionError: The shapes differ or are not [layer, prompt, d_model], something is empty, or `draws` is below 1.
        LabelError: Labels or groups are not one for each prompt, or only one class is present.
        NonFiniteError: An activation is NaN or infinite.
    """
    _check(base, tuned)
    if draws < 1:
        raise OptionError(f"draws is {draws}: expected 1 or more")
    prompts = base.shape[1]
    members = group_numbers(groups, prompts)
    rng = np.random.default_rng(seed)
    signs = np.concatenate([np.ones((1, prompts)), rng.choice([-1.0, 1.0], (draws, members.max() + 1))[:, members]])
    contrasts = [signs / prompts]
    if labels is not None:
        truth = checked_labels(labels, prompts)
        shuffles = [shuffled_labels(truth, members, rng) for _ in range(draws)]
        contrasts.append(_class_contrast(np.stack([truth, *shuffles])))
    norms = np.stack(
        [_contrast_norms(*layer, np.concatenate(contrasts)) for layer in zip(base, tuned, strict=True)], -1
    )
    shift, harm = norms[: draws + 1], norms[draws + 1 :]
    return ActivationDiff(
        mean_shift=shift[0],
        mean_shift_null=shift[1:],
        drift=np.array([_drift(*layer) for layer in zip(base, tuned, strict=True)]),
        cka=np.array([linear_cka(*layer) for layer in zip(base, tuned, strict=True)]),
        harm_shift=harm[0] if len(harm) else None,
        harm_shift_null=harm[1:] if len(harm) else None,
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
