"""A model and its tokenizer; a checkpoint's weights go in and come out again exactly."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from activations.checkpoints import Checkpoint, open_checkpoint
from activations.errors import ModelError, OptionError
from activations.hook_points import HookPoints
from activations.tensors import DTYPES, content_hash
from activations.weights import slots_of, tuned_weights

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["QUANTIZED", "Model", "quietly"]

# Entries of a configuration that decide no activation.
_NO_SETTING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "_attn_implementation"}

# Widths that bitsandbytes packs matrices to.
QUANTIZED = ("8bit", "4bit")


class Model:
    """A causal language model with its tokenizer.

    Attributes:
        hf: The Hugging Face model, in evaluation mode.
        name: What a report calls it.
        hook_points: Places in the model by TransformerLens' names.
        lock: Held during a pass with hooks: two threads must not run the same network at once.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "",
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.hf = hf
        self._tokenizer = tokenizer
        self.name = name or type(hf).__name__
        self.hook_points = HookPoints(hf)
        self.lock = threading.RLock()
        self._checkpoint = checkpoint
        self._applied: tuple[Checkpoint, ...] = ()
        self._put_aside: dict[str, torch.Tensor] = {}
        self._changed: frozenset[str] = frozenset()
        self._edits: tuple[str, ...] = ()
        self._held: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.n_layers} layers of {self.d_model}, {self.dtype}, {self.device})"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer.

        Raises:
            OptionError: A model in memory was given without one.
        """
        if self._tokenizer is None:
            raise OptionError(f"{self.name} has no tokenizer", hint="Pass one: load_model(hf, tokenizer=tokenizer).")
        return self._tokenizer

    @property
    def template(self) -> str:
        """How prompts are written for it: by its "chat template", or as "plain text" where it has none."""
        return "plain text" if self.tokenizer.chat_template is None else "chat template"

    @property
    def device(self) -> torch.device:
        """Where the model wants its token ids: the device of its embeddings, whatever device the layers are on."""
        return torch.device(self.hf.get_input_embeddings().weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """In which the model runs."""
        dtype: torch.dtype = self.hf.dtype
        return dtype

    @property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return int(self.hf.config.get_text_config().num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.hf.config.get_text_config().hidden_size)

    @property
    def quantization(self) -> str:
        """How the base's matrices are packed: "4bit", "8bit", another method's name, or "" where they are not."""
        quantizer = getattr(self.hf, "hf_quantizer", None)
        if quantizer is None:
            return ""
        config = quantizer.quantization_config
        bits = [name for name in QUANTIZED if getattr(config, f"load_in_{name}", False)]
        return bits[0] if bits else str(getattr(config.quant_method, "value", config.quant_method))

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of the base's weights: of its files where it is a folder, else of its tensors in memory.

        Packing at load leaves it as it is: `quantization` tells such a base apart. Cost: reads every weight once.
        """
        if self._checkpoint is not None:
            return self._checkpoint.content_hash()
        names = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
        return content_hash(
            (name, names[str(slot.dtype).removeprefix("torch.")], tuple(slot.shape), _digest(slot))
            for name, slot in (slots_of(self.hf) | self._put_aside).items()
        )

    @cached_property
    def config_hash(self) -> str:
        """Hash of the configuration but for names, versions and dtype: the same weights run otherwise under another."""
        config = json.loads(self.hf.config.to_json_string(use_diff=False))
        return hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()

    @property
    def tuned(self) -> str:
        """Content hash of the checkpoint that is applied, and what else is edited, joined by "+"; "" for the base."""
        return "+".join([*(checkpoint.content_hash() for checkpoint in self._applied), *self._held, *self._edits])

    @property
    def changed(self) -> frozenset[str]:
        """Parameters (named as in `slots_of`) whose bytes now differ from the base's, by what is applied."""
        return self._changed

    @property
    def first_changed_layer(self) -> int:
        """The first layer whose output can differ from the base's; `n_layers` where none can."""
        return 0 if self._edits else self.hook_points.first_block_of(self._changed)

    @contextlib.contextmanager
    def edited(self, what: str) -> Iterator[Model]:
        """Within the `with` block the model is known to run otherwise than its weights say, by hooks of the caller.

        Args:
            what: Tells one edit from another: it becomes part of `tuned`, and so of every provenance.
        """
        before, self._edits = self._edits, (*self._edits, what)
        try:
            yield self
        finally:
            self._edits = before

    @contextlib.contextmanager
    def applied(self, checkpoint: Checkpoint | str | Path) -> Iterator[Model]:
        """Within the `with` block this model has a checkpoint's weights, or its own with an adapter merged in.

        Nothing is put in before everything is read and compared, and the base's own tensors, the very same memory,
        are back after the block, whatever happens in it. Cost: memory for the checkpoint while it is read, and for
        the weights that it changes after that; no copy of the base.

        Raises:
            CheckpointError: The checkpoint cannot be read, or was not made for this base (see `tuned_weights`).
            ModelError: The base is quantised: no weights fit into packed ones.
        """
        if self.quantization:
            fault = f"{self.name} is quantised ({self.quantization}), and no checkpoint's weights fit into packed ones"
            raise ModelError(fault, hint="Load an unpacked base; device_map spreads it over several GPUs.")
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        values, equal = self._swaps(checkpoint)
        with self._swapped(values, equal):
            outer, self._applied = self._applied, (*self._applied, checkpoint)
            try:
                yield self
            finally:
                self._applied = outer

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, torch.Tensor], what: str) -> Iterator[Model]:
        """Within the `with` block some slots hold other values, and exactly what they held before after it.

        For parts of a checkpoint, whose values `tuned_weights` reads once for many blocks of this kind.

        Args:
            values: Name in `slots_of` to a tensor of the slot's shape and dtype, on its device.
            what: Tells one set of values from another: it becomes part of `tuned`, and so of every provenance.
        """
        before, self._held = self._held, (*self._held, what)
        try:
            with self._swapped(values, frozenset()):
                yield self
        finally:
            self._held = before

    @contextlib.contextmanager
    def _swapped(self, values: Mapping[str, torch.Tensor], equal: frozenset[str]) -> Iterator[None]:
        """Put values into slots; those named in `equal` are the base's own bytes."""
        slots = slots_of(self.hf)
        before, changed = {name: slots[name].data for name in values}, self._changed
        aside = self._put_aside
        try:
            for name, value in values.items():
                slots[name].data = value
            self._put_aside = before | aside
            self._changed = (changed | values.keys()) - equal
            yield
        finally:
            for name, value in before.items():
                slots[name].data = value
            self._put_aside, self._changed = aside, changed

    def _swaps(self, checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
        """What to put into which slot, and the slots that then have the base's own bytes."""
        with quietly():
            values, slots = tuned_weights(self.hf, checkpoint), slots_of(self.hf)
        own = {name: self._put_aside.get(name, slots[name].data) for name in values}
        equal = frozenset(name for name, value in values.items() if _same_bytes(value, own[name]))
        # This saves memory, and where an outer checkpoint changed what this one does not, the base's tensor comes back.
        values |= {name: own[name] for name in equal}
        return values, equal

    def bridge(self) -> TransformerBridge:
        """TransformerLens' view of this model, around the same parameters.

        A bridge rewires the model that it is built on, so it gets modules of its own. Where it splits a fused matrix
        (queries, keys and values of GPT-2 and GPT-NeoX) the parts are copies: to see a checkpoint, make the bridge
        inside `applied`. It reads the tokenizer again from where that came from, so one made in memory is left out.
        """
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        shared = {id(tensor): tensor for tensor in (*self.hf.parameters(), *self.hf.buffers())}
        twin = copy.deepcopy(self.hf, shared)
        architecture = type(self.hf).__name__
        twin.config.architectures = [architecture]
        return build_bridge_from_module(
            twin,
            architecture,
            hf_config=twin.config,
            tokenizer=copy.deepcopy(self._tokenizer) if getattr(self._tokenizer, "name_or_path", "") else None,
            model_name=self.name,
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the user's terminal: what matters in them is an error."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: -0.0 is not 0.0, and NaN equals itself."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(kind), other.view(kind))


def _settings(config: Any) -> Any:
    """A configuration without what changes no number."""
    if isinstance(config, dict):
        return {name: _settings(value) for name, value in config.items() if name not in _NO_SETTING}
    return config
