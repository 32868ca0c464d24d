"""`python -m flamingo_ckpt.codes > docs/findings.md`: the table as a document."""

from flamingo_ckpt.codes.page import to_markdown

if __name__ == "__main__":
    print(to_markdown(), end="")  # noqa: T201  (a command of its own)
