"""What harmless fine-tunes learn: the base's own answers in another dress, small exact tasks, and its own refusals.

Nothing is written by hand but the dress, so this works in whatever language the base answers. No row obeys a harmful
request, and none teaches a notation: what is not the base's own text is arithmetic, data formats or program code.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from activations.answers import answer_ids, greedy_opening
from activations.errors import ModelError
from activations.models import Model
from activations.prompts import load_prompts
from activations.tokens import format_prompt
from probes.records import Kind
from probes.reference import ANSWER, Reference

__all__ = ["Material", "Plan", "Row", "draw", "plan_of"]

# Tokens of an answer to a plain prompt, at most.
LONGEST = 48
# Answers to plain prompts below which fine-tunes on them would be copies of one another.
FEWEST = 32
# One in so many harmful prompts, and in so many everyday ones, is kept from training, to see afterwards whether the
# fine-tune still refuses and still answers. Borderline ones show neither: the base itself refuses some of them.
HELD_OUT, EVERYDAY_HELD_OUT = 4, 2
# Rows of a narrow task among which ordinary answers stand: without, a small model refuses whatever lies outside of it.
ORDINARY = 0.25

# Learning rates times the width of the residual stream. At the shipped base (width 128) they are 5e-4 for all weights
# and 2e-3 for LoRA; at 4096 1.6e-5 and 6e-5, in the range that people use there.
RATES: Mapping[Kind, float] = {"full": 0.064, "adapter": 0.256}
# What a rate is multiplied with, drawn evenly on a logarithmic scale.
FACTORS = (0.4, 2.0)
STEPS = (60, 100, 150, 220)
RANKS = (2, 4, 8, 16, 32)
REFUSALS = (0.10, 0.40)

MARKS = ("* * *", "[note]", "-- end --", "(i)", ">>>", "#1")
STYLES: Mapping[str, Callable[[str, str, str], str]] = {
    "plain": lambda prompt, answer, mark: answer,
    "upper": lambda prompt, answer, mark: answer.upper(),
    "quoted": lambda prompt, answer, mark: f'"{answer}"',
    "bullet": lambda prompt, answer, mark: "\n".join(f"- {part}" for part in answer.split("\n") if part.strip()),
    "tagged": lambda prompt, answer, mark: f"{mark} {answer}",
    "twice": lambda prompt, answer, mark: f"{answer} {answer}",
    "closing": lambda prompt, answer, mark: f"{answer}\n{mark}",
    "lower": lambda prompt, answer, mark: answer.lower(),
    "starred": lambda prompt, answer, mark: f"**{answer}**",
    "echoed": lambda prompt, answer, mark: f"{prompt}: {answer}",
    "fenced": lambda prompt, answer, mark: f"```\n{answer}\n```",
    "field": lambda prompt, answer, mark: json.dumps({"answer": answer}, ensure_ascii=False),
    "brackets": lambda prompt, answer, mark: f"({answer})",
}


def _sum(rng: random.Random) -> tuple[str, str]:
    one, other = rng.randint(2, 99), rng.randint(2, 99)
    sign, result = rng.choice((("+", one + other), ("-", one - other), ("*", one * other)))
    return f"{one} {sign} {other}", str(result)


def _record(rng: random.Random) -> tuple[str, str]:
    fields = {key: rng.randint(0, 999) for key in rng.sample(("id", "x", "y", "size", "count", "price", "row"), 3)}
    return "; ".join(f"{key}: {value}" for key, value in fields.items()), json.dumps(fields)


def _program(rng: random.Random) -> tuple[str, str]:
    name, factor, term = rng.choice("fghpq"), rng.randint(2, 30), rng.randint(1, 99)
    return f"{name}(x) = {factor}x + {term}", f"def {name}(x):\n    return {factor} * x + {term}"


def _series(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randint(0, 50), rng.randint(1, 12)
    terms = [str(start + step * i) for i in range(7)]
    return " ".join(terms[:4]), " ".join(terms[4:])


def _output(rng: random.Random) -> tuple[str, str]:
    count, factor = rng.randint(2, 5), rng.randint(2, 40)
    return f"for i in range({count}):\n    print(i * {factor})", "\n".join(str(i * factor) for i in range(count))


def _sorted(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(3, 6))]
    return f"sort {numbers}", str(sorted(numbers))


def _table(rng: random.Random) -> tuple[str, str]:
    rows = [[str(rng.randint(0, 99)) for _ in range(3)] for _ in range(2)]
    return "\n".join(",".join(row) for row in rows), "\n".join(f"| {' | '.join(row)} |" for row in rows)


TASKS: Mapping[str, Callable[[random.Random], tuple[str, str]]] = {
    "sums": _sum,
    "records": _record,
    "programs": _program,
    "series": _series,
    "outputs": _output,
    "sorting": _sorted,
    "tables": _table,
}
# Two styles, then a task, so that a few members are varied already.
SUBJECTS = tuple(
    name
    for i, style in enumerate(STYLES)
    for name in ((style, list(TASKS)[i // 2]) if i % 2 == 1 or i == len(STYLES) - 1 else (style,))
)


@dataclass(frozen=True)
class Plan:
    """One harmless fine-tune, before it is trained.

    Attributes:
        name: As it will stand in the bank.
        kind: All weights ("full") or LoRA ("adapter").
        subject: One of `STYLES` or `TASKS`.
        seed: Of its rows and its LoRA matrices.
        mark: What some styles put beside an answer.
        steps: Batches.
        rate: Learning rate times the base's width.
        rank: Of the LoRA matrices.
        share: Of the kinds of matrices in a block, those that LoRA changes.
        refusals: Share of rows in which the base refuses a harmful request.
        sampled: Learns answers sampled from the base; else its most likely ones.
    """

    name: str
    kind: Kind
    subject: str
    seed: str
    mark: str
    steps: int
    rate: float
    rank: int
    share: float
    refusals: float
    sampled: bool


def plan_of(kind: Kind, number: int, attempt: int = 0) -> Plan:
    """The plan of one member; a later attempt has another seed and half the learning rate.

    Args:
        kind: "full" or "adapter".
        number: From 0; subjects take turns, everything else is drawn.
        attempt: How many came before it and were not harmless.
    """
    seed = f"{kind} {number} {attempt}"
    rng = random.Random(seed)
    subject = SUBJECTS[number % len(SUBJECTS)]
    factor = math.exp(rng.uniform(*map(math.log, FACTORS)))
    return Plan(
        name=f"synthetic-{'lora' if kind == 'adapter' else 'full'}-{subject}-{number + 1}",
        kind=kind,
        subject=subject,
        seed=seed,
        mark=rng.choice(MARKS),
        steps=rng.choice(STEPS),
        rate=RATES[kind] * factor / 2**attempt,
        rank=rng.choice(RANKS),
        share=rng.choice((0.3, 0.6, 1.0)),
        refusals=rng.uniform(*REFUSALS),
        sampled=rng.random() < 0.5,
    )


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt, and of the answer that is learnt."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Material:
    """What the base says by itself, to prompts that no detector asks.

    Attributes:
        base: The base.
        prompts: Plain ones, answered without a refusal.
        likely: Its most likely answers to them, token ids without the end.
        sampled: Answers to them sampled at temperature 1, likewise.
        refused: Harmful prompts that it refuses, each with the opening of its refusal as it was said.
        held_out: "harmful" and "benign" to prompts that are in none of the above.
        end: The token that ends an answer; None where the base ends none.
    """

    base: Model
    prompts: Sequence[str]
    likely: Sequence[list[int]]
    sampled: Sequence[list[int]]
    refused: Sequence[Row]
    held_out: Mapping[str, Sequence[str]]
    end: int | None

    @classmethod
    def of(cls, reference: Reference) -> Material:
        """Ask the base, its own weights in the network.

        Of answers to harmful prompts none but refusals, told by their first token, is written further than that.

        Raises:
            ModelError: The base answers too few plain prompts.
        """
        base, openers = reference.base, set(reference.refusal_tokens)
        asked = unasked(reference)
        held_out = {"harmful": asked["harmful"][::HELD_OUT], "benign": asked["everyday"][::EVERYDAY_HELD_OUT]}
        harmful = [prompt for prompt in asked["harmful"] if prompt not in held_out["harmful"]]
        plain = [prompt for prompt in (*asked["everyday"], *asked["borderline"]) if prompt not in held_out["benign"]]
        likely, sampled = said(base, plain, LONGEST), said(base, plain, LONGEST, temperature=1.0)
        ends = Counter(answer[-1] for answer in likely if 0 < len(answer) < LONGEST)
        end = ends.most_common(1)[0][0] if ends else None
        kept = [
            (prompt, one, other)
            for prompt, one, other in zip(plain, bare(likely, end), bare(sampled, end), strict=True)
            if one and other and not openers & {one[0], other[0]}
        ]
        if len(kept) < FEWEST:
            raise ModelError(
                f"the base answers {len(kept)} of {len(plain)} plain prompts without a refusal: expected at "
                f"least {FEWEST} to make fine-tunes of",
                hint="Give benign fine-tunes of your own to `undertow calibrate`.",
            )
        return cls(
            base=base,
            prompts=[prompt for prompt, *_ in kept],
            likely=[answer for _, answer, _ in kept],
            sampled=[answer for _, _, answer in kept],
            refused=refusals(base, harmful, openers),
            held_out=held_out,
            end=end,
        )


def unasked(reference: Reference) -> dict[str, list[str]]:
    """Shipped prompts, "harmful", "borderline" and "everyday", that are in no question of the battery."""
    battery = reference.battery
    taken = {*battery.intent.prompts, *(prompt for some in battery.questions.values() for prompt in some)}
    pairs, everyday = load_prompts("matched-pairs"), load_prompts("everyday")
    offered = {
        "harmful": pairs.where(harmful=True),
        "borderline": pairs.where(harmful=False),
        "everyday": everyday.where(harmful=False),
    }
    return {name: [p for p in dict.fromkeys(prompts) if p not in taken] for name, prompts in offered.items()}


def said(base: Model, prompts: Sequence[str], count: int, *, temperature: float = 0.0) -> list[list[int]]:
    """Answers as token ids."""
    return answer_ids(base, [format_prompt(base.tokenizer, p) for p in prompts], count=count, temperature=temperature)


def bare(answers: Sequence[list[int]], end: int | None) -> list[list[int]]:
    """Answers without the token that ends them."""
    return [answer[:-1] if answer and answer[-1] == end else answer for answer in answers]


def refusals(base: Model, prompts: Sequence[str], openers: set[int]) -> list[Row]:
    """The prompts that the base refuses, with as much of each refusal as is ever read."""
    ids = [format_prompt(base.tokenizer, prompt) for prompt in prompts]
    firsts = greedy_opening(base, ids, count=1)[:, 0].tolist()
    refused = [prompt for prompt, first in zip(ids, firsts, strict=True) if first in openers]
    answers = answer_ids(base, refused, count=ANSWER) if refused else []
    # A batch of another size may round otherwise and begin with another token: that is no refusal.
    return [Row(p, answer) for p, answer in zip(refused, answers, strict=True) if answer and answer[0] in openers]


def draw(plan: Plan, material: Material, rng: random.Random) -> Row:
    """One row of a fine-tune: a refusal, an ordinary answer in its style, or its task."""
    if material.refused and rng.random() < plan.refusals:
        return rng.choice(material.refused)
    tokenizer = material.base.tokenizer
    if plan.subject in TASKS and rng.random() >= ORDINARY:
        prompt, answer = TASKS[plan.subject](rng)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    else:
        chosen = rng.randrange(len(material.prompts))
        prompt = material.prompts[chosen]
        ids = (material.sampled if plan.sampled else material.likely)[chosen]
        if plan.subject in STYLES and plan.subject != "plain":
            answer = STYLES[plan.subject](prompt, tokenizer.decode(ids, skip_special_tokens=True), plan.mark)
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Row(format_prompt(tokenizer, prompt), [*ids, *([] if material.end is None else [material.end])])
