"""`--config FILE`: a YAML file of flags, as a command line. Knows no flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def flags_in(file: Path) -> list[str]:
    """The flags of a YAML mapping, there without their dashes: `port: 8000` is `--port 8000`.

    `true` gives a flag alone, `false` and null leave it out, a list gives it several times. Raises ValueError naming the file and what is
    wrong with it.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ValueError(f"--config {file} must hold a mapping from flags to values, such as `port: 8000`")
    words: list[str] = []
    for name, value in content.items():
        flag = "--" + str(name).strip("-").replace("_", "-")
        if flag == "--config":
            raise ValueError(f"--config {file} names another config: put everything into one")
        for one in value if isinstance(value, list) else [value]:
            words += _words(flag, one, file)
    return words


def _words(flag: str, value: Any, file: Path) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if not isinstance(value, str | int | float):
        raise ValueError(f"--config {file}: {flag.strip('-')} must be a value or a list of values, not a mapping")
    return [f"{flag}={value}"]
