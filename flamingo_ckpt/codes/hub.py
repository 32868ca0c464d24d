"""FC470 to FC479: the hub."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC470",
        "error",
        "no such repository",
        meaning="The hub has no repository of that name, or hides it from this login: for private "
        "repositories the two look the same. Nothing was downloaded.",
        hint="Check the spelling of `owner/name`; for a private one log in with `hf auth login` or "
        "set HF_TOKEN. A local path has to exist.",
    ),
    Code(
        "FC471",
        "error",
        "no such file or revision on the hub",
        meaning="The repository is there, but not the file or the revision in it that was asked "
        "for, or it has no weights under any usual name. Names on the hub are case-sensitive.",
        hint="Look at the list of files on the repository's page; name a branch, a tag or a commit "
        "that exists.",
    ),
    Code(
        "FC472",
        "error",
        "gated repository",
        meaning="The repository is gated: its files are given only to accounts that accepted its "
        "terms. Many base models of Flamingo are.",
        hint="Accept the terms on the page of the repository, then log in with `hf auth login` or "
        "set HF_TOKEN.",
    ),
    Code(
        "FC473",
        "error",
        "offline and not in the cache",
        meaning="No network may be used, by `local_files_only` or HF_HUB_OFFLINE, and the cache "
        "does not have the file. Nothing is replaced by another revision that happens to be there.",
        hint="Download it once while online, or name a local path; the cache has to be the one it "
        "was downloaded to.",
    ),
    Code(
        "FC474",
        "error",
        "the hub cannot be reached",
        meaning="The hub could not be reached, or broke off: no connection, a proxy, a server that "
        "is down. What has arrived is kept in the cache, so that the next try goes on from there.",
        hint="Check the connection, the proxy and HF_ENDPOINT, and try again.",
    ),
    Code(
        "FC475",
        "error",
        "invalid name on the hub",
        meaning="The name cannot be one of the hub: a repository is `owner/name`, with letters, "
        "digits, points, dashes and underscores. Nothing was asked of the network.",
        hint="Correct the name; if a local path was meant, it does not exist.",
    ),
)
