"""FC460 to FC465: what was trained, saved, and taken up again."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC460",
        "error",
        "value that no checkpoint holds",
        meaning="Something is in, or should go into, a training state that is no plain value: an "
        "object of a class, a key that is no text, nesting without end, an epoch that is no "
        "number. Reading it back would mean running code, so no such value is read or written "
        "here.",
        hint="Keep numbers, text, lists, dicts and tensors in checkpoints; leave the object out "
        "where it is saved.",
    ),
    Code(
        "FC461",
        "error",
        "parallel wrapper",
        meaning="The model is wrapped for parallel training in a way that does not serve here: it "
        "is split by FSDP1, split already, or there is no process group to split it over. The "
        "pieces of FSDP1 have lost names and shapes.",
        hint="Split with `flamingo_ckpt.models.shard_model`, which is FSDP2, once, in a run that "
        "`torchrun` started.",
    ),
    Code(
        "FC462",
        "error",
        "nothing to save",
        meaning="The model cannot be saved as it is: nothing in it is trained, so a file of what "
        "was trained would be empty, or two names that should be one tensor have come apart. Such "
        "a file would load and lack what matters.",
        hint="`trainable_only=False` saves the whole model. If a layer was replaced in one of two "
        "places, put the same module in both.",
    ),
    Code(
        "FC463",
        "error",
        "training state does not fit",
        meaning="The training state in the file does not fit the optimizer or the scheduler at "
        "hand: other groups, parameters in another order, states of other shapes, or a part that "
        "the file does not have. torch would take moments of one parameter for those of another "
        "without a word. Nothing was loaded.",
        hint="Build optimizer and scheduler as they were built for the run that is taken up; leave "
        "them out to take up the weights alone.",
    ),
    Code(
        "FC464",
        "error",
        "training step cannot be made",
        meaning="The training step was asked for in a way that cannot work: no source or no batch, "
        "two sources of one name, batches without labels, a loss that depends on nothing that is "
        "trained, rows of the embedding that are not there. Nothing was trained.",
        hint="Correct what the message names; the README's section on training has a working "
        "example.",
    ),
    Code(
        "FC465",
        "error",
        "another process failed",
        meaning="Of several processes that save or load together, the one that writes failed, and "
        "the others were told so instead of waiting for it for ever. Its own message has the "
        "cause. Nothing was put in place.",
        hint="Look for the cause in the message and in the log of the first process, then run it "
        "again.",
    ),
)
