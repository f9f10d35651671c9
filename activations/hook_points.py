"""Names of places in a model, in TransformerLens' vocabulary, resolved to modules of the loaded model.

TransformerLens' architecture adapters know where each place lies in about 160 architectures, so there is no such table
here. Only their map is used: the model is neither wrapped nor changed. Which module is a router, and which part of what
it returns are its logits, is read from transformers' own list of what it can record: TransformerLens lags behind there.
Importing TransformerLens takes most of a second, so it waits until a name has to be resolved.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activations.errors import HookPointError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HEADS", "RESID_POST", "ROUTER", "HookPoints", "Site", "layer_of"]

# The residual stream after a block, before the final norm.
RESID_POST = "hook_resid_post"

# What each attention head found, before the output projection mixes the heads.
HEADS = "attn.hook_z"
# How a mixture of experts rates its experts for each token. The name is ours: TransformerLens calls the place
# mlp.gate.hook_out or mlp.router.hook_out, by architecture, and the former is an ordinary matrix in dense models.
ROUTER = "mlp.hook_router_logits"

# In the order of the forward pass.
_KINDS = ("hook_resid_pre", HEADS, "hook_attn_out", "hook_resid_mid", ROUTER, "hook_mlp_out", RESID_POST)
_SIDES: Mapping[str, Literal["input", "output"]] = {"hook_in": "input", "hook_out": "output"}
# What configurations call the number of experts that a router chooses from.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Site:
    """One side of one module: where a hook has to be put.

    Attributes:
        module: What the forward pass comes by.
        side: What is wanted of it.
        element: Which part, where the module returns several tensors.
    """

    module: nn.Module
    side: Literal["input", "output"]
    element: int = 0

    def attach(self, take: Callable[[Float[Tensor, "*prompt_token width"]], None]) -> RemovableHandle:
        """Call `take` with the tensor that passes here, at each forward pass until the handle is removed.

        It is [prompt, token, d_model], but for two kinds: `attn.hook_z` is [prompt, token, n_heads * d_head] with the
        heads side by side, and `mlp.hook_router_logits` has n_experts columns and comes as [prompt * token, n_experts]
        in most architectures (prompts one after the other), as [prompt, token, n_experts] in others.
        """

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            take(output[self.element] if isinstance(output, tuple) else output)

        if self.side == "input":
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(after)


def layer_of(hook_point: str) -> int:
    """Layer of a hook point: 12 for "blocks.12.hook_resid_post" and for "blocks.12.attn.hook_z".

    Raises:
        HookPointError: The name is not of that form.
    """
    return _split(hook_point)[0]


def _split(hook_point: str) -> tuple[int, str]:
    """Layer and kind."""
    match = re.fullmatch(r"blocks\.(\d{1,6})\.((?:\w+\.)*hook_\w+)", hook_point)
    if match is None:
        raise HookPointError(
            f"{hook_point!r} is no hook point: expected a name like 'blocks.0.{RESID_POST}'",
            hint="List the valid names with model.hook_points.names().",
        )
    return int(match[1]), match[2]


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

    def block(self, layer: int) -> nn.Module:
        """The module of a layer: the model's own, so its inputs and outputs are as transformers has them.

        Raises:
            HookPointError: The model has no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise self._out_of_range(f"layer {layer}")
        module: nn.Module = self._adapter.get_component(self._hf, f"blocks.{layer}")
        return module

    def blocks(self) -> tuple[nn.Module, ...]:
        """The modules of all layers, in their order."""
        return tuple(self.block(layer) for layer in range(self.n_layers))

    def writers(self, layer: int) -> tuple[nn.Module, ...]:
        """The matrices with which a layer writes to the residual stream: attention's, and a dense feed-forward part's.

        Experts, which share one tensor of three dimensions, are none.
        """
        found = (self._component(layer, *path) for path in (("attn", "o"), ("mlp", "out")))
        return tuple(one for one in found if getattr(getattr(one, "weight", None), "ndim", 0) == 2 and one is not None)

    def first_block_of(self, parameter_names: Iterable[str]) -> int:
        """The first layer whose output any of these parameters can change.

        Embeddings, and whatever is not recognised, count as layer 0; the final norm and the unembedding come after
        every layer, unless the unembedding is tied to the embeddings. Cost: a walk over the modules, once.

        Args:
            parameter_names: Names in the state dict, of parameters or buffers.

        Returns:
            A layer; `n_layers` if no layer's output can change.
        """
        return min((self._first_layers.get(name, 0) for name in parameter_names), default=self.n_layers)

    def names(self, kind: str | None = None) -> tuple[str, ...]:
        """Hook points in the order of the layers: those of one `kind` (such as "hook_resid_post"), or all.

        Each of them resolves: where layers differ, as when some have a router, only those with the place are listed.

        Raises:
            HookPointError: No layer has a place of this kind.
        """
        if kind is not None:
            self._checked(f"blocks.0.{kind}")
        kinds = self._places if kind is None else (kind,)
        return tuple(f"blocks.{n}.{k}" for n in range(self.n_layers) for k in kinds if self._site(n, k) is not None)

    def resolve(self, hook_point: str) -> Site:
        """The module and the side of it that a hook point stands for.

        Raises:
            HookPointError: The model has no such layer, or no such place in this layer or in any.
        """
        layer, kind = self._checked(hook_point)
        site = self._site(layer, kind)
        if site is None:
            others = ", ".join(str(layer_of(name)) for name in self.names(kind))
            raise HookPointError(
                f"layer {layer} of this model has no {kind}: its layers differ from each other",
                hint=f"Layers that have it: {others}.",
            )
        return site

    def _checked(self, hook_point: str) -> tuple[int, str]:
        layer, kind = _split(hook_point)
        if layer >= self.n_layers:
            raise self._out_of_range(f"layer {layer} in {hook_point!r}")
        if kind not in self._places:
            dense = "Only a mixture of experts has a router, and this model's layers are dense. "
            raise HookPointError(
                f"{kind!r} in {hook_point!r} does not exist in this model: expected one of {', '.join(self._places)}",
                hint=f"{dense * (kind == ROUTER)}List the valid names with model.hook_points.names().",
            )
        return layer, kind

    def _out_of_range(self, what: str) -> HookPointError:
        return HookPointError(
            f"{what} does not exist: the model has layers 0-{self.n_layers - 1}", hint="Name a layer of that range."
        )

    def _site(self, layer: int, kind: str) -> Site | None:
        """Where a place lies in one layer; None where the layer does without it."""
        if kind == ROUTER:
            return self._router(layer)
        *path, side = self._paths[kind].split(".")
        module = self._component(layer, *path)
        if module is None or (kind == HEADS and not self._mixes_heads(module)):
            return None
        return Site(module, _SIDES[side])

    def _component(self, layer: int, *path: str) -> nn.Module | None:
        try:
            module = self._adapter.get_component(self._hf, ".".join(["blocks", str(layer), *path]))
        except (AttributeError, ValueError):
            return None
        return module if isinstance(module, nn.Module) else None

    def _mixes_heads(self, module: nn.Module) -> bool:
        """Whether a module can be what the map calls it: a matrix from all heads to the residual stream."""
        rows = getattr(module, "in_features", getattr(module, "nx", None))
        columns = getattr(module, "out_features", getattr(module, "nf", None))
        cfg = self._adapter.cfg
        return rows is not None and rows % cfg.n_heads == 0 and columns == cfg.d_model

    def _router(self, layer: int) -> Site | None:
        """The router of a layer's feed-forward part, as transformers would record it: attention may have another."""
        config = self._hf.config.get_text_config()
        n_experts = {getattr(config, name, None) for name in _EXPERT_COUNTS} - {None}
        within = self._component(layer, "mlp") or self.block(layer)
        for recorded, element in _recorded_routers(self._hf):
            found = [module for module in within.modules() if isinstance(module, recorded)]
            if len(found) == 1 and _n_rows(found[0]) in n_experts:
                return Site(found[0], "output", element)
        return None

    @cached_property
    def _places(self) -> tuple[str, ...]:
        """Kinds of places that at least one layer has."""
        return tuple(
            kind
            for kind in _KINDS
            if (kind == ROUTER or kind in self._paths)
            and any(self._site(layer, kind) is not None for layer in range(self.n_layers))
        )

    @cached_property
    def _paths(self) -> dict[str, str]:
        """Kind of hook point to path within the block, such as "hook_mlp_out" to "mlp.hook_out"."""
        block = self._adapter.component_mapping["blocks"]
        paths = {kind: block.hook_aliases.get(kind) for kind in _KINDS}
        heads = getattr(block.submodules.get("attn"), "hook_aliases", {}).get("hook_z")
        paths[HEADS] = f"attn.{heads}" if isinstance(heads, str) else None
        return {
            kind: path
            for kind, path in paths.items()
            if isinstance(path, str) and path.rsplit(".", 1)[-1] in _SIDES and _is_real(block, path)
        }

    @cached_property
    def _first_layers(self) -> dict[str, int]:
        """Name of a parameter to the first layer whose output it can change; the smallest where names are tied."""
        after = [self._hf.get_output_embeddings(), self.final_norm]
        owners = {id(module): self.n_layers for module in after if module is not None}
        owners |= {id(block): layer for layer, block in enumerate(self.blocks())}
        layers = {
            path: owners[id(module)]
            for path, module in self._hf.named_modules(remove_duplicate=False)
            if id(module) in owners
        }
        tensors = self._hf.state_dict(keep_vars=True)
        first: dict[int, int] = {}
        for name, tensor in tensors.items():
            layer = next((layers[path] for path in _parents(name) if path in layers), 0)
            first[id(tensor)] = min(layer, first.get(id(tensor), layer))
        return {name: first[id(tensor)] for name, tensor in tensors.items()}

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


def _parents(name: str) -> Iterator[str]:
    """Modules that a parameter lies in, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _recorded_routers(hf: PreTrainedModel) -> Iterator[tuple[type[nn.Module], int]]:
    """Class of a router and which of its outputs are the logits, as transformers records `router_logits`."""
    for part in (hf, hf.base_model):
        records = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", ())
        for record in records if isinstance(records, (list, tuple)) else (records,):
            kind = getattr(record, "target_class", record)
            if isinstance(kind, type):
                yield kind, getattr(record, "index", 0)


def _n_rows(module: nn.Module) -> int | None:
    """Outputs of a router, from its matrix [n_experts, d_model]."""
    return next((weight.shape[0] for weight in module.parameters() if weight.dim() == 2), None)
