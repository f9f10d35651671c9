"""From texts to token ids: the chat template, what is cut, and which tokens are whose.

Every prompt has regions, contiguous ranges of its tokens that a pooling can name:

    <bos><user>How do I bake bread?<eos><assistant>Mix the flour
               └─────── user ──────┘└─── after ───┘└─ answer ──┘     span: a text found within the prompt
    └──────────────────── prompt ─────────────────┘
    └──────────────────────────── text ───────────────────────┘
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from activations.errors import OptionError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["REGIONS", "Conversation", "Tokenised", "format_prompt", "template_hash", "tokenise"]

REGIONS = ("prompt", "user", "after", "span", "answer", "text")

# These need to know from which characters each token came.
_FOUND = {"user", "after", "span"}

# Every byte class a tokenizer may treat in its own way; its ids tell two tokenizers apart.
_SAMPLE = "The Quick brown fox, 0123456789 jumps over:\n\tthe lazy dog's (back)? naïve 日本語 🙂 {x} <b> http://a.b/c_d"

# Stands in for the user's text to see what the template puts around it; of characters that no template removes.
_PLACEHOLDER = "Undertow7placeholder"

# The day that templates are told it is, by a macro too: they take no function of ours, and a macro hides their clock.
_DAY = date(2024, 7, 26)
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{_DAY.strftime('%' + code)}')" for code in "YmdBbAayjHMSIp")
    + " }}{% endmacro %}\n"
)


@dataclass(frozen=True)
class Conversation:
    """How prompts are written for the model, and what is read beside them.

    Attributes:
        system: System prompt before each prompt.
        answers: What follows each prompt, as text or as token ids; None for nothing.
        span: Text to find in each prompt, for the region "span": one for all, or one for each.
        truncate_to: Longer prompts lose the end of their user's text until they have so many tokens, answers apart.
    """

    system: str = ""
    answers: Sequence[str] | Sequence[Sequence[int]] | None = None
    span: str | Sequence[str] | None = None
    truncate_to: int | None = None

    def require_one_each(self, prompts: int) -> None:
        """Check that there is one answer and one span for each prompt.

        Raises:
            OptionError: There is not, or the length to cut to is not positive.
        """
        if isinstance(self.answers, str):
            raise OptionError(
                "answers is one text: expected one for each prompt", hint=f"Repeat it: [text] * {prompts}."
            )
        for name, given in (("answers", self.answers), ("span", self.span)):
            if given is not None and not isinstance(given, str) and len(given) != prompts:
                raise OptionError(f"{name} has {len(given)} entries for {prompts} prompts: expected one for each")
        if self.truncate_to is not None and self.truncate_to < 1:
            raise OptionError(f"truncate_to is {self.truncate_to}: expected a number of tokens, at least 1")

    @property
    def regions_hash(self) -> str:
        """SHA-256 of answers and spans; "" without any."""
        if self.answers is None and self.span is None:
            return ""
        answers = (
            None if self.answers is None else [a if isinstance(a, str) else list(map(int, a)) for a in self.answers]
        )
        span = self.span if self.span is None or isinstance(self.span, str) else list(self.span)
        return hashlib.sha256(json.dumps([answers, span]).encode()).hexdigest()


@dataclass(frozen=True)
class Tokenised:
    """One conversation as the model reads it.

    Attributes:
        ids: Token ids.
        regions: Name to the first token and the one after the last; an empty region has both alike.
    """

    ids: Int[np.ndarray, " token"]
    regions: Mapping[str, tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    conversation: Conversation | None = None,
    *,
    regions: Collection[str] = (),
    rows: Sequence[int] | None = None,
) -> list[Tokenised]:
    """Token ids of many conversations, each up to where the model would answer, or with the answer given.

    With a chat template, the template alone writes the special tokens, so there are never two BOS. Without one, the
    text is tokenised as it stands, after `system` and an empty line if there is a system prompt, and without the end
    that some tokenizers add.

    Args:
        tokenizer: The trusted base's tokenizer: a template is a program, so never a fine-tune's.
        prompts: The user's turns.
        conversation: What comes around them.
        regions: Which of `REGIONS` to find; "prompt", "answer" and "text" are always there.
        rows: Which prompts; all when None.

    Raises:
        PromptError: The template refuses a conversation, no token is left, or a region cannot be found; the message
            names the prompt's row.
        OptionError: The tokenizer cannot tell from which characters a token came, and a region needs that.
    """
    how = conversation or Conversation()
    how.require_one_each(len(prompts))
    chosen = range(len(prompts)) if rows is None else rows
    wanted = set(regions) & _FOUND
    for row in chosen:
        _check_text(prompts[row], row)
    rendered = [_rendered(tokenizer, prompts[row], how.system, row) for row in chosen]
    searched = bool(wanted) or how.truncate_to is not None
    around = _around(tokenizer, how.system) if searched else ("", "")
    made = []
    for row, text, (ids, spans) in zip(chosen, rendered, _encoded(tokenizer, rendered, offsets=searched), strict=True):
        one = _Conversation(text, around, ids, spans, _answer_ids(tokenizer, how, row), row)
        if how.truncate_to is not None:
            one.cut(how.truncate_to)
        if not one.ids:
            raise PromptError(f"prompt {row} becomes no tokens", hint="Remove it, or mend the base's template.")
        span = how.span if how.span is None or isinstance(how.span, str) else how.span[row]
        found = {name: one.region(name, span) for name in ("prompt", "answer", "text", *wanted)}
        made.append(Tokenised(np.array([*one.ids, *one.answer], dtype=np.int32), found))
    return made


def format_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, system: str = "") -> list[int]:
    """Token ids of one conversation up to where the model would answer; see `tokenise`.

    Raises:
        PromptError: The template refuses the conversation, or no token is left.
    """
    return list(map(int, tokenise(tokenizer, [prompt], Conversation(system=system))[0].ids))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template and of how the tokenizer cuts a sample text: the same only where prompts are."""
    ids = tokenizer(_SAMPLE)["input_ids"]
    return hashlib.sha256(json.dumps([tokenizer.chat_template, list(ids)]).encode()).hexdigest()


# --- texts


def _check_text(prompt: object, row: int) -> None:
    if not isinstance(prompt, str):
        raise PromptError(f"prompt {row} is a {type(prompt).__name__}: expected text", hint="Pass a list of strings.")
    if not prompt.strip():
        raise PromptError(f"prompt {row} is empty: expected text", hint="Remove empty prompts.")
    if not prompt.isascii() and prompt.encode(errors="ignore").decode() != prompt:
        raise PromptError(f"prompt {row} is no text: it holds half a surrogate pair", hint="Remove or mend it.")


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str, row: int) -> str:
    if tokenizer.chat_template is None:
        return f"{system}\n\n{prompt}" if system else prompt
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    try:
        template = tokenizer.get_chat_template()
        # Some templates write today's date unless they are given one: the same prompt must give the same ids tomorrow.
        text: str = tokenizer.apply_chat_template(
            turns,
            chat_template=_CLOCK + template if "strftime_now" in template else template,
            add_generation_prompt=True,
            tokenize=False,
            date_string=_DAY.strftime("%d %b %Y"),
            enable_thinking=False,  # templates that know it begin with the answer then, not with thoughts about it
        )
    # A template is a program: beside what it raises itself, its mistakes are Python's own errors.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        hint = "Leave the system prompt out if the template takes none." if system else "Mend the base's template."
        raise PromptError(f"the base's chat template refuses prompt {row}: {error}", hint=hint) from error
    return text


def _around(tokenizer: PreTrainedTokenizerBase, system: str) -> tuple[str, str]:
    """What stands before and behind the user's text."""
    before, _, behind = _rendered(tokenizer, _PLACEHOLDER, system, 0).partition(_PLACEHOLDER)
    return before, behind


# --- tokens


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, offsets: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids of each text and, if asked for, from which characters each came."""
    if offsets and not tokenizer.is_fast:
        raise OptionError(
            f"{type(tokenizer).__name__} does not tell from which characters a token came",
            hint="Use a fast tokenizer, or a pooling over the region 'prompt', 'answer' or 'text'.",
        )
    templated = tokenizer.chat_template is not None
    result = tokenizer(
        list(texts),
        add_special_tokens=not templated,
        return_attention_mask=False,
        return_offsets_mapping=offsets,
        verbose=False,  # it would warn of prompts longer than the model reads, which is an error of ours
    )
    ids = [list(row) for row in result["input_ids"]]
    spans = [list(row) for row in result["offset_mapping"]] if offsets else [[] for _ in ids]
    if not templated:
        # Some tokenizers add an end, after which a model begins with something new.
        for row, span in zip(ids, spans, strict=True):
            if len(row) > 1 and row[-1] == tokenizer.eos_token_id:
                del row[-1], span[-1:]
    return list(zip(ids, spans, strict=True))


def _answer_ids(tokenizer: PreTrainedTokenizerBase, how: Conversation, row: int) -> list[int]:
    if how.answers is None:
        return []
    answer = how.answers[row]
    if isinstance(answer, str):
        return list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return [int(token) for token in answer]


@dataclass
class _Conversation:
    """One conversation on its way to `Tokenised`."""

    text: str
    around: tuple[str, str]
    ids: list[int]
    spans: list[tuple[int, int]]
    answer: list[int]
    row: int

    def region(self, name: str, span: str | None) -> tuple[int, int]:
        total = len(self.ids) + len(self.answer)
        fixed = {"prompt": (0, len(self.ids)), "answer": (len(self.ids), total), "text": (0, total)}
        if name in fixed:
            return fixed[name]
        if name == "span":
            return self._span(span)
        user = self._user()
        return user if name == "user" else (user[1], len(self.ids))

    def cut(self, length: int) -> None:
        excess = len(self.ids) - length
        if excess <= 0:
            return
        start, end = self._user_characters()
        # A token on the border belongs to the template too, and stays.
        inside = [i for i, (a, b) in enumerate(self.spans) if start <= a < b <= end]
        if excess >= len(inside):
            raise PromptError(
                f"prompt {self.row} cannot lose {excess:,} tokens: its user's text has {len(inside):,}",
                hint="Pass a larger truncate_to.",
            )
        del self.ids[inside[-excess] : inside[-1] + 1], self.spans[inside[-excess] : inside[-1] + 1]

    def _user(self) -> tuple[int, int]:
        return self._from_characters(*self._user_characters())

    def _user_characters(self) -> tuple[int, int]:
        before, behind = self.around
        if not (self.text.startswith(before) and self.text.endswith(behind)):
            raise PromptError(
                f"the user's text cannot be told from the template around it in prompt {self.row}",
                hint="The template writes something else around other prompts: use the region 'prompt'.",
            )
        return len(before), len(self.text) - len(behind)

    def _span(self, span: str | None) -> tuple[int, int]:
        if not span:
            raise OptionError("the region 'span' needs a text to find", hint="Pass span='...'.")
        before, behind = self.around
        start = self.text.find(span, len(before), len(self.text) - len(behind))
        tokens = self._from_characters(start, start + len(span)) if start >= 0 else (0, 0)
        if tokens[0] == tokens[1]:
            raise PromptError(
                f"prompt {self.row} does not hold the span {span!r}", hint="Leave it out, or name another span."
            )
        return tokens

    def _from_characters(self, start: int, end: int) -> tuple[int, int]:
        """The tokens that came from these characters, or from some of them."""
        inside = [i for i, (a, b) in enumerate(self.spans) if a < end and b > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)
