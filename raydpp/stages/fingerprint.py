"""What a gradient table's numbers depend on: tables made otherwise are not mixed, nor is one run's with another's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from raydpp import __version__
from raydpp.corpus.tokenization import Masking, template_of
from raydpp.extraction.adapters import FULL_WEIGHTS
from raydpp.extraction.extractor import ExtractorConfig
from raydpp.extraction.model import revision


def fingerprint(extractor: ExtractorConfig, masking: Masking, tokenizer: Any, store_as: str) -> dict[str, Any]:
    """Everything a feature's numbers depend on; tables whose fingerprints differ must not be mixed."""
    vocabulary = tokenizer.backend_tokenizer.to_str()
    found = {
        "model": extractor.model.rsplit("/", 1)[-1],
        "revision": revision(extractor.model),
        "representation": extractor.representation,
        "tokenizer": _hash(vocabulary),
        "masking": asdict(masking),
        "normalisation": "unit norm",
        "dtype": extractor.dtype,
        "stored_as": store_as,
        "raydpp": __version__,
    }
    if extractor.representation != "embedding":
        found["template"] = _hash(template_of(tokenizer))
    if extractor.representation == "gradient":
        adapter = asdict(extractor.adapter)
        if adapter["kind"] not in ("fresh", FULL_WEIGHTS):
            adapter = {"kind": "trained LoRA", "digest": revision(adapter["kind"]), "layers": adapter["layers"]}
        found["adapter"] = adapter
        found["projection"] = {
            "kind": extractor.projection,
            "dimension": extractor.dimension,
            "seed": extractor.projection_seed,
        }
    return found


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field, in words, in which two fingerprints differ, and its two values: ("projection seed", 0, 1)."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if inner := first_difference(old, new):
                return f"{name} {inner[0]}", *inner[1:]
        elif old != new:
            return name, old, new
    return None
