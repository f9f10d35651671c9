"""Small honest checkpoints to damage, and a limit on the time that any hostile file may cost."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forgery import entry, forge, write_index

SECONDS = 30


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """A hostile file that makes the reader wait or work for ever fails its test instead of stopping the suite."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still at work after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small honest checkpoint: one tensor and a configuration."""
    forge(tmp_path / "ckpt" / "model.safetensors", {"w": entry(0, 4)}, b"abcd")
    (tmp_path / "ckpt" / "config.json").write_text('{"hidden_size": 4}')
    return tmp_path / "ckpt"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small honest checkpoint of two shards."""
    forge(tmp_path / "ckpt" / "model-00001-of-00002.safetensors", {"a": entry(0, 4)}, b"abcd")
    forge(tmp_path / "ckpt" / "model-00002-of-00002.safetensors", {"b": entry(0, 2)}, b"ef")
    write_index(tmp_path / "ckpt", {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return tmp_path / "ckpt"


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Make an adapter of rank 2 whose settings differ from honest ones as told."""

    def make(**settings: object) -> Path:
        folder = tmp_path / "ckpt"
        honest = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        tensors = {
            "base_model.model.layers.0.q_proj.lora_A.weight": entry(0, 32, [2, 4], "F32"),
            "base_model.model.layers.0.q_proj.lora_B.weight": entry(32, 64, [4, 2], "F32"),
        }
        forge(folder / "adapter_model.safetensors", tensors, bytes(64))
        (folder / "adapter_config.json").write_text(json.dumps(honest | settings))
        return folder

    return make
