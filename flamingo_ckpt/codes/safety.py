"""FC5xx: what could run code, reach outside its folder, or tell a secret."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC501",
        "error",
        "pickle names code that could run",
        meaning="",
        hint="",
    ),
    Code(
        "FC502",
        "error",
        "tensor depends on an unknown class",
        meaning="",
        hint="",
    ),
    Code(
        "FC503",
        "error",
        "path leaves the folder",
        meaning="",
        hint="",
    ),
    Code(
        "FC504",
        "error",
        "files left behind",
        meaning="",
        hint="",
    ),
    Code(
        "FC505",
        "error",
        "control characters in a name",
        meaning="",
        hint="",
    ),
    Code(
        "FC506",
        "error",
        "unknown classes beside the weights",
        meaning="",
        hint="",
    ),
)
