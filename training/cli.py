"""`blipren`: one sub-command per step. Arguments are made from the dataclasses in settings/, nothing is declared twice."""

import argparse
import atexit
import dataclasses
import importlib
import os
import sys
import types
import typing
from pathlib import Path

import torch.distributed
import transformers
import yaml

from blipren.training.errors import UsageError, UserError
from blipren.training.memory import keep_freed_memory
from blipren.training.settings import COMMANDS, Settings, field_docs


def _plain_type(annotation) -> tuple[type, bool]:
    """`int | None` -> (int, False); `list[str]` -> (str, True). A union takes its first member that is not None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return (typing.get_origin(annotation) or annotation), False


def _add_arguments(parser: argparse.ArgumentParser, settings_class: type[Settings]) -> None:
    docs = field_docs(settings_class)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        kind, many = _plain_type(hints[field.name])
        keywords = {"help": docs[field.name].replace("%", "%%"), "default": argparse.SUPPRESS}
        choices = field.metadata.get("choices")
        if choices:
            keywords["choices"] = choices
        if field.metadata.get("positional"):
            if many:
                keywords["nargs"] = "+"
            elif field.default is not dataclasses.MISSING:
                keywords["nargs"] = "?"
            keywords["metavar"] = field.name.upper()
            # absent positionals may come from the recipe, so argparse must not demand them
            keywords["nargs"] = "*" if many else "?"
            parser.add_argument(field.name, type=kind, **keywords)
            continue
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **keywords)
        elif kind is dict:
            parser.add_argument(flag, type=yaml.safe_load, metavar="{KEY: VALUE}", **keywords)
        else:
            if many:
                keywords["nargs"] = "+"
            parser.add_argument(flag, type=kind, **keywords)


def recipe_path(name: str) -> Path:
    """A recipe is a file, or the name of one that ships in training/recipes/."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(__file__).parent / "recipes" / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.yaml")))
    raise UsageError(f"recipe {name!r} is neither a file nor one of the recipes that ship with blipren: {known}")


def load_recipe(name: str) -> dict[str, dict]:
    """Reads a recipe: one mapping a command. Raises `UsageError` for anything else, and for unknown sections."""
    path = recipe_path(name)
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not all(isinstance(v, dict) for v in recipe.values()):
        raise UsageError(
            f"recipe {path} must be a mapping of commands to their settings, such as 'train: {{steps: 10}}'"
        )
    unknown = [section for section in recipe if section not in COMMANDS]
    if unknown:
        raise UsageError(f"recipe {path} has a section {unknown[0]!r}; sections are: {', '.join(COMMANDS)}")
    return recipe


def build_settings(command: str, flags: dict, config: str | None = None) -> Settings:
    """Recipe section, then flags over it, into the command's validated settings."""
    settings_class = COMMANDS[command].settings
    values = dict(load_recipe(config).get(command, {})) if config else {}
    known = {field.name for field in dataclasses.fields(settings_class)}
    for name in values:
        if name not in known:
            raise UsageError(
                f"unknown setting {name!r} in section {command!r} of {config}; settings are: {', '.join(sorted(known))}"
            )
    values.update({k: v for k, v in flags.items() if v is not None and v != []})
    missing = [
        f.name
        for f in dataclasses.fields(settings_class)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(
            f"blipren {command} needs {', '.join(m.upper() for m in missing)}; see blipren {command} --help"
        )
    return settings_class(**values)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `blipren` command. Returns the exit status: 0 done, 1 failed, 2 wrong use."""
    parser = argparse.ArgumentParser(prog="blipren", description="Give any language model eyes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        sub.add_argument("--config", help="recipe: a YAML file, or the name of one that ships (training/recipes)")
        _add_arguments(sub, command.settings)
    flags = vars(parser.parse_args(arguments))
    command, config = flags.pop("command"), flags.pop("config")
    try:
        settings = build_settings(command, flags, config)
        keep_freed_memory()
        # load reports and bars of base models say nothing that a user of a command can act on
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        module, function = COMMANDS[command].function.rsplit(".", 1)
        status = getattr(importlib.import_module(module), function)(settings)
    except UsageError as error:
        print(f"blipren {command}: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"blipren {command}: {error}", file=sys.stderr)
        return 1
    return status or 0


def command() -> None:
    """The `blipren` command as a process: `main`, then an end that several processes can rely on."""
    status = main()
    if not torch.distributed.is_initialized():
        sys.exit(status)
    # gloo's threads free the tensors of the last collective under Python's lock; where the interpreter is being torn
    # down by then, the process aborts and torchrun calls a run failed that has done all its work
    # (pytorch/pytorch#179291). DDP keeps the group from being destroyed, so we leave without the teardown.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    command()
