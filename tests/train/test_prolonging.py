"""A finished run under "wsd" is prolonged: it becomes the longer run, to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.stand_in import OPTIM, StandIn, run_config, stop, train
from nirvana.config import to_dict
from nirvana.errors import InputError
from nirvana.train import checkpoint

WSD = replace(OPTIM, schedule="wsd", decay_share=0.25)


def run(out, optim=WSD, hooks=None, **more):
    """Trains with the configuration that the loop would compare."""
    resume = more.pop("resume", False)
    accept = more.pop("accept_changes", False)
    tree = {"optim": to_dict(optim), "run": to_dict(run_config(out, **more))}
    return train(out, hooks, resume, tree, accept, optim, **more)


def curve(out):
    found = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    names = ("step", "loss", "lr", "gradient_norm")
    return [{name: line[name] for name in names} for line in found]


def assert_same(a, b):
    for (name, x), (_, y) in zip(
        a.model.named_parameters(), b.model.named_parameters(), strict=True
    ):
        assert torch.equal(x, y), name


def names(out):
    return sorted(folder.name for folder in (Path(out) / "checkpoints").iterdir())


@pytest.mark.parametrize("keep", [1, 3])
def test_prolonged_twice_is_the_long_run(tmp_path, keep):
    _, outcome, _ = run(tmp_path / "run", steps=12, keep_checkpoints=keep)
    assert outcome.finished
    # The newest, and the last of the stable phase, which no number of newer ones pushes out.
    assert names(tmp_path / "run") == ["step-00000009", "step-00000012"]
    for steps in (20, 40):
        again, outcome, logged = run(
            tmp_path / "run", steps=steps, resume=True, keep_checkpoints=keep
        )
        assert outcome.finished
        assert any("learning rate had decayed" in text for text in logged)
    whole, _, _ = run(tmp_path / "whole", steps=40, keep_checkpoints=keep)
    assert_same(again, whole)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    kept = ["step-00000015", "step-00000030", "step-00000040"]
    assert names(tmp_path / "run") == kept[-2 if keep == 1 else -3 :]


def test_a_decay_can_be_changed_or_ended_early(tmp_path):
    """Other settings of the decay, and fewer steps than planned, from the stable phase on."""
    run(tmp_path / "run", steps=40, hooks={9: stop})
    short = replace(WSD, min_lr=0.0, decay_share=0.5)
    ended, outcome, _ = run(tmp_path / "run", short, steps=20, resume=True)
    assert outcome.finished
    whole, _, _ = run(tmp_path / "whole", short, steps=20)
    assert_same(ended, whole)


def test_an_interrupted_prolongation_continues(tmp_path):
    run(tmp_path / "run", steps=12)
    run(tmp_path / "run", steps=20, resume=True, hooks={13: stop})
    again, outcome, _ = run(tmp_path / "run", steps=20, resume=True)
    assert outcome.finished
    assert_same(again, run(tmp_path / "whole", steps=20)[0])


def test_what_cannot_be_prolonged_is_refused(tmp_path):
    run(tmp_path / "wsd", steps=12, checkpoint_interval=1, keep_checkpoints=9)
    for folder in (tmp_path / "wsd" / "checkpoints").iterdir():
        if int(folder.name[5:]) <= 9:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    with pytest.raises(
        InputError, match="cannot be prolonged: no checkpoint from before the decay"
    ):
        run(tmp_path / "wsd", steps=20, resume=True)
    _, outcome, _ = run(tmp_path / "wsd", steps=20, resume=True, accept_changes=True)
    assert outcome.finished
    run(tmp_path / "cosine", OPTIM, steps=12)
    with pytest.raises(InputError, match=r"run\.steps: 12 -> 20 .*--accept-changes"):
        run(tmp_path / "cosine", OPTIM, steps=20, resume=True)
    with pytest.raises(InputError, match=r"optim\.schedule: cosine -> wsd"):
        run(tmp_path / "cosine", replace(OPTIM, schedule="wsd"), steps=20, resume=True)
    # What is no setting of the decay stays refused.
    run(tmp_path / "other", steps=12)
    with pytest.raises(InputError, match=r"optim\.lr: 0\.05 -> 0\.04"):
        run(tmp_path / "other", replace(WSD, lr=0.04), steps=20, resume=True)


def test_settings_that_an_older_run_did_not_know_have_their_defaults(tmp_path):
    tree = {"optim": to_dict(OPTIM), "run": to_dict(run_config(tmp_path))}
    for section, name in (("optim", "schedule"), ("optim", "name"), ("run", "initial")):
        del tree[section][name]
    train(tmp_path, {3: stop}, config=tree)
    assert run(tmp_path, OPTIM, resume=True)[1].finished
    with pytest.raises(InputError, match=r"optim\.schedule: cosine -> linear"):
        run(tmp_path, replace(OPTIM, schedule="linear"), resume=True)


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    """With a fresh optimiser; and the frozen parameters, too, when it is resumed."""
    first, _, _ = train(tmp_path / "first")
    second, outcome, _ = train(tmp_path / "second", {0: stop}, initial=str(tmp_path / "first"))
    assert outcome.step == 1
    found = checkpoint.latest(tmp_path / "second")
    assert found is not None
    # The first step of AdamW moves each weight by the rate, whatever came before.
    rate = OPTIM.lr / OPTIM.warmup_steps
    farthest = 0.0
    for (_, a), (_, b) in zip(first.trainable(), second.trainable(), strict=True):
        change = (b - a * (1 - rate * OPTIM.weight_decay * (a.ndim > 1))).abs()
        assert (change <= rate * 1.001).all()
        farthest = max(farthest, float(change.detach().max()))
    assert farthest > rate * 0.9
    initial = str(tmp_path / "first")
    assert train(tmp_path / "second", resume=True, initial=initial)[1].finished
    with pytest.raises(InputError, match=r"run.initial|neither a run"):
        train(tmp_path / "third", initial=str(tmp_path))
    assert not (tmp_path / "third").exists()


def test_weights_of_another_model_are_refused(tmp_path, monkeypatch):
    train(tmp_path / "first")
    original = StandIn.trainable
    monkeypatch.setattr(StandIn, "trainable", lambda task: original(task)[:-1])
    with pytest.raises(InputError, match=r"run\.initial = .* does not fit: .*has shape"):
        train(tmp_path / "second", initial=str(tmp_path / "first"))
    assert not (tmp_path / "second").exists()
