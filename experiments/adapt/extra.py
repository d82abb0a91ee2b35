"""Parts of the study with methods of others, joint training, and the cost in time."""

import time
from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.adapt.context import Context, by_domain, is_seen
from experiments.adapt.domains import UNSEEN
from experiments.adapt.measure import FROZEN, block_nats, change, read, unigram_cache
from experiments.common.results import Row
from nirvana.adapt.adaptation import start_optimizer
from nirvana.adapt.chunks import Chunk, read_documents
from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.parameters import TaskHooks
from nirvana.adapt.state import read_chunk
from nirvana.errors import InputError
from nirvana.model.assets import load_language_model
from nirvana.model.config import preset
from nirvana.model.nirvana import NirvanaForCausalLM

LORA_TARGETS = ["in_proj", "out_proj", "gate_up_proj", "down_proj"]
LORA_RANK = 8
LORA_SIZES = (1e-3, 3e-3, 1e-2)
LORA_DOCUMENTS = 5  # of each domain
JOINT_BATCHES = 40
JOINT_RATE = 3e-4
LARGE_TOKENS = 16384
REPEATS = 5


def select_cache(context: Context, shares: tuple[float, ...]) -> None:
    """Chooses the share of the unigram cache on validation documents."""

    def choose() -> Row:
        names, _, rows = context.flat("valid")
        scores = read(context.model("tiny"), rows, FROZEN)[0]
        frozen = block_nats(scores)
        gains = {}
        for share in shares:
            cached = [
                unigram_cache(row.tolist(), nll, share)
                for row, nll in zip(rows, scores, strict=True)
            ]
            last = by_domain(names, change(block_nats(cached), frozen, "last"))
            gains[share] = mean(mean(x) for domain, x in last.items() if not is_seen(domain))
        best = min(gains, key=gains.__getitem__)
        return {"share": best, "figure": round(gains[best], 3)}

    context.measure("select", {"model": "tiny", "kind": "unigram cache"}, choose)


def cache_share(context: Context) -> float:
    """The share that `select_cache` chose."""
    row = context.settings_row("tiny", "unigram cache")
    if row is None:
        raise InputError("no share of the unigram cache: run the part caches first")
    return row["share"]


def train_jointly(
    context: Context, batches: Callable[[Context, int], Iterator[list[Tensor]]]
) -> None:
    """Trains the weights of `tiny` to be adapted: the loss of every chunk of training text of
    another look, under the task parameters that adaptation has when it reads the chunk.

    Args:
        context: of the study.
        batches: yields batches of documents.
    """
    folder = context.models / "tiny-joint"
    if folder.is_dir() or (context.end is not None and time.time() > context.end):
        return
    config = context.settings("tiny", "trained")
    model, tokenizer = load_language_model("tiny", context.device)
    layout = start_optimizer(model, config).layout
    weights = torch.optim.AdamW(
        model.parameters(), lr=JOINT_RATE, betas=(0.9, 0.95), weight_decay=0
    )
    number = JOINT_BATCHES if context.device.type == "cuda" else 2
    curve = []
    for step, documents in enumerate(batches(context, number)):
        for group in weights.param_groups:
            group["lr"] = JOINT_RATE * min(1.0, 2 * (1 - step / number))
        chunks: list[Chunk] = []
        optimizer = start_optimizer(model, config, rows=len(documents))
        scores = read_documents(model, documents, optimizer, chunks.append)
        curve.append(round(float(torch.cat(scores).mean()), 4))
        _train_on(model, layout, documents, chunks, config)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        weights.step()
        weights.zero_grad()
        if context.end is not None and time.time() > context.end:
            return
    print(f"joint: {curve[0]} to {curve[-1]} nats a token", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_on(
    model: Any, layout: Any, documents: list[Tensor], chunks: list[Chunk], config: AdaptConfig
) -> None:
    """Adds the gradients of the weights, chunk by chunk, with the task parameters fixed."""
    device = chunks[0].nll.device
    width = 1 + len(chunks) * config.chunk
    padded = [F.pad(row, (0, width - len(row))) for row in documents]
    tokens = torch.stack(padded).to(device)
    total = sum(int(chunk.scored.sum()) for chunk in chunks)
    state = None
    with TaskHooks(model, layout) as hooks:
        for chunk in chunks:
            part = tokens[:, chunk.start - 1 : chunk.start + config.chunk]
            hooks.set(chunk.before)
            logits, state = read_chunk(model, part[:, :-1], state)
            nll = F.cross_entropy(
                logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none"
            )
            (nll.view_as(chunk.scored) * chunk.scored).sum().div(total).backward()


def lora(context: Context) -> None:
    """LoRA by PEFT, trained on the same chunks in the same order, one document at a time."""
    chunk = context.settings("tiny", "chosen").chunk
    number = min(LORA_DOCUMENTS, context.documents or LORA_DOCUMENTS)

    def change_of(rows: list[Tensor], size: float) -> tuple[float, list[Tensor]]:
        scores = [_lora_nll(context, row, chunk, size) for row in rows]
        frozen = block_nats(read(context.model("tiny"), rows, FROZEN)[0])
        return mean(change(block_nats(scores), frozen, "last")), scores

    def choose() -> Row:
        names, _, rows = context.flat("valid")
        unseen = [row for name, row in zip(names, rows, strict=True) if not is_seen(name)]
        chosen = unseen[:2] + unseen[-2:]
        gains = {size: change_of(chosen, size)[0] for size in LORA_SIZES}
        best = min(gains, key=gains.__getitem__)
        return {"size": best, "figure": round(gains[best], 3)}

    selected = context.measure("select", {"model": "tiny", "kind": "lora"}, choose)
    if selected is None:
        return
    domains = context.domains("test")
    for domain in (*UNSEEN, "law"):
        rows = [torch.tensor(d.tokens[: context.tokens + 1]) for d in domains[domain][:number]]

        def measure(rows: list[Tensor] = rows) -> Row:
            figure, scores = change_of(rows, selected["size"])
            return {"nats": block_nats(scores), "numbers": _lora_size(context), "figure": figure}

        context.measure("lora", {"domain": domain}, measure)


def _lora_model(context: Context) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, _ = load_language_model("tiny", context.device)
    config = LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS, lora_alpha=LORA_RANK)
    return get_peft_model(model, config).eval()


def _lora_size(context: Context) -> int:
    return sum(p.numel() for p in _lora_model(context).parameters() if p.requires_grad)


def _lora_nll(context: Context, row: Tensor, chunk: int, size: float) -> Tensor:
    """-ln p of a document's tokens, each chunk scored before one step of Adam on it."""
    model = _lora_model(context)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=size, betas=(0.9, 0.95))
    row, state, found = row.to(context.device)[None], None, []
    for start in range(0, row.shape[1] - 1, chunk):
        part = row[:, start : start + chunk + 1]
        output = model(input_ids=part[:, :-1], state=state, return_state=True)
        nll = F.cross_entropy(output.logits[0].float(), part[0, 1:], reduction="none")
        nll.sum().div(chunk).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = output.state.detach()
        found.append(nll.detach())
    return torch.cat(found).double().cpu()


def cost(context: Context) -> None:
    """Seconds of adaptation beside those of reading the same tokens."""
    chosen = context.settings("tiny", "chosen").chunk
    on_gpu = context.device.type == "cuda"
    for dtype in ("bfloat16", "float32") if on_gpu else ("float32",):
        model, _ = load_language_model("tiny", context.device)
        model = model.to(getattr(torch, dtype))
        for rows in (1, 32) if on_gpu else (1,):
            for chunk in sorted({chosen, 128, 512, 1024} if on_gpu else {chosen, 128, 512}):
                _measure_cost(context, model, "tiny", rows, context.tokens, chunk)
    if not on_gpu:
        return
    context.loaded.clear()
    with torch.device(context.device):
        large = NirvanaForCausalLM(preset("1.3b")).bfloat16().eval()
    for chunk in (2048, 1024, 512):
        _measure_cost(context, large, "1.3b", 1, LARGE_TOKENS, chunk)


def _measure_cost(
    context: Context, model: Any, name: str, rows: int, tokens: int, chunk: int
) -> None:
    config = AdaptConfig(("norm", "fast"), chunk, lr={"norm": 1e-3, "fast": 1e-3})
    key = {"model": name, "rows": rows, "tokens": tokens, "chunk": chunk}
    key |= {"device": context.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    context.measure("time", key, lambda: _cost(model, rows, tokens, config))


def _cost(model: Any, rows: int, tokens: int, config: AdaptConfig) -> Row:
    """Medians of seconds: a prefill at once, the same in chunks, and the adaptation; and of the
    ratios of the adaptation to the others, taken round by round."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, tokens + 1), generator=generator)
    on_device = ids[:, :-1].to(model.device)

    @torch.no_grad()
    def prefill() -> None:
        model(on_device, return_state=True, logits_to_keep=1)

    @torch.no_grad()
    def in_chunks() -> None:
        state = None
        for part in on_device.split(config.chunk, 1):
            state = model(part, state=state, return_state=True, logits_to_keep=1).state

    def adapted() -> None:
        read_documents(model, list(ids), start_optimizer(model, config, rows=rows))

    calls = {"prefill": prefill, "in chunks": in_chunks, "adapt": adapted}
    for call in calls.values():
        call()  # compiles
    rounds = [
        {name: _seconds(call, model.device) for name, call in calls.items()} for _ in range(REPEATS)
    ]
    found = {name: round(median(each[name] for each in rounds), 4) for name in calls}
    ratios = {
        name: round(median(each["adapt"] / each[name] for each in rounds), 3)
        for name in ("prefill", "in chunks")
    }
    peak = 0
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        adapted()
        peak = torch.cuda.max_memory_allocated()
    return {"times": found, "ratios": ratios, "peak": peak, "figure": ratios["prefill"]}


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
