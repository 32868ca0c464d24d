"""FC1xx: the bytes are not what their format asks for."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC101",
        "error",
        "malformed header",
        meaning="The header of a safetensors or numpy file, or an index, is not what its format "
        "prescribes: no JSON, a field that is missing or of the wrong kind, a dtype that the "
        "format lacks, a length that no reader accepts. A header decides which bytes are which "
        "tensor, so nothing is guessed from a broken one and no tensor of the file was read.\n\n"
        "As a note (severity `info`) it says that a safetensors file has no `format: pt` in its "
        "metadata. The weights are fine, but some versions of transformers refuse such a file.",
        hint="Download or copy the file again and compare its size with the original. If it stays "
        "so, the program that wrote it is at fault. For the note: `flamingo-ckpt convert` writes "
        "the field.",
    ),
    Code(
        "FC102",
        "error",
        "truncated",
        meaning="The file ends before the bytes that its own header, directory or pickle speaks "
        "of, or a record that holds a tensor is not there. An interrupted download or copy, or a "
        "disk that was full while saving, leaves such a file. A loader that maps the file may "
        "notice only when the missing part is used. Nothing was written.",
        hint="Compare the size with the original, and copy or download the file again.",
    ),
    Code(
        "FC103",
        "error",
        "byte ranges overlap, leave holes or point outside",
        meaning="The places of tensors within the file do not fit together: two share bytes that "
        "should not be shared, bytes are left over that no tensor claims, or a tensor reaches past "
        "the end of its storage or needs another number of bytes than it has. Two readers could "
        "see two different checkpoints in such a file, or something is hidden in it, so the file "
        "is refused as a whole.",
        hint="Save the weights again with torch, safetensors or numpy. If those wrote this very "
        "file, it was damaged or altered since: get it from its author again.",
    ),
    Code(
        "FC104",
        "error",
        "duplicate entry",
        meaning="One name occurs twice in a header, in a zip directory or in the state dict of a "
        "pickle. Programs differ in whether they take the first or the last, so what one tool "
        "inspects need not be what another loads. The file is refused.",
        hint="Save the weights again where they were made. A file that was patched by hand or by "
        "appending to a zip has to be packed anew.",
    ),
    Code(
        "FC105",
        "error",
        "checksum mismatch",
        meaning="A record of the archive carries a CRC-32, and the bytes that are there have "
        "another one: they were damaged after they were written, by a disk, a transfer or an edit. "
        "torch never checks this and loads such a file without a word. No copy of it is put in "
        "place.",
        hint="Copy or download the file again. If the original fails as well, the weights in it "
        "are damaged, and an older checkpoint has to serve.",
    ),
    Code(
        "FC106",
        "error",
        "malformed archive",
        meaning="The zip archive contradicts itself: its directory and its records disagree about "
        "names, sizes or methods, bytes stand before or after it, it spans several disks, or the "
        "records that torch always writes are not there. Readers that trust different parts of it "
        "see different things, which is a known way to hide content. It is refused as a whole.",
        hint="If torch or numpy wrote the file, it was damaged or altered since: get it again. If "
        "it was packed by hand, pack it again without compression, encryption or parts.",
    ),
    Code(
        "FC107",
        "error",
        "index and shards disagree",
        meaning="The index of a sharded checkpoint and the shards beside it do not belong "
        "together: files that it names are missing, names of tensors are on one side only, a "
        "numbered set has gaps, or shards are of several formats. A stale shard beside a new "
        "index, or a download that stopped, looks like this, and a loader that trusts the index "
        "alone would mix two releases. Nothing was read.\n\n"
        "As a warning it says that the `total_size` in the index is not what the shards hold. The "
        "weights are complete; tools that plan memory by that number plan wrongly.",
        hint="Download or copy all shards and the index of one release again. `flamingo-ckpt "
        "convert` writes shards and an index that agree.",
    ),
    Code(
        "FC109",
        "error",
        "compressed data expands too far",
        meaning="A compressed archive would grow to more than 200 times its size, or a compressed "
        "tensor would have to be inflated again for every row. Weights hardly compress at all, so "
        "such an archive is most likely a bomb that is meant to fill memory or disk. It was not "
        "inflated.",
        hint="If the file is trusted, unpack it and pack it again without compression; torch "
        "itself never compresses.",
    ),
    Code(
        "FC110",
        "error",
        "malformed pickle",
        meaning="The pickle in a torch file breaks the rules of its format: an operation that "
        "needs something that is not there, an ending in the middle, bytes after its end, tensors "
        "with arguments that torch never writes. The pickle was read by this program's own "
        "machine, which runs nothing, and reading stopped at that place. No weights were taken "
        "from the file.",
        hint="Get the file again. If it was edited by hand, save it again with "
        "`torch.save(model.state_dict(), ...)`.",
    ),
    Code(
        "FC111",
        "error",
        "limit exceeded",
        meaning="A number in the file is beyond what any real checkpoint has: the size of a "
        "header, an index or a pickle, the count of records or operations, the depth of nesting. "
        "The limits keep a hostile file from using up memory or time. When writing, it means that "
        "the header of a single safetensors file would be larger than other readers accept.",
        hint="A file from an unknown author: do not open it elsewhere. When writing: "
        "`--max-shard-size` splits the weights into several files.",
    ),
    Code(
        "FC112",
        "error",
        "unsupported container",
        meaning="The file or folder is recognised, and it is of a kind that is not read here: a "
        "tar from before torch 0.1.10, a bare pickle, old TorchScript, a distributed checkpoint, "
        "GGUF, HDF5, a compressed file, or a version of a format that is not known. A Git LFS "
        "pointer or a web page in place of the weights is told here too: the download has failed. "
        "Where the hint names a way, it leads to a format that is read. Nothing was written.",
        hint="Convert it with the tool it comes from, as the hint of the message says; for a "
        "folder of torch.distributed: `python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER FILE.pt`.",
    ),
    Code(
        "FC113",
        "warning",
        "records that nothing refers to",
        meaning="The archive holds records that no tensor and no pickle refers to. They are not "
        "weights and were left out. They cost disk space, and they can be leftovers of a writer, "
        "or something that somebody wanted to ship along unseen. For frozen TorchScript it means "
        "tensors among the constants of its code: they have no names and are not read.",
        hint="Look at the names; a plain `flamingo-ckpt convert` leaves them behind. For "
        "TorchScript take the module from before `torch.jit.freeze`.",
    ),
    Code(
        "FC114",
        "info",
        "checksum absent",
        meaning="The source has no checksums, or none on some of its records, so damage in its "
        "bytes cannot be noticed by anybody. The legacy format of torch never has them, and torch "
        "can be told to leave them out of a zip. The weights were read as they are.",
        hint="Compare the file with a published digest (`sha256sum`), if there is one. In a "
        "converted release `flamingo-ckpt manifest` writes digests of every file and tensor.",
    ),
    Code(
        "FC115",
        "warning",
        "file mode",
        meaning="A file of the release cannot be read by everybody, or a file of data can be "
        "executed. Archives, mirrors and containers carry modes along, and whoever unpacks "
        "them as another user gets `Permission denied`. `safetensors.save_file` leaves such "
        "modes (0600).",
        hint="`chmod 644 FILE`, or `flamingo-ckpt check DIR --fix --yes`.",
    ),
    Code(
        "FC116",
        "warning",
        "stray file",
        meaning="The folder has a file that is no part of a release: something that an editor, "
        "a system or a training run left behind, an empty file, or weights that the index does "
        "not name. An upload takes all of it. Archives, and weights in a folder within, are told "
        "because nothing here looks at what is in them.\n\n"
        "Weights that nobody reads are an error and not only untidy: loaders choose by file name, "
        "and one of them will take the stale shard or the other format.",
        hint="Remove it. If it belongs there, waive it with its path as the key.",
    ),
)
