"""Other packages' programs on our models, as a user starts them."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nirvana import NirvanaConfig, NirvanaForCausalLM
from nirvana.adapt import AdaptConfig, adapt, save_task
from nirvana.evaluate.perplexity import score_files
from nirvana.model.assets import load_language_model
from nirvana.packaged import resolve

LAUNCH = [sys.executable, "-m", "nirvana.launch"]
TINY = str(resolve("tiny"))
TEXTS = [
    "The court held that the defendant was liable, and that the damages were to be paid.\n" * 9,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; 日本語も。",
    "a",
    "It was a dark night, and no one was on the road. ",
]
TASK = """
task: bits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture
def environment(tmp_path):
    """No network, and no cache but one in the test's folder."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **offline, "HF_HOME": str(tmp_path / "hub")}


def test_lm_eval_agrees_with_ours(tmp_path, environment):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'nirvana[eval]'")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "bits.yaml").write_text(TASK.format(file=file))
    model = f"pretrained={TINY},dtype=float32,add_bos_token=False,max_length=512"
    command = [*LAUNCH, "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "bits"]
    where = ["--include_path", tmp_path, "--output_path", tmp_path / "out"]
    done = subprocess.run(
        [*command, *where, "--device", "cpu", "--batch_size", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["bits"]["bits_per_byte,none"]
    ours = score_files(*load_language_model("tiny"), [file])["total"]
    assert ours.documents == len(TEXTS)
    assert theirs == pytest.approx(ours.bits_per_byte, abs=1e-4)


@pytest.fixture
def server(tmp_path, environment):
    """`transformers serve` with the packaged model on a free port; its address."""
    with serving(tmp_path, environment) as address:
        yield address


@contextmanager
def serving(tmp_path, environment, *own):
    """The server, started with options of `nirvana.launch` itself."""
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason="needs the server: pip install 'transformers[serving]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        *LAUNCH,
        *own,
        "transformers",
        "serve",
        TINY,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"{address}/health", process, tmp_path / "log")
        yield address
    finally:
        process.terminate()
        process.wait(20)


def wait_for(url, process, log, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def ask(url, **body):
    """The answer to a request in OpenAI's format; the list of its chunks when streaming."""
    data = json.dumps({"model": TINY, "max_tokens": 8, "temperature": 0, **body}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
    if not body.get("stream"):
        return json.loads(text)
    lines = (line.removeprefix("data: ") for line in text.splitlines() if line.strip())
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_server_answers(server):
    """Completions and chats, at once and streamed, are what `generate` writes."""
    model, tokenizer = load_language_model("tiny")

    def expected(text):
        tokens = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(tokens, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)

    text, chat = "The court held that", ["You are a judge.", "The court held that"]
    messages = [
        {"role": role, "content": content}
        for role, content in zip(("system", "user"), chat, strict=True)
    ]
    answer = ask(f"{server}/v1/completions", prompt=text)
    assert answer["choices"][0]["text"] == expected(text)
    assert answer["usage"]["completion_tokens"] == 8
    parts = ask(f"{server}/v1/completions", prompt=text, stream=True)
    assert "".join(part["choices"][0]["text"] or "" for part in parts) == expected(text)
    answer = ask(f"{server}/v1/chat/completions", messages=messages)
    assert answer["choices"][0]["message"]["content"] == expected("\n".join(chat))
    parts = ask(f"{server}/v1/chat/completions", messages=messages, stream=True)
    written = [part["choices"][0]["delta"].get("content") or "" for part in parts]
    assert "".join(written) == expected("\n".join(chat))
    assert sum(map(bool, written)) > 1


def test_the_client_of_the_documentation_works(server, capsys):
    """It prints a completion and a chat's answer, which are the same continuation of one text."""
    page = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(from openai.*?)^```", page, flags=re.M | re.S)
    exec(code.replace("http://localhost:8000", server).replace("FOLDER", TINY), {})
    model, tokenizer = load_language_model("tiny")
    tokens = tokenizer("The court held that", return_tensors="pt").input_ids
    out = model.generate(tokens, max_new_tokens=20, do_sample=False)
    expected = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == f"{expected}\n{expected}"


@pytest.mark.parametrize("named", [[TINY], []])
def test_continuous_batching_is_refused(named):
    command = [*LAUNCH, "transformers", "serve", *named, "--continuous-batching"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--continuous-batching is not possible" in done.stderr
    assert done.stderr.count("\n") == 1


def test_continuous_batching_of_other_models_is_left_to_the_library(tmp_path):
    """It goes on to the program, which then refuses an unknown option of its own."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    command = [
        *LAUNCH,
        "transformers",
        "serve",
        str(tmp_path),
        "--continuous-batching",
        "--no-such",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "not possible" not in done.stderr
    assert "--no-such" in done.stderr


@pytest.fixture
def task(tmp_path):
    """A task file of the packaged model that changes what it writes, and the task."""
    model, tokenizer = load_language_model("tiny")
    config = AdaptConfig(chunk=16, lr={"norm": 0.1})
    found = adapt(model, tokenizer(TEXTS[0], return_tensors="pt").input_ids, config=config).task
    save_task(found, tmp_path / "a.safetensors")
    return str(tmp_path / "a.safetensors"), found


def test_server_answers_with_a_task(tmp_path, environment, task):
    file, learned = task
    model, tokenizer = load_language_model("tiny")
    tokens = tokenizer("The court held that", return_tensors="pt").input_ids

    def written():
        out = model.generate(tokens, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)

    plain = written()
    with learned.applied(model):
        expected = written()
    assert expected != plain
    with serving(tmp_path, environment, "--task", file) as address:
        answer = ask(f"{address}/v1/completions", prompt="The court held that")
    assert answer["choices"][0]["text"] == expected


LOADING = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(float(model(torch.arange(9)[None]).logits.double().sum()))
"""


@pytest.mark.parametrize("program", [[], ["accelerate", "launch", "--cpu"]])
def test_a_script_loads_models_with_a_task(tmp_path, environment, task, program):
    if program:
        pytest.importorskip("accelerate", reason="needs accelerate (the extra dev)")
    file, learned = task
    (tmp_path / "script.py").write_text(LOADING)
    command = [*LAUNCH, "--task", file, *program, str(tmp_path / "script.py"), TINY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model, _ = load_language_model("tiny")
    with learned.applied(model), torch.no_grad():
        expected = float(model(torch.arange(9)[None]).logits.double().sum())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_a_task_of_another_model_is_refused(tmp_path, environment, task):
    (tmp_path / "script.py").write_text(LOADING)
    torch.manual_seed(0)
    config = NirvanaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2)
    NirvanaForCausalLM(config).save_pretrained(tmp_path / "other")
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "other")]
    for file, message in ((task[0], "another model"), ("none.safetensors", "no such task file")):
        command = [*LAUNCH, "--task", file, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


SCRIPT = """
import sys
from transformers import AutoConfig
print(__name__, AutoConfig.for_model("nirvana").model_type, sys.path[0], *sys.argv[1:])
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["FOLDER/script.py"],
        ["-m", "script"],
        ["accelerate", "launch", "--cpu", "FOLDER/script.py"],
        ["accelerate", "launch", "--cpu", "-m", "script"],
        ["accelerate-launch", "--cpu", "-m", "nirvana.launch", "-m", "script"],
    ],
    ids=["file", "module", "accelerate, file", "accelerate, module", "accelerate, ourselves"],
)
def test_scripts_know_the_models(tmp_path, environment, arguments):
    """Also where accelerate runs them in a process of their own."""
    if arguments[0].startswith("accelerate"):
        pytest.importorskip("accelerate", reason="needs accelerate (the extra dev)")
    (tmp_path / "script.py").write_text(SCRIPT)
    given = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    done = subprocess.run(
        [*LAUNCH, *given, "--some", "-m"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["__main__", "nirvana", str(tmp_path), "--some", "-m"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["-m"], ["-m", "no.such.module"], ["no-such-program", "--help"]],
    ids=["none", "no module", "unknown module", "unknown"],
)
def test_no_program(arguments):
    done = subprocess.run([*LAUNCH, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("nirvana.launch: ")
    assert done.stderr.count("\n") == 1
