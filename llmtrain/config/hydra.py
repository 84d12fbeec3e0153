"""The door to Hydra: command line -> composed YAML -> typed config, and every mistake as one line.

Hydra composes and nothing else. Its job runner, its logging and its output directories are not used: each
rank of a job would make its own, and `hydra.main` drops what a program returns.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, cast

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from llmtrain.config.base import Config
from llmtrain.config.door import plain_door, rank_door
from llmtrain.config.errors import UserError, describe, did_you_mean
from llmtrain.config.help_page import SHARED, config_groups, help_page
from llmtrain.config.secrets import redact, refusal, texts_of
from llmtrain.config.sweep import run_each
from llmtrain.distributed import World
from llmtrain.importing import signals_end_it

VERSION_BASE = "1.3"
MISSING = "???"
PRIMARY = "config"
"""The file at the top of conf/ that composition begins with, unless a door has one of its own."""

__all__ = ["compose", "config_directory", "hydra_door", "plain_door", "quoted"]

C = TypeVar("C", bound=Config)
Root = type[C] | Callable[[], type[C]]


def config_directory() -> Path:
    """The YAML tree: `conf` inside the installed package, else beside it in the repository."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(
    root: type[C],
    overrides: Sequence[str] = (),
    directory: Path | None = None,
    config_dir: str | Path | None = None,
    primary: str = PRIMARY,
) -> C:
    """`<primary>.yaml` of `directory` with `overrides` as a validated `root`; UserError lists every mistake.

    `config_dir` adds a directory with more options for the groups, as `--config-dir` does.
    """
    tree = _Tree(directory or config_directory(), config_dir, primary)
    composed = _compose(overrides, tree)
    with _one_line_errors():
        value = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    _refuse_secrets(texts_of(value))
    unset = sorted(OmegaConf.missing_keys(composed))
    value = dict(root.complete(_without_missing(value), dict(map(_assigned, overrides))))
    try:
        config = root.model_validate(value)
    except ValidationError as error:
        lines = describe(root, value, error)
        raise UserError(*_choices_by_kind(lines, overrides, config_groups(tree.directories))) from error
    if unset:
        raise UserError(*(f"{key}: missing: set {key}=..." for key in unset))
    return config


def hydra_door(
    root: Root[C],
    run: Callable[[C], int | None],
    doc: str | None = "",
    argv: Sequence[str] | None = None,
    directory: Path | None = None,
    primary: str = PRIMARY,
) -> int:
    """Composes the config that the command line asks for, hands it to `run`, and returns the exit code.

    `root` is the config class, or a function that imports and returns it, so that `--help` needs nothing
    heavy. `primary` is the door's own file in conf/, where it has keys beside those of every run. Mistakes
    (UserError, from here or from `run`) are printed once, by rank 0, a line each.
    """
    door = _Door(root, run, doc or "", directory or config_directory(), primary)
    return rank_door(lambda world: door.answer(sys.argv[1:] if argv is None else argv, world))


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """`argv` without the `--local_rank=N` of the deepspeed launcher; LOCAL_RANK is in the environment."""
    kept: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word in ("--local_rank", "--local-rank"):
            next(rest, None)
        elif not re.match(r"--local[_-]rank=", word):
            kept.append(word)
    return kept


@dataclass(frozen=True)
class _Door(Generic[C]):
    root: Root[C]
    run: Callable[[C], int | None]
    doc: str
    directory: Path
    primary: str

    def answer(self, argv: Sequence[str], world: World) -> int | None:
        options = _parse(without_local_rank(argv))
        _refuse_secrets(map(_assigned, options.overrides))
        module = _module_of(self.run)
        tree = _Tree(self.directory, options.config_dir, self.primary)
        if options.help or options.cfg or options.info:
            if world.is_main:
                _show(options, self.doc, module.rpartition(".")[2], tree)
            return 0
        with signals_end_it():
            root = self.root if isinstance(self.root, type) else self.root()
        if options.multirun:
            return run_each(module, _jobs_of(options, root, tree, world))
        return self.run(
            compose(root, options.overrides, tree.directory, tree.config_dir, primary=tree.primary)
        )


@dataclass(frozen=True)
class _Tree:
    """The YAML files to compose from."""

    directory: Path
    config_dir: str | Path | None = None
    primary: str = PRIMARY

    @property
    def directories(self) -> list[Path]:
        return [self.directory, Path(self.config_dir)] if self.config_dir else [self.directory]


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    options, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise UserError(*(_unknown_option(word) for word in unknown))
    if options.config_dir and not Path(options.config_dir).is_dir():
        raise UserError(f"--config-dir {options.config_dir}: no such directory")
    options.argv = list(argv)
    return options


def _unknown_option(word: str) -> str:
    key = word.lstrip("-")
    hint = f"keys are written without dashes: {key}" if "=" in key else "see --help"
    return f"{word}: no such option; {hint}"


def _show(options: argparse.Namespace, doc: str, door: str, tree: _Tree) -> None:
    if options.help:
        groups = config_groups(tree.directories)
        sys.stdout.write(help_page(doc, door, groups, _choices(options, tree)))
    elif options.cfg == "job" and not options.info:
        composed = _compose(options.overrides, tree)
        with _one_line_errors():
            sys.stdout.write(_yaml(composed, options.package, options.resolve))
    else:
        _ask_hydra_itself(options.argv, tree)


def _yaml(composed: DictConfig, key: str | None, resolve: bool) -> str:
    part = OmegaConf.select(composed, key) if key else composed
    if part is None:
        raise UserError(f"--package {key}: no such key; --cfg job without it shows all keys")
    if not OmegaConf.is_config(part):
        return f"{redact(part, str(key))}\n"
    return OmegaConf.to_yaml(OmegaConf.create(redact(OmegaConf.to_container(part, resolve=resolve))))


def _choices(options: argparse.Namespace, tree: _Tree) -> dict[str, str | None]:
    """{group: the option in use}; empty when the overrides do not compose, for help must come anyway."""
    try:
        composed = _compose(options.overrides, tree, hydra_node=True)
    except UserError:
        return {}
    return {group.partition("@")[0]: option for group, option in composed.hydra.runtime.choices.items()}


def _ask_hydra_itself(argv: Sequence[str], tree: _Tree) -> None:
    """`--info` and `--cfg hydra`: questions about Hydra that only its own main answers, from sys.argv."""
    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        hydra.main(str(tree.directory), tree.primary, VERSION_BASE)(lambda _: None)()
    except SystemExit as end:
        if end.code:
            raise UserError("Hydra could not answer; its reason stands above") from end
    finally:
        sys.argv = before


def _jobs_of(options: argparse.Namespace, root: type[Config], tree: _Tree, world: World) -> list[list[str]]:
    """`--multirun`: the words of each combination's job, all of which are valid."""
    if world.world_size > 1:
        raise UserError(
            f"--multirun under a launcher would run the whole sweep in each of the {world.world_size} ranks: "
            "start it with launch/local.sh or launch/hostfile.sh, whose jobs are of many ranks"
        )
    jobs = []
    extra = ["--config-dir", options.config_dir] if options.config_dir else []
    for number, overrides in enumerate(_combinations(options.overrides)):
        config = compose(root, overrides, tree.directory, tree.config_dir, tree.primary)
        own = [
            _numbered(key, getattr(config, key), number)
            for key in ("name", "output_dir")
            if key in root.model_fields
        ]
        jobs.append([*overrides, *own, *extra])
    return jobs


def _numbered(key: str, value: Any, number: int) -> str:
    return f"{key}={quoted(f'{value}-{number}')}"


def _combinations(overrides: Sequence[str]) -> list[list[str]]:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    with _one_line_errors():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return jobs


def quoted(value: str) -> str:
    """`value` as text that Hydra's grammar takes literally, whatever is in it."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _module_of(run: Callable[..., Any]) -> str:
    """The door's import path, also where `python -m` calls it `__main__`."""
    if run.__module__ != "__main__":
        return run.__module__
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else run.__module__


# Composition


def _compose(overrides: Sequence[str], tree: _Tree, hydra_node: bool = False) -> DictConfig:
    """Hydra's composition. A key that does not exist is let through: validation knows the nearest match."""
    groups = config_groups(tree.directories)
    _refuse_job_options(overrides)
    _refuse_groups_as_keys(overrides, groups)
    words = [*overrides, *_search_path(overrides, tree.config_dir)]
    with (
        _one_line_errors(groups, overrides),
        hydra.initialize_config_dir(str(tree.directory), version_base=VERSION_BASE),
    ):
        while True:
            try:
                return hydra.compose(tree.primary, words, return_hydra_config=hydra_node)
            except ConfigCompositionException as error:
                allowed = _with_new_key(words, str(error))
                if allowed == words:
                    raise
                words = allowed


def _with_new_key(overrides: Sequence[str], message: str) -> list[str]:
    """`overrides` with `key=value` as `++key=value` where Hydra refused the key for being new."""
    refused = re.match(r"Could not override '([^/]+)'\.\nTo append to your config use", message)
    start = f"{refused[1]}=" if refused else None
    return [f"++{word}" if start and word.startswith(start) else word for word in overrides]


def _assigned(override: str) -> tuple[str, str]:
    """The key, or the group, that an override of the command line names, and the text it is given."""
    key, _, text = override.lstrip("+~").partition("=")
    return key, text


def _refuse_secrets(values: Iterable[tuple[str, str]]) -> None:
    """Of (key, text): a config is kept with the run, shown and sent."""
    lines = [line for key, text in values if (line := refusal(key, text))]
    if lines:
        raise UserError(*lines)


def _refuse_job_options(overrides: Sequence[str]) -> None:
    """Hydra's own keys would be accepted and do nothing, because its job runner is not used."""
    for word in overrides:
        key, _ = _assigned(word)
        if key.startswith(("hydra.", "hydra/")) and key != "hydra.searchpath":
            raise UserError(
                f"{word}: Hydra composes the config and does nothing else here, so this has no effect"
            )


def _refuse_groups_as_keys(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """`model.attention=flash` would put a word where a group of keys belongs."""
    wrong = []
    for word in overrides:
        key, option = _assigned(word)
        group = key.replace(".", "/")
        if "." in key and option in groups.get(group, ()):
            wrong.append(f"{word}: an option of a group is chosen with a slash: {group}={option}")
    if wrong:
        raise UserError(*wrong)


def _choices_by_kind(
    lines: Sequence[str], overrides: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> list[str]:
    """`lines` with one for `optimizer.kind=lion` in place of those about keys that another kind has."""
    lines = list(lines)
    for word in overrides:
        key, option = _assigned(word)
        place = key.removesuffix(".kind")
        group = place.replace(".", "/")
        if place == key or option not in groups.get(group, ()):
            continue
        others = rf"{re.escape(place)}\.[^ ]+: (no such key|missing)"
        kept = [line for line in lines if not re.match(others, line)]
        if kept != lines:
            lines = [f"{word}: its other keys are still another kind's; choose it as {group}={option}", *kept]
    return lines


def _search_path(overrides: Sequence[str], config_dir: str | Path | None) -> list[str]:
    if config_dir is None:
        return []
    if any(word.lstrip("+").startswith("hydra.searchpath=") for word in overrides):
        raise UserError("hydra.searchpath: give either this or --config-dir, not both")
    return [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).resolve()}')}]"]


def _without_missing(value: Any) -> Any:
    """`value` without keys that are still `???`, so that validation says they are missing."""
    if isinstance(value, Mapping):
        return {key: _without_missing(inner) for key, inner in value.items() if inner != MISSING}
    return value


# Hydra's own errors


@contextmanager
def _one_line_errors(
    groups: Mapping[str, Sequence[str]] | None = None, overrides: Sequence[str] = ()
) -> Iterator[None]:
    """Hydra's, OmegaConf's and YAML's exceptions, which span lines and come with tracebacks, as UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(_explain(error, groups or {}, overrides)) from error


def _explain(error: Exception, groups: Mapping[str, Sequence[str]], overrides: Sequence[str]) -> str:
    """One line for what Hydra or OmegaConf said, with the options there are and the one probably meant."""
    message = _flat(str(error))
    if isinstance(error, OverrideParseException):
        quoting = "quote a value that has special characters: 'key=\"a=b\"'"
        return f"{error.override or repr('')}: not a valid override: {message}; {quoting}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        names = (name.rpartition("/")[2] for name in error.options)
        known = [name for name in names if name != SHARED]
        listed = f"{group} has {', '.join(known)}"
        return f"{group}={option}: no such option; {listed}{did_you_mean(option, known)}"
    refused = re.match(r"Could not override '([^'@]+)", message)
    if refused and refused[1] not in groups:
        listed = f"groups are {', '.join(groups)}"
        return f"{refused[1]}: no such group; {listed}{did_you_mean(refused[1], groups)}"
    if message.startswith("Config group override must be"):
        words = [word for word in overrides if word.partition("=")[0] in ("", *groups)]
        return f"{' '.join(words)}: a group takes the name of one of its options: {message}"
    if message.startswith("Multiple values for"):
        return f"{message}; on the command line write it without the +"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {message}"
    cause = f": {_flat(str(error.__cause__))}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return message + cause


def _flat(message: str) -> str:
    """A message of several lines as one, without the addresses and types that help nobody."""
    lines = [line.strip() for line in message.splitlines()]
    useless = ("See https", "full_key:", "object_type=", "reference_type=")
    return ", ".join(line for line in lines if line and not line.startswith(useless))
