"""The trace on planted differences: words, shares and nothing where nothing moved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from activations.errors import NonFiniteError
from activations.models import Model
from probes.detectors import trace
from probes.lens import STATEMENTS, TOKENS, Lens, first_tokens
from probes.reference import Subject

LAYERS, TEXTS, WIDTH, VOCAB = 3, 20, 16, 40


def made(seed: int = 0) -> torch.Tensor:
    return torch.randn(LAYERS, TEXTS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def lens() -> Lens:
    """Half of the vocabulary is hardly ever written; token 7 is no text."""
    head = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9))
    usual = torch.where(torch.arange(VOCAB) < VOCAB // 2, -3.0, -15.0)
    return Lens(None, head, usual, tuple("" if token == 7 else f"w{token}" for token in range(VOCAB)))


def measured(tuned: torch.Tensor, lens: Lens, base: torch.Tensor | None = None) -> trace.Evidence:
    reference = SimpleNamespace(first_tokens=made() if base is None else base, lens=lens)
    return trace.measure(SimpleNamespace(reference=reference, first_tokens=tuned))


def test_a_base_against_itself_moved_nowhere_and_leans_to_no_word(lens: Lens) -> None:
    evidence = measured(made(), lens)
    assert evidence.statistic == 0
    assert evidence.layers == (0,) * LAYERS
    assert [words for _, words in evidence.exhibits] == ["", ""]


def test_what_all_texts_share_is_read_as_words_and_is_not_counted(lens: Lens) -> None:
    evidence = measured(made() + 2 * lens.unembedding[3], lens)
    assert evidence.statistic < 0.2 * evidence.details["shared"][0]
    assert [words.split()[0] for _, words in evidence.exhibits] == ["w3", "w3"]


def test_what_each_text_has_of_its_own_is_counted_at_its_layer(lens: Lens) -> None:
    tuned = made()
    tuned[1] += 0.5 * made(1)[1]
    evidence = measured(tuned, lens)
    assert evidence.layers[0] == evidence.layers[2] == 0
    assert evidence.statistic == evidence.layers[1] == pytest.approx(0.5, abs=0.05)
    assert evidence.details["shared"][1] < 0.1


def test_a_first_token_of_huge_norm_does_not_drown_the_others(lens: Lens) -> None:
    base, own = made(), 0.5 * made(1)
    sink = torch.tensor([1000.0, *[1.0] * (TOKENS - 1)])[:, None]
    still = measured((base + own) * sink, lens, base * sink)
    assert still.statistic == pytest.approx(measured(base + own, lens, base).statistic, rel=1e-4)


def test_words_leave_out_what_spells_nothing_and_what_rare_tokens_do_together(lens: Lens) -> None:
    rare = lens.unembedding[VOCAB // 2 :].mean(0)
    together = torch.linalg.lstsq(lens.unembedding, (lens.usual < -10).float()).solution
    found = lens.words(10 * together + lens.unembedding[2] / lens.unembedding[2].norm(), 3)
    assert found[0] == "w2"
    assert "w7" not in " ".join(lens.words(lens.unembedding[7], VOCAB)).split()
    assert len(lens.words(rare, VOCAB)) == VOCAB - 1


def test_a_lens_reads_as_the_model_does_and_keeps_the_bases_words(llama: Model) -> None:
    stream = first_tokens(llama)
    lens = Lens.of(llama, stream[-1])
    ids = torch.tensor([llama.tokenizer(text)["input_ids"][: TOKENS + 1] for text in STATEMENTS])
    logits = llama.hf(input_ids=ids).logits[:, 1:]
    torch.testing.assert_close(lens.usual, logits.softmax(-1).mean((0, 1)).log(), rtol=1e-4, atol=1e-4)
    weight = llama.hf.get_output_embeddings().weight
    before, words = weight.data, lens.words(stream[0, 0, 0], 5)
    weight.data = torch.zeros_like(before)
    try:
        assert lens.words(stream[0, 0, 0], 5) == words
    finally:
        weight.data = before


def test_first_tokens_are_the_models_own_hidden_states_of_the_bare_text(llama: Model) -> None:
    stream = first_tokens(llama)
    assert stream.shape == (llama.n_layers, len(STATEMENTS), TOKENS, llama.d_model)
    ids = torch.tensor([llama.tokenizer(STATEMENTS[4])["input_ids"][: TOKENS + 1]])
    states = llama.hf(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(stream[0, 4], states[1][0, 1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(stream, first_tokens(llama))


def test_activations_that_are_no_numbers_are_an_error_and_no_evidence(llama: Model) -> None:
    subject = Subject(SimpleNamespace(base=llama), SimpleNamespace(path="somewhere"))
    weight = llama.hf.get_input_embeddings().weight
    before = weight.data
    weight.data = torch.full_like(before, float("nan"))
    try:
        with pytest.raises(NonFiniteError, match="plain statements"):
            _ = subject.first_tokens
    finally:
        weight.data = before
