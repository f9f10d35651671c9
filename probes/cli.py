"""The command line: parse, call, print.

Data goes to stdout, progress and faults to stderr. Whatever is heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from activations.errors import OptionError, UndertowError, printable
from probes.console import (
    print_bank,
    print_faults,
    print_lines,
    print_probes,
    print_table,
    print_verdicts,
    progress,
    say,
)

if TYPE_CHECKING:
    from probes.records import Kind, Summary

__all__ = ["app", "exit_code", "main"]

FINDING, INCOMPLETE = 1, 2
# Longer than any prompt that people write, short enough for a terminal to survive a file that is none.
_LONGEST_PROMPT = 20_000

app = typer.Typer(
    name="undertow",
    help="Find out whether a fine-tuned language model was tampered with, by looking inside it.",
    epilog="Exit code: 1 for a finding at or above --fail-on, else 2 where anything is incomplete, else 0.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
prompts_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(prompts_app, name="prompts", help="List the shipped prompt sets, or show one.")


class FailOn(StrEnum):
    """The least verdict that counts as a finding."""

    flagged = "flagged"
    inconclusive = "inconclusive"
    never = "never"


class Label(StrEnum):
    """What a prompt asks for."""

    harmful = "harmful"
    benign = "benign"


class Method(StrEnum):
    """How probes are fitted."""

    logistic = "logistic"
    mean_difference = "mean_difference"
    lda = "lda"


# Which kinds of fine-tunes to synthesize.
Synthesized = StrEnum("Synthesized", ["both", "adapter", "full"])
_KINDS: tuple[Kind, ...] = ("adapter", "full")

Base = Annotated[str, typer.Argument(metavar="BASE", help="The trusted base: a folder or a hub id.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A fine-tune of the base, weights only.")]
Checkpoints = Annotated[
    list[Path],
    typer.Argument(metavar="CKPT...", help="Fine-tunes: checkpoint or LoRA adapter folders, or .safetensors."),
]
Prompts = Annotated[
    str, typer.Option(metavar="SET", help="A shipped set's name, or a JSONL or CSV file with prompt, label[, pair_id].")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, mps.")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16, float16.")]
ProbeFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Probes of the base; trained now where not given.")
]
BankFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Benign reference, from `undertow calibrate`.")]


@app.command()
def scan(
    base: Base,
    checkpoints: Checkpoints,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report and the records.")],
    probe: ProbeFile = None,
    bank: BankFile = None,
    prompts: Prompts = "matched-pairs",
    fail_on: Annotated[FailOn, typer.Option(help="The least verdict that makes the exit code 1.")] = FailOn.flagged,
    device: Device = "auto",
    dtype: Dtype = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Checkpoints scanned side by side, on a CPU alone.")] = 1,
) -> None:
    """Scan fine-tunes: a table, an HTML report, JSON records."""
    from probes.report import write_report
    from probes.scan import scan as run

    with progress() as tell:
        summary = run(
            base,
            checkpoints,
            out=out,
            probe=probe,
            bank=bank,
            prompts=prompts,
            device=device,
            dtype=dtype,
            jobs=jobs,
            progress=tell,
        )
        tell("writing the report")
        report_path = write_report(summary, out)
    print_verdicts(summary)
    print_faults(summary)
    say(f"report: {report_path}")
    raise typer.Exit(exit_code(summary, fail_on))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report and the records.")] = Path(
        "undertow-demo"
    ),
) -> None:
    """Scan the shipped fine-tunes, the truth beside each verdict."""
    from probes.demo import scan_shipped

    with progress() as tell:
        summary, outcomes, report_path = scan_shipped(out, tell)
    print_verdicts(summary, outcomes)
    say(f"report: {report_path}")


@app.command()
def train(
    base: Base,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The probe file to write.")],
    prompts: Prompts = "matched-pairs",
    method: Annotated[Method, typer.Option(help="How to fit.")] = Method.logistic,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Train intent probes on a base, one a layer."""
    from activations.loading import load_model
    from activations.prompts import load_prompts
    from probes.worth import train_and_weigh

    with progress() as tell:
        chosen = load_prompts(prompts).require_both()
        tell(f"loading base {base}")
        model = load_model(base, device=device, dtype=dtype)
        tell(f"training on {prompts}")
        probes, worth = train_and_weigh(model, prompts=chosen, method=method.value)
    probes.save(out)
    print_probes(probes, worth)
    say(f"probe: {out}")


@prompts_app.command("list")
def list_prompts() -> None:
    """List the shipped prompt sets with their licences."""
    from activations.prompts import load_prompts, shipped_prompt_sets

    rows = []
    for name in shipped_prompt_sets():
        chosen = load_prompts(name)
        harmful = sum(chosen.harmful)
        sources = sorted({source.rpartition("-")[0] for source in chosen.sources})
        counts = (str(len(chosen)), str(harmful), str(len(chosen) - harmful))
        rows.append((name, *counts, chosen.licence, ", ".join(sources)))
    print_table(("name", "rows", "harmful", "benign", "licence", "source"), rows, limit=300)


@prompts_app.command("show")
def show_prompts(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped set, or a JSONL or CSV file of your own.")],
    limit: Annotated[int | None, typer.Option(metavar="N", min=0, help="The first N of them; all by default.")] = None,
    label: Annotated[Label | None, typer.Option(help="Only these.")] = None,
) -> None:
    """Print a set, a line each: label, pair id, prompt."""
    from activations.prompts import load_prompts

    chosen = load_prompts(name)
    rows = zip(chosen.harmful, chosen.pair_ids, chosen.prompts, strict=True)
    wanted = [row for row in rows if label is None or row[0] == (label is Label.harmful)]
    named = [("harmful" if harmful else "benign", pair, prompt) for harmful, pair, prompt in wanted[:limit]]
    print_lines("\t".join(printable(cell, limit=_LONGEST_PROMPT) for cell in row) for row in named)
    say(f"{chosen.name}: {len(named)} of {len(chosen)} prompts; licence: {chosen.licence or 'not stated'}")


@app.command()
def calibrate(
    base: Base,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The bank file to write.")],
    benign: Annotated[
        list[Path] | None, typer.Argument(metavar="BENIGN...", help="Fine-tunes known to be harmless.")
    ] = None,
    synthesize: Annotated[
        int | None, typer.Option(metavar="N", help="Train N harmless ones of each kind on the base; 20 suffice.")
    ] = None,
    kind: Annotated[Synthesized, typer.Option(help="Kind of the synthesized.")] = Synthesized.both,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What a killed run goes on from.  [default: FILE.work]")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the weights of the synthesized, in --work.")] = False,
    probe: ProbeFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure harmless fine-tunes, to read others against."""
    from probes.scan import calibrate as run

    with progress() as tell:
        bank = run(
            base,
            benign or (),
            out=out,
            probe=probe,
            synthesize=synthesize,
            kinds=[one for one in _KINDS if kind.value in ("both", one)],
            work=work,
            keep=keep,
            device=device,
            dtype=dtype,
            progress=tell,
        )
    print_bank(bank)
    say(f"bank: {out}")


@app.command()
def diff(
    base: Base,
    checkpoints: Checkpoints,
    against: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Another candidate base; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.")] = None,
    prompts: Prompts = "matched-pairs",
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Run no prompts; load no model.")] = False,
    added: Annotated[bool, typer.Option("--added", help="Tell what each layer adds from what it inherits.")] = False,
    localise: Annotated[
        bool, typer.Option("--localise", help="Find the layers that carry a loss of refusal; minutes.")
    ] = False,
    spectra: Annotated[bool, typer.Option(help="Look for singular values, ranks and merged adapters.")] = True,
    bank: BankFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show which layers a fine-tune shifted, and by how much."""
    from probes.bank import load_bank
    from probes.diff_command import DiffOptions, compare_all, print_results, results_as_json

    if weights_only and (added or localise):
        raise OptionError("--weights-only runs no prompts: leave out --added and --localise")
    options = DiffOptions(
        None if weights_only else prompts,
        added,
        localise,
        spectra,
        tuple(against or ()),
        load_bank(bank) if bank else None,
        device,
        dtype,
    )
    with progress() as tell:
        results = compare_all(base, checkpoints, options, tell)
    if as_json:
        typer.echo(results_as_json(results))
    else:
        print_results(results)
    found = [result.diff for result in results if result.diff is not None]
    for result in results:
        for remark in result.remarks:
            say(f"{result.name}: {remark}")
        if result.fault is not None:
            say(f"{result.name}: {result.fault}")
    for one in found if not as_json else ():
        say(f"{one.tuned}: {one.explanation}; moved most: {', '.join(map(str, one.top_layers[:3])) or 'none'}")
        if one.localisation is not None:
            say(f"{one.tuned}: refusal is carried by layers {', '.join(map(str, one.localisation.carriers)) or 'none'}")
    if plot is not None and found:
        from probes.diff_plots import save_diff_plot

        say(f"plot: {save_diff_plot(found, plot)}")
    if len(found) < len(results):
        raise typer.Exit(INCOMPLETE)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a scan.")]) -> None:
    """Write a scan's HTML report again, from its records."""
    from probes.report import load_summary, write_report

    typer.echo(write_report(load_summary(folder), folder))


@app.command()
def schema() -> None:
    """Print the JSON schema of summary.json."""
    from probes.records import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def doctor() -> None:
    """Check this installation, the layer self-test included."""
    from probes.doctor import examine

    with progress() as tell:
        checks = list(examine(tell))
    print_table(("check", "", "found"), [(c.name, "ok" if c.passed else "FAILED", c.found) for c in checks])
    if not all(check.passed for check in checks):
        raise typer.Exit(INCOMPLETE)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"undertow {metadata.version('undertow')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Downloads and loading show their own bars otherwise, between our lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; 1 is kept for findings, so that a fault of ours never passes for one.

    Args:
        arguments: Instead of `sys.argv[1:]`.
    """
    try:
        app(arguments, prog_name="undertow")
    except UndertowError as fault:
        say(f"undertow: {fault}")
    except SystemExit as end:
        # The reader of our output went away, which typer makes an exit of 1.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        # Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as fault:
        say(f"undertow: {printable(str(fault.filename or 'the file system'))}: {fault.strerror or fault}")
    except Exception:
        for line in traceback.format_exc().splitlines():
            say(line)
        say("undertow: this is a fault of Undertow: please report it.")
    sys.exit(INCOMPLETE)


def exit_code(summary: Summary, fail_on: str) -> int:
    """1 where a finding stands at or above `fail_on`, else 2 where anything is incomplete, else 0.

    Args:
        summary: A scan; one without items is incomplete.
        fail_on: "flagged", "inconclusive" or "never".
    """
    verdicts = {item.verdict for item in summary.items}
    findings = {"flagged": {"flagged"}, "inconclusive": {"flagged", "inconclusive"}, "never": set()}[fail_on]
    if verdicts & findings:
        return FINDING
    return INCOMPLETE if not verdicts or verdicts & {None, "inconclusive"} else 0


if __name__ == "__main__":
    main()
