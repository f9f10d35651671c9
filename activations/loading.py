"""From a trusted base, a folder or a hub id, to a model on its devices."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from activations.checkpoints import Checkpoint, open_checkpoint
from activations.errors import ModelError, NotCausalError, OptionError, PathMissingError
from activations.models import QUANTIZED, Model, quietly
from activations.self_test import self_test

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_model"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Ways of accelerate to share out layers by free memory.
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
_BASE_HINT = "Pass the folder or the hub id of a causal language model in Hugging Face's layout."


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
        with quietly():
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

    if quantize not in QUANTIZED:
        raise OptionError(f"unknown quantisation {quantize!r}: expected {' or '.join(QUANTIZED)}", hint="Name one.")
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
