"""Environment variables in place of flags, as container images are told. Knows no image.

Every flag of `octavo serve` is a variable: `--mem-fraction-static 0.9` is `OCTAVO_MEM_FRACTION_STATIC=0.9`; those that SGLang's guide and
other images set go without the prefix too. Arguments win over the environment, and the environment over a --config file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from .arguments import serve_parser

PREFIX = "OCTAVO_"
# What images are usually told without a prefix. Names that a shell or a scheduler may set for its own ends are not among them.
PLAIN = (
    "MODEL_PATH",
    "TOKENIZER_PATH",
    "SERVED_MODEL_NAME",
    "TP_SIZE",
    "DP_SIZE",
    "PORT",
    "QUANTIZATION",
    "KV_CACHE_DTYPE",
    "MEM_FRACTION_STATIC",
    "CONTEXT_LENGTH",
    "MAX_RUNNING_REQUESTS",
    "MAX_RADIX_CACHE_LEN",
    "API_KEY_FILE",
    "LOG_LEVEL",
    "LOG_FORMAT",
)
_NOT_FLAGS = {"OCTAVO_API_KEY", "OCTAVO_ADMIN_API_KEY", "OCTAVO_CACHE_DIR"}  # read elsewhere
# What Kubernetes and Docker tell of a service that is called octavo.
_OF_A_SERVICE = re.compile(r"OCTAVO_(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)=|OCTAVO_PORT=(tcp|udp)://")
_YES, _NO = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def flags_from(environ: Mapping[str, str], words: Sequence[str]) -> list[str]:
    """The flags that the environment asks for and `words`, the arguments, do not give themselves.

    Exits as the parser does for values that a flag does not take. Raises ValueError for an OCTAVO_ variable that is no flag, one that is
    neither true nor false, and two that contradict.
    """
    parser = serve_parser("octavo serve")
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    by_name = {flag.removeprefix("--").replace("-", "_").upper(): flag for flag in actions if flag.startswith("--")}
    given = set(vars(parser.parse_words(words)))
    if "model" in given:
        given.add("model_path")
    wanted: dict[str, tuple[str, str]] = {}  # by what the flag sets: the variable, and the flag as it would be written
    for variable, value in sorted(environ.items()):
        name = _name_of(variable, value)
        if name is None:
            continue
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            raise ValueError(f"the variable {variable} is no flag" + (f"; did you mean {PREFIX}{near[0]}?" if near else ": unset it"))
        flag = by_name[name]
        said: str | None = f"{flag}={value}"
        if actions[flag].nargs == 0:
            said = _alone(flag, by_name, variable, value)
        if said is None or actions[flag].dest in given:
            continue
        parser.parse_words([said], where=f"in the variable {variable}: ")
        before = wanted.setdefault(actions[flag].dest, (variable, said))
        if before[1].split("=", 1)[1:] != said.split("=", 1)[1:]:
            raise ValueError(f"the variables {before[0]} and {variable} contradict each other: unset one")
    return [said for _, said in wanted.values()]


def _name_of(variable: str, value: str) -> str | None:
    """What a variable calls its flag; None for one that is not for us, or is set to nothing."""
    if not value or variable in _NOT_FLAGS or _OF_A_SERVICE.match(f"{variable}={value}"):
        return None
    if variable.startswith(PREFIX):
        return variable.removeprefix(PREFIX)
    return variable if variable in PLAIN else None


def _alone(flag: str, by_name: Mapping[str, str], variable: str, value: str) -> str | None:
    """The flag that is given alone for true; for false its opposite, or nothing where it has none."""
    if value.lower() in _YES:
        return flag
    if value.lower() in _NO:
        return by_name.get(flag.removeprefix("--").replace("-", "_").upper().replace("ENABLE_", "DISABLE_")) if "enable" in flag else None
    raise ValueError(f"the variable {variable} is {value!r}: give true or false")
