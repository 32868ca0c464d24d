"""FC402 and FC480 to FC489: whether two checkpoints compute the same."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC402",
        "error",
        "hidden behind closed gates",
        meaning="The two models agree as they are and diverge once the gates of cross-attention "
        "are forced open. Gates start at 0, and a gate of 0 hides everything behind it: the "
        "weights there differ, or are missing or random, and no output shows it yet. As soon as "
        "training opens the gates, the two are different models.",
        hint="See `blame` in the report and the first stage that diverges; `flamingo-ckpt diff A B "
        "--level bits` lists the tensors. Convert again from the right source.",
    ),
    Code(
        "FC480",
        "error",
        "diverges",
        meaning="The two models compute different things: at the stage that is named, their values "
        "differ by more than rounding explains, or only one of them computes it. Rounding was "
        "measured, by running A again with every sum taken in another order. Everything before "
        "that stage agrees, so the fault lies in it.",
        hint="See `blame` in the report, which names the tensor or setting that was found to be at "
        "fault. `--output report.html` shows every stage.",
    ),
    Code(
        "FC481",
        "error",
        "not deterministic",
        meaning="One model, run twice on the same inputs, gives two results. Then nothing it is "
        "compared with can be judged. Random numbers in a forward, or a kernel without a fixed "
        "order of summation, are the causes.",
        hint="Try `--device cpu`; if it stays so, look for random numbers in the stage that the "
        "message names.",
    ),
    Code(
        "FC482",
        "error",
        "required run not made",
        meaning="A comparison that is needed for the verdict was not made: there is no GPU for "
        "`--device cuda`, a partial checkpoint has no bases, or gates are 0 and no pass with "
        "forced gates was asked for. What was not run is never called passed, so the verdict is "
        "`incomplete` and the exit code 3.",
        hint="Name the bases (`--base-vision`, `--base-language`), leave `--gates` out, or use "
        "`--device cpu`.",
    ),
    Code(
        "FC483",
        "error",
        "to blame",
        meaning="The cause of a divergence was found and proved: with that one tensor or setting "
        "of B changed, the two agree. The message names it and how it differs, such as two swapped "
        "projections.",
        hint="Correct that tensor or setting in B, or the script that made it; then run `parity` "
        "again, since a fault may hide another behind it.",
    ),
    Code(
        "FC484",
        "error",
        "inputs do not serve",
        meaning="The inputs that were given cannot be used: a file that is no picture or no "
        "safetensors, shapes or ids that the model does not have, a prompt that does not fit, a "
        "preprocessor of another release. Nothing was compared.",
        hint="`flamingo-ckpt inspect FILE` shows what is in an inputs file; the README lists what "
        "each kind of model takes. Leave the options out for generated inputs.",
    ),
    Code(
        "FC485",
        "warning",
        "not seen by this check",
        meaning="Part of the model was not seen by this check, and the message says which: no "
        "input reaches it, a config is missing so that the other side's was used, a further dtype "
        "could not be run. The rest was compared. As a note it says that closed gates hide what is "
        "behind them in the first pass, while the second saw it.",
        hint="Give inputs that reach the part, or `--config`; a release folder should have its own "
        "config.json.",
    ),
    Code(
        "FC486",
        "error",
        "continuations differ",
        meaning="Writing on greedily, always with the likeliest token, the two models choose "
        "different ones where A is not undecided between two, or B cannot write at all. Small "
        "differences in logits become visible to users that way.",
        hint="See the first stage that diverges; if none does, compare in `--dtype float64`.",
    ),
    Code(
        "FC487",
        "error",
        "not a number",
        meaning="Side A, the reference, itself gives NaN or infinity at the stage that is named, "
        "so nothing after it can be compared. The weights have such values, or the computation "
        "overflows in the dtype. The verdict is `incomplete`.",
        hint="`--dtype float64` tells an overflow from a broken weight; `flamingo-ckpt check` on A "
        "looks for NaN in the weights.",
    ),
    Code(
        "FC488",
        "warning",
        "not explained",
        meaning="The two models diverge at a stage, and none of the causes that were tried "
        "explains it: no tensor there differs in a way that is known, and no setting makes the two "
        "agree. The divergence itself is real and told as FC480.",
        hint="See `blame` in the JSON report for what was tried, and look for a difference in code "
        "or config that no tensor shows.",
    ),
    Code(
        "FC489",
        "error",
        "does not fit into the memory that is allowed",
        meaning="The model does not fit into the memory that is free or that `--max-memory` "
        "allows, or one tensor alone is larger than that. Nothing was judged.",
        hint="`--max-memory SIZE` streams the weights, at the price of time; it has to be at least "
        "as large as the largest tensor, which the message gives. Fewer or smaller inputs take "
        "less as well.",
    ),
)
