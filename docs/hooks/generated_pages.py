"""Pages that mkdocs makes from the repository: a page for each command, and the benchmarks' README."""

import dataclasses
import posixpath
import re
import shutil
from pathlib import Path

from mkdocs.structure.files import File

from blipren.training.cli import command_module, command_names, settings_class
from blipren.training.settings import field_docs, setting_groups

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "build" / "docs" / "blipren"  # `paths` of mkdocs.yml
COMMANDS = "reference/commands"
BENCHMARKS = "results/benchmarks.md"


def type_name(annotation) -> str:
    """Return the type of a setting as it is written in Python."""
    return annotation.__name__ if type(annotation) is type else str(annotation)


def default_text(field: dataclasses.Field) -> str:
    """Return the text about the default of a setting, empty where it has none or nothing."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        value = None
    return "" if value in (None, "") else f", default `{value}`"


def flag_name(field: dataclasses.Field) -> str:
    """Return a setting's name on the command line."""
    return field.name.upper() if field.metadata.get("positional") else "--" + field.name.replace("_", "-")


def settings_list(settings: type, names: list[str]) -> str:
    """Return a Markdown definition list of settings: flag, values and default, then the help text."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    docs = field_docs(settings)
    entries = []
    for name in names:
        field = fields[name]
        choices = field.metadata.get("choices")
        values = " or ".join(f"`{choice}`" for choice in choices) if choices else f"`{type_name(field.type)}`"
        entries.append(f"`{flag_name(field)}` {values}{default_text(field)}\n\n:   {docs[name]}")
    return "\n\n".join(entries)


def command_page(name: str) -> str:
    """Return the reference page of a command."""
    settings = settings_class(name)
    positionals = [flag_name(field) for field in dataclasses.fields(settings) if field.metadata.get("positional")]
    usage = " ".join(["blipren", name, *positionals, "[--SETTING VALUE ...]"])
    parts = [f"# blipren {name}", command_module(name).__doc__.strip(), f"```text\n{usage}\n```"]
    groups = setting_groups(settings)
    for title in sorted(groups, key=bool):  # what has no title comes first
        parts += [f"## {title or 'Arguments'}", settings_list(settings, groups[title])]
    return "\n\n".join(parts) + "\n"


def on_startup(command, dirty):
    """Make a folder named as the package: mkdocstrings finds the source of a package by the name of its folder.

    It has to exist before mkdocstrings reads its configuration.
    """
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "training"]:
        (SOURCE / path.name).symlink_to(path)


def on_config(config):
    """Put a page for each command into the navigation."""
    pages = [f"{COMMANDS}/index.md", *({f"blipren {name}": f"{COMMANDS}/{name}.md"} for name in command_names())]
    for section in config.nav:
        for entry in section.get("Reference", ()):
            if entry.get("Commands") == COMMANDS:
                entry["Commands"] = pages
    return config


def on_files(files, config):
    """Add the generated pages to those of docs/."""
    rows = [f"- [`{name}`]({name}.md): {command_module(name).__doc__.splitlines()[0]}" for name in command_names()]
    index = (ROOT / "docs" / "hooks" / "commands.md").read_text(encoding="utf-8") + "\n".join(rows) + "\n"
    pages = {
        f"{COMMANDS}/index.md": index,
        BENCHMARKS: (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"),
    }
    pages |= {f"{COMMANDS}/{name}.md": command_page(name) for name in command_names()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between docs/ and benchmarks/README.md, which are right in the repository, into links of the site.

    Notebooks are no part of the site: their links become their names.
    """
    path = page.file.src_uri
    if path == BENCHMARKS:
        return markdown.replace("](../docs/", "](../")
    to_root = posixpath.relpath(".", posixpath.dirname(path) or ".")
    markdown = re.sub(r"\[([^\]]+)\]\((?:\.\./)+(notebooks/[\w-]+\.ipynb)\)", r"\1 (`\2`)", markdown)
    depth = "../" if to_root == "." else f"../{to_root}/"
    return markdown.replace(
        f"]({depth}benchmarks/README.md", f"]({posixpath.relpath(BENCHMARKS, posixpath.dirname(path) or '.')}"
    )
