"""FC6xx: what a release needs beside right weights."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC601",
        "error",
        "no license",
        meaning="The card names no license, an incomplete one, or one that the policy does not "
        "allow. Without a license nobody may use the weights, and the hub shows none.",
        hint="Add `license: mit`, or the one that holds, to the front matter of README.md. "
        "Mind that the licenses of both base models hold on.",
    ),
    Code(
        "FC602",
        "error",
        "no card",
        meaning="The folder has no README.md, or its front matter cannot be read. The card is "
        "where the hub and people find license, base models, and how the weights are loaded.",
        hint="Write a README.md that begins with a front matter of `license:` and "
        "`base_model:` between two lines of `---`.",
    ),
    Code(
        "FC603",
        "warning",
        "base model not pinned",
        meaning="A Flamingo is made of a vision tower and a language model that it was trained "
        "on top of, and works with exactly those. The card names no base model (an error for a "
        "Flamingo), or names one without a commit: what the repository holds may change, and "
        "the release with it.",
        hint="Name it in `base_model:`, and write `ORG/NAME@` and the 40 digits of the commit "
        "somewhere in the card.",
    ),
    Code(
        "FC604",
        "error",
        "config disagrees with the shapes",
        meaning="A field of the config says another size than the tensors have. Loaders "
        "construct the model by the config: they refuse the weights, or skip them in silence "
        "where they were told to ignore mismatched sizes.",
        hint="Take the config that the weights were trained with, or save it again after the "
        "embedding was resized.",
    ),
    Code(
        "FC605",
        "error",
        "tokenizer does not fit",
        meaning="The tokenizer lacks a token that the model was trained with, gives it another "
        "id than the config, or has ids that the embedding has no row for (or far more rows "
        "than ids, a warning). Such a model fails with an index error, or answers with the "
        "wrong tokens and no error at all. So does one whose files give a token different ids: "
        "which of them counts depends on the reader. A release without any tokenizer is a warning.",
        hint="Save the tokenizer that training used, with its added tokens, into the folder.",
    ),
    Code(
        "FC606",
        "error",
        "preprocessing constants differ",
        meaning="Mean, standard deviation, size, scale or filter of the preprocessor (or that "
        "pictures are scaled and normalised at all) are not what this kind of vision tower was "
        "trained with: OpenAI's statistics for CLIP and every OpenFlamingo, one half for SigLIP "
        "and PaliGemma, and the picture size of the config. The model runs, and sees pictures that "
        "are slightly wrong, which costs accuracy that nobody can explain.",
        hint="Copy `preprocessor_config.json` from the release of the tower. For a tower that "
        "was trained otherwise, waive it.",
    ),
    Code(
        "FC607",
        "error",
        "manifest stale",
        meaning="SHA256SUMS does not describe the folder as it is: a file changed since, is "
        "gone, or is new; or `manifest.json` lists other files or tensors than there are.",
        hint="Find out what changed; if it was meant, `flamingo-ckpt manifest DIR` writes it "
        "again. After that, sign again.",
    ),
    Code(
        "FC608",
        "error",
        "signature does not hold",
        meaning="The signature is not of exactly these files, or not by the signer that was "
        "expected, or the key cannot be used. Not covered are git's own files (`.gitattributes`, "
        "which the hub adds, `.gitignore`, `.git`, `.github`) and `.cache` of downloads.",
        hint="Sign again after the last change with `flamingo-ckpt sign`. If nobody changed "
        "anything on purpose, do not upload.",
    ),
    Code(
        "FC610",
        "warning",
        "config lacks what loaders need",
        meaning="The config is missing, or lacks what `AutoConfig` and `AutoModel` of "
        "transformers need to choose a class, or is refused by them. A `model_type` that "
        "transformers does not know is told as a note: such a release is loaded by the code "
        "that it is for.",
        hint="Add the field that is named. `flamingo-ckpt convert --config` writes a complete "
        "config.",
    ),
    Code(
        "FC611",
        "info",
        "conversion record absent or stale",
        meaning="The record in the card says what the weights were made from and what was "
        "proven about them. It is not there (a note), or it is of other weights than those in "
        "the folder (an error): somebody converted again and did not write it again.",
        hint="`flamingo-ckpt check DIR --source SRC --record` writes it in place.",
    ),
    Code(
        "FC612",
        "info",
        "no manifest",
        meaning="The folder has no SHA256SUMS, so those who download it cannot tell whether "
        "they got what was published.",
        hint="`flamingo-ckpt manifest DIR` writes it; `sha256sum -c SHA256SUMS` reads it.",
    ),
    Code(
        "FC613",
        "warning",
        "stated dtype differs",
        meaning="The config states another dtype than most of the weights have. transformers "
        "makes the model in the stated one: a release of bfloat16 then takes twice its size in "
        "memory, or float32 weights are rounded while they are loaded.",
        hint="`flamingo-ckpt check DIR --fix --yes` states the dtype of the weights.",
    ),
    Code(
        "FC614",
        "info",
        "no signature",
        meaning="The folder is not signed, so nobody can tell who published it.",
        hint="`flamingo-ckpt sign DIR --private-key KEY.pem` writes `model.sig`; the public "
        "key goes where users find it.",
    ),
    Code(
        "FC620",
        "error",
        "invalid policy",
        meaning="The policy file cannot be used: it is no TOML, names a field, a check or a "
        "code that does not exist, or waives what cannot be waived. A policy that was "
        "understood in part would be a check that is weaker than its author meant, so nothing "
        "was checked.",
        hint="Mend the field that is named. The README lists what a policy can say.",
    ),
    Code(
        "FC621",
        "error",
        "waiver expired",
        meaning="The end date of a waiver has passed. It lets nothing pass any more, and is an "
        "error of its own so that somebody decides: exceptions that nobody looks at again "
        "become the rule.",
        hint="Mend what it was for and remove it, or have its owner set another date.",
    ),
    Code(
        "FC622",
        "warning",
        "waiver fits nothing",
        meaning="A waiver met no finding. What it was for is mended, or its key is misspelt "
        "and will not help when it is needed.",
        hint="Remove it, or mend its `key` (a glob over the key of the finding, or its file).",
    ),
    Code(
        "FC623",
        "warning",
        "required check skipped",
        meaning="A check that is required did not run: there is no GPU, no base, no source, no "
        "config. What did not run has not passed, so the verdict is `incomplete` (exit 3) "
        "where it is not worse.",
        hint="Give it what it names, or leave the check out of `required` in the policy.",
    ),
    Code(
        "FC624",
        "info",
        "why a check did not run",
        meaning="What kept a check from running, in the words of the verb that it would have used.",
        hint="Give it what it names.",
    ),
    Code(
        "FC609",
        "error",
        "report is of other bytes",
        meaning="The report of the check lists other files than the folder has, or the same names "
        "with another SHA-256: something changed after the check. What would go up is not what "
        "was checked, so nothing goes up.",
        hint="Check the folder again and push with the new report.",
    ),
    Code(
        "FC630",
        "error",
        "no passing report",
        meaning="A push needs the report of a check of this folder that passed (exit 0) and read "
        "every byte. There is none, it is of another verb, it failed, or only headers were read.",
        hint="`flamingo-ckpt check DIR --output report.json`, then `push` with `--report "
        "report.json`. `--no-check` goes without, and says so in the commit for everyone to read.",
    ),
    Code(
        "FC631",
        "error",
        "not among the files that the check saw",
        meaning="The folder has a file that the report does not list. A file that nobody checked "
        "does not go up beside those that were.\n\n"
        "As a warning it is about weights or an index that the repository keeps from before, and "
        "this release does not have: readers may load them instead.",
        hint="Check the folder again, or take the file out of it. What stays in the repository is "
        "deleted there.",
    ),
)
