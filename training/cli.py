"""`blipren`: finds the commands in training/commands/ and makes their flags from their settings.

A command is one file there. Its name is the command's, its first line the help text, and its function `run` takes the
command's settings and returns the exit status. Nothing here imports torch: `--help` and wrong use answer at once.
"""

import argparse
import atexit
import dataclasses
import importlib
import os
import sys
import types
import typing
from pathlib import Path

import yaml

from blipren.training.engine.memory import keep_freed_memory
from blipren.training.errors import UsageError, UserError
from blipren.training.quiet import hide_library_notices
from blipren.training.settings import Settings, field_docs, setting_groups

FOLDER = Path(__file__).parent / "commands"
RECIPES = Path(__file__).parent / "recipes"
# the order of `blipren --help`; a command that is not named here comes behind them
FIRST = (
    "quickstart", "new", "doctor", "embed", "align", "train", "dpo", "grpo", "evaluate", "compare", "caption", "chat",
    "demo",
)  # fmt: skip


def command_names() -> list[str]:
    """Return the names of all commands."""
    names = sorted(path.stem.removesuffix("_") for path in FOLDER.glob("*.py") if path.stem != "__init__")
    return [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]


def command_file(name: str) -> Path:
    """Return the file of a command. That of `import` is import_.py, since Python reserves the word."""
    return FOLDER / f"{name}{'_' if name == 'import' else ''}.py"


def help_text(name: str) -> str:
    """Return the help text of a command, the first line of its file, without importing it."""
    with command_file(name).open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def command_module(name: str) -> types.ModuleType:
    """Import the file of a command."""
    return importlib.import_module(f"blipren.training.commands.{command_file(name).stem}")


def settings_class(name: str) -> type[Settings]:
    """Return the settings of a command: the type of the argument of its `run`."""
    return typing.get_type_hints(command_module(name).run)["settings"]


def _plain_type(annotation) -> tuple[type, bool]:
    """Return the type of a flag's value and whether it takes several: `int | None` -> (int, False), `list[str]` ->
    (str, True). A union takes its first member that is not None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return (typing.get_origin(annotation) or annotation), False


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _help_with_default(text: str, field: dataclasses.Field) -> str:
    """Return the help text of a flag, with its default unless that is none, off or empty."""
    if _is_required(field):
        return f"{text} (required)"
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if default is None or default is False or default in ([], {}):
        return text
    shown = "on" if default is True else " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} (default: {shown})"


def _add_arguments(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """Add a positional or a flag for every setting, in the groups of the settings' file."""
    docs = field_docs(settings)
    hints = typing.get_type_hints(settings)
    groups = {}
    for title, names in setting_groups(settings).items():
        groups |= dict.fromkeys(names, parser.add_argument_group(title) if title else parser)
    values = {int: "N", float: "X", str: "TEXT", dict: "{KEY: VALUE}"}
    positionals = []
    for field in dataclasses.fields(settings):
        kind, many = _plain_type(hints[field.name])
        if field.metadata.get("positional"):
            positionals.append(field.name.upper() + "..." * many)
            # absent positionals may come from the recipe, so argparse must not demand them
            keywords = {"nargs": "*" if many else "?", "metavar": field.name.upper(), "default": argparse.SUPPRESS}
            parser.add_argument(field.name, type=kind, help=docs[field.name].replace("%", "%%"), **keywords)
            continue
        text = _help_with_default(docs[field.name], field).replace("%", "%%")
        keywords = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = yaml.safe_load if kind is dict else kind
            keywords["nargs"] = "+" if many else None
            if choices := field.metadata.get("choices"):
                keywords["choices"] = [value for value in choices if value is not None]
            else:
                keywords["metavar"] = values[kind]
        groups[field.name].add_argument("--" + field.name.replace("_", "-"), **keywords)
    parser.usage = " ".join([parser.prog, *positionals, "[--config RECIPE] [options]"])


def recipe_path(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that ships in training/recipes/.

    Raises:
        UsageError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.yaml")))
    raise UsageError(f"recipe {name!r} is neither a file nor one of the recipes that ship with blipren: {known}")


def load_recipe(name: str) -> dict[str, dict]:
    """Read a recipe: for each command a mapping from settings to values.

    Raises:
        UsageError: the file holds anything else, or a section that is no command.
    """
    path = recipe_path(name)
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not all(isinstance(v, dict) for v in recipe.values()):
        raise UsageError(
            f"recipe {path} must be a mapping of commands to their settings, such as 'train: {{steps: 10}}'"
        )
    known = command_names()
    unknown = [section for section in recipe if section not in known]
    if unknown:
        raise UsageError(f"recipe {path} has a section {unknown[0]!r}; sections are: {', '.join(known)}")
    return recipe


def build_settings(command: str, flags: dict, config: str | None = None) -> Settings:
    """Return the settings of a command: those of the recipe's section, overridden by the flags.

    Raises:
        UsageError: a setting is unknown, missing, or has a wrong value.
    """
    chosen = settings_class(command)
    values = dict(load_recipe(config).get(command, {})) if config else {}
    known = {field.name for field in dataclasses.fields(chosen)}
    for name in values:
        if name not in known:
            raise UsageError(
                f"unknown setting {name!r} in section {command!r} of {config}; settings are: {', '.join(sorted(known))}"
            )
    values.update({k: v for k, v in flags.items() if v is not None and v != []})
    missing = [f.name for f in dataclasses.fields(chosen) if f.name not in values and _is_required(f)]
    if missing:
        raise UsageError(f"needs {', '.join(m.upper() for m in missing)}; see blipren {command} --help")
    return chosen(**values)


def run_command(name: str, settings: Settings) -> int:
    """Run a command in this process. Returns its exit status."""
    keep_freed_memory()
    return command_module(name).run(settings) or 0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command. Returns the exit status: 0 done, 1 failed, 2 wrong use."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="blipren", description="Give any language model eyes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in command_names():
        text = help_text(name)
        sub = commands.add_parser(name, help=text, description=text)
        if name in arguments[:1]:  # only the settings of the command that runs are read
            sub.add_argument(
                "--config",
                metavar="RECIPE",
                help="YAML file with settings, or the name of one in training/recipes; flags override it",
            )
            _add_arguments(sub, settings_class(name))
    flags = vars(parser.parse_args(arguments))
    name, config = flags.pop("command"), flags.pop("config")
    try:
        return run_command(name, build_settings(name, flags, config))
    except UsageError as error:
        print(f"blipren {name}: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"blipren {name}: {error}", file=sys.stderr)
        return 1


def command() -> None:
    """Run `main` as a process of its own, or as one of several under torchrun."""
    hide_library_notices()
    status = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(status)
    # gloo's threads free the tensors of the last collective under Python's lock. Where the interpreter is being torn
    # down by then, the process aborts, and torchrun reports a failure of a run that has done all its work
    # (pytorch/pytorch#179291). DDP keeps the group from being destroyed, so the process ends without the teardown.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    command()
