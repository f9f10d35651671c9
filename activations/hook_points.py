"""Names of places in a model, in TransformerLens' vocabulary, resolved to modules of the loaded model.

TransformerLens' architecture adapters know where each place lies in about 160 architectures, so there is no such table
here. Only their map is used: the model is neither wrapped nor changed. Importing TransformerLens takes most of a
second, so it waits until a name has to be resolved.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activations.errors import HookPointError, ModelError, NotCausalError, SelfTestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RESID_POST", "HookPoints", "Site", "layer_of", "self_test"]

# The residual stream after a block, before the final norm.
RESID_POST = "hook_resid_post"

# Places that have a tensor of [batch, token, d_model] in every architecture that has the place at all.
_KINDS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", RESID_POST)
_SIDES: Mapping[str, Literal["input", "output"]] = {"hook_in": "input", "hook_out": "output"}


@dataclass(frozen=True)
class Site:
    """One side of one module: where a hook has to be put."""

    module: nn.Module
    side: Literal["input", "output"]

    def attach(self, take: Callable[[Float[Tensor, "prompt token d_model"]], None]) -> RemovableHandle:
        """Call `take` with the hidden states that pass here, at each forward pass until the handle is removed."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            take(output[0] if isinstance(output, tuple) else output)

        if self.side == "input":
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(after)


def layer_of(hook_point: str) -> int:
    """Layer of a hook point: 12 for "blocks.12.hook_resid_post".

    Raises:
        HookPointError: The name is not of that form.
    """
    match = re.fullmatch(r"blocks\.(\d{1,6})\.hook_\w+", hook_point)
    if match is None:
        raise HookPointError(
            f"{hook_point!r} is no hook point: expected a name like 'blocks.0.{RESID_POST}'",
            hint="List the valid names with model.hook_points.names().",
        )
    return int(match[1])


class HookPoints:
    """The hook points of one model.

    Args:
        hf: A Hugging Face model; left as it is.

    Raises:
        ModelError: TransformerLens has no adapter for the architecture (at first use, not here).
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        self._hf = hf

    @property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return int(self._adapter.cfg.n_layers)

    @property
    def final_norm(self) -> nn.Module | None:
        """What the model does to the last residual stream before the unembedding, where it does anything."""
        if "ln_final" not in self._adapter.component_mapping:
            return None
        module: nn.Module = self._adapter.get_component(self._hf, "ln_final")
        return module

    def names(self, kind: str | None = None) -> tuple[str, ...]:
        """Hook points in the order of the layers: those of one `kind` (such as "hook_resid_post"), or all."""
        kinds = tuple(self._places) if kind is None else (kind,)
        return tuple(self._checked(f"blocks.{layer}.{kind}") for layer in range(self.n_layers) for kind in kinds)

    def resolve(self, hook_point: str) -> Site:
        """The module and the side of it that a hook point stands for.

        Raises:
            HookPointError: The model has no such layer, or no such place in its layers.
        """
        self._checked(hook_point)
        _, layer, kind = hook_point.split(".")
        *path, side = self._places[kind].split(".")
        try:
            module = self._adapter.get_component(self._hf, ".".join(["blocks", layer, *path]))
        except (AttributeError, ValueError) as error:
            raise HookPointError(
                f"layer {layer} of this model has no {kind}: its layers differ from each other", hint=str(error)
            ) from error
        return Site(module, _SIDES[side])

    def _checked(self, hook_point: str) -> str:
        layer, kind = layer_of(hook_point), hook_point.rsplit(".", 1)[1]
        if layer >= self.n_layers:
            raise HookPointError(
                f"layer {layer} in {hook_point!r} does not exist: the model has layers 0-{self.n_layers - 1}",
                hint="Name a layer of that range.",
            )
        if kind not in self._places:
            raise HookPointError(
                f"{kind!r} in {hook_point!r} does not exist in this model: expected one of {', '.join(self._places)}",
                hint="List the valid names with model.hook_points.names().",
            )
        return hook_point

    @cached_property
    def _places(self) -> dict[str, str]:
        """Kind of hook point to path within the block, such as "hook_mlp_out" to "mlp.hook_out"."""
        block = self._adapter.component_mapping["blocks"]
        paths = {kind: block.hook_aliases.get(kind) for kind in _KINDS}
        return {
            kind: path
            for kind, path in paths.items()
            if isinstance(path, str) and path.rsplit(".", 1)[-1] in _SIDES and _is_real(block, path)
        }

    @cached_property
    def _adapter(self) -> Any:
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

        architecture = type(self._hf).__name__
        # The translation reads `architectures`, which a model built from a configuration alone does not have.
        config = copy.copy(self._hf.config)
        config.architectures = [architecture]
        try:
            cfg = build_bridge_config_from_hf(config, architecture, architecture, self._hf.dtype)
            adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
        except (ValueError, AttributeError, ImportError) as error:
            raise ModelError(
                f"TransformerLens cannot map {architecture}: {error}",
                hint="Use an architecture that transformer_lens.model_bridge supports, or a newer transformer-lens.",
            ) from error
        if "blocks" not in (adapter.component_mapping or {}):
            raise ModelError(f"TransformerLens knows no blocks in {architecture}", hint="Use a decoder-only model.")
        return adapter


def _is_real(block: Any, path: str) -> bool:
    """Whether every component on the path is a module of the model: adapters also name places they only emulate."""
    component = block
    for name in path.split(".")[:-1]:
        component = component.submodules.get(name)
        if component is None or component.name is None:
            return False
    return True


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
    # Settings that contradict each other load, and fail in the arithmetic.
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
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
    if _distance(states[-1][0, :-1], states[-1][1, :-1]) > max(1e-4, 16 * torch.finfo(hf.dtype).eps):
        raise NotCausalError(
            f"{type(hf).__name__} lets tokens see later ones: expected a causal language model",
            hint="Pass a decoder-only model.",
        )


def _test_ids(hf: PreTrainedModel) -> Tensor:
    """Two rows that differ in their last token only."""
    vocab = hf.get_input_embeddings().weight.shape[0]
    row = torch.arange(7, 15, device=hf.device) % vocab
    return torch.stack([row, torch.cat([row[:-1], (row[-1:] + 1) % vocab])])


def _distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30))
