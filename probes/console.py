"""What the command line writes: tables to stdout, progress and remarks to stderr.

On a terminal these have colour and a spinner; in a pipe or a log they are plain lines, and no table is cut to a width.
"""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from activations.errors import UndertowError, printable
from probes.records import Item, Summary

if TYPE_CHECKING:
    from probes.bank import Bank
    from probes.probe import ProbeSet
    from probes.worth import Worth

__all__ = [
    "print_bank",
    "print_faults",
    "print_lines",
    "print_probes",
    "print_table",
    "print_verdicts",
    "progress",
    "say",
]

_STYLES = {
    "flagged": "bold red",
    "clean": "green",
    "inconclusive": "yellow",
    "unscannable": "bold yellow",
    "failed": "bold yellow",
    "FAILED": "bold red",
    "missed": "bold red",
    "false alarm": "bold red",
}
# Wide enough that no cell of ours wraps where nobody watches.
_PIPE_WIDTH = 400


def say(line: str) -> None:
    """Write a remark to stderr."""
    Console(stderr=True).print(Text(printable(line, limit=4000)), soft_wrap=True)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Give a function that shows what is being done: a spinner on a terminal, a line each time elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield say
        return
    with console.status("") as status:
        yield lambda line: status.update(Text(printable(line)))


def print_faults(summary: Summary) -> None:
    """Say of each checkpoint that could not be scanned what is wrong, to stderr."""
    for item in summary.items:
        if item.error:
            fault = UndertowError(item.error.message, path=item.error.path or item.path, hint=item.error.hint)
            say(f"{item.name}: {fault}")


def print_verdicts(summary: Summary, truths: Mapping[str, tuple[str, str]] | None = None) -> None:
    """Print a line a checkpoint, then what to make of each flagged one.

    Args:
        summary: A scan.
        truths: Item name to the truth on its card and how the verdict compares with it, as two columns more.
    """
    header = ["checkpoint", "kind", "verdict", "severity", "causes", "score", "p", "q", "layers"]
    rows = [_verdict_row(item) for item in summary.items]
    if truths is not None:
        header += ["truth", "outcome"]
        rows = [row + truths[item.name] for row, item in zip(rows, summary.items, strict=True)]
    print_table(header, rows)
    for item in summary.items:
        if item.verdict == "flagged" and item.explanation:
            print_lines(["", printable(item.name), *(line for text in item.explanation for line in _indented(text))])
    for remark in summary.remarks:
        say(remark)


def print_bank(bank: Bank) -> None:
    """Print a line a benign fine-tune with its statistics, then a word on how far synthetic ones go."""
    detectors = list(dict.fromkeys(name for member in bank.members for name in member.statistics))
    cells = [[member.statistics.get(name) for name in detectors] for member in bank.members]
    rows = [
        (member.name, member.kind, *("-" if number is None else f"{number:.3g}" for number in numbers))
        for member, numbers in zip(bank.members, cells, strict=True)
    ]
    print_table(("fine-tune", "kind", *detectors), rows)
    if bank.synthetic:
        say(
            f"{bank.synthetic} of {len(bank.members)} are synthetic: more alike than what people make, so that a "
            "harmless one may be flagged against them. Add your own as you get them."
        )


def print_probes(probes: ProbeSet, worth: Worth) -> None:
    """Print a line a layer with its nulls, then whether intent beats what needs none."""
    rows = [
        (
            hook_point,
            f"{layer.auroc:.3f}",
            f"{layer.interval[0]:.3f}-{layer.interval[1]:.3f}",
            f"{max(layer.null_shuffled):.3f}" if layer.null_shuffled else "",
            f"{layer.null_random_directions:.3f}",
            "" if layer.words_baseline is None else f"{layer.words_baseline:.3f}",
        )
        for hook_point, layer in zip(probes.hook_points, probes.metrics, strict=True)
    ]
    print_table(("hook point", "AUROC", "95 %", "shuffled", "random", "words"), rows)
    print_lines([""])
    print_table(("best layer, and what needs no intent", "AUROC", "95 %", "the probe's lead"), worth.rows())
    print_lines(["", worth.sentence])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, limit: int = 200) -> None:
    """Print aligned columns to stdout; cells may hold untrusted names and are cut to `limit` characters."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold", no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*(Text(printable(cell, limit=limit), style=_STYLES.get(cell, "")) for cell in row))
    if sys.stdout.isatty():
        Console().print(table)
        return
    console = Console(width=_PIPE_WIDTH, file=io.StringIO())
    with console.capture() as text:
        console.print(table)
    sys.stdout.writelines(line.rstrip() + "\n" for line in text.get().splitlines())
    # A reader that has gone away shows here, where it can be handled, and not when Python ends.
    sys.stdout.flush()


def print_lines(lines: Iterable[str]) -> None:
    """Write lines to stdout as they are, none wrapped or cut; whoever calls makes them printable."""
    sys.stdout.writelines(line + "\n" for line in lines)
    sys.stdout.flush()


def _indented(text: str) -> list[str]:
    """Untrusted text, indented; folded to the width of a terminal and left whole elsewhere."""
    width = Console().width if sys.stdout.isatty() else 10**6
    return textwrap.wrap(
        printable(text, limit=2000), width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _verdict_row(item: Item) -> tuple[str, ...]:
    return (
        item.name,
        item.kind or "-",
        item.verdict or item.status,
        item.severity,
        ", ".join(item.causes) or (item.error.code if item.error else "-"),
        "-" if item.score is None else f"{item.score:.1f}",
        "-" if item.p_value is None else f"{item.p_value:.3f}",
        "-" if item.q_value is None else f"{item.q_value:.3f}",
        ",".join(map(str, item.top_layers[:3])) or "-",
    )
