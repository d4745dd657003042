"""What a gradient table's numbers depend on: tables made otherwise are not mixed, nor is one run's with another's."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from raydpp import __version__
from raydpp.gradients.chat_template import template_of
from raydpp.gradients.config import ExtractorConfig, Masking
from raydpp.gradients.model import revision
from raydpp.gradients.optimizer import moments_file
from raydpp.gradients.tokenization import MASK_RULE


def fingerprint(extractor: ExtractorConfig, masking: Masking, tokenizer: Any, store_as: str) -> dict[str, Any]:
    """Everything a feature's numbers depend on; tables whose fingerprints differ must not be mixed."""
    vocabulary = tokenizer.backend_tokenizer.to_str()
    found = {
        "model": extractor.model.rsplit("/", 1)[-1],
        "revision": revision(extractor.model),
        "representation": extractor.representation,
        "tokenizer": _hash(vocabulary),
        "masking": {**asdict(masking), "rule": MASK_RULE},
        "normalisation": "unit norm",
        "dtype": extractor.dtype,
        "stored_as": store_as,
        "raydpp": __version__,
    }
    if extractor.quantization:
        found["quantization"] = extractor.quantization
    if extractor.representation != "embedding":
        found["template"] = _hash(template_of(tokenizer))
    if extractor.representation == "gradient":
        adapter = asdict(extractor.adapter)
        if adapter["kind"] != "fresh":
            adapter = {"kind": "trained LoRA", "digest": revision(adapter["kind"]), "layers": adapter["layers"]}
        found["adapter"] = adapter
        found["projection"] = {
            "kind": "inputs to rows, entries spread",
            "halves": "independent",
            "rows": extractor.rank,
            "dimension": extractor.dimension,
            "seed": extractor.projection_seed,
        }
        if extractor.optimizer != "sgd":
            moments = revision(str(moments_file(extractor.adapter.kind)))
            found["optimizer"] = {"kind": extractor.optimizer, "moments": moments}
    return found


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
