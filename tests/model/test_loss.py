"""The z-loss of a head: with and without logits, with and without a divisor."""

import pytest
import torch


@pytest.mark.parametrize("divisor", [None, 7])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_z_loss_is_the_same_without_logits(small_model, divisor, shifted):
    model = small_model()
    tokens = torch.randint(61, (2, 20))
    labels = tokens.clone()
    labels[0, :6] = -100
    given = {"shift_labels" if shifted else "labels": labels, "num_items_in_batch": divisor}
    plain = model(tokens, **given).loss
    results = []
    for skip in (False, True):
        output = model(tokens, **given, z_loss=0.01, skip_logits=skip)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        results.append((output.loss, output.z_loss, *gradients))
    close = {"rtol": 1e-4, "atol": 1e-6}  # the library computes its loss in float32
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **close, check_dtype=False)
    logits = model(tokens).logits
    targets = labels if shifted else torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    squares = logits.logsumexp(-1).square()[targets != -100]
    expected = 0.01 * squares.sum() / (divisor or squares.numel())
    torch.testing.assert_close(results[0][1], expected, **close)
    torch.testing.assert_close(results[0][0], plain + expected, **close)
    assert model(tokens, **given).z_loss is None
