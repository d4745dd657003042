"""What a report's page holds, read without a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any


def unpacked(html: str) -> list[str]:
    """What the page's packed scripts hold: of each figure its specification and columns, then Vega."""
    packed = re.findall(r'<script type="application/gzip"[^>]*>(.*?)</script>', html, re.DOTALL)
    return [gzip.decompress(base64.b64decode(text)).decode() for text in packed]


def figures(html: str) -> dict[str, dict[str, Any]]:
    """The specification and columns of each figure, by title; the first of those of one title."""
    found = [json.loads(text) for text in unpacked(html)[:-1]]
    return {one["spec"]["title"]: one for one in reversed(found)}
