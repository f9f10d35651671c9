"""Prompts in, what a model holds while it reads them out: in memory, or in files that a later run goes on with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import torch

from activations.answers import answer_ids
from activations.background import behind
from activations.batching import Pooling
from activations.errors import OptionError, StoreError
from activations.forward import Extracted, capture
from activations.hook_points import RESID_POST
from activations.models import Model
from activations.prompts import PromptSet, texts_hash
from activations.provenance import Provenance
from activations.results import Activations
from activations.reuse import ResidualCache
from activations.store import ActivationStore
from activations.stream import Plan, check_readable, stream
from activations.tokens import Conversation, template_hash, tokenise

__all__ = ["extract"]


@overload
def extract(
    model: Model,
    prompts: PromptSet | Sequence[str],
    *,
    hook_points: Sequence[str] | None = ...,
    pooling: str = ...,
    system: str = ...,
    answers: Sequence[str] | Sequence[Sequence[int]] | int | None = ...,
    span: str | Sequence[str] | None = ...,
    truncate_to: int | None = ...,
    max_tokens: int | None = ...,
    reuse: ResidualCache | None = ...,
    out: str | Path | None = ...,
) -> Activations: ...


@overload
def extract(
    model: Model,
    prompts: PromptSet | Sequence[str],
    *,
    hook_points: Sequence[str] | None = ...,
    pooling: list[str] | tuple[str, ...],
    system: str = ...,
    answers: Sequence[str] | Sequence[Sequence[int]] | int | None = ...,
    span: str | Sequence[str] | None = ...,
    truncate_to: int | None = ...,
    max_tokens: int | None = ...,
    reuse: ResidualCache | None = ...,
    out: str | Path | None = ...,
) -> dict[str, Activations]: ...


def extract(
    model: Model,
    prompts: PromptSet | Sequence[str],
    *,
    hook_points: Sequence[str] | None = None,
    pooling: str | list[str] | tuple[str, ...] = "last",
    system: str = "",
    answers: Sequence[str] | Sequence[Sequence[int]] | int | None = None,
    span: str | Sequence[str] | None = None,
    truncate_to: int | None = None,
    max_tokens: int | None = None,
    reuse: ResidualCache | None = None,
    out: str | Path | None = None,
) -> Activations | dict[str, Activations]:
    """Read prompts with a model, and keep what it holds at some places.

        extract(model, prompts)                                        # last prompt token, every layer
        extract(model, prompts, pooling=["last", "mean@user"])         # two in one pass, in a dictionary
        extract(model, prompts, pooling="all@answer[:4]", answers=16)  # of up to 16 tokens that the model writes

    Cost: one forward pass over the prompts up to the last hook point, and one hash of the weights per model. Memory
    beyond the model: one batch at one layer, keys and values of a shared beginning, the token ids, and the result
    unless it goes to `out`.

    Args:
        model: The model, with whatever checkpoint is applied to it.
        prompts: A prompt set, or plain texts.
        hook_points: Names such as "blocks.12.hook_resid_post"; by default the residual stream after every block.
        pooling: What to keep of each prompt, see `activations.batching.Pooling`; several give a dictionary.
        system: System prompt before each prompt.
        answers: What follows each prompt, as text or token ids; a number lets the model write so many, greedily.
        span: Text to find in each prompt, for the region "span": one for all, or one for each.
        truncate_to: Cut longer prompts to so many tokens, at the end of the user's text; answers come on top. Without
            it nothing is cut, and what the model cannot read is an error.
        max_tokens: Tokens in a batch; decides speed and memory, not the result. By default by the device.
        reuse: Start where the layers that a checkpoint changed begin, see `ResidualCache`.
        out: HDF5 file to write batch by batch (with several poolings a folder of them); an interrupted run goes on
            where it stopped.

    Returns:
        The activations, in the order of the prompts.

    Raises:
        HookPointError: The model has no such hook point.
        PromptError: A prompt is empty, longer than the model can read, or lacks what a pooling asks for.
        OptionError: No such pooling, hook points of different widths, another model's `reuse`, or nothing to extract.
        NonFiniteError: An activation is NaN or infinite.
        MemoryLimitError: Not even one prompt fits into memory.
        StoreError: `out` cannot be written, or holds something else.
    """
    names = model.hook_points.names(RESID_POST) if hook_points is None else tuple(hook_points)
    texts = prompts.prompts if isinstance(prompts, PromptSet) else _listed(prompts)
    poolings = {text: Pooling.parse(text) for text in (pooling if isinstance(pooling, list | tuple) else [pooling])}
    _check(names, texts, poolings)
    if reuse is not None:
        reuse.require(model)
    conversation = Conversation(system, None, span, truncate_to)
    if isinstance(answers, int | np.integer):
        answers = _written(model, texts, conversation, int(answers))
    conversation = replace(conversation, answers=answers)
    conversation.require_one_each(len(texts))
    plan = Plan(names, poolings, conversation, max_tokens, reuse)
    labelled = prompts if isinstance(prompts, PromptSet) else None
    provenances = {text: _provenance(model, texts, plan, text, labelled) for text in poolings}
    if out is None:
        found = _in_memory(stream(model, texts, plan), provenances)
    else:
        if not isinstance(pooling, str):
            _make(Path(out))
        paths = {text: Path(out) if isinstance(pooling, str) else Path(out) / _file_name(text) for text in poolings}
        found = _in_files(model, texts, plan, provenances, paths)
    return found[pooling] if isinstance(pooling, str) else found


def _written(model: Model, texts: Sequence[str], conversation: Conversation, count: int) -> list[list[int]]:
    """The first tokens of the model's own answers, read afterwards like answers given: the values are the same."""
    if count < 1:
        raise OptionError(f"answers is {count}: expected at least 1 token to write")
    prompts = tokenise(model.tokenizer, texts, replace(conversation, span=None))
    for row, prompt in enumerate(prompts):
        check_readable(model, prompt.ids, row, more=count)
    return answer_ids(model, [list(map(int, prompt.ids)) for prompt in prompts], count=count)


def _check(names: tuple[str, ...], texts: Sequence[str], poolings: Mapping[str, Pooling]) -> None:
    if not names or not texts or not poolings or len(set(names)) < len(names):
        raise OptionError(
            f"{len(set(names))} different of {len(names)} hook points, {len(texts)} prompts, {len(poolings)} poolings: "
            "expected at least one of each, and no hook point twice",
            hint="Leave hook_points out to take every layer.",
        )


def _listed(prompts: Iterable[str]) -> tuple[str, ...]:
    if isinstance(prompts, str):
        raise OptionError("prompts is one text: expected a list of them", hint="Pass [prompt].")
    return tuple(prompts)


def _provenance(model: Model, texts: Sequence[str], plan: Plan, pooling: str, labelled: PromptSet | None) -> Provenance:
    return Provenance(
        model=model.name,
        fingerprint=model.fingerprint,
        tuned=model.tuned,
        dtype=f"{str(model.dtype).removeprefix('torch.')} {model.quantization}".strip(),
        d_model=_width(model, plan.hook_points),
        hook_points=plan.hook_points,
        pooling=pooling,
        system=plan.conversation.system,
        template=model.template,
        template_hash=template_hash(model.tokenizer),
        truncated_to=plan.conversation.truncate_to or 0,
        regions_hash=plan.conversation.regions_hash,
        config_hash=model.config_hash,
        prompts_name=labelled.name if labelled else "",
        prompts_hash=labelled.content_hash if labelled else texts_hash(texts),
        n_prompts=len(texts),
        harmful=labelled.harmful if labelled else None,
        pair_ids=labelled.pair_ids if labelled else None,
    )


@torch.inference_mode()
def _width(model: Model, names: Sequence[str]) -> int:
    """Width of the hook points' vectors; what is not the residual stream's is seen on one token."""
    widths = dict.fromkeys(names, model.d_model)
    others = [name for name in names if name.count(".") > 2]
    if others:
        with capture(model, others, lambda name, hidden: widths.update({name: hidden.shape[-1]})):
            model.hf(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    if len(set(widths.values())) > 1:
        raise OptionError(
            f"hook points differ in width: {', '.join(f'{name} has {width}' for name, width in widths.items())}",
            hint="Extract those of each width in a call of their own.",
        )
    return next(iter(widths.values()))


def _in_memory(parts: Iterator[dict[str, Extracted]], provenances: Mapping[str, Provenance]) -> dict[str, Activations]:
    """Everything in the order of the prompts."""
    values = {
        text: np.empty((len(p.hook_points), p.n_prompts, p.d_model), dtype=np.float32)
        for text, p in provenances.items()
        if p.reduction != "all"
    }
    tokens: dict[str, dict[int, np.ndarray]] = {text: {} for text in provenances if text not in values}
    for found in parts:
        for text, part in found.items():
            if text in values:
                values[text][:, part.rows] = part.vectors
            else:
                arrays = np.split(part.vectors, np.cumsum(part.lengths)[:-1], axis=1)
                tokens[text] |= zip(part.rows, arrays, strict=True)
    return {
        text: Activations(values[text], provenance)
        if text in values
        else Activations.of_tokens([tokens[text][row] for row in range(provenance.n_prompts)], provenance)
        for text, provenance in provenances.items()
    }


def _in_files(
    model: Model,
    texts: Sequence[str],
    plan: Plan,
    provenances: Mapping[str, Provenance],
    paths: Mapping[str, Path],
) -> dict[str, Activations]:
    """Written by a thread of its own; only what no earlier run has finished is read."""
    with ExitStack() as stack:
        stores = {t: stack.enter_context(ActivationStore.resume(paths[t], p)) for t, p in provenances.items()}
        missing = {text: set(store.missing) for text, store in stores.items()}

        def write(found: dict[str, Extracted]) -> None:
            for text, part in found.items():
                stores[text].append(*_only(part, missing[text]))

        todo = sorted(set().union(*missing.values()))
        with behind(write) as hand_over:
            for found in stream(model, texts, plan, rows=todo):
                hand_over(found)
    return {text: Activations.load(path) for text, path in paths.items()}


def _only(part: Extracted, rows: set[int]) -> Extracted:
    """The prompts that one of several files lacks: a run may end after it has written the others."""
    if rows.issuperset(part.rows):
        return part
    kept = [i for i, row in enumerate(part.rows) if row in rows]
    ends = np.cumsum(part.lengths)
    vectors = np.concatenate(
        [part.vectors[:, ends[i] - part.lengths[i] : ends[i]] for i in kept] or [part.vectors[:, :0]], axis=1
    )
    return Extracted(tuple(part.rows[i] for i in kept), [part.lengths[i] for i in kept], vectors)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"no folder can be made here: {error}", path=folder, hint="Choose another for out.") from error


def _file_name(pooling: str) -> str:
    return re.sub(r"[^\w-]", "_", pooling) + ".h5"
