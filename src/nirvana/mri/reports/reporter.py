"""A codec that writes reports: probabilities of facts and texts from image tokens."""

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from nirvana.data.tokenizer import load_tokenizer
from nirvana.errors import InputError
from nirvana.files import write_json
from nirvana.model.backbone import backbone_folder
from nirvana.mri.anatomy.lesions import SIGNALS
from nirvana.mri.anatomy.lobes import LOBES, SIDES
from nirvana.mri.model.checkpoint import load_codec, save_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.model.report_tokens import ReportTokens
from nirvana.mri.reports.grammar import (
    KINDS,
    NORMAL,
    NUMBERS,
    SIZES,
    SLOTS,
    Facts,
    parse_wording,
    pieces,
    write,
)
from nirvana.packaged import resolve

DISCLAIMER = "Research software, not for diagnosis."
ABOUT = "report.json"
MAX_SLICES_AT_ONCE = 64  # for `Reporter.read`: each is scored with every value of a fact
CHOICES: dict[str, tuple] = {
    "count": tuple(range(1, len(NUMBERS) + 1)),
    "type": KINDS,
    "side": SIDES,
    "lobe": LOBES,
    "size": SIZES,
    "signal": SIGNALS,
}
"""Fact -> the values that the model chooses from."""
ANY = Facts(True, 1, KINDS[0], SIDES[0], LOBES[0], SIZES[0], SIGNALS[0])


@dataclass(frozen=True)
class Reading:
    """A model's report of one slice.

    Attributes:
        facts: the most probable ones, each given those before it in the wording.
        finding: probability of a finding, 0..1.
        probabilities: fact -> value -> probability, given a finding and the decided facts before it
            in the wording; sums to 1 over the values. Nothing of the side where it is unknown.
        text: the report.
    """

    facts: Facts
    finding: float
    probabilities: dict[str, dict[Any, float]]
    text: str

    @classmethod
    def decided(
        cls,
        finding: float,
        probabilities: dict[str, dict[Any, float]],
        threshold: float,
        wording: int,
    ) -> "Reading":
        """The most probable facts of a slice, as a report.

        Args:
            finding: probability of a finding, 0..1.
            probabilities: see the attributes.
            threshold: a finding is reported at this probability and above.
            wording: an index in `grammar.WORDINGS`.
        """
        facts = NORMAL
        if finding >= threshold:
            best = {
                slot: max(values, key=values.__getitem__) for slot, values in probabilities.items()
            }
            facts = Facts(True, **best)
        return cls(facts, finding, probabilities, write(facts, wording))

    def at_threshold(self, threshold: float) -> "Reading":
        """The same reading, with a finding reported at this probability, 0..1, and above."""
        wording = parse_wording(self.text)[1]
        return Reading.decided(self.finding, self.probabilities, threshold, wording)

    def without_side(self) -> "Reading":
        """The same reading of an image of unknown orientation, of which no side is known."""
        if not self.facts.finding:
            facts, text = self.facts, self.text
        else:
            facts = replace(self.facts, side=None)
            text = write(facts, parse_wording(self.text)[1])
        others = {slot: values for slot, values in self.probabilities.items() if slot != "side"}
        return Reading(facts, self.finding, others, text)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: text, facts, their probabilities, and those of all values."""
        chosen = {"finding": self.finding if self.facts.finding else 1 - self.finding}
        if self.facts.finding:
            known = (slot for slot in SLOTS if slot in self.probabilities)
            chosen |= {slot: self.probabilities[slot][getattr(self.facts, slot)] for slot in known}
        return {
            "text": self.text,
            "facts": self.facts.to_dict(),
            "probability": chosen,
            "probability_of_a_finding": self.finding,
            "alternatives": {
                slot: {str(value): p for value, p in values.items()}
                for slot, values in self.probabilities.items()
            },
        }


class Reporter:
    """Processes image tokens once and scores sentences from the backbone's cache.

    Args:
        model: a codec whose encoder was trained on reports.
        tokenizer: the backbone's.
        threshold: a finding is reported at this probability and above.
        wording: of the reports, an index in `grammar.WORDINGS`.
        mirrored: the probabilities are averaged over each slice and its mirror image, in which the
            sides are exchanged; `encode` makes the tokens of both.

    Raises:
        InputError: the codec has no backbone.
    """

    def __init__(
        self,
        model: CodecModel,
        tokenizer: Any,
        threshold: float = 0.5,
        wording: int = 0,
        mirrored: bool = False,
    ):
        if model.backbone is None:
            raise InputError("a codec without a backbone writes no reports")
        self.model = model
        self.backbone = model.backbone
        self.tokenizer = tokenizer
        self.report_tokens = ReportTokens(tokenizer)
        self.threshold = threshold
        self.wording = wording
        self.mirrored = mirrored

    @torch.inference_mode()
    def findings(self, tokens: Tensor, wording: int | None = None) -> list[float]:
        """Probability of a finding in each slice, the first step of `read`; same arguments."""
        wording = self.wording if wording is None else wording
        options = [[NORMAL, *_alternatives(ANY, "count")]] * len(tokens)
        rows = self._probabilities(*self._start(tokens), options, "count", wording)
        return [1 - row[0] for row in rows]

    @torch.inference_mode()
    def read(self, tokens: Tensor, wording: int | None = None) -> list[Reading]:
        """Reads slices fact by fact in the order of the wording.

        For each fact the sentences of its alternative values, from the beginning to the token after
        the fact, are scored, and their likelihoods are normalised to probabilities. The alternative
        to a finding is the whole normal sentence.

        Args:
            tokens: image tokens `[B, N, D]`, or `[B, 2, N, D]` with those of the mirror image.
            wording: an index in `grammar.WORDINGS`; None takes the reporter's.
        """
        wording = self.wording if wording is None else wording
        cache, views = self._start(tokens)
        options = [[NORMAL, *_alternatives(ANY, "count")]] * len(tokens)
        rows = self._probabilities(cache, views, options, "count", wording)
        finding = [1 - row[0] for row in rows]
        rows = [[p / max(sum(row[1:]), 1e-300) for p in row[1:]] for row in rows]
        decided = [ANY] * len(tokens)
        tables: list[dict[str, dict[Any, float]]] = [{} for _ in decided]
        for slot in (slot for slot, _ in pieces(ANY, wording) if slot is not None):
            if slot != "count":
                options = [_alternatives(facts, slot) for facts in decided]
                rows = self._probabilities(cache, views, options, slot, wording)
            for i, row in enumerate(rows):
                tables[i][slot] = dict(zip(CHOICES[slot], row, strict=True))
                best = max(CHOICES[slot], key=tables[i][slot].__getitem__)
                decided[i] = replace(decided[i], **{slot: best})
        return [
            Reading.decided(p, table, self.threshold, wording)
            for p, table in zip(finding, tables, strict=True)
        ]

    @torch.inference_mode()
    def write(self, tokens: Tensor, max_tokens: int = 64) -> list[str]:
        """Greedy generation after image tokens; of mirror images, the slices themselves are used.

        Args:
            tokens: as of `read`.
            max_tokens: of a text.
        """
        tokens = tokens if tokens.dim() == 3 else tokens[:, 0]
        cache, _ = self._start(tokens)
        ids = torch.full((len(tokens), 1), self.report_tokens.before[-1], device=tokens.device)
        written = []
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_tokens):
            logits = self.backbone(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids = logits[:, -1:].argmax(-1)
            ids[done] = self.report_tokens.end
            done |= ids[:, 0] == self.report_tokens.end
            if done.all():
                break
            written.append(ids)
        rows = torch.cat(written, dim=1) if written else ids[:, :0]
        return [
            text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        ]

    def _start(self, tokens: Tensor) -> tuple[DynamicCache, int]:
        """The cache after start, image, end and the tokens before a report but the last one, with
        the views of a slice in consecutive rows; and the number of views of each slice."""
        specialist = self.model.specialist
        views = 1 if tokens.dim() == 3 else tokens.shape[1]
        tokens = tokens.flatten(0, -3)
        B = len(tokens)
        prompt = torch.tensor([self.report_tokens.before[:-1]], device=tokens.device)
        embeds = torch.cat(
            [
                specialist.start.expand(B, 1, -1),
                specialist.norm(tokens),
                specialist.end.expand(B, 1, -1),
                self.backbone.get_input_embeddings()(prompt).expand(B, -1, -1),
            ],
            dim=1,
        )
        cache = DynamicCache(config=self.backbone.config)
        self.backbone.base_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        return cache, views

    def _probabilities(
        self,
        cache: DynamicCache,
        views: int,
        options: list[list[Facts]],
        slot: str,
        wording: int,
    ) -> list[list[float]]:
        """Probabilities of alternatives that differ in one fact, for each slice: the mean over its
        views, in the second of which the sides are exchanged.

        Args:
            cache: of `_start`.
            views: of each slice, likewise.
            options: for each slice the alternatives, equally many.
            slot: the fact.
            wording: an index in `grammar.WORDINGS`.
        """
        alternatives = [
            row if view == 0 else _mirrored(row) for row in options for view in range(views)
        ]
        texts = [self._up_to(facts, slot, wording) for row in alternatives for facts in row]
        longest = max(map(len, texts))
        padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        length = torch.tensor([len(text) for text in texts])
        device = self.model.specialist.start.device
        padded, length = padded.to(device), length.to(device)
        ids = F.pad(padded[:, :-1], (1, 0), value=self.report_tokens.before[-1])
        each = len(options[0])
        branches = copy.deepcopy(cache)
        rows: Any = torch.arange(len(alternatives), device=device).repeat_interleave(each)
        branches.reorder_cache(rows)
        logits = self.backbone(input_ids=ids, past_key_values=branches, use_cache=True).logits
        likelihood = logits.float().log_softmax(-1).gather(-1, padded[..., None])[..., 0]
        # The model is causal: padding after a shorter alternative does not affect its tokens.
        counted = torch.arange(longest, device=device) < length[:, None]
        total = (likelihood * counted).sum(1).view(len(options), views, each)
        return total.double().softmax(-1).mean(1).tolist()

    def _up_to(self, facts: Facts, slot: str, wording: int) -> list[int]:
        """Tokens of a report up to the one after a fact, which marks the fact as complete; without
        a finding those of the whole report and its end."""
        parts = pieces(facts, wording)
        text = " " + "".join(part for _, part in parts)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if not facts.finding:
            return [*encoded.input_ids, self.report_tokens.end]
        number = next(i for i, (name, _) in enumerate(parts) if name == slot)
        end = 1 + sum(len(part) for _, part in parts[: number + 1])
        # A blank alone leads to the next fact, which is not decided yet.
        following = parts[number + 1][1] if number + 1 < len(parts) else ""
        more = 1 if following.strip() else 0
        inside = sum(1 for low, _ in encoded.offset_mapping if low < end)
        return encoded.input_ids[: inside + more]


def _alternatives(facts: Facts, slot: str) -> list[Facts]:
    return [replace(facts, **{slot: value}) for value in CHOICES[slot]]


def _mirrored(row: list[Facts]) -> list[Facts]:
    """The same facts with the sides exchanged."""
    other: dict[str, str] = dict(zip(SIDES, reversed(SIDES), strict=True))
    return [
        facts if facts.side is None else replace(facts, side=other[facts.side]) for facts in row
    ]


def save_reporter(
    reporter: Reporter, folder: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a reporter's folder: the codec (`save_codec`), and `report.json` last.

    Args:
        reporter: the reporter.
        folder: where it is written; replaced if it exists.
        dtype: of the weights in the file.
    """
    save_codec(reporter.model, folder, dtype)
    about = {name: getattr(reporter, name) for name in ("threshold", "wording", "mirrored")}
    write_json(Path(folder) / ABOUT, about)


def load_reporter(name: str | Path, device: str | torch.device = "cpu") -> Reporter:
    """A reporter that `save_reporter` wrote.

    Args:
        name: its folder, or "reporter" for the packaged one.
        device: where it is loaded.

    Raises:
        InputError: there is no codec of that name, or it was not trained on reports.
    """
    folder = resolve(name, "MRI reporter")
    about = folder / ABOUT
    if not about.is_file():
        raise InputError(
            f"the codec in {folder} was not trained on reports: it has no {ABOUT}; give one "
            "that was"
        )
    try:
        saved = json.loads(about.read_text(encoding="utf-8"))
        threshold, wording = float(saved["threshold"]), int(saved["wording"])
        mirrored = bool(saved["mirrored"])
        pieces(NORMAL, wording)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{about} does not describe a codec that writes reports: {error}"
        ) from error
    if not (math.isfinite(threshold) and 0 <= threshold <= 1):
        raise InputError(f"{about}: threshold {threshold} must be from 0 to 1")
    model = load_codec(folder, device)
    if model.backbone is None:
        raise InputError(f"the codec in {folder} has no backbone, which reports need")
    tokenizer = load_tokenizer(backbone_folder(model.config.weights), required=())
    return Reporter(model, tokenizer, threshold, wording, mirrored)
