"""A program that uses a standalone folder where the package is not installed.

python -I use_standalone.py FOLDER INPUTS RESULTS [--block]

It writes what it computes to RESULTS, and the model after one step of fine-tuning to a folder
beside it. With --block an installed package is hidden.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Hidden(MetaPathFinder):
    """Finds no package."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "nirvana":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def absent():
    try:
        import nirvana  # noqa: F401
    except ModuleNotFoundError:
        return True
    return False


def computed(model, inputs):
    """Logits, a padded and a packed row, generated tokens, and a loss with its gradients."""
    tokens = inputs["tokens"]
    model.eval()
    with torch.no_grad():
        results = {
            "logits": model(tokens).logits,
            "padded": model(tokens, attention_mask=inputs["mask"]).logits,
            "packed": model(tokens[:1], position_ids=inputs["positions"]).logits,
            "generated": model.generate(
                tokens[:, :9], attention_mask=torch.ones_like(tokens[:, :9]), max_new_tokens=12,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            ),
        }  # fmt: skip
    model.train()
    loss = model(tokens, labels=tokens, skip_logits=True, use_cache=False).loss
    loss.backward()
    results["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        results[f"gradient.{name}"] = parameter.grad.clone()
    return {name: value.contiguous() for name, value in results.items()}


def fine_tune(model):
    """One step by the gradients that the parameters have."""
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


if __name__ == "__main__":
    folder, inputs, out = map(Path, sys.argv[1:4])
    if "--block" in sys.argv:
        sys.meta_path.insert(0, Hidden())
    assert absent(), "the package is installed here"
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    trusted = {"trust_remote_code": True}
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trusted)
    given = load_file(inputs)
    results = computed(model, given)
    fine_tune(model)
    saved = out.with_name("saved")
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, **trusted)
    results["tuned"] = model.eval()(given["tokens"]).logits.detach()
    results["again"] = again.eval()(given["tokens"]).logits.detach()
    base = AutoModel.from_pretrained(folder, dtype=torch.float32, **trusted)
    results["hidden"] = base(given["tokens"]).last_hidden_state.detach()
    assert AutoConfig.from_pretrained(folder, **trusted).model_type == "nirvana"
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    results["text"] = torch.tensor(tokenizer("The cat").input_ids)
    save_file(results, out)
    assert absent()
