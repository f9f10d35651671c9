"""The pure parts of the probe benchmark, and that what it times are the same fits."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import Figure

from probes.train import fit_probes

NAMES = {
    "vs_sklearn",
    "vs_sklearn_cv",
    "max_disagreement",
    "peak_memory_ratio",
    "intent_auroc_twins",
    "words_only_auroc_twins",
}


@pytest.fixture(scope="module")
def benchmark():
    """By its path: the name `probes` is the package's."""
    path = Path(__file__).parents[2] / "benchmarks" / "probes.py"
    spec = importlib.util.spec_from_file_location("probes_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def layer(benchmark):
    return benchmark.synthetic(200, 48)


def test_the_file_does_not_hide_the_package_of_its_name(benchmark):
    assert fit_probes.__module__ == "probes.train"
    assert benchmark.fit_probes is fit_probes


def test_synthetic_layers_have_a_power_law_and_three_massive_dimensions(benchmark):
    values, labels = benchmark.synthetic(600, 100)
    spread = np.sort(values.std(axis=0))
    assert spread[-3] > 20 * spread[-4]
    assert labels.sum() == 300
    variances = np.linalg.svd(benchmark.scaled(values), compute_uv=False) ** 2
    assert variances[0] > 10 * np.median(variances)


def test_rivals_fit_what_we_fit(benchmark, layer):
    exact = benchmark.their_fit(layer[0].astype(np.float64), layer[1], tol=1e-9)
    for scores in (benchmark.our_fit(*layer), benchmark.as_users_write(*layer)):
        assert np.corrcoef(scores, exact)[0, 1] > 0.999
    assert np.abs(benchmark.our_fit(*layer) - exact).max() <= 1e-3 * np.abs(exact).max()
    assert np.abs(benchmark.our_fit(*layer, l2=1.0) - exact).max() > 0.01 * np.abs(exact).max()  # the control


def test_cross_validations_agree(benchmark, layer):
    theirs, ours = benchmark.their_cv(*layer), benchmark.our_cv(*layer)
    assert len(ours) == len(benchmark.STRENGTHS)
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_headline_figures_are_of_the_target_or_the_worst(benchmark):
    big, small = benchmark.Case(4000, 4096), benchmark.Case(500, 512)
    figures = {f"{big.name}/{name}": Figure(float(i), "x") for i, name in enumerate(benchmark.RATIOS, start=2)}
    for case, value in ((big, 1.2), (small, 9.0)):
        figures[f"{case.name}/disagreement"] = Figure(value / 1e4, "share")
        figures[f"{case.name}/memory_fit"] = Figure(value, "times")
        figures[f"{case.name}/memory_cv"] = Figure(value + 0.5, "times")
    found = benchmark.headline(figures, big)
    assert found["vs_sklearn"].value == 2
    assert found["max_disagreement"].value == 9e-4
    assert found["peak_memory_ratio"].value == 1.7  # small layers say nothing of memory
    assert set(found) | {"intent_auroc_twins", "words_only_auroc_twins"} >= NAMES
    assert "500x512" in benchmark.report(found | figures)


def test_without_a_large_layer_memory_says_why_it_is_absent(benchmark):
    figure = benchmark.headline(
        {f"500x512/{name}": Figure(1.0, "x") for name in benchmark.RATIOS}, benchmark.Case(500, 512)
    )["peak_memory_ratio"]
    assert figure.value is None
    assert "--quick" in figure.note
