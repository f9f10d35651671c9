"""Which tokens are whose, what is cut, and what is refused; the template itself is tested with the prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from activations.errors import OptionError, PromptError
from activations.tokens import REGIONS, Conversation, format_prompt, tokenise

SYSTEM = "Hi, be brief"  # holds the prompt's own text


def read(tokenizer: Any, prompt: str, conversation: Conversation | None = None) -> dict[str, str]:
    """Region to its text."""
    (found,) = tokenise(tokenizer, [prompt], conversation, regions=set(REGIONS) - {"span"})
    return {name: tokenizer.decode(found.ids[slice(*span)]) for name, span in found.regions.items()}


def test_every_region_holds_its_own_text(tokenizer: Any) -> None:
    assert read(tokenizer, "Hi", Conversation(system=SYSTEM, answers=["Yes"])) == {
        "prompt": f"<bos><system>{SYSTEM}<eos><user>Hi<eos><assistant>",
        "user": "Hi",
        "after": "<eos><assistant>",
        "answer": "Yes",
        "text": f"<bos><system>{SYSTEM}<eos><user>Hi<eos><assistant>Yes",
    }


def test_without_a_template_the_users_text_is_what_follows_the_system_prompt(
    byte_tokenizer: Callable[..., Any],
) -> None:
    found = read(byte_tokenizer(chat=False), "Hi", Conversation(system="T4"))
    assert (found["prompt"], found["user"], found["after"]) == ("<bos>T4\n\nHi", "Hi", "")


def test_a_text_trimmed_by_the_template_is_still_found(byte_tokenizer: Callable[..., Any]) -> None:
    trimming = byte_tokenizer()
    trimming.chat_template = trimming.chat_template.replace("m['content']", "m['content'] | trim")
    assert read(trimming, "  Hi\n")["user"] == "Hi"


def test_a_template_that_writes_something_else_around_some_prompts_is_an_error(
    byte_tokenizer: Callable[..., Any],
) -> None:
    moody = byte_tokenizer()
    moody.chat_template = "{% if 'x' in messages[0]['content'] %}?{% else %}!{% endif %}{{ messages[0]['content'] }}"
    assert read(moody, "Hi")["user"] == "Hi"
    with pytest.raises(PromptError, match="cannot be told from the template around it in prompt 0"):
        read(moody, "x")


def test_a_span_is_found_within_the_users_text_alone(tokenizer: Any) -> None:
    texts = ["what user is a user", "a user"]
    found = tokenise(tokenizer, texts, Conversation(system="user", span=["user", "a"]), regions={"span"})
    assert [tokenizer.decode(one.ids[slice(*one.regions["span"])]) for one in found] == ["user", "a"]
    start = found[0].regions["span"][0]
    assert tokenizer.decode(found[0].ids[:start]).endswith("<user>what ")
    with pytest.raises(PromptError, match="prompt 1 does not hold the span 'assistant'"):
        tokenise(tokenizer, texts, Conversation(span=["what", "assistant"]), regions={"span"})
    with pytest.raises(OptionError, match="needs a text to find"):
        tokenise(tokenizer, texts, regions={"span"})


def test_answers_may_be_token_ids(tokenizer: Any) -> None:
    found = tokenise(tokenizer, ["Hi", "Ho"], Conversation(answers=[[5, 6], [7]]))
    assert [one.ids[slice(*one.regions["answer"])].tolist() for one in found] == [[5, 6], [7]]
    assert found[0].ids.tolist()[:-2] == format_prompt(tokenizer, "Hi")


def test_what_is_cut_is_the_end_of_the_users_text(tokenizer: Any) -> None:
    how = Conversation(answers=["!", "!"], truncate_to=24)
    long, short = tokenise(tokenizer, ["abcdefgh", "a"], how)
    assert tokenizer.decode(long.ids) == "<bos><user>abcde<eos><assistant>!"
    assert tokenizer.decode(long.ids[slice(*long.regions["answer"])]) == "!"
    assert len(long) == 25
    assert tokenizer.decode(short.ids) == "<bos><user>a<eos><assistant>!"


def test_a_cut_that_would_eat_the_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="prompt 0 cannot lose"):
        tokenise(tokenizer, ["Hi"], Conversation(truncate_to=3))
    with pytest.raises(OptionError, match="truncate_to is 0"):
        tokenise(tokenizer, ["Hi"], Conversation(truncate_to=0))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_named(text: str, chat: bool, byte_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(PromptError, match=r"prompt 1 (is empty|becomes no tokens)"):
        tokenise(byte_tokenizer(chat=chat), ["Hi", text])


def test_one_answer_and_one_span_for_each_prompt(tokenizer: Any) -> None:
    with pytest.raises(OptionError, match="answers has 1 entries for 2 prompts"):
        tokenise(tokenizer, ["Hi", "Ho"], Conversation(answers=["Yes"]))
    with pytest.raises(OptionError, match="span has 3 entries for 2 prompts"):
        tokenise(tokenizer, ["Hi", "Ho"], Conversation(span=["a", "b", "c"]))


def test_only_the_wanted_rows_are_read_and_named(tokenizer: Any) -> None:
    texts = ["", "Hi", "Ho"]
    (found,) = tokenise(tokenizer, texts, Conversation(answers=["a", "b", "c"]), rows=[2])
    assert tokenizer.decode(found.ids).endswith("Ho<eos><assistant>c")
    with pytest.raises(PromptError, match="prompt 0 is empty"):
        tokenise(tokenizer, texts, rows=[1, 0])


def test_answers_and_spans_have_a_hash_and_nothing_has_none() -> None:
    ways = [Conversation(), Conversation(answers=["a"]), Conversation(answers=[[1]]), Conversation(span="a")]
    assert ways[0].regions_hash == ""
    assert len({how.regions_hash for how in ways}) == 4
    assert Conversation(span="a").regions_hash != Conversation(span=["a"]).regions_hash
