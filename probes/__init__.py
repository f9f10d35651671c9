"""From activations to a verdict: probes, detectors, diffs, scans.

from probes import diff, fit_probes, plot_auroc, plot_layer_shift, scan
"""

from typing import TYPE_CHECKING

from activations.lazy import export

if TYPE_CHECKING:
    from probes.diff import Diff, diff
    from probes.plots import plot_auroc, plot_evidence, plot_layer_shift
    from probes.probe import Probe, ProbeSet
    from probes.scan import calibrate, scan, train_probe
    from probes.train import fit_probes

__all__ = [
    "Diff",
    "Probe",
    "ProbeSet",
    "calibrate",
    "diff",
    "fit_probes",
    "plot_auroc",
    "plot_evidence",
    "plot_layer_shift",
    "scan",
    "train_probe",
]

export(
    __name__,
    {
        "Diff": "probes.diff",
        "Probe": "probes.probe",
        "ProbeSet": "probes.probe",
        "calibrate": "probes.scan",
        "diff": "probes.diff",
        "fit_probes": "probes.train",
        "plot_auroc": "probes.plots",
        "plot_evidence": "probes.plots",
        "plot_layer_shift": "probes.plots",
        "scan": "probes.scan",
        "train_probe": "probes.scan",
    },
)
