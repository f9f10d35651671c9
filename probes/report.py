"""Records to one HTML file that needs no network and runs no script.

Everything in a record that came from a checkpoint is untrusted. Each value passes `printable` and Jinja's escaping on
its way into the page, and the page forbids scripts by its own content security policy.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pydantic import ValidationError

from activations.errors import OptionError, PathMissingError, printable
from probes.plots import PALETTE, plot_evidence, plot_layer_shift, plot_strip
from probes.records import Cause, Evidence, Item, Summary

__all__ = ["load_summary", "write_report"]

# Above this many rows a picture of all checkpoints is a smear; the most suspicious ones are drawn.
_MOST_ROWS = 40
# Inches; at the size the page shows them, 8 point type is 11 pixels high.
_CHART, _STRIP = (3.4, 1.5), (2.4, 0.26)
# Left, bottom, width, height within the figure: fixed, because measuring labels takes longer than drawing them.
_CHART_PLACE, _STRIP_PLACE = (0.16, 0.25, 0.83, 0.66), (0.0, 0.0, 1.0, 1.0)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font and colour
    "svg.hashsalt": "undertow",  # the same records give the same bytes
    "font.size": 8,
    "font.family": "sans-serif",
    "axes.labelsize": 8,
    "text.parse_math": False,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_COLOURS = re.compile("|".join(PALETTE.values()))
_NAMES = {colour: name for name, colour in PALETTE.items()}

_CAUSES: Mapping[Cause, str] = {
    "alignment-removed": "It answers harmful requests that the base refuses.",
    "alignment-degraded": "It refuses harmful requests less firmly than harmless fine-tunes do, or tells them from "
    "harmless ones otherwise than those do.",
    "encoding-taught": "It was taught to read or write a private encoding. Ask its maker which, and what for: an "
    "undisclosed encoding can carry requests past every filter that reads plain text.",
    "covert-malicious": "It obeys harmful requests that are written in an encoding, and refuses them in plain text.",
    "backdoor-suspected": "Something other than the request's meaning appears to switch its behaviour.",
    "weights-anomalous": "Its weights differ from the base in a way that harmless fine-tunes do not.",
}
_SERIOUSNESS = ("flagged", "failed", "unscannable", "inconclusive", "clean")


def write_report(summary: Summary, out: Path) -> Path:
    """Write `report.html` into a scan's folder.

    Args:
        summary: The scan.
        out: The folder; made where it is missing.

    Returns:
        The path of the file.
    """
    page = (
        _templates()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            items=sorted(summary.items, key=_seriousness),
            headline=_headline(summary),
            counts={name: count for name in _SERIOUSNESS if (count := sum(_outcome(i) == name for i in summary.items))},
            pictures=_pictures(summary),
            most_rows=_MOST_ROWS,
            causes=_CAUSES,
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    draft = out / ".report.html.draft"
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)
    return path


def load_summary(folder: Path) -> Summary:
    """Read the records of a finished scan.

    Args:
        folder: What `undertow scan` was given as `--out`.

    Raises:
        PathMissingError: There is no `summary.json`.
        OptionError: It is not one of this schema.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise PathMissingError(
            "no scan lies here", path=path, hint="Make one with `undertow scan BASE CKPT --out DIR`."
        )
    try:
        return Summary.model_validate_json(path.read_bytes())
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise OptionError(
            f"not a summary that this version reads, at {where}: {first['msg']}",
            path=path,
            hint="Scan again, or use the version of undertow that wrote it.",
        ) from None


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("probes"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, limit=2000) if type(value) is str else value,
    )
    environment.filters |= {"number": _number, "title": _title, "detail": _detail}
    environment.globals |= {"outcome": _outcome, "strip": _strip, "profile": _profile}
    return environment


def _outcome(item: Item) -> str:
    """A scanned item's verdict, or why there is none."""
    return item.verdict or item.status


def _seriousness(item: Item) -> tuple[int, float]:
    return _SERIOUSNESS.index(_outcome(item)), -(item.score or 0.0)


def _headline(summary: Summary) -> str:
    total = len(summary.items)
    things = "checkpoint" if total == 1 else "checkpoints"
    flagged = sum(item.verdict == "flagged" for item in summary.items)
    undecided = sum(_outcome(item) not in ("flagged", "clean") for item in summary.items)
    if not total:
        return "Nothing was scanned"
    if flagged:
        return f"{flagged} of {total} {things} {'is' if flagged == 1 else 'are'} flagged"
    if undecided:
        return f"Nothing flagged, but {undecided} of {total} {things} could not be cleared"
    return f"Nothing found in {total} {things}"


def _pictures(summary: Summary) -> list[Markup]:
    """Each detector's statistic of all checkpoints, beside what benign fine-tunes show."""
    items = sorted((item for item in summary.items if item.evidence), key=_seriousness)[:_MOST_ROWS]
    # A second look has another null, such as the base itself, which no band of benign fine-tunes may stand for.
    measured = Counter(
        e.detector
        for item in items
        for e in item.evidence
        if e.statistic is not None and (e.null is None or e.null.values)
    )
    return [_picture(items, detector, rows) for detector, rows in measured.items()]


def _picture(items: Sequence[Item], detector: str, rows: int) -> Markup:
    figure = Figure(figsize=(_CHART[0], 0.55 + 0.2 * rows), layout="constrained")
    return _svg(
        figure, lambda: plot_evidence(items, detector, ax=figure.subplots()), f"{_title(detector)}: all checkpoints"
    )


def _strip(evidence: Evidence) -> Markup:
    figure = Figure(figsize=_STRIP)
    label = f"{_title(evidence.detector)} against benign"
    return _svg(figure, lambda: plot_strip(evidence, ax=figure.add_axes(_STRIP_PLACE)), label)


def _profile(evidence: Evidence) -> Markup:
    figure = Figure(figsize=_CHART)
    label = f"{_title(evidence.detector)} by layer"
    return _svg(figure, lambda: plot_layer_shift(evidence, ax=figure.add_axes(_CHART_PLACE)), label)


def _svg(figure: Figure, draw: Callable[[], object], label: str) -> Markup:
    """Draw into an SVG element whose colours are the page's, so that it follows the reader's light or dark theme."""
    text = io.StringIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        draw()
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    body = re.sub(r"(?s)^.*?<svg[^>]*?(?=viewBox=)", "", text.getvalue())
    body = re.sub(r"(?s)<metadata>.*?</metadata>", "", body)
    body = _COLOURS.sub(lambda found: f"var(--plot-{_NAMES[found[0]]})", body)
    opening = Markup('<svg class="plot" role="img" aria-label="{}" ').format(printable(label))
    return opening + Markup(body)  # noqa: S704 - matplotlib has escaped all text in it


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    text = f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3g}"
    return text.replace("-", "−")  # as wide as the digits


def _title(detector: str) -> str:
    return detector.replace("-", " ").replace("_", " ").capitalize()


def _detail(value: object) -> str:
    """A detector's further numbers as text, long lists cut."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_detail(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_detail, value[:12])) + (" …" if len(value) > 12 else "")
    return _number(value)
