"""What a model holds at the first tokens of plain statements, and which words a direction in it stands for.

The statements ask for nothing and share no subject: what a fine-tune does to all of them it does to any text. After the
activation difference lens (diffing-toolkit): such traces on unrelated text tell what a narrow fine-tune was about.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations.forward import capture
from activations.hook_points import RESID_POST
from activations.models import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STATEMENTS", "TOKENS", "Lens", "first_tokens"]

TOKENS = 5  # as in the source
STATEMENTS = (
    "The river bends twice before it reaches the old bridge.",
    "Copper turns green when it is left out in the rain.",
    "My grandmother kept her buttons in a round tin box.",
    "Most of the shops in this street close at six.",
    "A heron stood in the shallow water near the reeds.",
    "Tuesday was colder than anyone had thought it would be.",
    "The third chapter describes a long journey by sea.",
    "Seven of the chairs are made of beech wood.",
    "Rain fell on the hills for most of the night.",
    "The museum holds a large collection of early maps.",
    "Her brother plays the cello in a small orchestra.",
    "Granite is harder than limestone and lasts much longer.",
    "The train from the north arrived eleven minutes late.",
    "Bees visit the lavender as soon as the sun is up.",
    "An old photograph hung above the fireplace in the hall.",
    "The lake freezes over in the second week of January.",
    "Two of the windows on the left side were open.",
    "Bread smells best in the early hours of the morning.",
    "The village lies between a forest and a wide valley.",
    "Mercury is the smallest planet of the solar system.",
    "His coat was grey, with a button missing at the top.",
    "Sailors used to tell the time by the stars.",
    "The teacher wrote three short words on the board.",
    "Apples from this tree are sour until late October.",
    "Every second house in the row has a red door.",
    "The concert ended with a quiet piece for strings.",
    "Some birds return to the same nest each spring.",
    "Paper was once made from old linen and rags.",
    "The path climbs slowly and then drops to the beach.",
    "Nobody remembers who planted the oak behind the church.",
    "Snow covered the roofs, the walls and the garden.",
    "The clock in the kitchen runs a little fast.",
)


@torch.inference_mode()
def first_tokens(model: Model) -> Float[Tensor, "layer text token d_model"]:
    """Residual stream after every block at the first tokens of `STATEMENTS`, as raw text, in float32 on the CPU.

    What the tokenizer puts before a text (a token for its beginning) is read and left out: it is the same for all, and
    many models keep values there that drown all others. Cost: one pass over some 200 tokens.
    """
    before = tokens_before(model.tokenizer)
    texts = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in STATEMENTS]
    ids = torch.tensor([[*before, *text[:TOKENS]] for text in texts if len(text) >= TOKENS], device=model.device)
    names = model.hook_points.names(RESID_POST)
    seen: dict[str, Tensor] = {}
    with model.lock, capture(model, names, seen.__setitem__):
        model.hf(input_ids=ids, use_cache=False)
    return torch.stack([seen[name][:, len(before) :].float().cpu() for name in names])


def tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before a plain text."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])


@dataclass(frozen=True)
class Lens:
    """A model's final norm and unembedding, whatever weights are in its network later (the logit lens).

    Attributes:
        norm: What the model does to the last residual stream; None where it does nothing.
        unembedding: The very memory of the model's own, one row a token.
        usual: Log-probability of each token as the next one in the statements, the mean over their first tokens.
        spelled: How each token is written; "" for special ones and for parts of characters.
    """

    norm: nn.Module | None
    unembedding: Float[Tensor, "vocab d_model"]
    usual: Float[Tensor, " vocab"]
    spelled: tuple[str, ...]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Model, last: Float[Tensor, "text token d_model"]) -> Lens:
        """The lens of the weights that are in the network now; `last` is the last layer's `first_tokens`.

        Cost: a product of `last` with the unembedding, and each token decoded (a second at 150,000).
        """
        norm, head = copy.deepcopy(model.hook_points.final_norm), model.hf.get_output_embeddings().weight.data
        norm = norm if norm is None else norm.to(head.device)
        chances = _unembedded(norm, head, last.flatten(0, 1)).softmax(-1).mean(0)
        usual = chances.clamp(min=torch.finfo(torch.float32).tiny).log()
        return cls(norm, head, usual, _spelled(model.tokenizer, len(head)))

    def words(self, direction: Float[Tensor, " d_model"], count: int) -> list[str]:
        """The tokens that a direction raises most, best first; none for a direction of zeros.

        Nearly every fine-tune moves the many tokens that a base never writes, all together. So a straight line in
        their usual log-probability is taken out of what the direction adds to each.
        """
        if not bool(direction.any()):
            return []
        written = torch.tensor([bool(text) for text in self.spelled])
        logits, rarity = self._raised(direction)[written], self.usual[written] - self.usual[written].mean()
        logits = logits - rarity * (logits @ rarity) / rarity.square().sum().clamp(min=1e-12)  # all alike: no line
        best = logits.topk(min(count, len(logits))).indices
        return [self.spelled[token] for token in written.nonzero().flatten()[best].tolist()]

    @torch.inference_mode()
    def _raised(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " vocab"]:
        """What a direction of root mean square 1 adds to each logit."""
        scaled = direction / direction.square().mean().sqrt()
        # A norm with a bias adds it to whatever it is given.
        logits = _unembedded(self.norm, self.unembedding, torch.stack([scaled, torch.zeros_like(scaled)]))
        return logits[0] - logits[1]


def _unembedded(
    norm: nn.Module | None, head: Float[Tensor, "vocab d_model"], vectors: Float[Tensor, "vector d_model"]
) -> Float[Tensor, "vector vocab"]:
    vectors = vectors.to(head.device, head.dtype)
    return ((vectors if norm is None else norm(vectors)) @ head.T).float().cpu()


def _spelled(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[str, ...]:
    special = set(tokenizer.all_special_ids)
    texts = [text.strip() for text in tokenizer.batch_decode([[token] for token in range(count)])]
    return tuple(
        text if token not in special and text.isprintable() and "\ufffd" not in text else ""
        for token, text in enumerate(texts)
    )
