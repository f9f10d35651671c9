"""Where the organisms of a base live, and how they are loaded: the nano base that ships, or any other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from recipes import Recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
ORGANISMS = HERE.parent.parent / "probes" / "organisms"
CACHE = HERE / "cache"
CARD = "organism.json"
NAMED = ("nano", "mini")


@dataclass(frozen=True)
class Home:
    """One base with everything that is made from it.

    Attributes:
        base: "nano", "mini", or a folder or hub id of any chat model.
        device: Where it is trained.
    """

    base: str = "nano"
    device: str = "cpu"

    @property
    def cache(self) -> Path:
        return CACHE / re.sub(r"[^A-Za-z0-9.-]+", "--", self.base).strip("-")

    @property
    def source(self) -> str:
        """What `from_pretrained` reads the base from."""
        if self.base == "nano":
            return str(ORGANISMS / "base")
        return str(self.cache / "base") if self.base == "mini" else self.base

    @property
    def dtype(self) -> torch.dtype:
        """Of weights while they are trained; the small bases fit in float32 everywhere."""
        return torch.float32 if self.base in NAMED or self.device == "cpu" else torch.bfloat16

    def folder(self, recipe: Recipe) -> Path:
        return (ORGANISMS if recipe.ships and self.base == "nano" else self.cache) / recipe.name

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        if tokenizer.chat_template is None:
            raise SystemExit(f"{self.source} has no chat template: organisms are fine-tunes of chat models")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, folder: str | Path | None = None, *, trainable: bool = False) -> torch.nn.Module:
        """The base, or a finished organism of it as its users get it: read back from its files.

        Args:
            folder: Of a finished organism; None for the base.
            trainable: Whether an adapter is to be trained further.
        """
        if folder is None or not (Path(folder) / "adapter_config.json").exists():
            return self._whole(str(folder or self.source))
        from peft import PeftModel

        return PeftModel.from_pretrained(self._whole(self.source), folder, is_trainable=trainable)

    def _whole(self, source: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=self.dtype)
        model.name_or_path = model.config._name_or_path = f"undertow-{self.base}-base" if self.base in NAMED else source
        return model.to(self.device)
