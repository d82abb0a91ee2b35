"""What every part of the study needs: data, models, and the rows that are there already."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.adapt.data import Data, Document
from experiments.adapt.domains import SEEN, UNSEEN, VALIDATION
from experiments.adapt.measure import rows_of
from experiments.common.results import Row, append_row, read_rows
from nirvana.adapt.config import AdaptConfig
from nirvana.config import from_dict, to_dict
from nirvana.errors import InputError
from nirvana.model.assets import load_language_model


@dataclass
class Context:
    """Where the study stands.

    Attributes:
        data: prepared documents.
        models: folder of trained models.
        out: file of results.
        device: of all models.
        about: the environment, recorded with every row.
        documents: of a domain at most; None: all.
        tokens: predicted tokens of a document.
        batches: from which step sizes are learned.
        end: after this moment (`time.time`) nothing new starts; None: never.
    """

    data: Data
    models: Path
    out: Path
    device: torch.device
    about: dict[str, Any]
    documents: int | None
    tokens: int
    batches: int
    end: float | None
    loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> dict[str, Any]:
        """What must be equal for two rows to belong together."""
        return {"data": self.data.identity, "documents": self.documents, "tokens": self.tokens}

    def rows(self, part: str) -> list[Row]:
        """The finished rows of a part at this scale."""
        rows = read_rows(self.out)
        return [row for row in rows if row["part"] == part and row["scale"] == self.scale]

    def measure(self, part: str, name: dict[str, Any], compute: Callable[[], Row]) -> Row | None:
        """Adds a row unless it is there, or time is over.

        Args:
            part: of the study.
            name: identifies the row within the part.
            compute: returns what is recorded.

        Returns:
            the row, or None if time is over.
        """
        for row in self.rows(part):
            if row["name"] == name:
                return row
        if self.end is not None and time.time() > self.end:
            print(f"{part} {name}: left for another call", flush=True)
            return None
        began = time.monotonic()
        found = compute()
        row = {"part": part, "name": name, "scale": self.scale, **found}
        row |= {"seconds": round(time.monotonic() - began, 2), "environment": self.about}
        append_row(self.out, row)
        shown = found.get("figure")
        print(f"{part} {name}: {row['seconds']} s {'' if shown is None else shown}", flush=True)
        return row

    def model(self, name: str) -> Any:
        """A model in eval mode: "tiny", or a trained one by its folder's name."""
        if name not in self.loaded:
            source = name if name == "tiny" else str(self.models / name)
            self.loaded[name] = load_language_model(source, self.device)
        return self.loaded[name][0]

    def tokenizer(self) -> Any:
        """The tokenizer of all models."""
        self.model("tiny")
        return self.loaded["tiny"][1]

    def domains(self, split: str) -> dict[str, list[Document]]:
        """The documents of a split, as many as the options name."""
        domains = self.data.test if split == "test" else self.data.valid
        return {domain: each[: self.documents] for domain, each in domains.items()}

    def flat(
        self, split: str, only: Sequence[str] | None = None
    ) -> tuple[list[str], list[Document], list[Tensor]]:
        """All documents of a split side by side: domain, document and tokens of each."""
        chosen = {d: each for d, each in self.domains(split).items() if only is None or d in only}
        names = [domain for domain, each in chosen.items() for _ in each]
        documents = [document for each in chosen.values() for document in each]
        return names, documents, rows_of(documents, self.tokens)

    def settings_row(self, model: str, kind: str) -> Row | None:
        """The row in which an earlier part learned or chose settings, from whatever number of
        documents, the one with the most; None where that part has not run."""
        name = {"model": model, "kind": kind}
        same = {key: value for key, value in self.scale.items() if key != "documents"}
        found = [
            row
            for part in ("steps", "select")
            for row in read_rows(self.out)
            if row["part"] == part and row["name"] == name and same.items() <= row["scale"].items()
        ]
        return max(found, key=size_of, default=None)

    def settings(self, model: str, kind: str) -> AdaptConfig:
        """Settings that an earlier part learned or chose, see `settings_row`.

        Raises:
            InputError: where that part has not run.
        """
        row = self.settings_row(model, kind)
        if row is None:
            raise InputError(f"no {kind} settings of {model}: run the parts before this one first")
        return from_dict(AdaptConfig, row["config"], "")


def size_of(row: Row) -> int:
    """By how many documents of a domain a row's scale is limited; those without a limit last."""
    limit = row["scale"]["documents"]
    return sys.maxsize if limit is None else limit


def by_domain(names: Sequence[str], values: Sequence[Any]) -> dict[str, list[Any]]:
    """Values of documents, by domain."""
    found: dict[str, list[Any]] = {}
    for name, value in zip(names, values, strict=True):
        found.setdefault(name, []).append(value)
    return found


def is_seen(domain: str) -> bool:
    """Whether the models were trained on a domain."""
    assert domain in (*SEEN, *UNSEEN, *VALIDATION)
    return domain in SEEN


def changed(config: AdaptConfig, **changes: Any) -> AdaptConfig:
    """Settings with changes; step sizes of groups that are left out go as well."""
    groups = changes.get("parameters", config.parameters)
    sizes = changes.pop("lr", config.lr)
    sizes = {name: size for name, size in sizes.items() if name.partition("/")[0] in groups}
    return replace(config, lr=sizes, **changes)


def plain(config: AdaptConfig) -> dict[str, Any]:
    """Settings as data of a row."""
    return json.loads(json.dumps(to_dict(config)))
