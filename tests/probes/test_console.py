"""What a terminal shows of verdicts: the table, then what to make of each flagged one, and nothing hostile."""

import pytest

from probes.console import print_verdicts

TOLD = ("It speaks an encoding.", "An innocent cause is unlikely.", "Quarantine it.")
TABLE = 3  # lines: a header and two items


@pytest.fixture
def items(make_item):
    return (
        make_item("open", verdict="inconclusive", explanation=("Nothing accuses it.",) * 3),
        make_item("covert", (0.0, 20.9, 0.5, 0.1), explanation=TOLD, q_value=0.25),
    )


def test_flagged_ones_are_explained_below_the_table_and_open_ones_in_the_report(capsys, make_summary, items):
    print_verdicts(make_summary(*items))
    lines = capsys.readouterr().out.splitlines()
    assert lines[TABLE:] == ["", "covert", *(f"  {sentence}" for sentence in TOLD)]
    assert lines[2].split()[-3:] == ["0.045", "0.250", "1,2,0"]


def test_a_remark_on_the_batch_goes_where_remarks_go(capsys, make_summary, items):
    print_verdicts(make_summary(*items, remarks=("By chance alone up to 6 are flagged.",)))
    out, err = capsys.readouterr()
    assert "By chance" not in out
    assert err == "By chance alone up to 6 are flagged.\n"


def test_a_terminal_folds_sentences_and_keeps_them_indented(capsys, monkeypatch, make_summary, make_item):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    covert = make_item("covert", (0.0, 20.9, 0.5, 0.1), explanation=("word " * 40,))
    print_verdicts(make_summary(covert))
    folded = [line for line in capsys.readouterr().out.splitlines() if "word" in line]
    assert len(folded) > 3
    assert all(line.startswith("  ") and len(line) <= 60 for line in folded)


def test_a_hostile_explanation_cannot_write_to_the_terminal(capsys, make_summary, make_item):
    hostile = make_item("a\x1b[2J", (0.0, 20.9, 0.5, 0.1), explanation=("\x1b[31mred\nclean  clean",))
    print_verdicts(make_summary(hostile, remarks=("\x1b[2J",)))
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert out.splitlines()[-1] == "  \\x1b[31mred\\nclean  clean"
