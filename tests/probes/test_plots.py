"""Plots return axes that hold the numbers they were given, and show nothing."""

from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from activations.errors import OptionError, ProbeError
from probes.calibration import reliability
from probes.plots import (
    plot_auroc,
    plot_calibration,
    plot_evidence,
    plot_heatmap,
    plot_layer_shift,
    plot_strip,
    plot_transfer,
)
from probes.probe import LayerMetrics
from probes.records import Null
from probes.transfer import Transfer


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture
def draw(ax):
    """Text that a label shows once drawn."""

    def texts():
        ax.figure.canvas.draw()
        return [label.get_text() for label in ax.get_yticklabels()]

    return texts


def layer(auroc: float, words: float | None = 0.7) -> LayerMetrics:
    return LayerMetrics(
        auroc=auroc,
        interval=(auroc - 0.05, min(1.0, auroc + 0.05)),
        null_shuffled=(0.48, 0.5, 0.53),
        null_random_directions=0.6,
        words_baseline=words,
    )


def probes_with(*metrics, blocks=None):
    """As much of a probe set as a plot reads."""
    named = tuple(f"blocks.{block}.hook_resid_post" for block in blocks or range(len(metrics)))
    return SimpleNamespace(metrics=metrics, hook_points=named)


def marks(ax):
    """Positions and markers of the points drawn."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in ax.lines if len(line.get_xdata()) == 1
    ]


def test_evidence_is_drawn_as_one_bar_a_layer(ax, make_evidence):
    assert plot_layer_shift(make_evidence("intent-shift", layers=(0.1, -0.4, 0.2)), ax=ax) is ax
    assert [bar.get_height() for bar in ax.patches] == [0.1, -0.4, 0.2]
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert colours[1] != colours[0] == colours[2]


def test_a_diff_is_drawn_with_what_chance_would_give(ax):
    activations = SimpleNamespace(mean_shift=np.array([0.1, 0.9]), mean_shift_null=np.full((20, 2), 0.05))
    weights = SimpleNamespace(layer_profile=lambda: np.array([0.2, 0.3]))
    plot_layer_shift(SimpleNamespace(weights=weights, activations=activations), ax=ax)
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert drawn == {"activations": [0.1, 0.9], "weights": [0.2, 0.3]}
    assert ax.collections[0].get_datalim(ax.transData).y1 == pytest.approx(0.05)


def test_a_diff_of_weights_alone_is_one_line(ax):
    weights = SimpleNamespace(layer_profile=lambda: np.array([0.2, 0.3]))
    plot_layer_shift(SimpleNamespace(weights=weights, activations=None), ax=ax)
    assert [line.get_label() for line in ax.lines] == ["weights"]


def test_evidence_without_a_profile_is_refused_by_name(make_evidence):
    with pytest.raises(OptionError, match="asymmetric-drift"):
        plot_layer_shift(make_evidence(layers=()))


def test_auroc_is_drawn_with_its_nulls_and_baseline(ax):
    plot_auroc(probes_with(layer(0.8), layer(0.95)), ax=ax)
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["shuffled labels", "best of 1000 random directions", "words alone", "probe"]
    assert ax.lines[-1].get_ydata().tolist() == [0.8, 0.95]


def test_auroc_without_a_words_baseline_draws_none(ax):
    plot_auroc(probes_with(layer(0.8, None), layer(0.95, None)), ax=ax)
    assert "words alone" not in [text.get_text() for text in ax.get_legend().get_texts()]


def test_auroc_of_a_single_layer_has_lines_and_bands_that_can_be_seen(ax):
    plot_auroc(probes_with(layer(0.8)), ax=ax)
    assert [line.get_xdata().tolist() for line in ax.lines[1:]] == [[-0.4, 0.4], [-0.4, 0.4], [0]]
    shuffled, interval = (band.get_paths()[0].get_extents() for band in ax.collections)
    assert (shuffled.width, interval.width) == (pytest.approx(0.8), pytest.approx(0.8))
    assert shuffled.ymax == pytest.approx(0.53)
    assert ax.get_xticks().tolist() == [0]


def test_auroc_is_drawn_at_the_blocks_that_the_hook_points_name(ax):
    some = probes_with(*map(layer, (0.8, 0.9, 0.7)), blocks=(10, 20, 30))
    assert plot_auroc(some, ax=ax).lines[-1].get_xdata().tolist() == [10, 20, 30]
    assert ax.get_xlabel() == "layer"


def test_auroc_of_two_places_in_one_block_is_drawn_in_their_order(ax):
    plot_auroc(probes_with(layer(0.8), layer(0.9), blocks=(4, 4)), ax=ax)
    assert ax.lines[-1].get_xdata().tolist() == [0, 1]
    assert ax.get_xlabel() == "hook point, in order"


def test_probes_that_held_nothing_out_cannot_be_drawn():
    with pytest.raises(ProbeError, match="no metrics"):
        plot_auroc(SimpleNamespace(metrics=()))


def test_each_checkpoint_has_a_row_and_what_left_its_range_another_shape(ax, summary, draw):
    plot_evidence(summary.items, "asymmetric-drift", ax=ax)
    assert draw()[:2] == ["benign-formal", "cmft-walnut53"]
    assert marks(ax)[:2] == [(1.0, 0, "o"), (20.9, 1, "D")]
    assert len(marks(ax)) == 5  # the unscannable one has no number


def test_a_range_far_below_a_statistic_stays_visible(ax, make_item):
    plot_evidence([make_item("near", (0, 3.0, 0.5, 0.1))], "asymmetric-drift", ax=ax)
    assert ax.get_xscale() == "linear"
    plot_evidence([make_item("far", (0, 300.0, 0.5, 0.1))], "asymmetric-drift", ax=ax)
    assert ax.get_xscale() == "symlog"


def test_an_unknown_detector_is_refused_with_the_known_ones(summary):
    with pytest.raises(OptionError, match="expected one of asymmetric-drift, intent-shift"):
        plot_evidence(summary.items, "astrology")


def test_a_hostile_name_is_text_and_nothing_else(ax, make_item, draw):
    plot_evidence([make_item("$\\frac{1}{$\x1b[31m" + "x" * 300)], "intent-shift", ax=ax)
    (label,) = draw()
    assert label.startswith("$\\frac{1}{$\\x1b[31m")
    assert len(label) < 40


def test_a_strip_has_no_axes_but_the_mark_and_its_range(ax, make_evidence):
    plot_strip(make_evidence(statistic=2.0), ax=ax)
    assert not ax.axison
    assert marks(ax) == [(2.0, 0, "D")]
    assert ax.collections


def test_a_new_figure_is_made_where_none_is_given(make_evidence):
    import matplotlib.pyplot as plt

    with mpl.rc_context({"backend": "agg"}):
        drawn = plot_layer_shift(make_evidence("intent-shift"))
        assert drawn.figure.number in plt.get_fignums()
        plt.close(drawn.figure)


def test_a_copy_of_the_base_beside_a_narrow_benign_range_is_drawn(ax, make_item, make_evidence):
    null = Null(source="benign", count=2, median=5.05, low=5.0, high=5.1, values=(5.0, 5.1))
    copy = make_item("copy", evidence=[make_evidence("asymmetric-drift", 0.0, null=null)])
    assert marks(plot_evidence([copy], "asymmetric-drift", ax=ax)) == [(0.0, 0, "o")]


@pytest.mark.parametrize("statistic", [1e30, -1e300])
def test_a_statistic_of_any_size_leaves_room_for_its_labels(ax, make_item, make_evidence, statistic):
    huge = make_item("huge", evidence=[make_evidence("weight-spectrum", statistic)])
    assert len(plot_evidence([huge], "weight-spectrum", ax=ax).get_xticks()) <= 8


AREAS = np.array([[0.55, 0.9, np.nan], [0.6, 0.7, 0.8]])


def test_a_heatmap_holds_every_cell_frames_the_best_and_leaves_gaps_empty(ax, draw):
    assert plot_heatmap(AREAS, rows=["last", "mean"], columns=[0, 1, 2], ax=ax) is ax
    drawn = ax.images[0].get_array()
    assert np.array_equal(drawn.filled(np.nan), AREAS, equal_nan=True)
    assert ax.images[0].get_clim() == (0.5, 1.0)
    (frame,) = ax.patches
    assert frame.get_xy() == (0.5, -0.5)  # the second column of the first row
    assert [text.get_text() for text in ax.texts] == ["0.55", "0.90", "0.60", "0.70", "0.80"]
    assert draw() == ["last", "mean"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]


def test_cells_that_chance_or_words_reach_are_struck_through(ax):
    plot_heatmap(AREAS, rows=["a", "b"], columns=[0, 1, 2], beaten=AREAS < 0.65, ax=ax)
    struck = [(line.get_xdata()[0] + 0.5, line.get_ydata()[1] + 0.5) for line in ax.lines]
    assert struck == [(0, 0), (0, 1)]


def test_numbers_on_cells_can_be_read_on_their_colour(ax):
    plot_heatmap(np.array([[0.5, 1.0]]), rows=["a"], columns=[0, 1], ax=ax)
    dark, light = (text.get_color() for text in ax.texts)
    assert dark == "white"
    assert light != "white"


def test_a_large_heatmap_has_no_numbers_and_names_some(ax, draw):
    plot_heatmap(np.full((80, 30), 0.7), rows=range(80), columns=range(30), ax=ax)
    assert not ax.texts
    assert len(draw()) <= 32
    assert len(ax.get_xticklabels()) <= 12
    assert [label.get_text() for label in ax.get_xticklabels()][:2] == ["0", "3"]


@pytest.mark.parametrize(
    ("values", "rows", "columns", "beaten"),
    [
        (AREAS, ["a"], [0, 1, 2], None),
        (AREAS, ["a", "b"], [0, 1], None),
        (AREAS, ["a", "b"], [0, 1, 2], np.zeros((3, 2))),
        (np.empty((0, 0)), [], [], None),
        (np.full((1, 1), np.nan), ["a"], [0], None),
    ],
)
def test_a_heatmap_of_nothing_or_of_other_names_is_refused(ax, values, rows, columns, beaten):
    with pytest.raises(OptionError):
        plot_heatmap(values, rows=rows, columns=columns, beaten=beaten, ax=ax)


def test_a_transfer_matrix_is_drawn_with_its_intervals(ax, draw):
    area = np.array([[[0.6, 0.7], [0.8, 0.9]], [[0.5, 0.55], [0.65, 0.75]]])
    result = Transfer(("one", "$two$"), ("layer 0", "layer 1"), area, area - 0.05, area + 0.05)
    assert plot_transfer(result, layer=0, ax=ax) is ax
    assert ax.images[0].get_array().tolist() == area[0].tolist()
    assert [text.get_text() for text in ax.texts][1] == "0.70\n0.65-0.75"
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title()) == ("trained on", "tested on", "layer 0")
    assert draw() == ["one", "$two$"]
    with pytest.raises(OptionError, match="layers 0-1"):
        plot_transfer(result, layer=2, ax=ax)


def test_a_reliability_diagram_has_bars_around_its_marks(ax):
    probabilities, labels = np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, False, True, False])
    result = reliability(probabilities, labels)
    assert plot_calibration(result, ax=ax) is ax
    bars, marks = ax.collections
    assert marks.get_offsets().tolist() == pytest.approx(np.array([[0.1, 0.0], [0.9, 0.5]]))
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        [result.low[0], result.high[0]],
        [result.low[1], result.high[1]],
    ]
    assert ax.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
