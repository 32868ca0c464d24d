"""YAML of strangers: data only, of bounded size, without aliases that would multiply it."""

from __future__ import annotations

from typing import Any


def load_yaml(text: str, max_chars: int) -> Any:
    """The document.

    Raises:
        ValueError: with one line of reason, for what is not YAML, too long, or has aliases.
    """
    import yaml  # type: ignore[import-untyped]

    if len(text) > max_chars:
        raise ValueError(f"it is longer than {max_chars} characters")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases")
        return yaml.safe_load(text)
    except ValueError:
        raise
    except Exception as error:  # its constructors raise whatever a value like `!!int ""` leads to
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None
