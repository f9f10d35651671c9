"""One probe as a scikit-learn classifier, for pipelines, grid searches and whatever else expects one."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from activations.errors import OptionError
from probes.crossval import check_method, checked_strengths, fit_training_sets
from probes.rows import Precision, check_device, check_precision, prepare, standardised, undecomposed

__all__ = ["ProbeClassifier"]


class ProbeClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The probe that `fit_probes` fits at a layer: standardise, then read along one direction.

    Args:
        method: "logistic", "mean_difference" or "lda".
        l2: Penalty per prompt on the direction, 1 / (C * n_prompts); used by "logistic" alone.
        precision: "final" or "screening".
        device: Where the products are done.

    Attributes:
        classes_: The two labels, sorted; a score above 0 reads as the second.
        coef_: Weights of the features as given, scaling undone, [1, n_features].
        intercept_: What is added, [1].
        n_features_in_: Width of the rows.
    """

    def __init__(
        self,
        *,
        method: Literal["logistic", "mean_difference", "lda"] = "logistic",
        l2: float = 1e-2,
        precision: Precision = "final",
        device: str = "cpu",
    ) -> None:
        self.method = method
        self.l2 = l2
        self.precision = precision
        self.device = device

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on rows [prompt, d_model] with two classes.

        Raises:
            OptionError: `method`, `l2`, `precision` or `device` is impossible.
            ValueError: As every scikit-learn classifier: NaN, lengths that differ, or not two classes.
        """
        check_method(self.method)
        check_precision(self.precision)
        check_device(self.device)
        strengths = checked_strengths(self.l2)
        if len(strengths) > 1:
            raise OptionError(f"l2 is {self.l2}: expected one number; a grid search chooses among several")
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            counted = f"{len(self.classes_)} class" + ("" if len(self.classes_) == 1 else "es")
            raise ValueError(
                "Only binary classification is supported. A probe reads along one direction, "
                f"so y must hold two classes; got {counted}."
            )
        values, mean, scale = standardised(X, self.device)
        if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
            raise ValueError("X holds values too large for float32: scale them down first.")
        rows = undecomposed(values) if self.method == "mean_difference" else prepare(values, 1, self.precision)
        truth = (codes == 1)[None]
        fits = fit_training_sets(rows, self.method, truth, np.ones_like(truth), strengths)
        coefficients = rows.features(fits[0]).double().cpu().numpy()
        self.coef_ = coefficients / scale.astype(np.float64)
        self.intercept_ = fits[1].double().cpu().numpy() - self.coef_ @ mean.astype(np.float64)
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, " prompt"]:
        """Scores; above 0 reads as the second class. Log odds but for a mean difference."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        return np.asarray(X @ self.coef_[0] + self.intercept_[0])

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row."""
        second = self.decision_function(X) > 0
        return np.asarray(self.classes_[second.astype(int)])

    def predict_proba(self, X: Any) -> Float[np.ndarray, "prompt 2"]:
        """Probability of each class; of a mean difference, which has no scale, merely monotone in the score."""
        chance = torch.sigmoid(torch.from_numpy(self.decision_function(X).astype(np.float64))).numpy()
        return np.stack([1 - chance, chance], axis=1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
