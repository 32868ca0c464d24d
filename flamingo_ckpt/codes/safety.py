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
    Code(
        "FC507",
        "warning",
        "pickle in the release",
        meaning="A file of the release is a pickle. Loading a pickle can run any program that "
        "its author put in; scanners look for known patterns and are bypassed every month. "
        "flamingo-ckpt reads them without executing anything, but those who download the "
        "release have other tools. Beside safetensors it is an error: a pickle that nobody "
        "needs is only a risk.",
        hint="`flamingo-ckpt convert FILE OUT/` writes the same weights as safetensors. Remove "
        "training arguments, optimizer states and the like.",
    ),
    Code(
        "FC508",
        "warning",
        "code in the release",
        meaning="The release has Python files, notebooks, scripts or programs, or a config "
        "whose `auto_map` names classes to be fetched and run. Whoever loads it with "
        "`trust_remote_code=True` runs that code, in the version that is there on that day. An "
        "`auto_map` into another repository runs what somebody else can change, and is an "
        "error, as programs are.",
        hint="Leave it out where transformers has the class itself. Otherwise review the code, "
        "pin the revision, and waive the finding with an owner and an end date.",
    ),
    Code(
        "FC509",
        "error",
        "looks like a secret",
        meaning="A text file or the metadata of the weights holds something in the form of a "
        "token, a key or a password. What was public once stays public: bots read new uploads "
        "within minutes, and deleting the file leaves it in the history. The report shows only "
        "its first characters.",
        hint="Revoke it where it was issued, then remove it. If it is no secret, waive it with "
        "the file as the key.",
    ),
    Code(
        "FC510",
        "warning",
        "symbolic link",
        meaning="The entry is a link and not a file. An upload puts the content of its target "
        "there, or fails; copies and archives may keep a link to nothing.",
        hint='Put the file itself there: `cp --remove-destination "$(readlink -f FILE)" FILE`.',
    ),
    Code(
        "FC511",
        "warning",
        "path of a machine",
        meaning="A config, a card or the metadata of the weights names an absolute path of the "
        "machine that it was made on, often with the name of a user. It tells strangers about "
        "your systems, and loaders that follow it (`_name_or_path`) look for something that is "
        "not there.",
        hint="Replace it by the id of a repository, or remove the field.",
    ),
)
