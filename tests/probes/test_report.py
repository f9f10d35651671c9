"""The report is one file that says the verdict first and that no hostile name can break."""

import re
from html.parser import HTMLParser

import pytest

from activations.errors import OptionError, PathMissingError
from probes.records import ErrorRecord, Item, Null, write_json
from probes.report import load_summary, write_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e'\"{{ 7*7 }}${8*8}"


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def page_of(tmp_path):
    def render(summary) -> Page:
        return Page(write_report(summary, tmp_path).read_text(encoding="utf-8"))

    return render


@pytest.fixture(scope="module")
def page(summary, tmp_path_factory) -> Page:
    """The report on one of each outcome."""
    return Page(write_report(summary, tmp_path_factory.mktemp("report")).read_text(encoding="utf-8"))


def test_the_verdict_comes_before_everything_else(page):
    text = page.text
    order = ["2 of 6 checkpoints are flagged", "cmft-walnut53", "encoding-taught", "Reasons", "Evidence", "Provenance"]
    places = [text.index(words, text.index(order[0])) for words in order]
    assert places == sorted(places)


def test_flagged_ones_come_first_and_clean_ones_are_folded(page):
    entries = [tag for tag, attributes in page.tags if attributes.get("class") == "item"]
    assert entries == ["article"] * 4 + ["details"] * 2


@pytest.mark.parametrize(
    ("names", "headline"),
    [
        ((), "Nothing was scanned"),
        (("benign",), "Nothing found in 1 checkpoint"),
        (("benign", "broken"), "Nothing flagged, but 1 of 2 checkpoints could not be cleared"),
    ],
)
def test_the_headline_claims_no_more_than_was_found(page_of, make_summary, make_item, broken, names, headline):
    items = {"benign": make_item("benign"), "broken": broken}
    assert headline in page_of(make_summary(*(items[name] for name in names))).text


def test_every_statistic_stands_beside_its_benign_range_and_p(page_of, make_summary, make_item):
    text = page_of(make_summary(make_item("one", (0.01, 20.9, 0.5, 0.1)))).text
    assert "20.9 0.203 to 1.32 0.045" in text
    assert "1, 2, 0" in text


def test_an_unscannable_item_says_why_and_what_to_do(page_of, make_summary, broken):
    text = page_of(make_summary(broken)).text
    assert "git lfs pull" in text
    assert "lfs-pointer" in text
    assert "treat it as unvetted" in text


def test_a_scan_without_a_bank_says_what_is_missing(page_of, make_summary, make_item):
    assert "No bank of benign fine-tunes was given" not in page_of(make_summary(make_item("one"))).text
    assert "No bank of benign fine-tunes was given" in page_of(make_summary(make_item("one"), bank=None)).text


def test_an_item_without_null_or_statistic_is_drawn_without_them(page_of, make_summary, make_item, make_evidence):
    evidence = [make_evidence(null=None), make_evidence("intent-shift", None, layers=())]
    text = page_of(make_summary(make_item("one", evidence=evidence, verdict="inconclusive"))).text
    assert "nothing to compare with" in text
    assert "not measured" in text


def test_no_hostile_text_becomes_markup_or_an_escape(page_of, make_summary, make_item, make_evidence):
    control = page_of(make_summary(make_item("plain")))
    evidence = [make_evidence(summary=HOSTILE, details={HOSTILE: [HOSTILE]}), make_evidence(detector="intent-shift")]
    item = make_item(HOSTILE, path=HOSTILE, evidence=evidence, reasons=[HOSTILE], notes=[HOSTILE], verdict="flagged")
    fault = Item(
        name=HOSTILE,
        path=HOSTILE,
        status="unscannable",
        error=ErrorRecord(code=HOSTILE, path=HOSTILE, message=HOSTILE, hint=HOSTILE),
    )
    page = page_of(make_summary(item, fault, probe={HOSTILE: HOSTILE}, bank={HOSTILE: HOSTILE}))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in control.tags} | {"article", "header"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text  # as text, so it was not lost either
    assert "{{ 7*7 }}" in page.text
    assert not {"\x1b", "\u202e"} & set(page.text)


def test_the_page_is_whole_without_network_or_script(page):
    assert not {"script", "link", "iframe", "object", "img", "image"} & {tag for tag, _ in page.tags}
    policies = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert sum(tag == "svg" for tag, _ in page.tags) > 20


def test_the_same_records_give_the_same_bytes(tmp_path, make_summary, make_item):
    summary = make_summary(make_item("one"))
    first = write_report(summary, tmp_path / "first").read_bytes()
    assert write_report(summary, tmp_path / "second").read_bytes() == first


def test_colours_follow_the_readers_theme(tmp_path, make_summary, make_item):
    text = write_report(make_summary(make_item("one")), tmp_path).read_text(encoding="utf-8")
    assert not re.findall(r"(?:fill|stroke): #(?!ffffff|000000)[0-9a-f]{6}", text)
    assert "var(--plot-band)" in text


def test_a_report_is_made_again_from_the_records_alone(tmp_path, summary):
    write_json(summary, tmp_path / "summary.json")
    assert load_summary(tmp_path) == summary


def test_a_folder_without_a_scan_is_named(tmp_path):
    with pytest.raises(PathMissingError, match="no scan lies here"):
        load_summary(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "undertow.scan/2"}', "[" * 10_000])
def test_a_summary_of_another_schema_is_refused_with_the_place(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(OptionError, match="not a summary that this version reads, at"):
        load_summary(tmp_path)


def test_a_second_looks_control_is_named_and_not_drawn_as_the_range_of_benign_fine_tunes(
    page_of, make_summary, make_item, make_evidence
):
    control = Null(source="the base, asked the same", count=98, median=0.0, low=0.0, high=0.04)
    second = make_evidence("asymmetric-drift", 0.9).model_copy(
        update={"detector": "encoding-recovery", "null": control}
    )
    page = page_of(make_summary(make_item("covert", evidence=[make_evidence("asymmetric-drift", 20.0), second])))
    assert "98 of: the base, asked the same" in page.text
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert "Asymmetric drift: all checkpoints" in labels
    assert "Encoding recovery: all checkpoints" not in labels


def test_what_could_not_be_read_takes_no_row_from_a_picture(page_of, make_summary, make_item, broken):
    many = [broken.model_copy(update={"name": f"broken-{i}"}) for i in range(60)]
    page = page_of(make_summary(*many, make_item("quiet")))
    assert [a for tag, a in page.tags if tag == "svg" and a.get("aria-label") == "Asymmetric drift: all checkpoints"]


def test_what_to_make_of_an_item_comes_before_its_reasons(page_of, make_summary, make_item):
    told = ("It speaks an encoding.", "An innocent cause is unlikely.", "Quarantine it.")
    text = page_of(make_summary(make_item("covert", (0.0, 20.9, 0.5, 0.1), explanation=told))).text
    places = [text.index(words) for words in (*told, "Reasons")]
    assert places == sorted(places)
    assert "It was taught to read or write a private encoding" not in text
    untold = page_of(make_summary(make_item("covert", (0.0, 20.9, 0.5, 0.1)))).text
    assert "It was taught to read or write a private encoding" in untold


def test_q_stands_beside_p_and_a_remark_on_the_batch_above_all_items(page_of, make_summary, make_item):
    item = make_item("one", (0.0, 20.9, 0.5, 0.1), q_value=0.91)
    text = page_of(make_summary(item, remarks=("By chance alone up to 6 are flagged.",))).text
    assert "0.045 0.91" in text
    assert "q = 0.91" in text
    assert text.index("By chance alone up to 6") < text.index("Verdict Why")


def test_no_hostile_explanation_or_remark_becomes_markup(page_of, make_summary, make_item):
    control = page_of(make_summary(make_item("plain", explanation=("a",), verdict="flagged"), remarks=("b",)))
    hostile = make_item("plain", explanation=(HOSTILE,) * 3, verdict="flagged")
    page = page_of(make_summary(hostile, remarks=(HOSTILE,)))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in control.tags}
    assert page.text.count("<script>alert(1)</script>") == 4
    assert not {"\x1b", "\u202e"} & set(page.text)
