"""The facts that a model states: FLOPs per token, and the parameters without weight decay."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nirvana import NirvanaForCausalLM, preset


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"sliding_window": 64}])
def test_flops_are_about_those_of_the_products(overrides):
    """PyTorch's counter counts the products that the forward pass executes: those within chunks
    are more, and window attention includes its masked part."""
    config = preset("tiny", vocab_size=2048, **overrides)
    model = NirvanaForCausalLM(config)
    T = 256
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(2048, (1, T)), use_cache=False)
    counted = 3 * counter.get_total_flops() / T
    assert 0.8 < model.flops_per_token(T) / counted <= 1.0


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_is_for_the_matrices_of_linear_maps(small_model, tied):
    model = small_model(
        tie_word_embeddings=tied, trigger_lr_learnable=True, trigger_decay_learnable=True
    )
    names = {name for name, _ in model.named_parameters()}
    undecayed = model.no_weight_decay()
    assert undecayed < names
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    linear -= {"lm_head.weight"} if tied else set()  # which is the embedding
    assert not linear & undecayed
    assert {"model.embed_tokens.weight", "model.bank.gain", "model.bank.shift"} <= undecayed
    assert "model.bank.weight" not in undecayed
    scalars = {n for n, p in model.named_parameters() if p.ndim < 2}
    assert scalars <= undecayed
