"""FC402 and FC480 to FC489: whether two checkpoints compute the same."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC402",
        "error",
        "hidden behind closed gates",
        meaning="",
        hint="",
    ),
    Code(
        "FC480",
        "error",
        "diverges",
        meaning="",
        hint="",
    ),
    Code(
        "FC481",
        "error",
        "not deterministic",
        meaning="",
        hint="",
    ),
    Code(
        "FC482",
        "error",
        "required run not made",
        meaning="",
        hint="",
    ),
    Code(
        "FC483",
        "error",
        "to blame",
        meaning="",
        hint="",
    ),
    Code(
        "FC484",
        "error",
        "inputs do not serve",
        meaning="",
        hint="",
    ),
    Code(
        "FC485",
        "error",
        "not seen by this check",
        meaning="",
        hint="",
    ),
    Code(
        "FC486",
        "error",
        "continuations differ",
        meaning="",
        hint="",
    ),
    Code(
        "FC487",
        "error",
        "not a number",
        meaning="",
        hint="",
    ),
    Code(
        "FC488",
        "error",
        "not explained",
        meaning="",
        hint="",
    ),
    Code(
        "FC489",
        "error",
        "does not fit into the memory that is allowed",
        meaning="",
        hint="",
    ),
)
