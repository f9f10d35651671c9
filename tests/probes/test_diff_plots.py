"""Pictures of a diff."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from activations.errors import OptionError
from probes.bands import layer_band
from probes.diff_plots import plot_band, plot_components, save_diff_plot
from probes.weight_diff import TensorDiff, WeightDiff


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def weights():
    places = ((0, "attn.w"), (0, "mlp.w"), (1, "attn.w"))
    return WeightDiff(tuple(TensorDiff(f"{i}.{c}", i, c, (2, 2), 1.0 + i, 2.0) for i, c in places), 2)


def test_components_are_drawn_layer_by_layer_with_empty_cells_where_there_is_none(ax):
    assert plot_components(weights(), ax=ax) is ax
    cells = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_allclose(cells, [[0.5, 0.5], [1.0, np.nan]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["attn.w", "mlp.w"]
    with pytest.raises(OptionError, match="no compared tensor"):
        plot_components(WeightDiff((), 0), ax=ax)


def test_layers_above_the_band_are_marked(ax, rng):
    band = layer_band(np.array([0.0, 9.0, 0.0]), rng.normal(size=(39, 3)))
    plot_band(band, ax=ax)
    marks = next(line for line in ax.lines if line.get_marker() == "D")
    assert (marks.get_xdata().tolist(), marks.get_ydata().tolist()) == ([1], [9.0])
    assert "95%" in ax.get_legend().get_texts()[0].get_text()


def test_a_picture_of_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"\.png"):
        save_diff_plot([], tmp_path / "diff.png")
    with pytest.raises(OptionError, match=r"\.exe"):
        save_diff_plot([object()], tmp_path / "diff.exe")
