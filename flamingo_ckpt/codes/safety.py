"""FC5xx: what could run code, reach outside its folder, or tell a secret."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC501",
        "error",
        "pickle names code that could run",
        meaning="The pickle in the file names something that could run code when it is loaded: "
        "`os.system`, `builtins.eval`, `getattr` and the like. Every tool that unpickles the file "
        "runs it with your rights. Nothing of it was executed here; the pickle is only read. An "
        "array of Python objects in a numpy file is a pickle as well, and refused alike. A model "
        "of weights has no reason to name such a thing.",
        hint="Do not load the file with anything else. Ask its author for the weights alone, as "
        "safetensors, and tell the place it came from.",
    ),
    Code(
        "FC502",
        "error",
        "tensor depends on an unknown class",
        meaning="A tensor can be made only with the help of a class that is not known here: a "
        "subclass of tensor, an unknown storage, a model that was pickled whole. What the class "
        "would do to the bytes is code that is not run, so the values are unknown. No tensor was "
        "taken from it.",
        hint="Where that class is installed, save plain tensors: `torch.save(model.state_dict(), "
        "...)`. `--wrapper-key KEY` chooses another part of the file.",
    ),
    Code(
        "FC503",
        "error",
        "path leaves the folder",
        meaning="A file name or link leads out of the folder of the checkpoint: an index that "
        "names `../`, an absolute path or an address, or a symbolic link to elsewhere. Whoever "
        "opens such a release could read or publish files of their own machine. It was not "
        "followed. Links into the blob store of a hub cache are allowed.",
        hint="Copy the file into the folder. If the release came from somebody else, treat the "
        "rest of it with suspicion.",
    ),
    Code(
        "FC504",
        "info",
        "files left behind",
        meaning="Files of the source folder were not taken along: code (`.py`), pickles, and what "
        "no loader of the weights needs. A converted release should run nobody's code by surprise. "
        "The weights are complete without them.",
        hint="`--copy-code` takes code and pickles along, after you have read them; copy other "
        "files by hand.",
    ),
    Code(
        "FC505",
        "error",
        "control characters in a name",
        meaning="The name of a tensor is empty, has control characters or half a character in it, "
        "is reserved, or is too long for the format. Such names can hide in listings or repaint a "
        "terminal. They are escaped wherever they are shown. `convert` refuses them; `inspect` "
        "gives a warning.",
        hint="Leave the tensor out with `--exclude`, or rename it where the file was made.",
    ),
    Code(
        "FC506",
        "warning",
        "unknown classes beside the weights",
        meaning="Beside the weights the file has objects of classes that are not known here, such "
        "as an `argparse.Namespace` or a scheduler. They stayed inert and were left out. Other "
        "tools that load the file import those classes, and `torch.load` with `weights_only=True` "
        "refuses it.",
        hint="`flamingo-ckpt convert SRC DST` writes the weights alone. Before publishing a `.pt`, "
        "leave such objects out.",
    ),
)
