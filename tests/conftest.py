"""What all tests share: small models, the folder of real data, determinism, the quick selection."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton reads this once, when something
# imports it, and what is imported below may do that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers.forks import Forks
from nirvana import NirvanaConfig, NirvanaForCausalLM

TESTS = Path(__file__).parent

SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "sliding_window": 12,
    "task_dim": 8,
    "bank_size": 4,
    "trigger_lr": 0.2,
    "trigger_decay": 0.8,
}


QUICK = (
    "adapt/test_task.py",
    "app/test_parts.py",
    "cli/test_outputs.py",
    "data/test_loader.py",
    "data/test_tokenizer.py",
    "evaluate/test_compare.py",
    "evaluate/test_perplexity.py",
    "model/test_trigger.py",
    "mri/adapt/test_scan_adaptation.py",
    "mri/evaluate/test_metrics.py",
    "mri/physics/test_physics.py",
    "mri/reports/test_grammar.py",
    "mri/train/test_loss.py",
    "ops/test_ops.py",
    "test_docs.py",
    "test_files.py",
    "test_statistics.py",
    "train/test_config.py",
    "train/test_optim.py",
)
"""Files whose tests are all marked `quick`, for `make quick`: fast ones of every room."""


def pytest_ignore_collect(collection_path, config):
    """`make quick` imports its own files alone: importing all takes longer than its tests."""
    named = collection_path.is_dir() or collection_path in _quick_files()
    return True if config.option.markexpr == "quick" and not named else None


def _quick_files():
    return {TESTS / name for name in QUICK}


def pytest_collection_modifyitems(items):
    missing = [name for name in QUICK if not (TESTS / name).is_file()]
    if missing:
        raise pytest.UsageError(f"QUICK in {__file__} names no test files: {', '.join(missing)}")
    quick = _quick_files()
    for item in items:
        if item.path in quick and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
    # A slow test that starts last keeps one worker busy while the other has nothing left.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keeps copies and records that tests make out of the user's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NIRVANA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on the CPU and on a GPU; there everything is made on the GPU by default."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs programs in forks of a process that has imported what training needs."""
    with Forks("nirvana.train.language") as found:
        yield found


@pytest.fixture
def small_model():
    """Makes a small float64 model whose zero-initialised factors are filled, so that every branch
    takes part in what is tested."""

    def make(**overrides) -> NirvanaForCausalLM:
        model = NirvanaForCausalLM(NirvanaConfig(**{**SMALL, **overrides})).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
                elif parameter.ndim >= 2:
                    parameter.mul_(3)
        return model

    return make


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, `NIRVANA_DATA`; without it, tests that need it are skipped."""
    name = os.environ.get("NIRVANA_DATA")
    if not name:
        pytest.skip("needs real data: set NIRVANA_DATA to their folder")
    folder = Path(name)
    assert folder.is_dir(), f"NIRVANA_DATA={name} is no folder"
    return folder
