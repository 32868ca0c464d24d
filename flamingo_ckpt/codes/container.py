"""FC1xx: the bytes are not what their format asks for."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC101",
        "error",
        "malformed header",
        meaning="",
        hint="",
    ),
    Code(
        "FC102",
        "error",
        "truncated",
        meaning="",
        hint="",
    ),
    Code(
        "FC103",
        "error",
        "byte ranges overlap, leave holes or point outside",
        meaning="",
        hint="",
    ),
    Code(
        "FC104",
        "error",
        "duplicate entry",
        meaning="",
        hint="",
    ),
    Code(
        "FC105",
        "error",
        "checksum mismatch",
        meaning="",
        hint="",
    ),
    Code(
        "FC106",
        "error",
        "malformed archive",
        meaning="",
        hint="",
    ),
    Code(
        "FC107",
        "error",
        "index and shards disagree",
        meaning="",
        hint="",
    ),
    Code(
        "FC109",
        "error",
        "compressed data expands too far",
        meaning="",
        hint="",
    ),
    Code(
        "FC110",
        "error",
        "malformed pickle",
        meaning="",
        hint="",
    ),
    Code(
        "FC111",
        "error",
        "limit exceeded",
        meaning="",
        hint="",
    ),
    Code(
        "FC112",
        "error",
        "unsupported container",
        meaning="",
        hint="",
    ),
    Code(
        "FC113",
        "error",
        "records that nothing refers to",
        meaning="",
        hint="",
    ),
    Code(
        "FC114",
        "error",
        "checksum absent",
        meaning="",
        hint="",
    ),
)
