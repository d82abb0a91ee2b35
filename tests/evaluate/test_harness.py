"""Tasks of lm-eval on a model in memory: likelihoods, generation, and our local files."""

import json

import pytest
import torch

from nirvana.errors import InputError
from nirvana.evaluate.perplexity import score_documents
from nirvana.evaluate.tasks import TASKS, answers, benchmark_folder, task_config, task_file

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'nirvana[eval]'")
from lm_eval.api.instance import Instance

from nirvana.evaluate.harness import HarnessModel, run_tasks


@pytest.fixture
def model(small_model):
    return small_model(vocab_size=280)


def requests(kind, arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def nats(model, tokenizer, text):
    """-ln p of a text as a document, from one forward pass."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    tokens = torch.tensor([tokenizer.bos_token_id, *ids])
    with torch.no_grad():
        p = model(tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
    return -float(p[:-1].gather(1, tokens[1:, None]).sum())


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("longest", [2048, 20])
def test_likelihoods_are_differences_of_documents(
    model, tokenizer, batch_size, longest, monkeypatch
):
    """ln p(b | a) = ln p(ab) - ln p(a), in batches of any size and read in pieces."""
    monkeypatch.setattr("nirvana.evaluate.harness.PIECE_TOKENS", longest)
    pairs = [
        ("The cat", " sat"),
        ("The cat sat on", " the mat. The cat sat on the mat, <|eos|> and so on."),
        ("The cat sat on the mat. " * 3 + "A", " b"),
        ("", "The cat"),
        ("On the mat ", "sat"),
    ]
    harness = HarnessModel(model, tokenizer, batch_size)
    found = harness.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        whole = nats(model, tokenizer, context + continuation)
        before = nats(model, tokenizer, context.rstrip()) if context else 0.0
        assert value == pytest.approx(before - whole, abs=1e-4)
    texts = [context + continuation for context, continuation in pairs]
    rolling = harness.loglikelihood_rolling(requests("rolling", [(text,) for text in texts]))
    ours = [-score.nats for score in score_documents(model, tokenizer, texts)]
    assert rolling == pytest.approx(ours)


def test_generation_ends_at_stop_words(model, tokenizer):
    harness = HarnessModel(model, tokenizer)

    def write(**settings):
        requested = requests("generate_until", [("The cat sat", {"max_gen_toks": 6, **settings})])
        return harness.generate_until(requested)[0]

    text = write()
    assert len(text) > 2
    for stop in {*text}:
        assert write(until=[stop, "never"]) == text[: text.index(stop)]
    assert write(until="never") == text
    assert text.startswith(write(max_gen_toks=2))


def test_greedy_is_the_likeliest_token(model, tokenizer):
    """Of all words of one token behind a context just the likeliest token is greedy."""
    harness = HarnessModel(model, tokenizer)
    words = [tokenizer.decode([i]) for i in range(280)]
    words = [w for w in words if w.startswith(" ") and len(tokenizer.tokenize(w)) == 1]
    met = 0
    for number in range(60):
        context = f"The cat {number}"
        ids = [tokenizer.bos_token_id, *tokenizer(context, add_special_tokens=False).input_ids]
        with torch.no_grad():
            best = tokenizer.decode([int(model(torch.tensor([ids])).logits[0, -1].argmax())])
        pairs = [(context, word) for word in words]
        found = harness.loglikelihood(requests("loglikelihood", pairs))
        greedy = [word for word, (_, flag) in zip(words, found, strict=True) if flag]
        assert greedy == [word for word in words if word == best]
        met += len(greedy)
    assert met


FILES = {
    "arc_easy": {"query": "Question: 1+1?", "choices": ["2", "3", "4"], "gold": 0},
    "winogrande": {"context_options": ["A so A", "A so B"], "continuation": "won.", "gold": 1},
    "lambada_openai": {"text": "The cat sat on the mat"},
    "pubmed_qa_labeled": {"context": "Is it? Answer: ", "continuation": "maybe"},
}
RIGHT = {
    ("Question: 1+1?\nAnswer:", " 2"),
    ("A so B", " won."),
    ("The cat sat on the", " mat"),
    ("Is it? Answer:", " maybe"),
}


@pytest.fixture
def folder(tmp_path):
    for name, record in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.parametrize("sign", [1, -1])
def test_local_tasks_request_the_right_continuations(model, tokenizer, folder, monkeypatch, sign):
    names = ["arc_easy", "winogrande", "lambada", "pubmed_qa"]

    seen = set()
    for name in names:
        pairs, gold = answers(TASKS[name].read(task_file(name, folder))[0])
        assert pairs[gold] in RIGHT
        seen |= set(pairs)

    def know(harness, requested):
        """Knows the right continuations and prefers them, or the wrong ones."""
        assert {request.args for request in requested} <= seen
        values = [sign * float(request.args in RIGHT) for request in requested]
        return [(value, value > 0) for value in values]

    monkeypatch.setattr(HarnessModel, "loglikelihood", know)
    found = run_tasks(model, tokenizer, names, [], folder)
    assert list(found) == names
    for task in found.values():
        assert task["figures"]["acc"] == float(sign > 0)
        assert len(task["each"]["points"]) == 1
        assert len(task["each"]["sha256"]) == 64


def test_points_of_questions_are_the_accuracy(model, tokenizer, tmp_path):
    records = [
        {"query": f"The cat {i}", "choices": ["sat on", "the mat", "x"], "gold": i % 3}
        for i in range(12)
    ]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    task = run_tasks(model, tokenizer, ["copa"], [], tmp_path)["copa"]
    points = task["each"]["points"]
    assert task["each"]["metric"] == "acc"
    assert sum(points) / 12 == pytest.approx(task["figures"]["acc"])
    assert 0 < sum(points) < 12
    few = run_tasks(model, tokenizer, ["copa"], [], tmp_path, limit=5)["copa"]
    assert few["each"]["points"] == points[:5]


@pytest.mark.parametrize("name", TASKS)
def test_every_local_task_reads_the_benchmark_files(data_folder, name):
    folder = data_folder / "benchmarks"
    config = task_config(name, folder)
    questions = config["custom_dataset"]()["test"]
    assert len(questions) >= 100
    golds = {question.get("gold") for question in questions}
    assert len(golds) >= 2 or name == "lambada"


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("copa", {"query": "a", "choices": ["b", "c"], "gold": 2}),
        ("copa", {"query": "a", "choices": ["b"], "gold": 0}),
        ("copa", {"query": "a", "choices": ["b", "c"]}),
        ("winogrande", {"context_options": ["a", "b"], "gold": 0}),
        ("lambada", {"text": "word"}),
        ("pubmed_qa", {"context": "a", "continuation": "perhaps"}),
    ],
)
def test_wrong_questions(tmp_path, name, record):
    (tmp_path / f"{TASKS[name].file}.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match="line 1: must have"):
        task_config(name, tmp_path)


def test_absent_files(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"copa\.jsonl .* no such file, which task copa needs"):
        task_file("copa", tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        benchmark_folder(tmp_path / "none")
    monkeypatch.delenv("NIRVANA_DATA", raising=False)
    with pytest.raises(InputError, match="NIRVANA_DATA"):
        benchmark_folder(None)
    (tmp_path / "copa.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no question"):
        task_config("copa", tmp_path)


def test_unknown_hub_task(model, tokenizer):
    """A pattern is none either, though it would match tasks."""
    with pytest.raises(InputError, match=r"hub:arc\*: the lm-eval library has no task"):
        run_tasks(model, tokenizer, [], ["arc*"])
