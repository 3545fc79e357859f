"""End-to-end MIDI music generation: the package that the notebooks in nbs/ export.

`Request`, `generate`, `open_model`, `regenerate` and `verify` can be imported from here; they are
loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Request", "generate", "open_model", "regenerate", "verify"]

if TYPE_CHECKING:
    from .generation.generate import generate, regenerate
    from .generation.loader import open_model
    from .generation.receipt import verify
    from .generation.request import Request

_HOMES = {
    "Request": "generation.request",
    "generate": "generation.generate",
    "open_model": "generation.loader",
    "regenerate": "generation.generate",
    "verify": "generation.receipt",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'musicgen' has no attribute {name!r}")
    return getattr(import_module(f"musicgen.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
