"""FC3xx: the bits and the numbers."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC301",
        "error",
        "bits differ",
        meaning="",
        hint="",
    ),
    Code(
        "FC302",
        "error",
        "inexact cast",
        meaning="",
        hint="",
    ),
    Code(
        "FC303",
        "error",
        "overflow to infinity in a cast",
        meaning="",
        hint="",
    ),
    Code(
        "FC304",
        "error",
        "NaN lost in a cast",
        meaning="",
        hint="",
    ),
    Code(
        "FC305",
        "error",
        "dtype not representable",
        meaning="",
        hint="",
    ),
    Code(
        "FC306",
        "error",
        "unsupported tensor kind",
        meaning="",
        hint="",
    ),
    Code(
        "FC307",
        "error",
        "view expands its storage",
        meaning="",
        hint="",
    ),
    Code(
        "FC308",
        "error",
        "non-canonical BOOL bytes",
        meaning="",
        hint="",
    ),
)
