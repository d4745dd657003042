"""The response masks of a corpus under the chat templates of model families: how many are wrong, and what they cost.

A mask is right where it is the one that transformers makes of the same template with generation marks around what the
assistant wrote and the end of its turn. A row is refused where the family's own template refuses it.

    PYTHONPATH=. python tests/benchmarks/masks.py CORPUS --per-source 100
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from printed import machine, table

from raydpp import runs
from raydpp.errors import RowError
from raydpp.extract.sample import choose
from raydpp.gradients.config import Masking
from raydpp.gradients.tokenization import TokenizedExample, tokenize
from raydpp.storage import Folder
from raydpp.tables import read_columns
from tests.gradients.chat_families import FAMILIES, byte_level, marked, published

_LONGEST = Masking(2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="output folder of raydpp ingest")
    parser.add_argument("--per-source", type=int, default=100, help="conversations of every source")
    options = parser.parse_args()
    sources = runs.load_finished(["ingest"], Folder.at(options.corpus))["counts"]["sources"]
    chosen = choose(Folder.at(options.corpus), sources, per_source=options.per_source)
    rows = chosen.filter(read_columns(chosen.parts, ["id", "source", "messages"])).to_pylist()
    tokenizer = byte_level()
    found = []
    for family, template in FAMILIES.items():
        wrong, refused, seconds, rendering = 0, 0, 0.0, 0.0
        for row in rows:
            expected = mask(row["messages"], tokenizer, marked(template))
            began = time.perf_counter()
            actual = mask(row["messages"], tokenizer, published(template))
            seconds += time.perf_counter() - began
            refused += isinstance(actual, str)
            wrong += not same(actual, expected)
            began = time.perf_counter()
            plainly(row["messages"], tokenizer)
            rendering += time.perf_counter() - began
        figures = [f"{wrong}", f"{refused}", f"{1000 * seconds / len(rows):.2f}", f"{seconds / rendering:.2f}x"]
        found.append([family, *figures])
    print(f"{len(rows)} conversations of {len(sources)} sources; {machine('transformers')}\n")
    table(["family", "wrong masks", "refused by the template", "ms a row", "of rendering and tokenising once"], found)


def mask(messages: Any, tokenizer: Any, template: str) -> TokenizedExample | str:
    tokenizer.chat_template = template
    try:
        return tokenize(messages, tokenizer, _LONGEST)
    except RowError as error:
        return str(error)


def plainly(messages: Any, tokenizer: Any) -> None:
    try:
        tokenizer.apply_chat_template(messages, return_dict=True)
    except Exception:
        return


def same(actual: TokenizedExample | str, expected: TokenizedExample | str) -> bool:
    if isinstance(actual, str) or isinstance(expected, str):
        return actual == expected
    return np.array_equal(actual.ids, expected.ids) and np.array_equal(actual.response, expected.response)


if __name__ == "__main__":
    main()
