"""FC0xx: usage, the destination, the environment."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC001",
        "error",
        "unknown format",
        meaning="The source exists and can be read, but its content is no checkpoint in any format "
        "that is known here. Formats are told by the first bytes of a file, never by its name, so "
        "a renamed or wrapped file does not help or hurt. For a folder it means that no weights "
        "were found in it: no index, no set of shards, no single weights file under a usual name. "
        "Nothing was read beyond that.",
        hint="Look at the first bytes that the message shows. Unpack archives first, and name a "
        "file with an unusual name itself instead of its folder.",
    ),
    Code(
        "FC002",
        "error",
        "cannot read the source",
        meaning="The system refused to open, list or read the source: it is not there, may not be "
        "read, is no regular file, or the disk gave an error. The message carries the system's own "
        "words. Nothing was written.",
        hint="Check the path and its permissions (`ls -l`). An address of another kind than "
        "`hf://` is not opened: download the file first, then name it.",
    ),
    Code(
        "FC003",
        "error",
        "destination exists",
        meaning="There is something at the destination already, or something of the other kind: a "
        "file where a folder is to be written, or a folder where a file is. An existing release is "
        "never replaced by accident, so the run stopped before it wrote anything. An empty folder "
        "does not count.",
        hint="Name another destination, or replace it on purpose with `--overwrite`, which "
        "exchanges old and new in one step.",
    ),
    Code(
        "FC004",
        "error",
        "cannot write the destination",
        meaning="The destination cannot be written: its parent folder is missing, the disk is full "
        "or read-only, permissions are lacking, or the path is a symbolic link or a mount point, "
        "which cannot be exchanged atomically. Files are staged beside the destination and renamed "
        "at the end, so nothing that looks complete was left, and what stood there before still "
        "stands. The same code is given where the report itself cannot be written.",
        hint="Follow the hint of the message: make the parent folder, free space, or name a place "
        "on another disk. A destination that is a link is named by its target.",
    ),
    Code(
        "FC005",
        "error",
        "destination is the source",
        meaning="The destination is the source, or a folder that contains it, so that writing "
        "would replace the very bytes that are being read. Nothing was written.",
        hint="Name another destination; to exchange the two afterwards, move them yourself once "
        "`verify` has passed.",
    ),
    Code(
        "FC006",
        "error",
        "options contradict each other",
        meaning="The command line, or the arguments of a Python function, ask for things that do "
        "not go together, do not exist or have no effect: a suffix that contradicts `--format`, an "
        "option without the one it belongs to, a device or dtype that cannot be used. An option "
        "that would be ignored in silence is refused as well, because somebody believed in it. No "
        "source was changed and nothing was written.",
        hint="The message names the option at fault; `flamingo-ckpt VERB --help` shows the usage.",
    ),
    Code(
        "FC007",
        "error",
        "source changed while it was read",
        meaning="While the source was read, its size, its time of modification or the file behind "
        "the name changed. What was copied may be half of one state and half of another, so it was "
        "thrown away. A training run that still writes its checkpoint, or a download in progress, "
        "is the usual cause.",
        hint="Wait until the writer has finished, then run the same command again.",
    ),
    Code(
        "FC008",
        "error",
        "internal error",
        meaning="Something happened that this program did not expect: a mistake in it, or memory "
        "that ran out. It is not a statement about the checkpoint. Staged files were removed and "
        "no destination was replaced.",
        hint="Run it again with `--debug` and report the traceback. If memory ran out, close other "
        "programs, or for `parity` give `--max-memory`.",
    ),
    Code(
        "FC010",
        "error",
        "interrupted",
        meaning="The run was stopped by Ctrl-C or by a signal before it had an answer. Staged "
        "files were removed; what stood at the destination still stands.",
        hint="Run the same command again; it starts over.",
    ),
    Code(
        "FC011",
        "error",
        "not a report",
        meaning="The file was to be rendered as a stored report, and is not one: it is no JSON, it "
        "lacks a field that every report has, a field holds something else than it should, or "
        "it was written by a version of the tool whose reports this one does not read. Nothing "
        "was rendered: a report that is read half could say `passed` where the rest said more.",
        hint="Give the file that `--output report.json` or `--json` wrote, whole and unedited. "
        "`report schema` prints what a report has to look like.",
    ),
    Code(
        "FC012",
        "error",
        "optional package missing",
        meaning="The verb needs a package that is not installed with flamingo-ckpt, because "
        "most people never need it. Nothing was done without it, and nothing was taken for "
        "done.",
        hint="Install the extra that the message names, such as `pip install "
        "'flamingo-ckpt[sign]'`.",
    ),
)
