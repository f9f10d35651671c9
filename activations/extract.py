"""Hooks in a context manager, and the extraction loop.

Prompts become token ids, and ids become batches of similar length. One forward pass a batch runs until the last wanted
hook point; each hook keeps what the pooling asks for, and only that leaves the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.batching import MAX_TOKENS, Batch, Pooling, check_pooling, pool, token_batches
from activations.errors import HookPointError, OptionError, PromptError
from activations.hook_points import RESID_POST, layer_of
from activations.models import Model
from activations.prompts import PromptSet, format_prompt, template_hash, texts_hash
from activations.store import ActivationStore, Provenance

__all__ = ["Activations", "Extracted", "capture", "extract", "stream"]


@dataclass(frozen=True)
class Activations:
    """What a model holds at some places while it reads some prompts.

    Attributes:
        values: One vector a hook point and prompt; without prompts where the pooling keeps "all" tokens.
        provenance: The model, places, prompts and settings that these come from.
        tokens: For pooling "all" one array a prompt, with one vector a hook point and token; else ().
    """

    values: Float[np.ndarray, "hook_point prompt d_model"]
    provenance: Provenance
    tokens: tuple[Float[np.ndarray, "hook_point token d_model"], ...] = ()

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Names of the places, in the order of the values."""
        return self.provenance.hook_points

    @property
    def pooling(self) -> str:
        """What was kept of each prompt's tokens."""
        return self.provenance.pooling

    @property
    def labels(self) -> Bool[np.ndarray, " prompt"] | None:
        """True where a prompt is harmful; None for prompts without labels."""
        harmful = self.provenance.harmful
        return None if harmful is None else np.array(harmful, dtype=bool)

    def layer(self, which: int | str) -> Float[np.ndarray, "prompt d_model"]:
        """The vectors of one hook point, by its name, or by its layer where that has only one.

        Raises:
            HookPointError: It was not extracted, or the layer has several.
        """
        found = [i for i, name in enumerate(self.hook_points) if which in (name, layer_of(name))]
        if len(found) != 1:
            raise HookPointError(
                f"{which!r} stands for {len(found)} of the extracted hook points, expected one",
                hint=f"Extracted were: {', '.join(self.hook_points)}.",
            )
        vectors: np.ndarray = self.values[found[0]]
        return vectors

    def save(self, path: str | Path) -> None:
        """Write everything to a new HDF5 file (see `activations.store`).

        Raises:
            StoreError: Something lies at the path already, or it cannot be written.
        """
        kept = self.tokens or [self.values]
        lengths = [array.shape[1] for array in self.tokens] or [1] * self.provenance.n_prompts
        with ActivationStore.create(path, self.provenance) as store:
            store.append(range(self.provenance.n_prompts), lengths, np.concatenate(kept, axis=1))

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """Read what `save` wrote, or a finished `extract(..., out=path)`.

        Raises:
            PathMissingError, StoreError: The file is missing, broken or unfinished.
        """
        with ActivationStore.open(path) as store:
            return _from_store(store)


class Extracted(NamedTuple):
    """What one batch gave: the vectors of its prompts, one prompt after the other.

    Attributes:
        rows: The prompts.
        lengths: Vectors of each: 1, or its number of tokens where the pooling keeps "all".
        vectors: In float32, on the CPU.
    """

    rows: tuple[int, ...]
    lengths: list[int]
    vectors: Float[np.ndarray, "hook_point vector d_model"]


def extract(
    model: Model,
    prompts: PromptSet | Sequence[str],
    *,
    hook_points: Sequence[str] | None = None,
    pooling: str = "last",
    max_tokens: int = MAX_TOKENS,
    out: str | Path | None = None,
    system: str = "",
) -> Activations:
    """Read prompts with a model, and keep what it holds at some places.

    Cost: one forward pass over the prompts up to the last hook point, and one hash of the weights per model. Memory
    beyond the model: one batch's hidden states at one layer, and the result; `stream` does without the result.

    Args:
        model: The model, with whatever checkpoint is applied to it.
        prompts: A prompt set, or plain texts.
        hook_points: Names such as "blocks.12.hook_resid_post"; by default the residual stream after every block.
        pooling: "last", "mean" or "max" over a prompt's tokens, or "all" of them.
        max_tokens: Padded tokens in a batch; decides speed and memory, not the result.
        out: HDF5 file to write batch by batch; an interrupted run goes on where it stopped.
        system: System prompt before each prompt.

    Returns:
        The activations, in the order of the prompts.

    Raises:
        HookPointError: The model has no such hook point.
        PromptError: A prompt is empty, or longer than the model can read.
        OptionError: No such pooling, or nothing to extract.
        StoreError: `out` cannot be written, or holds something else.
    """
    names = model.hook_points.names(RESID_POST) if hook_points is None else tuple(hook_points)
    how = check_pooling(pooling)
    ids = _token_ids(model, prompts, system)
    provenance = _provenance(model, prompts, names, how, system)
    if out is None:
        return _gathered(stream(model, ids, names, pooling=how, max_tokens=max_tokens), provenance)
    with ActivationStore.resume(out, provenance) as store:
        for part in stream(model, ids, names, rows=store.missing, pooling=how, max_tokens=max_tokens):
            store.append(*part)
        return _from_store(store)


@torch.inference_mode()
def stream(
    model: Model,
    ids: Sequence[Sequence[int]],
    hook_points: Sequence[str],
    *,
    rows: Sequence[int] | None = None,
    pooling: Pooling = "last",
    max_tokens: int = MAX_TOKENS,
) -> Iterator[Extracted]:
    """Extract batch by batch, for results that do not fit into memory; longest prompts come first.

    Args:
        model: The model.
        ids: Token ids of each prompt.
        hook_points: Where.
        rows: Which prompts; all when None.
        pooling: What to keep of each prompt.
        max_tokens: Padded tokens in a batch.
    """
    for batch in token_batches(ids, rows=rows, max_tokens=max_tokens):
        lengths = batch.mask.sum(dim=1).tolist() if pooling == "all" else [1] * len(batch.rows)
        vectors = _pooled(model, batch.to(model.device), hook_points, pooling)
        yield Extracted(batch.rows, lengths, vectors.cpu().numpy())


def _pooled(
    model: Model, batch: Batch, hook_points: Sequence[str], pooling: Pooling
) -> Float[Tensor, "hook_point vector d_model"]:
    kept: dict[str, Tensor] = {}

    def keep(name: str, hidden: Tensor) -> None:
        kept[name] = pool(hidden, batch.mask, pooling)

    with capture(model, hook_points, keep):
        # No mask: padding comes after the prompt, and a causal model (checked at load) never looks ahead.
        model.hf(input_ids=batch.input_ids, use_cache=False)
    return torch.stack([kept[name] for name in hook_points])


@contextmanager
def capture(
    model: Model,
    hook_points: Sequence[str],
    take: Callable[[str, Float[Tensor, "prompt token d_model"]], None],
) -> Iterator[None]:
    """Call `take(name, hidden)` at each hook point of one forward pass, which stops after the last of them.

        with capture(model, ["blocks.3.hook_resid_post"], take):
            model.hf(input_ids=ids)  # what follows here in the block is skipped: the pass ends by an exception

    The hooks are gone when the block ends, however it ends.

    Raises:
        HookPointError: The model has no such hook point, or the forward pass never came by it.
    """
    sites = {name: model.hook_points.resolve(name) for name in hook_points}
    awaited = set(sites)

    def hook(name: str) -> Callable[[Tensor], None]:
        def see(hidden: Tensor) -> None:
            take(name, hidden)
            awaited.discard(name)
            if not awaited:
                raise _Complete

        return see

    handles = [site.attach(hook(name)) for name, site in sites.items()]
    try:
        yield
    except _Complete:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if awaited:
        raise HookPointError(f"no forward pass came by {', '.join(sorted(awaited))}", hint="Run model.hf in the block.")


class _Complete(Exception):  # noqa: N818  # a signal, not an error
    """Everything wanted has been seen: the rest of the forward pass would be thrown away."""


def _token_ids(model: Model, prompts: PromptSet | Sequence[str], system: str) -> list[list[int]]:
    ids = [format_prompt(model.tokenizer, text, system=system) for text in _texts(prompts)]
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    for row, tokens in enumerate(ids):
        if limit is not None and len(tokens) > limit:
            raise PromptError(
                f"prompt {row} has {len(tokens):,} tokens, expected at most {limit:,}, the positions of {model.name}",
                hint="Shorten it or leave it out.",
            )
    return ids


def _texts(prompts: PromptSet | Sequence[str]) -> tuple[str, ...]:
    return prompts.prompts if isinstance(prompts, PromptSet) else tuple(prompts)


def _provenance(
    model: Model, prompts: PromptSet | Sequence[str], hook_points: tuple[str, ...], pooling: Pooling, system: str
) -> Provenance:
    if not hook_points or not len(prompts) or len(set(hook_points)) < len(hook_points):
        raise OptionError(
            f"{len(set(hook_points))} different of {len(hook_points)} hook points, {len(prompts)} prompts: "
            "expected at least one of each, and none twice",
            hint="Leave hook_points out to take every layer.",
        )
    labelled = prompts if isinstance(prompts, PromptSet) else None
    return Provenance(
        model=model.name,
        fingerprint=model.fingerprint,
        tuned=model.tuned,
        dtype=str(model.dtype).removeprefix("torch."),
        d_model=model.d_model,
        hook_points=hook_points,
        pooling=pooling,
        system=system,
        template_hash=template_hash(model.tokenizer),
        prompts_name=labelled.name if labelled else "",
        prompts_hash=labelled.content_hash if labelled else texts_hash(_texts(prompts)),
        n_prompts=len(prompts),
        harmful=labelled.harmful if labelled else None,
        pair_ids=labelled.pair_ids if labelled else None,
    )


def _gathered(parts: Iterator[Extracted], provenance: Provenance) -> Activations:
    """All parts in the order of the prompts."""
    if provenance.pooling == "all":
        tokens: dict[int, np.ndarray] = {}
        for part in parts:
            tokens |= zip(part.rows, np.split(part.vectors, np.cumsum(part.lengths)[:-1], axis=1), strict=True)
        return Activations(_no_values(provenance), provenance, tuple(tokens[row] for row in range(len(tokens))))
    values = np.empty((len(provenance.hook_points), provenance.n_prompts, provenance.d_model), dtype=np.float32)
    for part in parts:
        values[:, part.rows] = part.vectors
    return Activations(values, provenance)


def _from_store(store: ActivationStore) -> Activations:
    provenance = store.provenance
    if provenance.pooling == "all":
        layers = [store.read_tokens(name) for name in provenance.hook_points]
        return Activations(_no_values(provenance), provenance, tuple(map(np.stack, zip(*layers, strict=True))))
    return Activations(np.stack([store.read_layer(name) for name in provenance.hook_points]), provenance)


def _no_values(provenance: Provenance) -> Float[np.ndarray, "hook_point 0 d_model"]:
    return np.empty((len(provenance.hook_points), 0, provenance.d_model), dtype=np.float32)
