"""What the settings of all commands share: fields on the command line, their help texts, checks of their values."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from dataclasses import dataclass, field

from blipren.training.errors import UsageError


def positional(**keywords):
    """Return a field that is a positional argument on the command line."""
    return field(metadata={"positional": True}, **keywords)


def choice(*choices, default):
    """Return a field with a closed list of values."""
    return field(default=default, metadata={"choices": choices})


@functools.cache
def field_docs(settings_class: type) -> dict[str, str]:
    """Return the help text of each setting by name: the string literal under its field.

    Raises:
        TypeError: a field has none.
    """
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


def describe_type(annotation) -> str:
    """Return the type of a setting in words, such as `int or list of str`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        return f"list of {describe_type(typing.get_args(annotation)[0])}"
    return {dict: "a mapping"}.get(annotation) or annotation.__name__


def is_of_type(value, annotation) -> bool:
    """Return whether a value is of the type of a setting. An int is a float, a bool is not an int."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(is_of_type(value, a) for a in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return isinstance(value, list) and all(is_of_type(item, *typing.get_args(annotation)) for item in value)
    return type(value) is annotation or (annotation is float and type(value) is int)


@dataclass(kw_only=True)
class Settings:
    """Base of all settings. Checks types and closed lists when made, wherever the values come from."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value, annotation = getattr(self, f.name), hints[f.name]
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise UsageError(f"{f.name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
            if not is_of_type(value, annotation):
                wanted = describe_type(annotation)
                hint = (
                    ": YAML reads 1e-4 as text, write 1.0e-4" if isinstance(value, str) and wanted == "float" else ""
                )
                raise UsageError(f"{f.name} is {value!r} ({type(value).__name__}); it must be {wanted}{hint}")
            if type(value) is int and float in (annotation, *typing.get_args(annotation)):
                setattr(self, f.name, float(value))
