"""FC0xx: usage, the destination, the environment."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC001",
        "error",
        "unknown format",
        meaning="",
        hint="",
    ),
    Code(
        "FC002",
        "error",
        "cannot read the source",
        meaning="",
        hint="",
    ),
    Code(
        "FC003",
        "error",
        "destination exists",
        meaning="",
        hint="",
    ),
    Code(
        "FC004",
        "error",
        "cannot write the destination",
        meaning="",
        hint="",
    ),
    Code(
        "FC005",
        "error",
        "destination is the source",
        meaning="",
        hint="",
    ),
    Code(
        "FC006",
        "error",
        "options contradict each other",
        meaning="",
        hint="",
    ),
    Code(
        "FC007",
        "error",
        "source changed while it was read",
        meaning="",
        hint="",
    ),
    Code(
        "FC008",
        "error",
        "internal error",
        meaning="",
        hint="",
    ),
    Code(
        "FC010",
        "error",
        "interrupted",
        meaning="",
        hint="",
    ),
)
