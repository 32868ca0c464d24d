"""FC410 to FC422: layouts, the maps between them, and bases."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC410",
        "error",
        "unknown layout",
        meaning="`--to` or `--from` names a layout that does not exist. Layouts are named as "
        "`flamingo-ckpt layouts` lists them.",
        hint="`flamingo-ckpt layouts` lists them, and the message names the nearest.",
    ),
    Code(
        "FC411",
        "error",
        "no layout fits",
        meaning="No layout has any evidence in the names of the tensors: this is no Flamingo, "
        "CLIP, SigLIP, PaliGemma or language model under a spelling that is known here. The "
        "decision is made by the names alone, never by the name of the file. Copying such a file "
        "with its names kept is possible; renaming it is not.",
        hint="`flamingo-ckpt inspect SRC` shows the names. If they have a prefix of their own, "
        "remove it where the file is made; `--from LAYOUT` insists on one.",
    ),
    Code(
        "FC412",
        "error",
        "ambiguous layout",
        meaning="The names fit two layouts equally well, and the two mean different things by "
        "them. A guess would be right half of the time.",
        hint="Say which it is: `--from LAYOUT`, with one of the two that the message names.",
    ),
    Code(
        "FC413",
        "error",
        "key without a rule",
        meaning="The file is in a known layout, and some of its keys fit no rule of it. Each may "
        "be a misspelling, a part of another model, or something new in the model. None is carried "
        "along unread into the new names. When names are kept, it is a warning and the keys are "
        "kept too.",
        hint="`flamingo-ckpt layouts NAME` prints the rules. Correct misspelt keys where the file "
        "is made, or leave them out with `--exclude`.",
    ),
    Code(
        "FC414",
        "error",
        "no place in the target layout",
        meaning="A tensor of the source has no place in the layout that was asked for, and nothing "
        "says that it is dispensable. Writing the rest would lose a trained part of the model. "
        "Where a layout is known to be lossy, it is a warning that names what is lost.",
        hint="Choose a layout that holds it (`flamingo-ckpt layouts` marks the lossy ones), or "
        "leave it out on purpose with `--exclude`.",
    ),
    Code(
        "FC415",
        "error",
        "tensor does not fit its layout",
        meaning="A tensor cannot be what its name says: its shape does not fit the rule of its "
        "layout, parts that belong together are missing, or a size such as the number of heads is "
        "needed to take it apart and no shape tells it. Rearranging it anyway would give a tensor "
        "of the right shape with its values in wrong places.",
        hint="`--config FILE` tells sizes that no shape does; `--from` names another layout. "
        "`flamingo-ckpt diff SRC model:CONFIG` lists what differs.",
    ),
    Code(
        "FC416",
        "error",
        "layouts are not interchangeable",
        meaning="The two sides, or a checkpoint and its config, are different kinds of model: a "
        "CLIP and a Flamingo, two families of language model, or a model that is recognised but "
        "not computed or converted here. No map leads from one to the other, since none of the "
        "tensors means the same.",
        hint="Check that the right file, layout and config are named. `flamingo-ckpt layouts` "
        "shows which layouts are of one group and can be converted to each other.",
    ),
    Code(
        "FC417",
        "error",
        "half one layout, half another",
        meaning="One file mixes two spellings: most keys are in one layout, some in another. It "
        "looks like a conversion that stopped half way, or a state dict that was patched with "
        "another one. A loader would take what it knows and skip the rest.",
        hint="Take one naming apart with `--include` or `--exclude`, or convert again from the "
        "original.",
    ),
    Code(
        "FC418",
        "warning",
        "vocabulary rows",
        meaning="The vocabulary does not have the rows that are wanted, or its two sides, "
        "embedding and head, do not have as many. Where rows are added they are zeros, never "
        "random, and the message counts them: the logits of such tokens mean nothing until they "
        "are trained. Rows that are cut are named too.\n\n"
        "It is an error where nothing says which number is right, and where the embedding lacks "
        "rows for tokens that are used. For padding by a known rule it is only a note.",
        hint="Say how many rows there should be: `convert --to LAYOUT --vocab-rows N`. If tokens "
        "were added in training, take the checkpoint in which embedding and head both grew.",
    ),
    Code(
        "FC419",
        "error",
        "padding rows are not zero",
        meaning="Rows or columns that are to be cut off as padding are not zero, so they are no "
        "padding: somebody trained or wrote them. Cutting them would lose values, and the way back "
        "would not give the same bits.",
        hint="If the rows may go, say so with `--vocab-rows N`; otherwise keep the layout that has "
        "them.",
    ),
    Code(
        "FC420",
        "error",
        "base does not fit",
        meaning="The release that `--base-vision` or `--base-language` names is not the one that "
        "the checkpoint was trained on: another family, another width, fewer layers, or no such "
        "tower at all. Filled from it, the model would load and produce noise.",
        hint="Name the release that the checkpoint was trained on; for OpenFlamingo it is in the "
        "model card, and `flamingo-ckpt inspect SRC` shows widths and layers.",
    ),
    Code(
        "FC421",
        "info",
        "partial model",
        meaning="The model is partial, or was put together from several sources, and this says "
        "what came from where or what remains unknown. A folder that is marked partial holds in "
        "its config only what the shapes prove.\n\n"
        "It is an error where a whole model would need settings that nobody has told (heads, "
        "activation, epsilon): a config with guessed values would look right and compute something "
        "else.",
        hint="`--config FILE` or `--config PRESET` tells the settings; `--base-vision` and "
        "`--base-language` make the result self-contained.",
    ),
    Code(
        "FC422",
        "info",
        "already in the target layout",
        meaning="The source is in the layout that `--to` asks for already. Its names stay as they "
        "are; nothing was rearranged. Casts and other options took effect all the same.",
        hint="Nothing is to be done. If another result was expected, see `flamingo-ckpt layouts` "
        "for the name of the layout that is meant.",
    ),
)
