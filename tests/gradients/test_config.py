from __future__ import annotations

import subprocess
import sys

import pytest

from raydpp.gradients.config import Dtype, resolve_dtype


@pytest.mark.parametrize(
    ("dtype", "device", "resolved"),
    [("auto", "cpu", "float32"), ("auto", "cuda", "bfloat16"), ("float16", "cpu", "float16")],
)
def test_the_type_follows_the_device(dtype: Dtype, device: str, resolved: Dtype) -> None:
    assert resolve_dtype(dtype, device) == resolved


@pytest.mark.parametrize(
    "module", [*(f"gradients.{name}" for name in ("config", "tokenization", "model", "fingerprint")), "extract.stage"]
)
def test_options_are_read_without_torch(module: str) -> None:
    code = f"import sys, raydpp.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert f"raydpp.{module}" in loaded
    assert not {"torch", "transformers", "peft", "gguf", "scipy"} & set(loaded)
