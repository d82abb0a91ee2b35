"""The frozen backbone: gradients go through it, never into it."""

import pytest
import torch

from nirvana.model.specialist import Specialist, own_state_dict


@pytest.fixture
def backbone(small_model):
    return small_model().float()


def test_hidden_states_are_the_backbones(backbone):
    specialist = Specialist(backbone, dim=0)
    foreign, text = torch.randn(2, 5, 48), torch.randint(0, 61, (2, 7))
    out = specialist(foreign, text)
    embedded = torch.cat(
        [
            specialist.start.expand(2, 1, -1),
            specialist.norm(foreign),
            specialist.end.expand(2, 1, -1),
            backbone.model.embed_tokens(text),
        ],
        dim=1,
    )
    expected = backbone(inputs_embeds=embedded, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected.logits[:, 7:])
    torch.testing.assert_close(out.hidden, expected.hidden_states[-1][:, 1:6])
    without_text = specialist(foreign).hidden  # the text comes after, so it changes nothing
    torch.testing.assert_close(without_text, out.hidden, rtol=1e-3, atol=1e-4)


def test_frozen_means_bit_equal(backbone):
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    encoder = torch.nn.Linear(3, 48)
    specialist = Specialist(backbone, dim=0).train()
    assert not backbone.training
    trained = [p for p in specialist.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*encoder.parameters(), *trained], lr=0.1)
    for _ in range(3):
        text = torch.randint(0, 61, (2, 4))
        out = specialist(encoder(torch.randn(2, 5, 3)), text)
        (out.hidden.square().mean() + out.logits.square().mean()).backward()
        assert encoder.weight.grad.any()
        assert all(p.grad is None for p in backbone.parameters())
        optimizer.step()
        optimizer.zero_grad()
    for name, x in backbone.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_foreign_tokens_are_as_loud_as_words(backbone):
    specialist = Specialist(backbone, dim=0)
    tokens = specialist.norm(100 * torch.randn(4, 9, 48))
    word = backbone.get_input_embeddings().weight.std()
    torch.testing.assert_close(tokens.std(), word, rtol=0.05, atol=0)


def test_the_identity_needs_no_backbone():
    specialist = Specialist(None, dim=6)
    foreign = torch.randn(2, 5, 6)
    assert torch.equal(specialist(foreign).hidden, specialist.norm(foreign))
    with pytest.raises(ValueError, match="no language head"):
        specialist(foreign, torch.zeros(2, 1, dtype=torch.long))


def test_own_state_leaves_the_backbone_out(backbone):
    parts = torch.nn.ModuleDict(
        {"specialist": Specialist(backbone, 0), "head": torch.nn.Linear(2, 2)}
    )
    names = {"specialist.norm.weight", "specialist.norm.bias", "specialist.start", "specialist.end"}
    assert set(own_state_dict(parts)) == names | {"head.weight", "head.bias"}
    assert not any("backbone" in name for name in own_state_dict(parts["specialist"]))
