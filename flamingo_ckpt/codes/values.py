"""FC3xx: the bits and the numbers."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC301",
        "error",
        "bits differ",
        meaning="Two tensors that should be the same hold other bits. Bits are compared as bits, "
        "so that another NaN, or -0 in place of 0, counts as well. The message gives the first "
        "element that differs and how many do; a single one points to damage, all of them to "
        "another training state or a rounding on the way.\n\n"
        "When `convert` gives it, the result that was read back is not the source: nothing was put "
        "in place.",
        hint="`flamingo-ckpt diff A B --level bits` lists every tensor. If a cast was intended, "
        "give `verify` the same `--dtype`. After damage, convert again from the source.",
    ),
    Code(
        "FC302",
        "info",
        "inexact cast",
        meaning="A cast that was asked for rounded values: the narrower dtype does not have them. "
        "That is what a cast to bfloat16 or float16 does to nearly every weight; it is counted so "
        "that nobody takes the result for exact. Values that were rounded to zero are counted "
        "beside.",
        hint="Nothing, if the cast was meant. To keep every bit: `--dtype keep`, which is the "
        "default.",
    ),
    Code(
        "FC303",
        "error",
        "overflow to infinity in a cast",
        meaning="In a cast, finite values became infinite because the narrower dtype does not "
        "reach as far: float16 ends at 65504. One infinite weight makes the outputs of a model "
        "useless. `convert` wrote the files, and ends with exit code 1.",
        hint="`--dtype bfloat16` has the range of float32; `--dtype keep` changes nothing. A "
        "weight of that size can also be a sign of a broken training run.",
    ),
    Code(
        "FC304",
        "error",
        "NaN lost in a cast",
        meaning="In a cast, a NaN became an ordinary number. What was recognisable as broken would "
        "look healthy afterwards. This is never expected of a correct cast, and is checked for all "
        "the same.",
        hint="Keep the dtype (`--dtype keep`), and report it together with the dtypes that the "
        "message names.",
    ),
    Code(
        "FC305",
        "error",
        "dtype not representable",
        meaning="A tensor has a dtype that the format of the destination, or the step that was "
        "asked for, cannot take: safetensors has no complex128, numpy no bfloat16 and no 8-bit "
        "floats, and values that mean something only together with their scales have no cast. "
        "Nothing is converted to a neighbouring dtype in silence, so nothing was written.",
        hint="Choose a format that holds it (`--format torch` or `--format safetensors`), cast it "
        "(`--dtype float32`), or leave it out with `--exclude`. For npz: `--npy-bfloat16`.",
    ),
    Code(
        "FC306",
        "error",
        "unsupported tensor kind",
        meaning="The tensor is no plain dense array: sparse, quantized, nested, distributed, a "
        "lazy conjugate, a structured numpy dtype, or no tensor at all. Its stored bytes are not "
        "its values, so copying them would make a file that loads and means something else.",
        hint="Where it was trained, make it dense (`.to_dense()`, `.dequantize()`, "
        "`.full_tensor()`, `.resolve_conj()`) and save again.",
    ),
    Code(
        "FC307",
        "error",
        "view expands its storage",
        meaning="The tensor is a view that repeats the few bytes it lies on, such as one row "
        "expanded to a thousand. A file of a kilobyte can claim a terabyte that way, so it is not "
        "written out unless that was asked for. `inspect` tells it as a warning.",
        hint="If the expansion is real: `--max-expansion RATIO`, with the number that the message "
        "gives. Better: call `.contiguous()` or save the small tensor.",
    ),
    Code(
        "FC308",
        "warning",
        "non-canonical BOOL bytes",
        meaning="A tensor of dtype BOOL has bytes that are neither 0 nor 1. They are kept bit for "
        "bit. Programs disagree about what such a byte means, and two that compare as true may "
        "compare as different.",
        hint="If the bytes are masks, write them again with `tensor != 0` where they were made; no "
        "weight is affected.",
    ),
    Code(
        "FC351",
        "warning",
        "gate exactly 0",
        meaning="The gates of gated cross-attention begin at 0 and training moves them away "
        "from it. A gate of exactly 0 means that its layer adds nothing to the language model, "
        "whatever its weights are. One or two may be meant; if all are 0 (then it is an "
        "error), the model does not see its pictures: it was saved before training, or its "
        "gates were never loaded.",
        hint="Look whether this is the trained checkpoint, and load it with a loader that "
        "raises for missing keys before saving it.",
    ),
    Code(
        "FC352",
        "error",
        "NaN or infinity",
        meaning="The tensor has elements that are no finite numbers. What is computed with "
        "them is NaN from that layer on, for every input that reaches it. It comes from "
        "training that diverged, from an overflow in a cast to float16, or from a damaged file "
        "without checksum.",
        hint="Take an earlier checkpoint. For an overflow in a cast: convert again with "
        "`--dtype bfloat16` or `keep`. A buffer that is NaN on purpose can be waived by its "
        "key.",
    ),
    Code(
        "FC353",
        "warning",
        "still at its initial constants",
        meaning="Every element of the tensor has one and the same value, as a constructor "
        "leaves it: a norm of ones, a bias of zeros, a matrix of zeros. In a part that was "
        "trained that does not happen. It is what a key looks like that was missing when the "
        "model was loaded with `strict=False` and saved again.",
        hint="Compare with the checkpoint that it was made from: `flamingo-ckpt diff SOURCE "
        "RELEASE --level bits`. If the part was frozen at its start, waive it by a glob.",
    ),
    Code(
        "FC354",
        "error",
        "two tensors equal that should differ",
        meaning="Two tensors that are stored by themselves, of the same shape, have the same "
        "bits and are not constant. Two layers that were trained never agree in every bit, so "
        "one was written in the place of the other: by a loop over layers that kept the last "
        "one, by a rename that met two keys, by a wrong index. Tensors that are one by design, "
        "such as a tied head and embedding, are not told.",
        hint="Convert again from the source, and compare with `verify`. Layers that were "
        "copied on purpose can be waived.",
    ),
    Code(
        "FC355",
        "warning",
        "norm out of family",
        meaning="The root mean square of the tensor is far from that of the same tensor in the "
        "other layers: more than 30 times, or 900 times for vectors, above or below their "
        "median. Layers of one model differ, but not by that. It is a scale that was applied "
        "twice or not at all, a tensor of another kind under this name, or a layer that "
        "training blew up.",
        hint="Look at the tensor in the source. `norm_factor` under `[policy.tolerance]` sets "
        "how far is far.",
    ),
)
