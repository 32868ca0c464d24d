"""FC430 to FC446: putting weights into a module."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC430",
        "error",
        "checkpoint does not fit the model",
        meaning="The checkpoint and the model do not fit: tensors are missing, unexpected, of "
        "another shape, or can be made only in part. The error lists all of them, and carries the "
        "same as data in its `report`. The model stays as it was; no tensor was filled. In "
        "`parity` it means that side A, the reference, does not fit its own config.",
        hint="`flamingo-ckpt diff SRC model:CONFIG` explains each key. For a part of a model on "
        "purpose: `strict=False`, `exclude=`, or a loading policy; for a partial release: "
        "`convert` with `--base-vision` and `--base-language`.",
    ),
    Code(
        "FC431",
        "error",
        "next to nothing matched",
        meaning="Nearly nothing of the file has a counterpart in the model, or a whole tower that "
        "both have does not match. `strict=False` is for loading parts; a load that matches next "
        "to nothing is an accident under every policy, and elsewhere it ends with a model of "
        "random weights and no message. The model stays as it was.",
        hint="Compare the names in the message: a prefix, another layout, or another model. "
        "`flamingo-ckpt inspect SRC` shows what the file is.",
    ),
    Code(
        "FC432",
        "error",
        "another language model",
        meaning="The language model of the checkpoint is of another family than that of the model. "
        "Perceiver and gated blocks have the same names in all of them and would even load, and "
        "the result would be noise.",
        hint="Build the model on the language model that the checkpoint was trained on; its model "
        "card names it.",
    ),
    Code(
        "FC433",
        "error",
        "left on the meta device",
        meaning="After loading, parameters or buffers of the model would still be on the meta "
        "device, without values, and nothing tells what they should be. Used, they fail late, or "
        "read as arbitrary memory once moved.",
        hint="Build the module on a real device, or set the buffers named in the message before "
        "loading.",
    ),
    Code(
        "FC434",
        "info",
        "not loaded on purpose",
        meaning="Keys of the file were not loaded, and the model does not need them: buffers that "
        "older classes stored and newer ones compute, and what the map knows to be of no use "
        "there. They are named so that the choice can be seen.",
        hint="Nothing is to be done. If one of them was wanted, the model at hand has no part that "
        "would use it.",
    ),
    Code(
        "FC435",
        "info",
        "filled with zeros",
        meaning="The model has something for which the file has nothing, and whose right value is "
        "known to be zero: a bias that the file's own class does not have, the logit bias of a "
        "CLIP that was trained with softmax, or rows that only pad a vocabulary. It was filled "
        "with zeros rather than left at random.",
        hint="Nothing is to be done. Save the model again to have it in the file.",
    ),
    Code(
        "FC436",
        "info",
        "cast to the model's dtype",
        meaning="Tensors were cast to the dtype that the model has, or that `dtype=` asks for. A "
        "cast from float32 to bfloat16 rounds; the other way round changes no value.",
        hint='Build the model in the dtype of the file, or use `dtype="keep"`, where every bit '
        "is wanted.",
    ),
    Code(
        "FC437",
        "error",
        "integers for floating-point weights",
        meaning="The file has integers, 8-bit floats with scales, or complex numbers for a "
        "parameter that is an ordinary floating-point tensor. Those are quantised weights: without "
        "the scales, and the program that applies them, the numbers mean something else. Cast, "
        "they would load and be noise. The model stays as it was.",
        hint="Take the checkpoint from before it was quantised, or load it with the program that "
        "quantised it.",
    ),
    Code(
        "FC438",
        "warning",
        "hooks of the model's own that are not run",
        meaning="Parts of the model have code of their own that runs when a state dict is loaded "
        "(hooks, or a `_load_from_state_dict`). It is not run here, because the tensors are put in "
        "place directly. Where that code renames or changes values, the model may lack something.",
        hint="Save the state dict of the model itself, whose names and values need no change, and "
        "compare the outputs once.",
    ),
    Code(
        "FC440",
        "error",
        "grid of positions unknown",
        meaning="A table of positions has to be resized, and nothing tells how its rows are "
        "arranged: their number is no square, or the model's own grid is none, so that several "
        "heights and widths would fit. Read with the wrong grid, positions are shifted against the "
        "picture and the tower still gives plausible features.",
        hint="Say it: `image_grid=(height, width)` in patches, of the file's model.",
    ),
    Code(
        "FC441",
        "error",
        "width of positions differs",
        meaning="The rows of the two tables of positions have different widths. Resizing changes "
        "how many positions there are, never how wide they are, so this is a table of another "
        "model.",
        hint="Build the model with the width that the message names, or leave the table out with "
        "`exclude=`.",
    ),
    Code(
        "FC442",
        "error",
        "class row on one side only",
        meaning="One table of positions begins with the row of a class token and the other has "
        "none. Taking the class row for the first patch, or the other way round, shifts every "
        "position by one.",
        hint="Build the model with or without a class token as the file has it, or take the row "
        "out of the file's table.",
    ),
    Code(
        "FC443",
        "error",
        "text positions",
        meaning="The table of text positions has another length than the model's, and cannot be "
        "brought to it as was asked: a table cannot be cut to be longer, and there is no other way "
        "than the two named below. The table was left alone.",
        hint="Build the model for as many tokens as the file has, or choose: "
        '`text_positions="linear"` stretches or shrinks the table, `"truncate"` keeps its '
        "first rows as they are.",
    ),
    Code(
        "FC444",
        "error",
        "grid does not fit the source",
        meaning="The grid that was given as `image_grid` does not have as many places as the "
        "file's table has positions. Height times width must be that number, without the class "
        "row.",
        hint="Give the grid of the file's model: the size of its images divided by the size of a "
        "patch.",
    ),
    Code(
        "FC445",
        "error",
        "not a table of positions",
        meaning="Under the name of a table of positions the file has something that is none: a "
        "tensor of another rank, or without a single position. The file is probably of another "
        "kind of model.",
        hint="`flamingo-ckpt inspect SRC` shows what is in it.",
    ),
    Code(
        "FC446",
        "info",
        "positions resized",
        meaning="A table of positions was resized from the file's grid to the model's, with the "
        "kernel that is named. That is the usual way to run a vision tower at another resolution. "
        "The features change a little, so scores of the original size do not carry over exactly.",
        hint="Check in the finding's data whether the grid was inferred; if that guess is wrong, "
        "give `image_grid=(height, width)`.",
    ),
)
