"""Options by the name of whoever used them: what ``--preset`` sets where an option is not given."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Wang et al. 2024 (arXiv 2402.02318), section 4 and appendix, and their published code. The base model was
    # llama-7b. The kernel exp(g (x.y - 1) / 2) with g = 1 is the rbf with gamma g / 4 on unit rows.
    "paper": {
        "extract": {
            "lora_rank": 512,
            "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "lora_init": "gaussian",
            "dimension": 4096,
            "max_length": 2048,
            "seed": 0,
        },
        "select": {"kernel": "rbf", "gamma": 0.25, "quality_scale": "quantiles"},
        "measure": {"kernel": "rbf", "gamma": 0.25, "reference_seeds": [0, 1, 2, 3, 4], "drop_below": -7.0},
    },
}
"""By preset and command: option -> value."""


SOURCES = {"paper": "Wang et al. (2024, arXiv 2402.02318)"}
"""Whose presets are."""


def options_of(preset: str, command: str) -> dict[str, Any]:
    """What a preset sets for a command, by option."""
    return PRESETS[preset].get(command, {})


def presets_for(command: str) -> list[str]:
    """The presets that say something of a command."""
    return [name for name, commands in PRESETS.items() if command in commands]
