"""What an extraction gives: one vector a hook point and prompt, or one a token, with everything that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Bool, Float

from activations.errors import HookPointError, StoreError
from activations.hook_points import layer_of
from activations.provenance import Provenance
from activations.store import ActivationStore

__all__ = ["Activations"]


class Activations:
    """What a model holds at some places while it reads some prompts.

    What lies in a file stays there until it is asked for: `layer` reads one layer, `values` and `tokens` read all.

    Attributes:
        provenance: The model, places, prompts and settings that the vectors come from.
    """

    def __init__(
        self,
        values: Float[np.ndarray, "hook_point prompt width"],
        provenance: Provenance,
        tokens: Sequence[Float[np.ndarray, "hook_point token width"]] = (),
    ) -> None:
        self.provenance = provenance
        self._values: np.ndarray | None = values
        self._tokens: tuple[np.ndarray, ...] | None = tuple(tokens)
        self._path = Path()  # of the file that holds what is not in memory

    def __repr__(self) -> str:
        p = self.provenance
        which = f"{p.model} with {p.tuned[:12]}" if p.tuned else p.model
        return (
            f"Activations({which}: {p.pooling} of {p.n_prompts} prompts ({p.template}) "
            f"at {len(p.hook_points)} hook points, {p.d_model} wide)"
        )

    @property
    def values(self) -> Float[np.ndarray, "hook_point prompt width"]:
        """One vector a hook point and prompt; without prompts where the pooling keeps all tokens."""
        if self._values is None:
            self._values = np.stack([self.layer(name) for name in self.hook_points])
        return self._values

    @property
    def tokens(self) -> tuple[Float[np.ndarray, "hook_point token width"], ...]:
        """Where the pooling keeps all tokens one array a prompt; else ()."""
        if self._tokens is None:
            with ActivationStore.open(self._path) as store:
                layers = [store.read_tokens(name) for name in self.hook_points]
            self._tokens = tuple(map(np.stack, zip(*layers, strict=True)))
        return self._tokens

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

    def layer(self, which: int | str) -> Float[np.ndarray, "prompt width"]:
        """The vectors of one hook point, by its name, or by its layer where that has only one.

        Raises:
            HookPointError: It was not extracted, or the layer has several.
            StoreError: The file cannot be read any more.
        """
        found = [i for i, name in enumerate(self.hook_points) if which in (name, layer_of(name))]
        if len(found) != 1:
            raise HookPointError(
                f"{which!r} stands for {len(found)} of the extracted hook points, expected one",
                hint=f"Extracted were: {', '.join(self.hook_points)}.",
            )
        if self._values is None:
            with ActivationStore.open(self._path) as store:
                return store.read_layer(self.hook_points[found[0]])
        vectors: np.ndarray = self._values[found[0]]
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
    def load(cls, path: str | Path) -> Self:
        """Open what `save` wrote, or a finished `extract(..., out=path)`; values are read when they are used.

        Raises:
            PathMissingError, StoreError: The file is missing, broken or unfinished.
        """
        with ActivationStore.open(path) as store:
            if store.missing:
                raise StoreError(
                    f"{len(store.missing)} prompts, such as {store.missing[0]}, are not finished",
                    path=path,
                    hint="Run the extraction again: it goes on where it stopped.",
                )
            found = cls(np.empty((0, 0, 0), np.float32), store.provenance)
        found._path = Path(path)
        every = store.provenance.reduction == "all"
        found._values = _no_values(store.provenance) if every else None
        found._tokens = None if every else ()
        return found

    @classmethod
    def of_tokens(cls, tokens: Sequence[Float[np.ndarray, "hook_point token width"]], provenance: Provenance) -> Self:
        """From one array a prompt, for a pooling that keeps all tokens."""
        return cls(_no_values(provenance), provenance, tokens)


def _no_values(provenance: Provenance) -> Float[np.ndarray, "hook_point 0 width"]:
    return np.empty((len(provenance.hook_points), 0, provenance.d_model), dtype=np.float32)
