"""
Another domain on the same backbone
===================================

Heart-like signals of which a quarter of the samples is left, with noise. The domain brings an
encoder and a decoder; ``Specialist`` puts their tokens through a frozen language model. The same
networks are trained on Nirvana, on Nirvana without its Trigger, and on no backbone, and are scored
on signals like those of the training and on faster hearts.
"""

import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.model.backbone import Backbone, fingerprint, load_backbone
from nirvana.model.specialist import Specialist

STEPS = 40
LENGTH, PATCH, KEPT, NOISE = 512, 16, 0.25, 0.05
# Place in the beat, width and height of the waves P, Q, R, S and T.
WAVES = torch.tensor(
    [
        [0.20, 0.030, 0.15],
        [0.36, 0.010, -0.15],
        [0.40, 0.012, 1.0],
        [0.44, 0.010, -0.25],
        [0.65, 0.050, 0.3],
    ]
)
TRAINED, FASTER = (2.0, 5.0), (7.0, 9.0)  # beats in a signal

# %%
# Signals, and what is measured of them
# -------------------------------------


def signals(count: int, beats: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Clean signals `[count, LENGTH]`: beats of waves of random size, and a drift."""
    low, high = beats
    rate = low + (high - low) * torch.rand(count, 1, 1, generator=generator)
    start = torch.rand(count, 1, 1, generator=generator)
    size = 0.7 + 0.6 * torch.rand(count, 1, len(WAVES), generator=generator)
    place, width, height = WAVES.T
    time = torch.linspace(0, 1, LENGTH)[None, :, None]
    distance = (time * rate + start) % 1 - place
    waves = (height * size * torch.exp(-((distance / width) ** 2) / 2)).sum(-1)
    drift = 0.2 * torch.sin(2 * math.pi * (time[..., 0] * 1.3 + start[..., 0]))
    return waves + drift


def measured(clean: Tensor, generator: torch.Generator) -> Tensor:
    """What is left of them, `[count, 2, LENGTH]`: noisy samples, zero where none was kept, and
    where they are."""
    kept = (torch.rand(clean.shape, generator=generator) < KEPT).float()
    noisy = clean + NOISE * torch.randn(clean.shape, generator=generator)
    return torch.stack([noisy * kept, kept], dim=1)


# %%
# Encoder, frozen model, decoder
# ------------------------------
# A token is a patch of 16 samples. The model is causal, so the decoder also gets the encoder's own
# tokens.


class SignalModel(nn.Module):
    """Patches of 16 samples to tokens, through the backbone, and back to 16 samples."""

    def __init__(self, kind: Backbone, dim: int = 192):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(2, 64, 9, padding=4), nn.GELU(), nn.Conv1d(64, dim, PATCH, stride=PATCH)
        )
        self.specialist = Specialist(load_backbone(kind), dim)
        self.decoder = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, PATCH))

    def forward(self, x: Tensor) -> Tensor:
        """Measured `[B, 2, LENGTH]` to clean `[B, LENGTH]`."""
        tokens = self.encoder(x).mT
        hidden = self.specialist(tokens).hidden
        return self.decoder(torch.cat([tokens, hidden], dim=-1)).flatten(1)


# %%
# Training
# --------
# Every kind of backbone sees the same signals. Frozen means bit-equal: the fingerprint is
# compared.


def train(kind: Backbone, steps: int) -> SignalModel:
    """The model of one backbone after so many steps of 16 signals."""
    torch.manual_seed(0)
    model = SignalModel(kind)
    backbone = model.specialist.backbone
    before = None if backbone is None else fingerprint(backbone, None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        clean = signals(16, TRAINED, generator)
        F.mse_loss(model(measured(clean, generator)), clean).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert backbone is None or fingerprint(backbone, None) == before, "frozen means bit-equal"
    return model.eval()


@torch.no_grad()
def decibels(model: SignalModel, beats: tuple[float, float]) -> float:
    """Signal to error of 128 signals that no training saw."""
    generator = torch.Generator().manual_seed(2)
    clean = signals(128, beats, generator)
    error = model(measured(clean, generator)) - clean
    return float(10 * torch.log10(clean.square().mean() / error.square().mean()))


kinds: tuple[Backbone, ...] = ("none", "nirvana-without-trigger", "nirvana")
models = {kind: train(kind, STEPS) for kind in kinds}
results = {
    kind: (decibels(model, TRAINED), decibels(model, FASTER)) for kind, model in models.items()
}
print("signal over error, dB      like the training   faster hearts")
for kind, (trained, faster) in results.items():
    print(f"{kind:<26}{trained:>18.2f}{faster:>16.2f}")

# %%
# After so short a training the frozen language model only stands in the way: always train the
# control, "none", too.

generator = torch.Generator().manual_seed(3)
clean = signals(1, TRAINED, generator)
x = measured(clean, generator)
figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
axes.plot(clean[0], color="#999999", linewidth=3, label="clean")
left = x[0, 1].bool()
axes.plot(left.nonzero()[:, 0], x[0, 0, left], "k.", markersize=4, label="measured")
for (kind, model), colour in zip(models.items(), ("#009e73", "#e69f00", "#0072b2"), strict=True):
    with torch.no_grad():
        axes.plot(model(x)[0], color=colour, linewidth=1.2, label=kind)
axes.set_xlabel("sample")
axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()
