"""The raydpp command, and what the scripts under jobs/ share with it: typed functions become commands.

Options come from the functions' signatures, their help and its groups from the docstrings. Each also comes from a YAML
or JSON file (``--config``), a finished run's ``run.json`` among them. Only the command that is asked for is imported.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import jsonargparse
import yaml

from raydpp.errors import UserError
from raydpp.logs import LogFormat, logging_to_stderr
from raydpp.presets import SOURCES, options_of, presets_for
from raydpp.report.table import shorten, visible

if TYPE_CHECKING:
    from raydpp.runs import RunResult

    Stage = Callable[..., RunResult]

COMMANDS = {
    "ingest": ("raydpp.ingest.stage", "raw files of any schema -> a corpus of conversations"),
    "warmup": (
        "raydpp.warmup.stage",
        "a corpus -> checkpoints of a LoRA adapter, for the gradients of its training",
    ),
    "extract": ("raydpp.extract.stage", "a corpus -> a point for each conversation, its projected LoRA gradient"),
    "select": ("raydpp.select.stage", "a table of gradients -> the subset worth training on (greedy MAP of a DPP)"),
    "cut": ("raydpp.select.cut", "a selection -> the selection for a smaller budget, without a new search"),
    "measure": ("raydpp.measure.stage", "tables of gradients, selections -> how diverse they are, and a report"),
    "refresh": (
        "raydpp.refresh.stage",
        "raw files that come, change and go -> new versions of a selection",
    ),
    "demo": ("raydpp.demo", "all of these on real conversations and a real model, offline, in a few minutes"),
}
"""By name: the module that has a function of that name, and a line of help."""

MISTAKE, AGAIN, INTERRUPTED, TERMINATED = 2, 3, 130, 143
"""Exit codes: the user can mend it; the same command may work later; Ctrl-C; SIGTERM."""

_LONGEST = 500  # characters of what is said of an option

_OF_THE_COMMAND = ("config", "preset", "log_format")
"""Options that no stage knows."""

log = logging.getLogger("raydpp")

_POSITIONAL = {"inputs", "corpus", "table", "tables", "selection"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``raydpp`` command. Returns 0, or what ``run`` does."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        "raydpp",
        usage="%(prog)s COMMAND [options]",
        description="How diverse is an instruction dataset, and which subset of it is worth training on. The road:"
        " ingest, extract, select, measure. Start with: raydpp demo",
        epilog="raydpp COMMAND --help lists the options of a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name", required=True)
    for name, (_, line) in COMMANDS.items():
        commands.add_parser(name, help=line)
    name = parser.parse_args(arguments[:1]).name  # the options are for the parser of that command alone
    stage = find_stage(name)
    return run(stage, parse(stage, arguments[1:], f"raydpp {name}"))


def run_job(stage: Stage, arguments: Sequence[str] | None = None) -> int:
    """One stage as a script of its own, for ``ray job submit``. Returns 0, or what ``run`` does."""
    return run(stage, parse(stage, arguments))


def parse(stage: Stage, arguments: Sequence[str] | None, prog: str | None = None) -> jsonargparse.Namespace:
    """The options of a stage, those of ``--preset`` where they are not given."""
    parser = stage_parser(stage, prog)
    try:
        options = parser.parse_args(arguments)
    except UnicodeDecodeError:
        parser.error("the file of --config is not text: give YAML, JSON or the run.json of a run")
    if preset := options.get("preset"):
        parser.set_defaults(options_of(preset, stage.__name__))
        options = parser.parse_args(arguments)
    return options


def run(stage: Stage, options: jsonargparse.Namespace) -> int:
    """Call a stage with parsed options; print what it found, or one line that says what is wrong.

    With ``log_format`` json both are records of the log, and nothing else is printed.

    Returns:
        0; 2 for a mistake that the user can mend, 3 where the same command may work later (a full disk, a network that
        is down), 130 after Ctrl-C, 143 after SIGTERM, which ends a stage as Ctrl-C does; with log_format json also 1,
        for an error that is none of these, which else is raised.
    """
    form: LogFormat = vars(options).get("log_format", "text")
    with logging_to_stderr(stage.__name__, form):
        try:
            return _run(stage, options, form)
        except Exception as error:
            if form == "text":
                raise
            log.critical("%s", error, exc_info=True, extra={"event": "error", "code": 1})
            return 1


def _run(stage: Stage, options: jsonargparse.Namespace, form: LogFormat) -> int:
    from raydpp import runs

    given = {name: value for name, value in vars(options).items() if name not in _OF_THE_COMMAND}
    ended = INTERRUPTED

    def terminate(*_: Any) -> None:
        nonlocal ended
        ended = TERMINATED
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # only there can signals be caught
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        outcome = stage(**given)
    except UserError as error:
        return _say(stage, str(error), MISTAKE)
    except OSError as error:
        from raydpp.storage import may_pass

        if not may_pass(error):
            advice = "; see that the bucket's name and region are right, and that the credentials may use it"
            return _say(stage, f"{error}{'' if error.errno else advice}", MISTAKE)
        return _say(stage, f"{error}; when that has passed, the same command again goes on", AGAIN)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            signal.signal(number, signal.SIG_IGN)  # it ends as it is: another would only interrupt the ending
        how = "interrupted" if ended == INTERRUPTED else "ended by SIGTERM"
        return _say(stage, f"{how}; the same command again resumes", ended)
    finally:
        if main and signal.getsignal(signal.SIGTERM) == terminate:
            signal.signal(signal.SIGTERM, before)
    code = ended if outcome.record.get("status") == runs.INTERRUPTED else 0
    if form == "json":
        facts = {name: outcome.record.get(name) for name in ("counts", "seconds")}
        log.info("%s", outcome.summary, extra={"event": "summary", "code": code, "out": outcome.out, **facts})
        return code
    if outcome.tables:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120)
        for table in outcome.tables:
            console.print(table)
    for line in (*outcome.record.get("paths", ()), outcome.summary, outcome.record.get("next")):
        if line is not None:
            print(visible(line))
    return code


def _say(stage: Stage, words: str, code: int) -> int:
    log.error("raydpp %s: %s", stage.__name__, words, extra={"event": "error", "code": code})
    return code


def find_stage(name: str) -> Stage:
    """The function behind a command."""
    stage: Stage = getattr(import_module(COMMANDS[name][0]), name)
    return stage


def stage_parser(stage: Stage, prog: str | None = None) -> jsonargparse.ArgumentParser:
    """A parser with one option for each parameter of a stage's function, in the groups of its docstring."""
    description, groups = parse_docstring(stage.__doc__ or "")
    parameters = inspect.signature(stage).parameters
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    shown = [name.upper() if name in _POSITIONAL else f"{_flag(name)} {name.upper()}" for name in required]
    parser = _Parser(
        prog,
        usage=f"%(prog)s {' '.join(shown)} [options]",
        description=description,
        formatter_class=_HelpFormatter,
        parser_mode="raydpp",
    )
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,
        help="YAML or JSON file with options by name, or the run.json of a run to repeat; options given here win.",
    )
    parser.add_argument(
        "--log-format",
        choices=typing.get_args(LogFormat),
        default="text",
        help="text, or json: everything that is said is one JSON object a line on standard error, with time, stage,"
        " level, event (log, progress, summary or error) and message; progress has done, total and rate (a second).",
    )
    if presets := presets_for(stage.__name__):
        parser.add_argument("--preset", choices=presets, help=" ".join(map(_explained(stage), presets)))
    hints = typing.get_type_hints(stage)
    parser.kinds = {name: _item_type(hints[name])[0] for name in parameters}
    for title, helps in groups.items():
        group: Any = parser if title == "Args" else parser.add_argument_group(title)
        for name, text in helps.items():
            kind, several = _item_type(hints[name])
            settings: dict[str, Any] = {"type": kind, "help": text}
            if kind is bool:  # --name and --no-name
                settings = {"action": jsonargparse.ActionYesNo(no_prefix="no-"), "help": text}
            if several:
                settings["nargs"] = "+"
            if name in required and name in _POSITIONAL:
                group.add_argument(name, **settings)
            elif name in required:
                group.add_argument(_flag(name), required=True, **settings)
            else:
                group.add_argument(_flag(name), default=parameters[name].default, **settings)
    return parser


def _explained(stage: Stage) -> Callable[[str], str]:
    """What a preset sets, for people."""

    def words(preset: str) -> str:
        options = options_of(preset, stage.__name__).items()
        shown = [f"{_flag(name)} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in options]
        return f"{preset}: what {SOURCES[preset]} used, {', '.join(shown)}; options given here win."

    return words


def parse_docstring(text: str) -> tuple[str, dict[str, dict[str, str]]]:
    """The description of a Google-style docstring, and by heading (``Args``, or a group's title): parameter -> help."""
    description, *sections = re.split(r"^(\S.*):\n(?= {4})", inspect.cleandoc(text), flags=re.MULTILINE)
    groups = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", body, flags=re.MULTILINE)
        groups[title] = {name: " ".join(words.split()) for name, words in found}
    return description, groups


def _item_type(hint: Any) -> tuple[Any, bool]:
    """The type of an option's value, and whether several may be given: list[str] | None -> (str, True)."""
    for choice in (hint, *typing.get_args(hint)):
        if typing.get_origin(choice) is list:
            return typing.get_args(choice)[0], True
    return hint, False


def _described(kind: Any) -> str:
    """A type for people: Literal["a", "b"] -> one of a, b; float | Literal["auto"] -> a number or auto."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    names = {dict: "options by name", int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    found = [typing.get_origin(one) or one for one in (kind, *choices)]
    words = [_described(one) for one in choices if typing.get_origin(one) is typing.Literal]
    return " or ".join([[name for one, name in names.items() if one in found][-1], *words])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(jsonargparse.ArgumentParser):
    """Says what is wrong with an option in one sentence, as stages do; ``kinds`` are the options' types."""

    kinds: Mapping[str, Any]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if found := re.match(r'Parser key "(\w+)"[^:]*:\s*(.*)', message, re.DOTALL):
            name, detail = found.groups()
            _, wrong_type, value = detail.rpartition("alue: ")
            message = f"{_flag(name)} {value}: give {_described(self.kinds[name])}" if wrong_type else detail
        self.print_usage(sys.stderr)
        said = shorten(visible(message), _LONGEST)
        self.exit(2, f"{self.prog}: {said} ({self.prog} --help lists the options)\n")


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the paragraphs of the description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(part, width, indent) for part in text.split("\n\n") if part.strip())


class _Loader(yaml.SafeLoader):
    """Plain data alone, and no aliases: a few of them can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name): write out what it stands for")
        return super().compose_node(parent, index)


def _load(text: str) -> Any:
    """YAML; of a run.json only its configuration."""
    value = yaml.load(text, _Loader)
    if isinstance(value, dict) and {"stage", "config", "versions"} <= value.keys():
        return {name: option for name, option in value["config"].items() if option is not None}
    return value


jsonargparse.set_loader("raydpp", _load, exceptions=(yaml.YAMLError,))


if __name__ == "__main__":
    sys.exit(main())
