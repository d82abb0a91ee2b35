"""CUDA graphs give the results of the plain computation."""

import copy

import pytest
import torch

from nirvana.cuda_graphs import MAX_GRAPHS, GraphCache, TrainingGraphs, capturable, record
from nirvana.mri.model.checkpoint import load_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.physics.fourier import fft2c
from nirvana.mri.physics.masks import Sampling

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def kspace_of(slices: int, side: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(slices, 4, side, side, generator=generator)
    mask = Sampling().mask(side, seed)
    return fft2c(images.to(torch.complex64)) * mask, mask


@needs_gpu
def test_replays_are_what_was_captured():
    model = load_codec("codec", "cuda").eval()
    for seed in range(4):  # plain, captured, replayed
        for slices, side in ((2, 64), (1, 80)):
            kspace, mask = kspace_of(slices, side, seed)
            found = model.reconstruct(kspace, mask)
            plain = copy.deepcopy(model).reconstruct(kspace, mask)
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("batch_size", [2, 4])  # several batches, and all slices in one
def test_a_gpu_gives_the_image_of_a_cpu(batch_size):
    kspace, mask = kspace_of(3, 64, 0)
    kspace[1] *= 3  # the brightest slice is the scale of all
    found = [
        load_codec("codec", device).eval().reconstruct(kspace, mask, batch_size)
        for device in ("cuda", "cpu")
    ]
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


@needs_gpu
def test_a_model_with_other_storage_is_captured_anew():
    model = load_codec("codec", "cuda").eval()
    kspace, mask = kspace_of(1, 64, 0)
    before = [model.reconstruct(kspace, mask) for _ in range(3)][-1]
    model.cpu().to("cuda")
    torch.testing.assert_close(model.reconstruct(kspace, mask), before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        next(model.image_cascades.parameters()).zero_()  # in place: the graph reads the new number
    after = model.reconstruct(kspace, mask)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(
        after, copy.deepcopy(model).reconstruct(kspace, mask), rtol=1e-4, atol=1e-5
    )


@needs_gpu
def test_training_graphs_have_the_gradients_of_the_module():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    module.cuda()
    graphs = TrainingGraphs(module)
    for step in range(3):
        for rows in (2, 5):
            x = torch.randn(rows, 4, device="cuda")
            found = []
            for run in (module, graphs):
                module.zero_grad()
                run(x).square().mean().backward()
                found.append([p.grad.clone() for p in module.parameters()])
            for plain, graphed in zip(*found, strict=True):
                torch.testing.assert_close(graphed, plain)
        with torch.no_grad():  # in place: the graphs read the new weights
            for parameter in module.parameters():
                parameter.add_(0.1 * step)


@needs_gpu
def test_a_recorded_function_runs_in_the_warmups_and_in_replays():
    count = torch.zeros((), device="cuda")
    graph, output = record(lambda: count.add_(1) * 2, count.device, warmups=3)
    assert count.item() == 3
    graph.replay()
    assert (count.item(), output.item()) == (4, 8)


def test_what_comes_once_runs_plainly_and_few_are_kept():
    graphs, model = GraphCache(), torch.nn.Linear(2, 2)
    for n in range(2 * MAX_GRAPHS):
        assert torch.equal(graphs(model, lambda x: x + 1, torch.zeros(n + 1)), torch.ones(n + 1))
    assert len(graphs._graphs) == MAX_GRAPHS


def test_trainings_capture_nothing(monkeypatch):
    """Autocast frees cast weights; a sharded model's forward waits for other processes."""
    assert capturable()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not capturable()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not capturable()


def test_a_copied_codec_has_graphs_of_its_own():
    model = CodecModel(CodecConfig(backbone="none", image_cascades=1), None)
    assert copy.deepcopy(model)._graphs is not model._graphs
