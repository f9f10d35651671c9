"""Prompt sets say where they come from, keep their pairs, and reach the model as the template writes them."""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from activations import prompts as module
from activations.errors import LabelError, OptionError, PathMissingError, PromptError
from activations.prompts import PromptSet, load_prompts, shipped_licences, shipped_prompt_sets
from activations.tokens import format_prompt, template_hash

ROOT = Path(__file__).parents[2]
PAIRS = PromptSet("pairs", ("a?", "b?", "c?", "d?"), (True, False, True, False), ("1", "1", "2", "2"))


def shipped_rows(name: str) -> list[dict[str, str]]:
    text = (ROOT / "activations" / "prompt_sets" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def corpus_rows() -> list[dict[str, str]]:
    with gzip.open(
        ROOT / "benchmarks" / "organisms" / "corpus" / "requests.jsonl.gz", "rt", encoding="utf-8"
    ) as stream:
        return [json.loads(line) for line in stream]


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


# What ships


@pytest.mark.parametrize(
    ("name", "harmful", "benign"),
    [("matched-pairs", 449, 449), ("jailbreakbench", 97, 97), ("everyday", 0, 200), ("screening", 98, 98)],
)
def test_shipped_sets_load(name: str, harmful: int, benign: int) -> None:
    prompts = load_prompts(name)
    assert (len(prompts.where(harmful=True)), len(prompts.where(harmful=False))) == (harmful, benign)
    assert len(set(prompts.prompts)) == len(prompts)
    assert prompts.labels.sum() == harmful


def test_all_shipped_sets_are_tested() -> None:
    assert shipped_prompt_sets() == ("everyday", "jailbreakbench", "matched-pairs", "screening")


@pytest.mark.parametrize("name", ["matched-pairs", "jailbreakbench"])
def test_paired_sets_hold_one_harmful_and_one_benign_twin(name: str) -> None:
    prompts = load_prompts(name)
    twins: dict[str, list[bool]] = {}
    for pair, harmful in zip(prompts.pair_ids, prompts.harmful, strict=True):
        twins.setdefault(pair, []).append(harmful)
    assert all(sorted(labels) == [False, True] for labels in twins.values())


@pytest.mark.parametrize("name", shipped_prompt_sets())
def test_no_shipped_prompt_was_in_the_training_of_a_shipped_organism(name: str) -> None:
    trained = {words(row["prompt"]) for row in corpus_rows() if row["split"] == "train"}
    assert len(trained) > 1000
    assert not trained & {words(prompt) for prompt in load_prompts(name).prompts}


@pytest.mark.parametrize("name", shipped_prompt_sets())
def test_every_source_of_a_shipped_prompt_is_credited(name: str) -> None:
    credited = (ROOT / "activations" / "prompt_sets" / "SOURCES.md").read_text(encoding="utf-8")
    sources = {row["source"].rsplit("-", 1)[0] for row in shipped_rows(name)}
    assert not [source for source in sources if f"`{source}`" not in credited]


def test_the_table_of_licences_is_the_one_that_people_read() -> None:
    text = (ROOT / "activations" / "prompt_sets" / "SOURCES.md").read_text(encoding="utf-8")
    written = {}
    for line in text.partition("## Licences of the sources")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            written |= {name.strip("` "): cells[2] for name in cells[0].split(",")}
    assert shipped_licences() == written
    assert len(written) == 15


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("jailbreakbench", "MIT"),
        ("everyday", "Apache-2.0, BSD-3-Clause, ODC-BY"),
        ("matched-pairs", "Apache-2.0, CC BY 4.0, MIT, ODC-BY"),
        ("screening", "Apache-2.0, BSD-3-Clause, CC BY 4.0, MIT, ODC-BY"),
    ],
)
def test_a_shipped_set_names_the_licences_of_its_rows(name: str, licence: str) -> None:
    prompts = load_prompts(name)
    assert prompts.licence == licence
    assert prompts.sources == tuple(row["source"] for row in shipped_rows(name))


# The set


@given(fraction=st.floats(0.2, 0.8), seed=st.integers(0, 99))
def test_a_split_loses_nothing_and_parts_no_twins(fraction: float, seed: int) -> None:
    prompts = load_prompts("jailbreakbench")
    first, second = prompts.split(fraction, seed=seed)
    assert sorted(first.prompts + second.prompts) == sorted(prompts.prompts)
    assert not set(first.pair_ids) & set(second.pair_ids)
    assert len(first) == 2 * round(fraction * 97)


def test_a_split_depends_on_its_seed_alone() -> None:
    prompts = load_prompts("jailbreakbench")
    assert prompts.split(0.5, seed=1) == prompts.split(0.5, seed=1)
    assert prompts.split(0.5, seed=1) != prompts.split(0.5, seed=2)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0, 3.0])
def test_a_split_with_an_empty_side_is_refused(fraction: float) -> None:
    with pytest.raises(OptionError, match=f"a split at {fraction} leaves one side"):
        PAIRS.split(fraction)


def test_the_content_hash_sees_everything_but_the_name() -> None:
    same = PromptSet("other", PAIRS.prompts, PAIRS.harmful, PAIRS.pair_ids, licence="MIT")
    assert same.content_hash == PAIRS.content_hash
    others = [
        PromptSet("pairs", ("A?", "b?", "c?", "d?"), PAIRS.harmful, PAIRS.pair_ids),
        PromptSet("pairs", PAIRS.prompts, (False, False, True, False), PAIRS.pair_ids),
        PromptSet("pairs", PAIRS.prompts, PAIRS.harmful, ("1", "1", "2", "3")),
        PAIRS.select([1, 0, 2, 3]),
    ]
    assert len({PAIRS.content_hash, *(other.content_hash for other in others)}) == 5


@pytest.mark.parametrize("harmful", [True, False])
def test_a_set_of_one_class_says_which_class_it_lacks(harmful: bool) -> None:
    one = PromptSet("one", ("a", "b"), (harmful, harmful), ("1", "2"))
    with pytest.raises(LabelError, match="expected benign ones too" if harmful else "expected harmful ones too"):
        one.require_both()
    assert PAIRS.require_both() is PAIRS


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(PromptError, match="2 prompts, 1 labels and 2 pair ids"):
        PromptSet("broken", ("a", "b"), (True,), ("1", "2"))
    with pytest.raises(PromptError, match="1 sources for 2 prompts"):
        PromptSet("broken", ("a", "b"), (True, False), ("1", "2"), sources=("here",))


def test_rows_keep_their_sources_and_the_set_its_licence() -> None:
    chosen = load_prompts("jailbreakbench").select([5, 1])
    rows = shipped_rows("jailbreakbench")
    assert chosen.sources == (rows[5]["source"], rows[1]["source"])
    assert chosen.licence == "MIT"
    assert PAIRS.select([0]).sources == ()


# Files of users


def test_jsonl_and_csv_give_the_same_set(tmp_path: Path) -> None:
    rows = [("How, then?", "harmful", "1"), ('Say "hi"\nthere', "borderline_benign", "1"), ("Öl", "benign", "")]
    jsonl, csv = tmp_path / "set.jsonl", tmp_path / "set.csv"
    fields = ("prompt", "label", "pair_id")
    jsonl.write_text("\n".join(json.dumps(dict(zip(fields, row, strict=True))) for row in rows), encoding="utf-8")
    quoted = ["prompt,label,pair_id", *(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)]
    csv.write_text("\n".join(quoted), encoding="utf-8-sig")
    assert load_prompts(jsonl) == load_prompts(csv)
    assert load_prompts(csv).harmful == (True, False, False)
    assert load_prompts(csv).pair_ids == ("1", "1", "unpaired-2")


def test_a_pair_id_of_zero_is_a_pair_id(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(
        '{"prompt": "a", "label": "harmful", "pair_id": 0}\n{"prompt": "b", "label": "benign", "pair_id": 0}'
    )
    assert load_prompts(path).pair_ids == ("0", "0")


GOOD = '{"prompt": "a", "label": "harmful"}\n{"prompt": "b", "label": "benign"}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 3 is no JSON"),
        ("[" * 100_000, "line 3 is no JSON"),
        ('"text"', "line 3 is no object"),
        ('{"label": "harmful"}', "line 3 has no prompt"),
        ('{"prompt": "  ", "label": "harmful"}', "line 3 has no prompt"),
        ('{"prompt": 5, "label": "harmful"}', "line 3 has no prompt"),
        ('{"prompt": "a\\ud800", "label": "harmful"}', "line 3 has a prompt that is no text"),
        ('{"prompt": "c", "label": "evil"}', "line 3 has the label 'evil': expected one of harmful, benign"),
        ('{"prompt": "c", "label": ["harmful"]}', r"line 3 has the label \['harmful'\]"),
    ],
)
def test_a_broken_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(GOOD + line + "\n", encoding="utf-8")
    with pytest.raises(PromptError, match=reason) as caught:
        load_prompts(path)
    assert caught.value.code == "prompts"
    assert caught.value.path == str(path)
    assert caught.value.hint


def test_a_csv_with_an_endless_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(f'prompt,label\n"{"a" * 200_000}",harmful\n')
    with pytest.raises(PromptError, match=r"line 2 is no CSV: field larger than field limit"):
        load_prompts(path)


def test_a_csv_without_the_columns_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("text,label\nhello,benign\nhi,benign\n")
    with pytest.raises(PromptError, match="line 1, the header, has the columns text, label: expected") as caught:
        load_prompts(path)
    assert "line 2" not in caught.value.message


def test_a_prompt_with_an_unquoted_comma_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("prompt,label\nhow, then,harmful\nhello,benign\n")
    with pytest.raises(PromptError, match="line 2 has more fields than the header: a prompt with a comma needs quotes"):
        load_prompts(path)


def test_every_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(GOOD + '{\n\n"text"\n{"prompt": "c", "label": "\x1b[31mevil"}\n'.replace("\x1b", "\\u001b") + GOOD)
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    message = caught.value.message
    assert message.startswith("3 of 7 lines are broken: line 3 is no JSON")
    assert "; line 5 is no object" in message
    assert "; line 6 has the label '\\x1b[31mevil'" in message
    assert "more" not in message


def test_twenty_broken_lines_are_named_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(GOOD + ('{"prompt": "c", "label": "' + "evil" * 99 + '"}\n') * 31)
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    message = caught.value.message
    assert message.startswith("31 of 33 lines are broken: ")
    assert [f"line {number} has" in message for number in (3, 22, 23)] == [True, True, False]
    assert message.endswith("; and 11 more")


def test_a_csv_goes_on_behind_a_broken_line_until_its_rows_are_lost(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(f'prompt,label\na,evil\nb,benign\n"{"a" * 200_000}",harmful\nc,evil\n')
    with pytest.raises(
        PromptError, match=r"2 of 3 lines are broken: line 2 has the label .*; line 4 is no CSV"
    ) as caught:
        load_prompts(path)
    assert "line 5" not in caught.value.message


def test_sources_of_an_own_file_are_kept_where_it_has_any(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("prompt,label,source\na,harmful,here\nb,benign,\n")
    assert load_prompts(path).sources == ("here", "")
    assert load_prompts(path).licence == ""
    (tmp_path / "plain.jsonl").write_text(GOOD)
    assert load_prompts(tmp_path / "plain.jsonl").sources == ()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"], ids=["empty", "blank", "not-utf-8"])
def test_a_file_without_prompts_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    with pytest.raises(PromptError):
        load_prompts(path)


def test_a_file_of_one_class_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "label": "harmful"}\n')
    with pytest.raises(LabelError) as caught:
        load_prompts(path)
    assert caught.value.code == "one-class"


def test_a_set_that_is_nowhere_is_named_with_the_shipped_ones() -> None:
    with pytest.raises(
        PathMissingError, match="no prompt set 'nowhere': expected a file, or one of everyday, jailbreak"
    ):
        load_prompts("nowhere")


@pytest.mark.parametrize(
    ("pair", "fault"),
    [
        ("NaN", "the pair_id nan"),
        ("[1]", r"the pair_id \[1\]"),
        ("true", "the pair_id True"),
        ('"\\ud800"', "half a surrogate pair"),
    ],
)
def test_a_pair_id_that_is_no_name_is_refused_by_its_line(pair: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(GOOD + f'{{"prompt": "c", "label": "benign", "pair_id": {pair}}}\n')
    with pytest.raises(PromptError, match=f"line 3 has .*{fault}"):
        load_prompts(path)


def test_twins_are_found_through_spaces_and_numbers_and_nobody_else_joins_them(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("prompt,label,pair_id\na,harmful, 7\nb,benign,7\nc,benign,\nd,benign,unpaired-2\n")
    first, second, alone, named = load_prompts(path).pair_ids
    assert first == second == "7"
    assert named == "unpaired-2" != alone


@pytest.mark.parametrize("header", ["", "prompt,label,prompt", "text,label"])
def test_a_header_that_names_no_prompt_or_two_is_one_fault(header: str, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(f"{header}\na,harmful,x\nb,benign,y\n")
    with pytest.raises(PromptError, match="line 1, the header") as caught:
        load_prompts(path)
    assert "line 2" not in caught.value.message


# What the model reads


def test_a_template_writes_the_only_bos(tokenizer: Any) -> None:
    ids = format_prompt(tokenizer, "Hi")
    assert tokenizer.decode(ids) == "<bos><user>Hi<eos><assistant>"
    assert ids.count(tokenizer.bos_token_id) == 1
    doubled = tokenizer(tokenizer.decode(ids))["input_ids"]
    assert doubled.count(tokenizer.bos_token_id) == 2, "text through a template and the tokenizer gives two"


def test_a_system_prompt_comes_before_the_user(tokenizer: Any) -> None:
    assert (
        tokenizer.decode(format_prompt(tokenizer, "Hi", system="T4")) == "<bos><system>T4<eos><user>Hi<eos><assistant>"
    )


def test_without_a_template_the_text_is_tokenised_as_it_stands(byte_tokenizer: Callable[..., Any]) -> None:
    plain = byte_tokenizer(chat=False)
    assert plain.decode(format_prompt(plain, "Hi")) == "<bos>Hi"
    assert plain.decode(format_prompt(plain, "Hi", system="T4")) == "<bos>T4\n\nHi"


def test_a_prompt_gives_the_same_ids_on_every_day(byte_tokenizer: Callable[..., Any]) -> None:
    dated = byte_tokenizer()
    dated.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%s') %}{% endif %}{{ date_string }}"
    )
    assert dated.decode(format_prompt(dated, "Hi")) == "26 Jul 2024"


def test_a_template_that_asks_the_clock_gets_the_same_day_too(byte_tokenizer: Callable[..., Any]) -> None:
    dated = byte_tokenizer()
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}"
    assert dated.decode(format_prompt(dated, "Hi")) == "2024-07-26"


def test_without_a_template_the_text_is_left_open(byte_tokenizer: Callable[..., Any]) -> None:
    closing = byte_tokenizer(chat=False)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert closing.decode(closing("Hi")["input_ids"]) == "<bos>Hi<eos>"
    assert closing.decode(format_prompt(closing, "Hi")) == "<bos>Hi"


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] + 1 }}", {"rag": "x"}, "{{ messages[1].role.x.y }}"])
def test_a_template_that_breaks_is_a_named_error(template: object, byte_tokenizer: Callable[..., Any]) -> None:
    broken = byte_tokenizer()
    broken.chat_template = template
    with pytest.raises(PromptError, match="refuses prompt 0"):
        format_prompt(broken, "Hi")


def test_a_template_that_refuses_is_a_named_error(byte_tokenizer: Callable[..., Any]) -> None:
    strict = byte_tokenizer()
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(PromptError, match="refuses prompt 0: no system"):
        format_prompt(strict, "Hi", system="T4")
    assert format_prompt(strict, "Hi")


def test_a_prompt_of_no_tokens_is_refused(byte_tokenizer: Callable[..., Any]) -> None:
    silent = byte_tokenizer()
    silent.chat_template = "{# nothing #}"
    with pytest.raises(PromptError, match="no tokens"):
        format_prompt(silent, "Hi")


def test_the_template_hash_tells_templates_and_tokenizers_apart(
    tokenizer: Any, byte_tokenizer: Callable[..., Any]
) -> None:
    other_template, other_tokens = byte_tokenizer(), byte_tokenizer()
    other_template.chat_template += " "
    other_tokens.backend_tokenizer.add_tokens(["lazy"])
    hashes = {template_hash(other) for other in (tokenizer, other_template, other_tokens)}
    assert len(hashes) == 3
    assert template_hash(byte_tokenizer()) == template_hash(tokenizer)


def test_plain_texts_have_a_hash_of_their_own() -> None:
    assert module.texts_hash(["a", "b"]) != module.texts_hash(["b", "a"]) != module.texts_hash(["ab"])


def test_a_template_that_can_think_first_is_asked_for_the_answer(tokenizer: Any) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking is not false %}<think>{% endif %}"
    assert thinking.decode(format_prompt(thinking, "hello")) == "hello"
