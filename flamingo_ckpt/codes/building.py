"""FC450 to FC459 and FC466 to FC469: building a model from what releases have."""

from flamingo_ckpt.codes.code import Code

CODES = (
    Code(
        "FC450",
        "error",
        "nothing at that place",
        meaning="A name that was given to a loader leads nowhere: no local file or folder, no "
        "repository of the hub, no model of open_clip; or it is a file where a folder with a "
        "config is wanted. Nothing was downloaded or built.",
        hint="Check the spelling. A repository is `owner/name`; `open_clip.list_models()` lists "
        "open_clip's names.",
    ),
    Code(
        "FC451",
        "error",
        "no tower that gives patch tokens",
        meaning="The vision tower gives no patch tokens: it is no CLIP vision transformer, or of "
        "an architecture, such as a ResNet, whose output is one vector for a picture. The "
        "perceiver of a Flamingo needs the tokens.",
        hint="Take a vision transformer such as ViT-L-14, or set any module that gives `[batch, "
        "tokens, vis_dim]` as `vision_encoder` of a `Flamingo`.",
    ),
    Code(
        "FC452",
        "error",
        "no such pretrained weights",
        meaning="The pretrained weights that were asked for do not exist for that model: the name "
        "is neither a file nor one of its tags, or the tag is kept outside the hub, where nothing "
        "is downloaded from here.",
        hint="Use one of the tags that the message lists, or download the weights and name the "
        "file.",
    ),
    Code(
        "FC453",
        "error",
        "no decoder layers at that path",
        meaning="`decoder_layers_attr_name` is not the path of a list of layers in the language "
        "model. Gated cross-attention is put before the members of that list, so without it there "
        "is no Flamingo.",
        hint="The message lists the lists that the model has; `model.layers` and `transformer.h` "
        "are the usual ones.",
    ),
    Code(
        "FC454",
        "error",
        "tokenizer cannot be read",
        meaning="The tokenizer of a Flamingo cannot be read from the folder: files are missing or "
        "broken, or it would need code that the repository brings, which is never run.",
        hint="Use a folder with a `tokenizer.json`, which every version of transformers reads.",
    ),
    Code(
        "FC455",
        "error",
        "no such interval of gated cross-attention",
        meaning="`cross_attn_every_n_layers` is not a number from 1 to the number of layers of the "
        "language model. With a larger one no layer would have gated cross-attention, and the "
        "model would ignore every picture.",
        hint="Take the number that the checkpoint was trained with; releases of OpenFlamingo have "
        "1, 2 or 4.",
    ),
    Code(
        "FC456",
        "error",
        "tokenizer does not serve",
        meaning="Tokenizer and model do not belong together: there is no tokenizer, it has more "
        "tokens than the embedding has rows, its image token is not the one of the config, or it "
        "pads the wrong side. A model with the wrong tokenizer answers fluently and wrongly, or "
        "fails at some inputs only.",
        hint="Copy the tokenizer's files from the release that the weights were trained from, or "
        "correct `image_token_index` in the config.",
    ),
    Code(
        "FC457",
        "error",
        "head and embedding: config and file disagree",
        meaning="The config says that the output head is tied to the embedding and the file has "
        "another head, or it says that there is a head and the file has none. transformers "
        "believes the config: it would throw a trained head away, or leave one at random.",
        hint="Set `tie_word_embeddings` in the config to what the weights are, or take the "
        "checkpoint that fits it.",
    ),
    Code(
        "FC458",
        "error",
        "several dtypes",
        meaning="The weights of one model have several dtypes, and in such a mixture no PaliGemma "
        "computes. Which dtype the model was trained in cannot be told from it.",
        hint='Say which to cast to: `dtype="bfloat16"`, or whatever the message suggests.',
    ),
    Code(
        "FC459",
        "error",
        "adapters or quantised weights",
        meaning="The file holds adapters (LoRA) or quantised weights. Its base layers alone are "
        "another model than the one that was trained, and quantised numbers mean nothing without "
        "the program that made them.",
        hint="Merge adapters with PEFT (`merge_and_unload`) and save the result. For quantised "
        "weights load the release from before.",
    ),
    Code(
        "FC466",
        "error",
        "accelerate is not installed",
        meaning="`device_map` was given, and the package accelerate, which does that work, is not "
        "installed.",
        hint="`pip install 'flamingo-ckpt[accelerate]'`, or leave `device_map` out and call "
        "`.to(device)`.",
    ),
    Code(
        "FC467",
        "error",
        "weights could only be unpickled",
        meaning="The weights, or code beside them, could only be used by executing what a stranger "
        "wrote: the weights are pickled, or the repository brings its own classes. Neither is done "
        "here under any option.",
        hint="`flamingo-ckpt convert SRC DST --to hf-flamingo` reads pickled weights without "
        "running them and writes safetensors.",
    ),
    Code(
        "FC468",
        "error",
        "no token for images is known",
        meaning="The config does not tell which token stands for a picture in the text. Without it "
        "the model cannot know where a picture belongs, and would look at none.",
        hint="Put `media_token_id` (Flamingo) or `image_token_index` (PaliGemma) into config.json; "
        "for Flamingo `tokenizer.convert_tokens_to_ids('<image>')` is its value.",
    ),
    Code(
        "FC469",
        "error",
        "a head of its own, and a config that ties it",
        meaning="The config ties two tensors, and the weights have both with different values. "
        "transformers would keep one and drop the other; if the dropped one was trained, the model "
        "is another.",
        hint="Set `tie_word_embeddings` to false in `text_config` of config.json, or remove the "
        "tensor that was not trained.",
    ),
)
