"""FC470 to FC479: the hub."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC470",
        "error",
        "no such repository",
        meaning="The hub answered that there is no repository of this name, or none that this "
        "login may see: a private one looks the same to those who may not read it.",
        hint="Check the spelling. For a private repository log in with `hf auth login`, or set "
        "HF_TOKEN. A local path has to exist, or it is taken for the name of a repository.",
    ),
    Code(
        "FC471",
        "error",
        "no such file or revision on the hub",
        meaning="The repository is there, and has no such file, folder, branch, tag or commit. "
        "Names are case-sensitive, and a file may be on another branch.",
        hint="`inspect hf://OWNER/NAME` says what the repository holds when it finds no checkpoint "
        "in it; a revision stands after `@`, a path after the next slash.",
    ),
    Code(
        "FC472",
        "error",
        "gated repository",
        meaning="The repository gives its files to those who accepted its terms, and this login "
        "has not, or there is no login.",
        hint="Accept the terms on the page of the repository, then log in with `hf auth login` or "
        "set HF_TOKEN.",
    ),
    Code(
        "FC473",
        "error",
        "offline and not in the cache",
        meaning="HF_HUB_OFFLINE (or `local_files_only`) forbids asking the network, and the cache "
        "of huggingface_hub does not have what was asked for.",
        hint="Download it once while online, with HF_HUB_OFFLINE unset, or name a local path. The "
        "cache lies under HF_HOME, which has to be the same one.",
    ),
    Code(
        "FC474",
        "error",
        "the hub cannot be reached",
        meaning="The connection failed, or the hub answered with a status that says nothing of the "
        "file: it is overloaded, asks for more patience than a command should have, or broke off "
        "again and again. What may pass was tried several times.",
        hint="Check the connection, the proxy and HF_ENDPOINT, and run the same command again: "
        "what a download has brought so far is kept.",
    ),
    Code(
        "FC475",
        "error",
        "invalid name on the hub",
        meaning="The address names nothing that the hub could have. A repository is `OWNER/NAME`, "
        "and an address on the command line is `hf://OWNER/NAME[@REVISION][/PATH]`; a revision "
        "with slashes is written `refs/pr/1`, or with `%2F`.",
        hint="Mend the address. A local file or folder is named by its path, without `hf://`.",
    ),
    Code(
        "FC476",
        "error",
        "server's answer is not what was asked for",
        meaning="Headers of a remote file are read by ranges, and every answer is held to the "
        "request: its range, its length, the size and the commit that the hub lists. This one "
        "differs. Either the server knows no ranges, or something stands in between (a proxy, a "
        "mirror, the page of a captive portal), or it lies.\n\n"
        "Nothing is guessed from such an answer, and the whole file is never downloaded instead "
        "without being asked for.",
        hint="Check HF_ENDPOINT and the proxy settings. Where the server only lacks ranges, "
        "`flamingo-ckpt pull` downloads the file, checked against the digests that the hub lists.",
    ),
    Code(
        "FC477",
        "error",
        "file changed on the hub while it was read",
        meaning="Two answers for one file came with different ETags, or with another digest than "
        "the list of files gives. Parts of two files would have been taken for one.",
        hint="Run the same command again. A full commit as revision does not change under it.",
    ),
    Code(
        "FC478",
        "error",
        "hub refuses the upload",
        meaning="The hub did not take the files: this login may not write there, the branch moved "
        "in the meantime, or a rule of the repository forbids it. No commit was made; large files "
        "that had arrived before are not visible to anyone.",
        hint="Log in with a token that may write (`hf auth login`), leave `--direct` out to open a "
        "pull request instead, and look at what moved: `push --dry-run` shows it.",
    ),
    Code(
        "FC479",
        "error",
        "digest or size of a downloaded file differs",
        meaning="The file that arrived does not have the size, the SHA-256 or git's digest that "
        "the hub lists for it at this commit, also after it was downloaded a second time. It was "
        "damaged on the way, or the cache was, or a mirror serves something else.",
        hint="Nothing was put in place. Check the disk of the cache (HF_HOME) and HF_ENDPOINT, and "
        "pull again; if it stays so, tell the owner of the repository or of the mirror.",
    ),
)
