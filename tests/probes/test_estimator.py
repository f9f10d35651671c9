"""A single probe keeps every promise of a scikit-learn classifier, and is the probe of `fit_probes`."""

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from activations.errors import OptionError
from probes.crossval import METHODS
from probes.estimator import ProbeClassifier
from probes.train import fit_probes


@parametrize_with_checks([ProbeClassifier(method=method) for method in METHODS])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")  # checks that need pandas say so by a warning
def test_scikit_learn_finds_nothing_to_object_to(estimator, check):
    check(estimator)


def test_scikit_learn_does_object_to_a_broken_one():
    """Positive control: the conformance suite sees a parameter that is changed on the way in."""
    from sklearn.utils.estimator_checks import check_no_attributes_set_in_init

    class Broken(ProbeClassifier):
        def __init__(self, *, method="logistic", l2=1e-2, precision="final", device="cpu"):
            super().__init__(method=method, l2=l2, precision=precision, device=device)
            self.extra = 1

    with pytest.raises(AssertionError):
        check_no_attributes_set_in_init("Broken", Broken())


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_probe_of_fit_probes(rng, method):
    labels = rng.random(120) < 0.4
    values = (rng.standard_normal((120, 30)) + labels[:, None] * rng.standard_normal(30)).astype(np.float32)
    probe = fit_probes(values[None], labels, method=method, folds=0)[0]
    scores = ProbeClassifier(method=method).fit(values, labels).decision_function(values)
    np.testing.assert_allclose(scores, probe.score(values), rtol=1e-4, atol=1e-4)


def test_it_works_in_a_pipeline_and_a_search(rng):
    labels = np.where(rng.random(90) < 0.5, "harmful", "benign")
    values = rng.standard_normal((90, 12)) + 2 * (labels == "harmful")[:, None]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), ProbeClassifier()), {"probeclassifier__l2": [1.0, 1e-3]}, cv=3
    ).fit(values, labels)
    assert search.best_score_ > 0.95
    assert list(search.classes_) == ["benign", "harmful"]
    assert (search.predict_proba(values)[:, 1] > 0.5).mean() == pytest.approx((labels == "harmful").mean(), abs=0.05)


def test_impossible_options_are_named(rng):
    values, labels = rng.standard_normal((10, 3)), np.arange(10) % 2
    for wrong in ({"method": "svm"}, {"l2": 0}, {"precision": "rough"}, {"device": "abacus"}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            ProbeClassifier(**wrong).fit(values, labels)
    with pytest.raises(OptionError, match="expected one number"):
        ProbeClassifier(l2=[0.1, 1.0]).fit(values, labels)
    with pytest.raises(ValueError, match="too large for float32"):
        ProbeClassifier().fit(values * 1e200, labels)
    with pytest.raises(ValueError, match="two classes; got 1 class"):
        ProbeClassifier().fit(values, np.zeros(10))
