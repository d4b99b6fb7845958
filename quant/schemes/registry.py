"""Which scheme reads which layout. Knows no tensor."""

from __future__ import annotations

from ..linear_format import LinearFormat
from ..platforms import load_plugins
from .awq import AwqScheme
from .base import QuantScheme
from .dense import DenseScheme
from .fp8 import Fp8Scheme
from .gguf import GgufScheme
from .gptq import GptqScheme
from .int_quantized import IntQuantizedScheme
from .load_time import LoadTimeScheme
from .pack_quantized import PackQuantizedScheme

_SCHEMES: dict[str, QuantScheme] = {
    "dense": DenseScheme(),
    "awq": AwqScheme(),
    "gptq": GptqScheme(),
    "pack-quantized": PackQuantizedScheme(),
    "float-quantized": Fp8Scheme(),
    "fp8": Fp8Scheme(),
    "modelopt-fp8": Fp8Scheme(),
    "int-quantized": IntQuantizedScheme(),
    "gguf": GgufScheme(),
    "load-time": LoadTimeScheme(),
}


def scheme_of(stored: LinearFormat) -> QuantScheme:
    """The scheme of a layout. Raises ValueError for one that nobody registered."""
    load_plugins()
    scheme = _SCHEMES.get(stored.layout)
    if scheme is None:
        raise ValueError(f"no scheme reads layout {stored.layout!r}: there are {', '.join(_SCHEMES)}")
    return scheme


def register_scheme(layout: str, scheme: QuantScheme) -> None:
    """Add a layout. Raises ValueError when it is taken."""
    if layout in _SCHEMES:
        raise ValueError(f"layout {layout!r} already has a scheme")
    _SCHEMES[layout] = scheme
