from __future__ import annotations

from pathlib import Path

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


def test_what_changes_the_numbers_changes_the_fingerprint(tiny_model: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    plain = ExtractorConfig(tiny_model, dtype="float32")
    first = fingerprint(plain, Masking(), tokenizer, "float16")
    assert first == fingerprint(plain, Masking(), load_tokenizer(tiny_model), "float16")
    assert first["projection"] == {"kind": "kronecker", "dimension": 1024, "seed": 0}
    changed = {
        "masking end_of_turn": fingerprint(plain, Masking(end_of_turn=False), tokenizer, "float16"),
        "stored_as": fingerprint(plain, Masking(), tokenizer, "float32"),
        "adapter layers": fingerprint(
            ExtractorConfig(tiny_model, dtype="float32", adapter=Adapter(layers="last:1")),
            Masking(),
            tokenizer,
            "float16",
        ),
        "projection seed": fingerprint(
            ExtractorConfig(tiny_model, dtype="float32", projection_seed=1), Masking(), tokenizer, "float16"
        ),
    }
    for name, other in changed.items():
        difference = first_difference(first, other)
        assert difference is not None
        assert difference[0] == name
    tokenizer.chat_template = "{{ messages }}"
    template = first_difference(first, fingerprint(plain, Masking(), tokenizer, "float16"))
    assert template is not None
    assert template[0] == "template"
    hidden = fingerprint(
        ExtractorConfig(tiny_model, representation="hidden", dtype="float32"), Masking(), tokenizer, "float16"
    )
    assert "adapter" not in hidden
