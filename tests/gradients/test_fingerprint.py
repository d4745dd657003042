from __future__ import annotations

from typing import Any

from raydpp.gradients.config import Adapter, ExtractorConfig, Masking
from raydpp.gradients.fingerprint import fingerprint
from raydpp.gradients.model import load_tokenizer
from raydpp.runs import first_difference


def test_the_field_that_differs_is_named_with_its_values() -> None:
    before = {"model": "m", "projection": {"seed": 0, "dimension": 4}}
    assert first_difference(before, before) is None
    assert first_difference(before, {**before, "model": "n"}) == ("model", "m", "n")
    other = {"model": "m", "projection": {"seed": 1, "dimension": 4}}
    assert first_difference(before, other) == ("projection seed", 0, 1)
    assert first_difference(before, {"model": "m"}) == ("projection", before["projection"], None)


def test_what_changes_the_numbers_changes_the_fingerprint(tiny_model: str) -> None:
    tokenizer = load_tokenizer(tiny_model)

    def made(masking: Masking | None = None, store_as: str = "float16", **options: Any) -> dict[str, Any]:
        config = ExtractorConfig(tiny_model, dtype="float32", **options)
        return fingerprint(config, masking or Masking(), tokenizer, store_as)

    first = made()
    assert first["projection"]["halves"] == "independent"
    assert {"rows": 32, "dimension": 8192, "seed": 0}.items() <= first["projection"].items()
    plain = ExtractorConfig(tiny_model, dtype="float32")
    assert first == fingerprint(plain, Masking(), load_tokenizer(tiny_model), "float16")
    changed = {
        "masking end_of_turn": made(Masking(end_of_turn=False)),
        "stored_as": made(store_as="float32"),
        "adapter layers": made(adapter=Adapter(layers="last:1")),
        "projection seed": made(projection_seed=1),
        "projection rows": made(rank=16),
        "quantization": made(quantization="4bit"),
    }
    for name, other in changed.items():
        difference = first_difference(first, other)
        assert difference is not None
        assert difference[0] == name
    tokenizer.chat_template = "{{ messages }}"
    template = first_difference(first, made())
    assert template is not None
    assert template[0] == "template"
    assert first_difference(made(quantization="8bit"), changed["quantization"]) == ("quantization", "8bit", "4bit")
    assert "quantization" not in first  # nor in those of earlier tables
    assert "adapter" not in made(representation="hidden")
    difference = first_difference(made(representation="hidden"), made(representation="weighted-hidden"))
    assert difference == ("representation", "hidden", "weighted-hidden")
