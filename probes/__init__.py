"""From activations to a verdict: probes, detectors, diffs, scans.

from probes import diff, fit_probes, plot_auroc, plot_layer_shift, scan
"""

from typing import TYPE_CHECKING

from activations.lazy import export

if TYPE_CHECKING:
    from probes.baselines import surface_baselines
    from probes.causal import ablated, causal_effect, steered
    from probes.diff import Diff, diff
    from probes.estimator import ProbeClassifier
    from probes.evaluate import Labelled, evaluate
    from probes.hygiene import clean_probes, contamination
    from probes.plots import plot_auroc, plot_calibration, plot_evidence, plot_heatmap, plot_layer_shift, plot_transfer
    from probes.probe import Probe, ProbeSet
    from probes.scan import calibrate, scan
    from probes.sweep import sweep_probes
    from probes.token_probe import fit_token_probe
    from probes.train import fit_probes
    from probes.transfer import transfer_matrix
    from probes.worth import train_probe

__all__ = [
    "Diff",
    "Labelled",
    "Probe",
    "ProbeClassifier",
    "ProbeSet",
    "ablated",
    "calibrate",
    "causal_effect",
    "clean_probes",
    "contamination",
    "diff",
    "evaluate",
    "fit_probes",
    "fit_token_probe",
    "plot_auroc",
    "plot_calibration",
    "plot_evidence",
    "plot_heatmap",
    "plot_layer_shift",
    "plot_transfer",
    "scan",
    "steered",
    "surface_baselines",
    "sweep_probes",
    "train_probe",
    "transfer_matrix",
]

export(
    __name__,
    {
        "Diff": "probes.diff",
        "Labelled": "probes.evaluate",
        "Probe": "probes.probe",
        "ProbeClassifier": "probes.estimator",
        "ProbeSet": "probes.probe",
        "ablated": "probes.causal",
        "calibrate": "probes.scan",
        "causal_effect": "probes.causal",
        "clean_probes": "probes.hygiene",
        "contamination": "probes.hygiene",
        "diff": "probes.diff",
        "evaluate": "probes.evaluate",
        "fit_probes": "probes.train",
        "fit_token_probe": "probes.token_probe",
        "plot_auroc": "probes.plots",
        "plot_calibration": "probes.plots",
        "plot_evidence": "probes.plots",
        "plot_heatmap": "probes.plots",
        "plot_layer_shift": "probes.plots",
        "plot_transfer": "probes.plots",
        "scan": "probes.scan",
        "steered": "probes.causal",
        "surface_baselines": "probes.baselines",
        "sweep_probes": "probes.sweep",
        "train_probe": "probes.worth",
        "transfer_matrix": "probes.transfer",
    },
)
