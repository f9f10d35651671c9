"""Before a model is believed: our hooks see what it reports, and no token looks ahead."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import ModelError, NotCausalError, SelfTestError
from activations.hook_points import RESID_POST, HookPoints, layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["self_test", "token_distance"]


@torch.inference_mode()
def self_test(hf: PreTrainedModel, hook_points: HookPoints) -> None:
    """Compare our hooks with the model's own hidden states, and see that no token looks ahead.

    Layers that are off by one, and models that read in both directions, give plausible numbers and wrong results.
    Cost: one forward pass over two rows of eight tokens.

    Raises:
        SelfTestError: A hook saw something else than `hidden_states[layer + 1]` (for the last layer: than what its
            final norm makes of it).
        ModelError: The model cannot run, or its hidden states are NaN or infinite in its dtype.
        NotCausalError: Another last token changed the hidden states before it.
    """
    names = hook_points.names(RESID_POST)
    seen: dict[str, Tensor] = {}
    handles = [hook_points.resolve(name).attach(partial(seen.__setitem__, name)) for name in names]
    try:
        states = hf(input_ids=_test_ids(hf), output_hidden_states=True, use_cache=False).hidden_states
    # Settings that contradict each other load, and fail in the arithmetic; so do sizes that packed kernels cannot do.
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ModelError(
            f"{type(hf).__name__} cannot run: {str(error) or type(error).__name__}",
            hint="Check the sizes in the base's config.json.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    norm = hook_points.final_norm
    if norm is not None and names[-1] in seen:
        seen[names[-1]] = norm(seen[names[-1]])
    for name, expected in zip(names, states[1:], strict=True):
        # The same tensors of the same pass: only the final norm is computed a second time.
        if not expected.isfinite().all():
            raise ModelError(
                f"hidden states of {type(hf).__name__} are NaN or infinite at layer {layer_of(name)} in {hf.dtype}",
                hint="Pass --dtype bfloat16 or float32, whose numbers reach further; else the base is broken.",
            )
        if name not in seen or _distance(seen[name], expected) > 8 * torch.finfo(hf.dtype).eps:
            raise SelfTestError(
                f"{name} of {type(hf).__name__} is not hidden_states[{layer_of(name) + 1}]",
                hint="Its layers cannot be told apart safely; please report the architecture.",
            )
    # A loose bound: rounding may differ between rows, and attention to later tokens is far larger than that.
    if token_distance(states[-1][0, :-1].float(), states[-1][1, :-1].float()) > max(
        1e-4, 4 * torch.finfo(hf.dtype).eps
    ):
        raise NotCausalError(
            f"{type(hf).__name__} lets tokens see later ones: expected a causal language model",
            hint="Pass a decoder-only model.",
        )


def _test_ids(hf: PreTrainedModel) -> Tensor:
    """Two rows that differ in their last token only."""
    embeddings = hf.get_input_embeddings().weight
    row = torch.arange(7, 15, device=embeddings.device) % embeddings.shape[0]
    return torch.stack([row, torch.cat([row[:-1], (row[-1:] + 1) % embeddings.shape[0]])])


def _distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value; layers of one model may lie on several devices."""
    expected = expected.float()
    return float((got.to(expected) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def token_distance(got: Float[Tensor, "token d_model"], expected: Float[Tensor, "token d_model"]) -> float:
    """How far the worst token is off: its typical difference over its typical value.

    Medians over the dimensions, because trained models hold values in a few that would drown all others.
    """
    apart, size = ((tensor.abs().median(dim=-1).values) for tensor in (got - expected, expected))
    return float((apart / size.clamp(min=1e-30)).max())
