"""From a folder of weights to an array of activations.

from activations import extract, load_model, load_prompts

model = load_model("meta-llama/Llama-3.2-1B-Instruct")
activations = extract(model, load_prompts("matched-pairs"))  # .values: [hook_point, prompt, d_model]
"""

from typing import TYPE_CHECKING

from activations.lazy import export

if TYPE_CHECKING:
    from activations.checkpoints import Checkpoint, open_checkpoint
    from activations.errors import UndertowError
    from activations.extract import extract
    from activations.forward import capture
    from activations.loading import load_model
    from activations.models import Model
    from activations.prompts import PromptSet, load_prompts
    from activations.results import Activations
    from activations.reuse import ResidualCache

__all__ = [
    "Activations",
    "Checkpoint",
    "Model",
    "PromptSet",
    "ResidualCache",
    "UndertowError",
    "capture",
    "extract",
    "load_model",
    "load_prompts",
    "open_checkpoint",
]

export(
    __name__,
    {
        "Activations": "activations.results",
        "Checkpoint": "activations.checkpoints",
        "Model": "activations.models",
        "PromptSet": "activations.prompts",
        "ResidualCache": "activations.reuse",
        "UndertowError": "activations.errors",
        "capture": "activations.forward",
        "extract": "activations.extract",
        "load_model": "activations.loading",
        "load_prompts": "activations.prompts",
        "open_checkpoint": "activations.checkpoints",
    },
)
