"""Which versions of Transformers the integration works with: stated here, and as the extra in pyproject.toml."""

from __future__ import annotations

from importlib.util import find_spec

from vitgraph.errors import MissingExtraError, UnsupportedModuleError

OLDEST = "5.17"
"""The oldest version whose vision modules return what the backends return. There is no upper bound."""


def require_transformers() -> None:
    """Checks the installed Transformers.

    Raises:
        MissingExtraError: there is none.
        UnsupportedModuleError: it is older than `OLDEST`.
    """
    if find_spec("transformers") is None:
        raise MissingExtraError("transformers", "transformers", "vitgraph.accelerate")
    from packaging.version import Version
    from transformers import __version__ as installed

    if Version(Version(installed).base_version) < Version(OLDEST):
        raise UnsupportedModuleError(
            f"transformers {installed} is installed; vitgraph.accelerate needs {OLDEST} or newer: "
            "pip install -U 'vitgraph[transformers]'"
        )
