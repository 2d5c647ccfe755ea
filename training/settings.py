"""What all settings have in common: fields on the command line, their help texts, and checks of their values."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from dataclasses import dataclass, field

from blipren.training.errors import UsageError


def positional(**keywords):
    """A field that is a positional argument on the command line."""
    return field(metadata={"positional": True}, **keywords)


def choice(*choices, default):
    """A field with a closed list of values."""
    return field(default=default, metadata={"choices": choices})


@functools.cache
def field_docs(settings_class: type) -> dict[str, str]:
    """The string literal under each field of a settings dataclass, its parents' included. Raises if one has none."""
    docs: dict[str, str] = {}
    for parent in reversed(settings_class.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for statement, following in zip(body, body[1:] + [None]):
            if isinstance(statement, ast.AnnAssign):
                literal = following.value if isinstance(following, ast.Expr) else None
                if not (isinstance(literal, ast.Constant) and isinstance(literal.value, str)):
                    raise TypeError(f"{parent.__name__}.{statement.target.id} has no docstring under it")
                docs[statement.target.id] = " ".join(literal.value.split())
    return docs


def setting_groups(settings_class: type) -> dict[str, list[str]]:
    """Return the names of a command's settings by group, in the order of the file.

    A base class of the settings is a group, and the first line of its docstring its title. What the command's own class
    declares has no title.
    """
    groups: dict[str, list[str]] = {}
    for parent in reversed(settings_class.__mro__[:-1]):
        if names := list(parent.__dict__.get("__annotations__", {})):
            title = "" if parent is settings_class else inspect.getdoc(parent).splitlines()[0].rstrip(".")
            groups[title] = names
    return groups


@dataclass(kw_only=True)
class Settings:
    """Base of all settings: checks closed lists and types of plain fields when made, wherever the values come from."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise UsageError(f"{f.name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
            members = typing.get_args(hints[f.name]) or (hints[f.name],)
            plain = {m for m in members if m in (int, float, bool, str)}
            if (
                plain
                and not any(typing.get_origin(m) for m in members)
                and typing.get_origin(hints[f.name]) is not list
            ):
                if isinstance(value, int) and not isinstance(value, bool) and float in plain and int not in plain:
                    setattr(self, f.name, float(value))
                elif not (value is None and type(None) in members) and type(value) not in plain:
                    wanted = " or ".join(sorted(m.__name__ for m in plain))
                    raise UsageError(f"{f.name} is {value!r} ({type(value).__name__}); it must be {wanted}")
