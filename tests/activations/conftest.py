"""Checkpoints as their authors make them: saved networks, and adapters by PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def save(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """Save a network as its author would, with the tokenizer."""

    def to(network: Any, name: str = "saved", **options: Any) -> Path:
        folder = tmp_path / name
        network.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return to


@pytest.fixture
def lora(tiny_network: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A random LoRA adapter made by PEFT: its folder, and PEFT's own model with it."""
    import peft

    def make(architecture: str, targets: list[str], **settings: Any) -> tuple[Path, Any]:
        torch.manual_seed(2)
        options = {"r": 4, "lora_alpha": 7, "init_lora_weights": False, **settings}
        config = peft.LoraConfig(target_modules=targets, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's own use of it
            model = peft.get_peft_model(tiny_network(architecture), config, autocast_adapter_dtype=False)
        folder = tmp_path / f"lora-{architecture}"
        model.save_pretrained(folder)
        return folder, model.eval()

    return make
