"""FC2xx: names, shapes and dtypes."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC201",
        "error",
        "no tensors",
        meaning="The source was read and there is no tensor to work with: the file holds settings "
        "or a training state only, the chosen part has none, the tensors are not in a dict under "
        "names, or `--include` and `--exclude` left nothing. A converted file without tensors "
        "would load into any model under `strict=False`, so none is written.",
        hint="`flamingo-ckpt inspect SRC` shows what is in the file and beside the weights; "
        "`--wrapper-key KEY` names the part that holds them.",
    ),
    Code(
        "FC202",
        "error",
        "two sources for one name",
        meaning="Two tensors lay claim to one name. Two shards hold it, two keys become equal once "
        "a prefix such as `module.` is removed or the map has renamed them, or two names of one "
        "tied tensor hold different values. Which of them a loader takes is luck, so nothing is "
        "chosen here. Two keys that are one and the same tensor are no collision.\n\n"
        "In `diff` it is a warning where both sides have the same two values.",
        hint="Leave one out with `--exclude`, or in Python with `exclude=`; remove a stale shard; "
        "for tied weights correct `tie_word_embeddings` in the config.",
    ),
    Code(
        "FC203",
        "error",
        "missing tensor",
        meaning="A tensor that should be there is not: the model that the config describes "
        "computes with it, or the other side of a comparison has it. A loader with `strict=False` "
        "would leave that part of the model at its random initial values and say nothing. What is "
        "absent by design, such as a frozen tower of an OpenFlamingo checkpoint, is never counted "
        "here; that is FC215.",
        hint="Look for the tensor under another name or prefix in the list of unexpected ones; "
        "`flamingo-ckpt diff SRC model:CONFIG` tells likely misspellings. Where a frozen tower is "
        "wanted, `convert --base-vision` and `--base-language` supply it.",
    ),
    Code(
        "FC204",
        "error",
        "unexpected tensor",
        meaning="A tensor is there that nothing asks for: the model of the config does not have "
        "it, or the other side of a comparison lacks it. Loaders drop such a tensor in silence or "
        "fail, and often it is the missing one under a wrong name. It can also be a sign that the "
        "config is of another model.",
        hint="Compare with the missing tensors first (FC203, FC214). If it is really not needed, "
        "leave it out with `convert --exclude NAME`; if the config is wrong, name the right one "
        "with `--config`.",
    ),
    Code(
        "FC205",
        "error",
        "shape differs",
        meaning="A tensor has another shape than the model of the config, or the other side, has "
        "for it. It cannot be loaded as it is, and loaders that ignore mismatched sizes leave a "
        "random tensor in its place. Usually the config is of another size of the model, or the "
        "vocabulary or the grid of positions was changed.",
        hint="Name the config of the model that was trained. `flamingo-ckpt inspect SRC` shows the "
        "shapes; rows of a vocabulary are padded or cut with `convert --to LAYOUT --vocab-rows N`.",
    ),
    Code(
        "FC206",
        "error",
        "dtype differs",
        meaning="A tensor has another dtype than was asked for or than the other side has. The "
        "values may be equal, rounded, or more exact than before; the names of dtypes do not tell "
        "which. `parity` notes it (severity `info`) where the values are the same in another "
        "dtype. In a numpy file it means elements of two bytes without a stated type, which could "
        "be bfloat16 or anything else.",
        hint="If the cast was meant, give `verify` the same `--dtype`, or compare with `diff "
        "--level keys`. For numpy files that hold bfloat16: `--npy-bfloat16`.",
    ),
    Code(
        "FC207",
        "error",
        "ambiguous weights",
        meaning="More than one thing could be meant by the weights: a folder with several "
        "checkpoints, a file with several state dicts of equal rank, a state dict with another "
        "inside it, or a `--wrapper-key` that the file does not have. A wrong choice, such as the "
        "moving average in place of the weights, would look right and be a different model. "
        "Nothing is chosen in silence.",
        hint="Name the file instead of the folder, or the part with `--wrapper-key KEY`; the "
        "message lists what there is.",
    ),
    Code(
        "FC208",
        "error",
        "flat parameters",
        meaning="The tensors are flat parameters of FSDP1: pieces of a long vector that one "
        "process held, into which many tensors were packed. Names and shapes of those tensors are "
        "not in the file, so it cannot be taken apart here.",
        hint="Save again with `StateDictType.FULL_STATE_DICT` where the model can be built. In "
        "Python: shard with FSDP2 (`fully_shard`, or `flamingo_ckpt.models.shard_model`), or load "
        "before wrapping.",
    ),
    Code(
        "FC209",
        "info",
        "left out",
        meaning="Something of the source is not in the result, with the reason: an optimizer "
        "state, a second alias of a tensor, a tensor that the target layout has no place for and "
        "that nobody needs there, a part that no model at hand takes up. Everything that is left "
        "out is listed, so that nothing is lost unseen.\n\n"
        "As a warning it means that something of use may be lost: a tensor that could have been "
        "trained, metadata that the format of the destination cannot hold, or metadata about which "
        "shards disagree.",
        hint="For a note nothing is to be done. For a warning choose a format or layout that holds "
        "it: a `.safetensors` destination keeps metadata, `openflamingo-full` keeps every tensor.",
    ),
    Code(
        "FC210",
        "info",
        "tied tensors",
        meaning="Two names are one tensor. It is stored once, the other names are recorded in the "
        "metadata, and loaders that know the model tie them again. That is how most releases are "
        "stored.\n\n"
        "As a warning it says that the folder's own `config.json` calls the model untied although "
        "the file shares the tensor: a loader that follows the config will then find a name "
        "missing.",
        hint="Nothing for a note. For the warning: `convert --untie` writes a copy for every name, "
        "or correct `tie_word_embeddings` in the config.",
    ),
    Code(
        "FC211",
        "info",
        "views materialised",
        meaning="Two tensors of the torch file overlap in memory without being the same tensor, "
        "such as a slice of a larger one. Safetensors and most loaders know no such sharing, so "
        "each was written out in full. The values are right; the file is larger, and changing one "
        "no longer changes the other.",
        hint="Nothing is to be done, unless the size matters: then save the larger tensor alone.",
    ),
    Code(
        "FC212",
        "warning",
        "prefix on some names only",
        meaning="The wrapper prefix `module.` was removed from some names and others do not have "
        "it. A training wrapper puts it on all names or on whole branches. Where it is on a few, "
        "`module` may be a submodule that the model really has, and then the new names are wrong.",
        hint="Compare with the model: `flamingo-ckpt diff SRC model:CONFIG`. If the names should "
        "stay as they are: `--keep-prefix`.",
    ),
    Code(
        "FC213",
        "warning",
        "pattern fits no name",
        meaning="A pattern of `--include` or `--exclude` fits no name in the file, so it had no "
        "effect. Most often it is misspelt, or written for the names of another layout. What was "
        "meant to be left out is in the result.",
        hint="`flamingo-ckpt inspect SRC` lists the names. A pattern is matched against the whole "
        "name, with and without its prefix; `*` also spans dots.",
    ),
    Code(
        "FC214",
        "error",
        "renamed",
        meaning="A tensor is missing under its right name, and another one without a counterpart "
        "looks like it: equal content, equal after a transpose, or the same shape under the "
        "nearest name. `strict=False` would skip both and leave the model with random weights "
        "there. It is a guess, with the evidence in the message; nothing was renamed.",
        hint="If the guess is right, rename the tensor where the file is made and save again. If "
        "the whole file is spelt in another layout, `convert --to LAYOUT` renames by rule.",
    ),
    Code(
        "FC215",
        "info",
        "absent by design",
        meaning="The tensor is not in the checkpoint and should not be: it belongs to a frozen "
        "tower (CLIP, or the language model), and releases of OpenFlamingo leave those out by "
        "design. The base release supplies it when the model is created. It counts neither as "
        "missing nor as a fault.\n\n"
        "In `verify` it is a warning: the tensor came from a base, and without that base there is "
        "nothing to compare it with, so the verdict is `incomplete`.",
        hint="To make a checkpoint that needs no base: `convert --to hf-flamingo --base-vision SRC "
        "--base-language SRC --config FILE`. For `verify`, name the same bases again.",
    ),
    Code(
        "FC216",
        "error",
        "resizable",
        meaning="Two tensors are the same but for their number of rows: a vocabulary to which "
        "tokens were added, or a table of positions for another size of image. It cannot be loaded "
        "as it stands, and unlike other differences of shape there is a known way to make it fit. "
        "The message says by how many rows they differ.",
        hint="Vocabulary: `convert --to LAYOUT --vocab-rows N`, or resize the model's embedding "
        "before loading. Positions: `load_checkpoint` resizes them from grid to grid.",
    ),
    Code(
        "FC217",
        "error",
        "wrong interval of gated cross-attention",
        meaning="Gated cross-attention stands before other decoder layers on one side than on the "
        "other, so `cross_attn_every_n_layers` is not the same. Loaded all the same, blocks would "
        "be put before the wrong layers or be left at random, and the model would talk but not see "
        "well. Releases of OpenFlamingo have 1, 2 or 4.",
        hint="Correct `cross_attn_every_n_layers` in the config, or name the config of the model "
        "that was trained. `flamingo-ckpt inspect SRC` shows which layers have the blocks.",
    ),
    Code(
        "FC218",
        "error",
        "moved content",
        meaning="The content of a tensor is on the other side, but under another name or "
        "transposed: a query under the key's name, two swapped layers, a matrix written the other "
        "way round. Shapes are equal, so every loader takes it, and the model computes nonsense in "
        "that place. It is told by equal digests of the content, not by likeness.",
        hint="Correct the script that renamed the tensors, then run `flamingo-ckpt diff A B "
        "--level bits` again.",
    ),
)
