"""What users of the library expect of losses, gradients, compilation, adapters and the Trainer."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from nirvana import NirvanaForCausalLM
from nirvana.model.assets import load_language_model

IN_A_ROW = torch.arange(30)[None].expand(2, -1)
PACKED = torch.cat([torch.arange(n) for n in (3, 19, 8)])[None].expand(2, -1)
packing = pytest.mark.parametrize("positions", [None, PACKED], ids=["plain", "packed"])


def gradients(model, tokens, **inputs):
    """The loss and the gradients of all parameters, which are then cleared."""
    loss = model(tokens, labels=tokens, use_cache=False, **inputs).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), found


def test_accumulated_gradients_are_those_of_one_batch(small_model):
    """Rows of unequal length, two at a time: `num_items_in_batch` makes the parts add up."""
    model, tokens = small_model(), torch.randint(61, (4, 30))
    labels = tokens.clone()
    for row, length in enumerate((30, 4, 17, 9)):
        labels[row, length:] = -100
    model(tokens, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for part in (slice(0, 2), slice(2, 4)):
        out = model(tokens[part], labels=labels[part], num_items_in_batch=count)
        out.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@packing
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(small_model, reentrant, positions):
    model, tokens = small_model().train(), torch.randint(61, (2, 30))
    loss, expected = gradients(model, tokens, position_ids=positions)
    visits = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: visits.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, found = gradients(model, tokens, position_ids=positions)
    assert len(visits) == 2  # forward, and once more on the way back
    assert torch.equal(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_checkpointing_refuses_a_cache_that_holds_tokens(small_model):
    """It leaves caches out, and the tokens would be computed without those before them."""
    model, tokens = small_model().train(), torch.randint(61, (2, 30))
    with torch.no_grad():
        cache = model(tokens[:, :9], use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="this one holds 9 tokens: continue from a state"):
            model(tokens[:, 9:], **{name: cache})
    empty = DynamicCache(config=model.config)
    assert torch.equal(model(tokens, past_key_values=empty).logits, model(tokens).logits)
    assert empty.get_seq_length(2) == 0


@pytest.mark.parametrize("variant", [{}, {"branches": "linear"}, {"branches": "window"}], ids=str)
def test_gradients_of_single_rows(small_model, variant):
    """`torch.func`: per-sample gradients, as of Opacus and of influence functions."""
    model, tokens = small_model(**variant), torch.randint(61, (3, 20))

    def loss(parameters, row):
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return functional_call(model, parameters, (), inputs).loss

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    together = vmap(grad(loss), (None, 0))(parameters, tokens)
    for i in range(3):
        _, alone = gradients(model, tokens[i : i + 1])
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name][i], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", [{}, {"branches": "linear"}], ids=str)
def test_second_derivatives(small_model, variant):
    """A gradient penalty: the derivative of a gradient's square is its difference quotient."""
    model, tokens = small_model(**variant).double(), torch.randint(61, (2, 20))
    given = model.get_input_embeddings()(tokens).detach()
    direction = torch.randn_like(given)

    def penalty(embeds):
        embeds = embeds.detach().requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
        return embeds, gradient.square().sum()

    with sdpa_kernel(SDPBackend.MATH):  # the only one whose gradient PyTorch differentiates
        embeds, value = penalty(given)
        value.backward()
        step = 1e-8 * direction  # whose error, of second order, is a percent for 1e-6
        quotient = (penalty(given + step)[1] - penalty(given - step)[1]) / 2e-8
    torch.testing.assert_close((embeds.grad * direction).sum(), quotient, rtol=1e-4, atol=0.0)


@packing
def test_compiled_training_is_eager(small_model, positions):
    """One graph forward and backward, also for other texts and other borders of documents."""
    torch._dynamo.reset()
    model, backend = (
        small_model(num_hidden_layers=3).train(),
        CompileCounterWithBackend("aot_eager"),
    )
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for shift in (0, 4):
        tokens = torch.randint(61, (2, 30))
        inputs = {} if positions is None else {"position_ids": positions.roll(shift, dims=1)}
        loss, expected = gradients(model, tokens, **inputs)
        again, found = gradients(compiled, tokens, **inputs)
        torch.testing.assert_close(again, loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(found["_orig_mod." + name], gradient)
    assert backend.frame_count == 1


@pytest.mark.gpu
def test_inductor_training_is_eager(small_model):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here; inductor takes minutes on a CPU")
    torch._dynamo.reset()
    model, tokens = small_model().train().cuda(), torch.randint(61, (2, 30)).cuda()
    loss, expected = gradients(model, tokens, position_ids=PACKED.cuda())
    compiled = torch.compile(model, fullgraph=True)
    again, found = gradients(compiled, tokens, position_ids=PACKED.cuda())
    torch.testing.assert_close(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found["_orig_mod." + name], gradient)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["in_proj", "out_proj", "gate_up_proj", "down_proj"]], ids=str
)
def test_lora(small_model, targets, tmp_path):
    """Only the adapters learn; saved, loaded and merged they compute the same."""
    peft = pytest.importorskip("peft", reason="needs peft (the extra dev)")
    base, tokens = small_model(), torch.randint(61, (2, 30))
    base.save_pretrained(tmp_path / "base")
    before = {name: p.clone() for name, p in base.named_parameters()}
    logits = base(tokens).logits.detach()
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    torch.testing.assert_close(model(tokens).logits, logits)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)
    for target in ("in_proj", "out_proj", "gate_up_proj", "down_proj"):
        assert sum(f".{target}.lora_A" in name for name in names) == 4
    assert any("zeta" in name for name in names) == (targets == "all-linear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[plain])
    model.eval()
    trained = model(tokens).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens).logits, trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is NirvanaForCausalLM
    torch.testing.assert_close(merged(tokens).logits, trained)
    assert (trained - logits).abs().max() > 0.01


@pytest.fixture
def fine_tune(tmp_path):
    """Runs the library's Trainer on the packaged model for some steps; returns it."""
    pytest.importorskip("accelerate", reason="needs accelerate (the extra dev)")
    text = "the cat sat on the mat and the dog sat on the cat, and so they sat, "
    _, tokenizer = load_language_model("tiny")
    data = [{"input_ids": tokenizer(text * n).input_ids} for n in (1, 2, 3, 1, 2, 3, 2, 1)]

    def run(name, steps, resume=None, **settings):
        model, _ = load_language_model("tiny")
        usual = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
        arguments = TrainingArguments(
            output_dir=tmp_path / name,
            max_steps=steps,
            lr_scheduler_type="constant",
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{**usual, **settings},
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_trainer_learns_and_resumes(fine_tune, tmp_path):
    whole = fine_tune("whole", 6)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    resumed = fine_tune("resumed", 6, resume=tmp_path / "whole" / "checkpoint-3")
    assert resumed.state.log_history[2]["loss"] == losses[2]  # taken over, not run again
    assert resumed.state.log_history[-1]["train_loss"] < losses[0]
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    tokens = torch.randint(8192, (1, 9))
    torch.testing.assert_close(saved(tokens).logits, whole.model.eval()(tokens).logits)


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "LoRA"])
def test_trainer_smooths_shifted_labels(tmp_path, adapter):
    """A position's label is its next token, with a tenth of the weight spread over all tokens."""
    pytest.importorskip("accelerate", reason="needs accelerate (the extra dev)")
    model, tokenizer = load_language_model("tiny")
    texts = ["The court held that the defendant was not liable.", "Patients were assigned."]
    data = [{"input_ids": tokenizer(text).input_ids} for text in texts]
    smoothed = []
    for row in data:
        tokens = torch.tensor(row["input_ids"])
        with torch.no_grad():
            smoothed.append(-model(tokens[None]).logits[0, :-1].log_softmax(-1))
        nll = smoothed[-1].gather(1, tokens[1:, None])[:, 0]
        smoothed[-1] = 0.9 * nll + 0.1 * smoothed[-1].mean(-1)
    if adapter:
        peft = pytest.importorskip("peft", reason="needs peft (the extra dev)")
        config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True),
        eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    expected = torch.cat(smoothed).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_trainer_accumulates_to_the_same_step(fine_tune):
    """Two batches of 2 rows, activations recomputed, take the step of one batch of 4 rows."""
    plain = {"optim": "sgd", "learning_rate": 0.1}
    one = fine_tune("one", 1, **plain, per_device_train_batch_size=4)
    parts = fine_tune(
        "parts", 1, **plain, gradient_accumulation_steps=2, gradient_checkpointing=True
    )
    start, _ = load_language_model("tiny")
    for name, parameter in one.model.named_parameters():
        step = parameter - start.get_parameter(name)
        other = parts.model.get_parameter(name) - start.get_parameter(name)
        assert step.any(), name
        torch.testing.assert_close(other, step, rtol=1e-2, atol=1e-5)
