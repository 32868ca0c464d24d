"""YAML of strangers: data only, of bounded size, without aliases that would multiply it."""

from __future__ import annotations

from typing import Any

_MAX_DEPTH = 32


def load_yaml(text: str, max_chars: int) -> Any:
    """The document.

    Raises:
        ValueError: with one line of reason, for what is not YAML, too long, or has aliases.
    """
    import yaml  # type: ignore[import-untyped]

    if len(text) > max_chars:
        raise ValueError(f"it is longer than {max_chars} characters")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, loader):  # one after the other: stops before it gets slow
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases")
            if depth > _MAX_DEPTH:
                raise ValueError("it is nested too deeply")
        return yaml.load(text, loader)  # noqa: S506 -- both are safe ones
    except ValueError:
        raise
    except Exception as error:  # its constructors raise whatever a value like `!!int ""` leads to
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None
