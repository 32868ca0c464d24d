"""FC6xx: what a release needs beside right weights."""

from flamingo_ckpt.codes.code import Code

CODES: tuple[Code, ...] = ()
