"""`--config FILE`: a YAML file of flags, as a command line. Knows no flag."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT = "--not-"  # what a flag that is `false` in the file begins with, for the parser to judge


def flags_in(file: Path) -> list[str]:
    """The flags of a YAML mapping, there without their dashes: `port: 8000` is `--port 8000`.

    `true` gives a flag alone, `false` its opposite, null leaves it out, a list gives it several times. Raises ValueError naming the file
    and what is wrong with it.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Numbers stay as they are written: a key or a revision may look like one."""

        yaml_implicit_resolvers = {  # noqa: RUF012  (yaml's name)
            first: [entry for entry in entries if entry[0] in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null")]
            for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    try:
        loader = Loader(file.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:  # its text repeats the line, which may hold a key
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ValueError(f"--config {file} is not valid YAML{where}: {getattr(error, 'problem', None) or 'it cannot be read'}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ValueError(f"--config {file} must hold a mapping from flags to values, such as `port: 8000`")
    return flags_of_mapping(content, f"--config {file}")


def flags_of_mapping(content: Mapping[Any, Any], where: str) -> list[str]:
    """The same of a mapping that was read; `where`, in errors, is what holds it."""
    words: list[str] = []
    for name, value in content.items():
        flag = "--" + str(name).strip("-").replace("_", "-")
        if flag == "--config":
            raise ValueError(f"{where} names another config: put everything into one")
        for one in value if isinstance(value, list) else [value]:
            words += _words(flag, one, where)
    return words


def _words(flag: str, value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if value is False:
        return [f"{NOT}{flag.removeprefix('--')}"]
    if value is True:
        return [flag]
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {flag.strip('-')} must be a value or a list of values, not a mapping")
    return [f"{flag}={value}"]
