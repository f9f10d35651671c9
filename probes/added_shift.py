"""What each layer adds to the shift of the residual stream, apart from what it inherits from the layers below it.

Block k of the fine-tune is given the base's own residual stream: what comes out otherwise than in the base is block k's
doing alone. So the first guilty layer is named, and not those that only carry on what they were handed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.checkpoints import Checkpoint
from activations.errors import MismatchError
from activations.extract import extract
from activations.hook_points import RESID_POST
from activations.models import Model
from activations.prompts import PromptSet
from activations.reuse import ResidualCache
from activations.weights import slots_of, tuned_weights

__all__ = ["Parts", "added_activations"]


@dataclass(frozen=True, eq=False)
class Parts:
    """A checkpoint's changed weights, block by block, to put some of them into the base and leave the others out.

    Memory: the weights that the checkpoint changes, once.

    Attributes:
        model: The base.
        checkpoint: The fine-tune.
        values: Slot of the base to the checkpoint's value; those with the base's own bytes are left out.
        edit: What else was done to the values; "" for the checkpoint's own.
    """

    model: Model
    checkpoint: Checkpoint
    values: Mapping[str, Tensor]
    edit: str = ""

    @classmethod
    def of(cls, model: Model, checkpoint: Checkpoint) -> Parts:
        """Read a checkpoint.

        Raises:
            CheckpointError: It cannot be read, or was not made for this base.
            MismatchError: Another checkpoint is in the network now.
        """
        if model.tuned:
            raise MismatchError("other weights are in the network now: expected the base's own", path=checkpoint.path)
        values, slots = tuned_weights(model.hf, checkpoint), slots_of(model.hf)
        return cls(model, checkpoint, {n: v for n, v in values.items() if not torch.equal(v, slots[n].data)})

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Blocks in which anything changed."""
        return tuple(layer for layer in range(self.model.n_layers) if self.names([layer]))

    def names(self, layers: Sequence[int], *, outside: bool = False) -> tuple[str, ...]:
        """Changed slots inside some blocks; `outside` adds those of no block (embeddings, final norm)."""
        wanted = set(layers) | ({None} if outside else set())
        return tuple(name for name in self.values if self._layer_of.get(name) in wanted)

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[Model]:
        """Within the block the base has these slots of the checkpoint, and no others."""
        values = {name: self.values[name] for name in names}
        with self.model.holding(values, f"{self.checkpoint.content_hash()}[{self.edit}{','.join(sorted(names))}]"):
            yield self.model

    @cached_property
    def _layer_of(self) -> dict[str, int]:
        blocks = self.model.hook_points.blocks()
        home = {
            id(slot): layer for layer, block in enumerate(blocks) for slot in block.state_dict(keep_vars=True).values()
        }
        return {name: home[id(slot)] for name, slot in slots_of(self.model.hf).items() if id(slot) in home}


def added_activations(
    parts: Parts, prompts: PromptSet, *, pooling: str = "last", reuse: ResidualCache | None = None
) -> Float[np.ndarray, "layer prompt d_model"]:
    """The residual stream after each block, had every block below it been the base's.

    Layer k of the result comes from the fine-tune's block k on the base's stream; compare it with the base's own
    activations (`diff_activations`) for what each layer adds. Where a block has the base's bytes, so has the result.

    Cost: one forward pass over the prompts in all where passes can start in the middle (see `ResidualCache`), else
    half of one for each layer. Changed embeddings are in no layer and are left out.

    Args:
        parts: The checkpoint.
        prompts: Prompts to run.
        pooling: What to keep of each prompt, one vector.
        reuse: Of the base, to start passes in the middle; its own by default.
    """
    model = parts.model
    if reuse is None:
        reuse = ResidualCache(model, layers=tuple(range(1, model.n_layers)))
    points = model.hook_points.names(RESID_POST)
    found = extract(model, prompts, pooling=pooling, reuse=reuse).values.copy()
    for layer in parts.layers:
        with parts.only(parts.names([layer])):
            found[layer] = extract(model, prompts, hook_points=[points[layer]], pooling=pooling, reuse=reuse).values[0]
    return found
