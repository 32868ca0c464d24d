"""FC401 to FC408: configs, and the models that they describe."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC401",
        "error",
        "invalid model config",
        meaning="The config of the model, of its generation or of its image preprocessing cannot "
        "be used: it is no JSON, a field that is needed is missing, or a value has a kind or size "
        "that no model of the sort has. Heads, activation and epsilon are in no tensor, so a "
        "config is the only place they can be read from, and no default is put in for a broken "
        "one.",
        hint="Correct the field that the message names, or take the file from the release that the "
        "weights were trained from.",
    ),
    Code(
        "FC403",
        "error",
        "unknown kind of model",
        meaning="The `model_type` of the config, or the family of its language model, is not one "
        "that can be constructed here or that this loader loads. Code that a repository brings is "
        "never run, so a type that exists only there is not available.",
        hint="Check for a misspelt `model_type`. For another causal language model of "
        "transformers, put the path of its decoder layers into `decoder_layers_attr_name`, such as "
        "`transformer.h`; a newer transformers may know the type.",
    ),
    Code(
        "FC404",
        "error",
        "no such model",
        meaning="There is no model under the name that was given: no file, no folder with a "
        "`config.json`, no preset. Weights alone do not tell a model, because numbers of heads and "
        "activations are in no shape.",
        hint="The message lists near names; `model:PRESET` names a known release, "
        "`model:PATH/config.json` a file. Copy a missing config from the release that the weights "
        "were trained from.",
    ),
    Code(
        "FC405",
        "error",
        "model cannot be constructed",
        meaning="The config is understood, and yet no model comes of it: torch, transformers or "
        "open_clip refuse it or are not installed, or it asks for something that the wanted class "
        "does not have, such as adapters, a text tower from the hub, or a layout in which that "
        "kind of model has no form. Nothing is built that is nearly what was asked for.",
        hint="The message gives the reason in the library's words. Check that torch, transformers "
        "and open_clip_torch are installed; choose another layout or remove the setting it names.",
    ),
    Code(
        "FC406",
        "error",
        "gated layers fit no interval",
        meaning="The layers that have gated cross-attention stand at no regular distance, as "
        "`cross_attn_every_n_layers` would put them. Either blocks are missing from the file, or "
        "layers were renumbered in a conversion. No interval is guessed, because each guess would "
        "put blocks before wrong layers.",
        hint="Compare the layers that the message lists with the source of the conversion; blocks "
        "belong at layers n-1, 2n-1, 3n-1 and so on, counted from 0.",
    ),
    Code(
        "FC407",
        "error",
        "setting differs",
        meaning="A setting that no tensor shows differs between the two sides, or between a config "
        "and that of its base: activation, epsilon, number of heads, size of images, a token's id, "
        "which tokens of the vision tower are taken. With equal weights the two compute "
        "differently, often by so little that a quick look at outputs misses it. QuickGELU against "
        "GELU is the classic case.\n\n"
        "It is a warning where the setting is not reached by the inputs that were compared, or "
        "where one side does not tell it.",
        hint="Correct the config that is wrong, after the one the model was trained with; then run "
        "`flamingo-ckpt parity A B`.",
    ),
    Code(
        "FC408",
        "error",
        "config contradicts itself",
        meaning="Two fields of the config cannot both be true: two names of one setting with "
        "different values, a width that the number of heads does not divide, a class that is not "
        "the one of `model_type`, an interval larger than the number of layers. Different programs "
        "read different ones of such fields and build different models. None is preferred here. "
        "The same code is given for a generation config that transformers cannot read.",
        hint="Delete or correct the field that is wrong; the message names both.",
    ),
)
