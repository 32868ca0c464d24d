"""FC470 to FC479: the hub."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC470",
        "error",
        "no such repository",
        meaning="",
        hint="",
    ),
    Code(
        "FC471",
        "error",
        "no such file or revision on the hub",
        meaning="",
        hint="",
    ),
    Code(
        "FC472",
        "error",
        "gated repository",
        meaning="",
        hint="",
    ),
    Code(
        "FC473",
        "error",
        "offline and not in the cache",
        meaning="",
        hint="",
    ),
    Code(
        "FC474",
        "error",
        "the hub cannot be reached",
        meaning="",
        hint="",
    ),
    Code(
        "FC475",
        "error",
        "invalid name on the hub",
        meaning="",
        hint="",
    ),
)
