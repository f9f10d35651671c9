"""A runnable model, built from a trusted base; a checkpoint's weights go in and come out again exactly."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from activations.checkpoints import Checkpoint, open_checkpoint
from activations.errors import ModelError, NotCausalError, OptionError, PathMissingError
from activations.hook_points import HookPoints, self_test
from activations.tensors import DTYPES, content_hash
from activations.weights import slots_of, tuned_weights

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Model", "load_model"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTIZED = ("8bit", "4bit")
# Ways of accelerate to share out layers by free memory.
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
_BASE_HINT = "Pass the folder or the hub id of a causal language model in Hugging Face's layout."


class Model:
    """A causal language model with its tokenizer.

    Attributes:
        hf: The Hugging Face model, in evaluation mode.
        name: What a report calls it.
        hook_points: Places in the model by TransformerLens' names.
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
        self._checkpoint = checkpoint
        self._applied: tuple[Checkpoint, ...] = ()
        self._put_aside: dict[str, torch.Tensor] = {}
        self._changed: frozenset[str] = frozenset()

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
        bits = [name for name in _QUANTIZED if getattr(config, f"load_in_{name}", False)]
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

    @property
    def tuned(self) -> str:
        """Content hash of the checkpoint that is applied, several joined by "+"; "" for the base itself."""
        return "+".join(checkpoint.content_hash() for checkpoint in self._applied)

    @property
    def changed(self) -> frozenset[str]:
        """Parameters (named as in `slots_of`) whose bytes now differ from the base's, by what is applied."""
        return self._changed

    @property
    def first_changed_layer(self) -> int:
        """The first layer whose output can differ from the base's; `n_layers` where none can."""
        return self.hook_points.first_block_of(self._changed)

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
        (values, equal), slots = self._swaps(checkpoint), slots_of(self.hf)
        before, changed = {name: slots[name].data for name in values}, self._changed
        outer, aside = self._applied, self._put_aside
        try:
            for name, value in values.items():
                slots[name].data = value
            self._applied, self._put_aside = (*outer, checkpoint), before | aside
            self._changed = (changed | values.keys()) - equal
            yield self
        finally:
            for name, value in before.items():
                slots[name].data = value
            self._applied, self._put_aside, self._changed = outer, aside, changed

    def _swaps(self, checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
        """What to put into which slot, and the slots that then have the base's own bytes."""
        with _quiet():
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


def load_model(
    base: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    check: bool = True,
    device_map: str | Mapping[str, Any] | None = None,
    quantize: str | None = None,
) -> Model:
    """Load a base that you trust, and check that its layers are where we look for them.

    Args:
        base: A local folder, a hub id, or a model in memory (put into evaluation mode, and moved only if asked to).
        tokenizer: Instead of the base's own.
        device: "cpu", "cuda", "cuda:1"; "auto" takes the first GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto" takes float32 on a CPU and bfloat16 on a GPU.
        revision: Branch, tag or commit of a hub id.
        check: Run `self_test` (one small forward pass).
        device_map: Instead of `device`, how accelerate spreads the layers over devices: "auto", or module names to
            devices. Nothing may be offloaded to a disk, nor from a GPU to the CPU.
        quantize: "8bit" or "4bit", packed by bitsandbytes: to extract from, as no checkpoint can be applied to it. A
            base that was saved in packed form loads as it is.

    Raises:
        PathMissingError: Neither a folder nor a reachable hub id.
        CheckpointError: The folder's weights cannot be read.
        NotCausalError: The base is no causal language model.
        ModelError: The base cannot be loaded, or its architecture is unknown to TransformerLens.
        SelfTestError: Hooks and hidden states disagree.
        OptionError: No such device, dtype or quantisation, options that exclude each other, or a package is missing.
    """
    if isinstance(base, str | Path):
        where = _placed(device, dtype, device_map, quantize)
        with _quiet():
            model = _pretrained(base, tokenizer, where, revision)
    elif device_map is not None or quantize is not None:
        fault = f"device_map={device_map!r} and quantize={quantize!r} are for bases that are loaded, not in memory"
        raise OptionError(fault, hint="Pass the folder or hub id that it came from.")
    else:
        model = Model(base, tokenizer)
        if device != "auto" or dtype != "auto":
            place = model.device if device == "auto" else _device(device)
            kind = model.dtype if dtype == "auto" else _dtype(dtype, place)
            with _named_faults(model.name):  # a packed model refuses to be moved
                base.to(device=place, dtype=kind)
    model.hf.eval()
    if check:
        self_test(model.hf, model.hook_points)
    return model


def _pretrained(
    base: str | Path, tokenizer: PreTrainedTokenizerBase | None, where: Mapping[str, Any], revision: str | None
) -> Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = _local_base(base)
    # Ours and transformers' own safeguards on top of trust: no code from the base, no pickle.
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None and checkpoint is None:
        options["revision"] = revision
    config = _causal_config(base, options)
    if "quantization_config" in where and getattr(config, "quantization_config", None):
        raise OptionError(f"'{base}' is quantised already", hint="Load it without quantize.")
    with _named_faults(base):
        hf, report = AutoModelForCausalLM.from_pretrained(
            base, config=config, use_safetensors=True, output_loading_info=True, **where, **options
        )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(base, **options)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the base lacks {len(missing)} weights, such as '{missing[0]}'", path=base, hint=_BASE_HINT)
    if any(tensor.is_meta for tensor in (*hf.parameters(), *hf.buffers())):
        hint = "Use more or larger GPUs, or bfloat16."
        raise ModelError("weights were left off the devices, and cannot be swapped there", path=base, hint=hint)
    return Model(hf, tokenizer, name=checkpoint.name if checkpoint is not None else str(base), checkpoint=checkpoint)


def _placed(device: str, dtype: str, device_map: str | Mapping[str, Any] | None, quantize: str | None) -> Any:
    """What `from_pretrained` has to be told about places and kinds of numbers."""
    if device_map is not None and device != "auto":
        raise OptionError("device and device_map exclude each other", hint="Leave one of them out.")
    if device_map is None or isinstance(device_map, str):
        place = _device(device if device_map is None or device_map in _SPREAD else device_map)
        # Whole models are placed while they are loaded, too: one that is packed cannot be moved afterwards.
        placed: Any = device_map if device_map in _SPREAD else {"": str(place)}
    else:
        placed = dict(device_map)
        places = [_device(f"cuda:{to}" if isinstance(to, int) else str(to)) for to in placed.values()]
        place = next((one for one in places if one.type != "cpu"), torch.device("cpu"))
    where: dict[str, Any] = {"dtype": _dtype(dtype, place), "device_map": placed}
    return where if quantize is None else where | {"quantization_config": _packing(quantize, place, where["dtype"])}


def _packing(quantize: str, place: torch.device, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize not in _QUANTIZED:
        raise OptionError(f"unknown quantisation {quantize!r}: expected {' or '.join(_QUANTIZED)}", hint="Name one.")
    try:
        nn = importlib.import_module("bitsandbytes").nn
        # Some of its kernels exist for some devices only, and say so when they are first called.
        trial = nn.Linear4bit(64, 64) if quantize == "4bit" else nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        trial.to(place)(torch.zeros(1, 64, device=place, dtype=torch.float16))
    except Exception as error:
        hint = "Install bitsandbytes for this device, or leave quantize out."
        raise OptionError(f"no packing to {quantize} on {place}: {_first_line(error)}", hint=hint) from error
    return BitsAndBytesConfig(**{f"load_in_{quantize}": True}, bnb_4bit_compute_dtype=dtype)


def _local_base(base: str | Path) -> Checkpoint | None:
    """The base's folder, opened by our own reader for its clear errors; None for a hub id."""
    path = Path(base)
    if not path.exists():
        if isinstance(base, Path) or path.is_absolute() or base.startswith((".", "~")) or len(path.parts) > 2:
            raise PathMissingError("there is no base at this path", path=base, hint=_BASE_HINT)
        return None
    checkpoint = open_checkpoint(path)
    if checkpoint.kind == "adapter":
        raise ModelError("is an adapter, expected a base", path=path, hint="Pass the model that it was trained on.")
    return checkpoint


def _causal_config(base: str | Path, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    with _named_faults(base):
        config = AutoConfig.from_pretrained(base, **options)
    named = set(config.architectures or [])
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING or (named and not named & causal):
        what = ", ".join(sorted(named)) or type(config).__name__
        raise NotCausalError(f"the base is a {what}, expected a causal language model", path=base, hint=_BASE_HINT)
    return config


@contextlib.contextmanager
def _named_faults(base: str | Path) -> Iterator[None]:
    """Whatever transformers raises over a base becomes one error that the user can act on."""
    try:
        yield
    except Exception as error:  # a broken configuration raises whatever it leads to, anywhere in transformers
        if isinstance(error, OSError) and not Path(base).exists():
            raise PathMissingError(
                f"'{base}' is neither a folder here nor a model that the hub gives us", path=base, hint=_BASE_HINT
            ) from error
        hint = "Install that package." if isinstance(error, ImportError) else _BASE_HINT
        raise ModelError(f"the base cannot be loaded: {_first_line(error)}", path=base, hint=hint) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device {device!r} cannot be used: {_first_line(error)}", hint="Name another.") from error
    return place


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}: expected auto, {', '.join(_DTYPES)}", hint="Pass --dtype float32.")
    return _DTYPES[dtype]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
