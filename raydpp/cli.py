"""The raydpp command, and what the scripts under jobs/ share with it: typed functions become commands.

Options come from the functions' signatures, their help from the docstrings. Each also comes from a YAML or JSON file
(``--config``), a finished run's ``run.json`` among them.
"""

from __future__ import annotations

import inspect
import logging
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

import docstring_parser
import jsonargparse
import yaml
from rich.console import Console

from raydpp.demo import demo
from raydpp.errors import UserError
from raydpp.extract.stage import extract
from raydpp.ingest.stage import ingest
from raydpp.measure.stage import measure
from raydpp.runs import INTERRUPTED, Outcome
from raydpp.select.cut import cut
from raydpp.select.stage import select

STAGES: tuple[Callable[..., Outcome], ...] = (ingest, extract, select, cut, measure, demo)
_POSITIONAL = {"inputs", "corpus", "table", "tables", "selection"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``raydpp`` command. Returns 0, or 2 for a mistake of the user's."""
    parser = jsonargparse.ArgumentParser(
        prog="raydpp",
        description="How diverse is an instruction dataset, and which subset of it is worth training on. The road:"
        " ingest, extract, select, measure. Start with: raydpp demo",
        formatter_class=_HelpFormatter,
        parser_mode="raydpp",
    )
    commands = parser.add_subcommands(required=True, dest="stage")
    for stage in STAGES:
        commands.add_subcommand(stage.__name__, stage_parser(stage), help=_documented(stage).short_description)
    parsed = parser.parse_args(arguments)
    name = parsed.stage
    return run(next(stage for stage in STAGES if stage.__name__ == name), parsed[name])


def run_job(stage: Callable[..., Outcome], arguments: Sequence[str] | None = None) -> int:
    """One stage as a script of its own, for ``ray job submit``. Returns 0, or 2 for a mistake of the user's."""
    return run(stage, stage_parser(stage).parse_args(arguments))


def run(stage: Callable[..., Outcome], options: jsonargparse.Namespace) -> int:
    """Call a stage with parsed options; print its line, or the user's mistake in words."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("raydpp").setLevel(logging.INFO)
    given = {name: value for name, value in vars(options).items() if name != "config"}
    try:
        outcome = stage(**given)
    except UserError as error:
        print(f"raydpp {stage.__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"raydpp {stage.__name__}: interrupted; the same command again goes on", file=sys.stderr)
        return 130
    if outcome.tables:
        console = Console(width=None if sys.stdout.isatty() else 120)
        for table in outcome.tables:
            console.print(table)
    for path in outcome.record.get("paths", ()):
        print(path)
    print(outcome.summary)
    if "next" in outcome.record:
        print(outcome.record["next"])
    return 130 if outcome.record.get("status") == INTERRUPTED else 0


def stage_parser(stage: Callable[..., Outcome]) -> jsonargparse.ArgumentParser:
    """A parser with one option for each parameter of a stage's function."""
    documented = _documented(stage)
    helps = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in documented.params}
    hints = typing.get_type_hints(stage)
    parser = jsonargparse.ArgumentParser(
        description=f"{documented.short_description}\n\n{documented.long_description or ''}",
        formatter_class=_HelpFormatter,
        parser_mode="raydpp",
    )
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,
        help="YAML or JSON file with options by name, or the run.json of a run to repeat; options given here win.",
    )
    for name, parameter in inspect.signature(stage).parameters.items():
        kind, several = _item_type(hints[name])
        settings: dict[str, Any] = {"type": kind, "help": helps[name]}
        if kind is bool:  # --name and --no-name
            settings = {"action": jsonargparse.ActionYesNo(no_prefix="no-"), "help": helps[name]}
        required = parameter.default is inspect.Parameter.empty
        if several:
            settings["nargs"] = "+"
        if name in _POSITIONAL and required:
            parser.add_argument(name, **settings)
        elif required:
            parser.add_argument(_flag(name), required=True, **settings)
        else:
            parser.add_argument(_flag(name), default=parameter.default, **settings)
    return parser


def _item_type(hint: Any) -> tuple[Any, bool]:
    """The type of an option's value, and whether several may be given: list[str] | None -> (str, True)."""
    for choice in (hint, *typing.get_args(hint)):
        if typing.get_origin(choice) is list:
            return typing.get_args(choice)[0], True
    return hint, False


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _documented(stage: Callable[..., Any]) -> docstring_parser.Docstring:
    return docstring_parser.parse(stage.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the paragraphs of the description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(part, width, indent) for part in text.split("\n\n") if part.strip())


def _load(text: str) -> Any:
    """YAML; of a run.json only its configuration."""
    value = yaml.safe_load(text)
    if isinstance(value, dict) and {"stage", "config", "versions"} <= value.keys():
        return {name: option for name, option in value["config"].items() if option is not None}
    return value


jsonargparse.set_loader("raydpp", _load, exceptions=(yaml.YAMLError,))


if __name__ == "__main__":
    sys.exit(main())
