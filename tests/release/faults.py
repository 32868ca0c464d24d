"""Faults that a release can have, each with exactly what the check has to say about it."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.release.releases import (
    COMMITS,
    EOC,
    INDEX,
    ROWS,
    SHARDS,
    Arrays,
    edit_json,
    edit_text,
    edit_weights,
    read_weights,
    safetensors_bytes,
    shard_of,
    write,
)
from tests.support import Outcome

#: (code, severity, key) of a finding.
Told = tuple[str, str, str | None]
#: What is said of the release without fault.
NOTES: Final[frozenset[Told]] = frozenset(
    {
        ("FC610", "info", "config.json"),
        ("FC611", "info", "record"),
        ("FC614", "info", "model.sig"),
    }
)

LAYER: Final = "lang_encoder.model.decoder.layers.{}."
GATES: Final = tuple(
    LAYER.format(at) + f"gated_cross_attn_layer.{which}_gate"
    for at in range(4)
    for which in ("attn", "ff")
)
PERCEIVER: Final = "perceiver.layers.0."
#: In the form of a token of Hugging Face; of nobody.
TOKEN: Final = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
PASSWORD: Final = "correct-horse-battery-staple"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One planted fault.

    Attributes:
        plant: changes the folder.
        told: the findings that it must give, and no other.
        code: exit code of the check.
        joins: whether it can stand in one folder with all others that do.
        is_after_sums: whether the manifest is made before it.
        instead: notes that it takes the place of.
    """

    plant: Callable[[Path], object]
    told: frozenset[Told]
    code: int = 1
    joins: bool = False
    is_after_sums: bool = False
    instead: frozenset[Told] = frozenset()


FAULTS: dict[str, Fault] = {}


def told(outcome: Outcome) -> set[Told]:
    """The findings of a check; none is told twice."""
    found = [(one["code"], one["severity"], one["key"]) for one in outcome.document["findings"]]
    assert len(found) == len(set(found)), found
    return set(found)


def error(code: str, *keys: str | None) -> frozenset[Told]:
    return frozenset((code, "error", key) for key in keys)


def warning(code: str, *keys: str | None) -> frozenset[Told]:
    return frozenset((code, "warning", key) for key in keys)


def add(name: str, plant: Callable[[Path], object], *told: frozenset[Told], **options: Any) -> None:
    """A fault of the table; the check fails where one of its findings is an error."""
    found = frozenset().union(*told)
    code = options.pop("code", int(any(severity == "error" for _, severity, _ in found)))
    FAULTS[name] = Fault(plant=plant, told=found, code=code, **options)


def weights(change: Callable[[Arrays], object], **metadata: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, change, **metadata)


def values(name: str, value: Any) -> Callable[[Path], None]:
    """Overwrite the first elements of a tensor."""

    def change(tensors: Arrays) -> None:
        tensors[name].reshape(-1)[: np.size(value)] = value

    return weights(change)


def config(change: Callable[[Any], object], file: str = "config.json") -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / file, change)


def card(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: edit_text(folder / "README.md", old, new)


def file(name: str, data: bytes | str, mode: int = 0o644) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        write(folder / name, data)
        (folder / name).chmod(mode)

    return plant


def put(document: Any, dotted: str, value: Any) -> None:
    """Set a field of a document by its path."""
    *path, last = dotted.split(".")
    for name in path:
        document = document[name]
    document[last] = value


def field(dotted: str, value: Any, file: str = "config.json") -> Callable[[Path], None]:
    return config(lambda document: put(document, dotted, value), file)


def torch_pickle(content: Any) -> bytes:
    """As `torch.save` writes what is no tensor."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
    return raw.getvalue()


def one_shard(folder: Path, shard: str, **options: Any) -> None:
    tensors, _ = read_weights(folder)
    held = {name: array for name, array in tensors.items() if shard_of(name) == shard}
    write(folder / shard, safetensors_bytes(held, **options))


# The weights: values.
FIRST = LAYER.format(0) + "decoder_layer."
add("nan", values(FIRST + "fc1.weight", np.nan), error("FC352", FIRST + "fc1.weight"), joins=True)
add("inf", values(FIRST + "fc2.bias", -np.inf), error("FC352", FIRST + "fc2.bias"), joins=True)
add("gate 0", values(GATES[2], 0), warning("FC351", GATES[2]), joins=True)
add("gate -0", values(GATES[3], -0.0), warning("FC351", GATES[3]))
add(
    "all gates 0",
    weights(lambda t: [t[name].fill(0) for name in GATES]),
    error("FC351", *GATES),
)
add(
    "norm of ones",
    weights(lambda t: t["perceiver.norm.weight"].fill(1)),
    warning("FC353", "perceiver.norm.weight"),
    joins=True,
)
add(
    "matrix of zeros in a tower",
    weights(lambda t: t[FIRST + "self_attn.q_proj.weight"].fill(0)),
    warning("FC353", FIRST + "self_attn.q_proj.weight"),
)
TWIN = LAYER.format("{}") + "decoder_layer.self_attn.k_proj.weight"
add(
    "two layers equal",
    weights(lambda t: t[TWIN.format(3)].__setitem__(..., t[TWIN.format(1)])),
    error("FC354", TWIN.format(3)),
    joins=True,
)
LOUD = LAYER.format(2) + "gated_cross_attn_layer.attn.to_out.weight"
add(
    "layer scaled by 1000",
    weights(lambda t: t[LOUD].__imul__(1000)),
    warning("FC355", LOUD),
    joins=True,
)

# The weights: names and shapes.
GONE = LAYER.format(1) + "decoder_layer.fc1.bias"
add("missing tensor", weights(lambda t: t.pop(GONE)), error("FC203", GONE), joins=True)
add(
    "unexpected tensor",
    weights(lambda t: t.update({"vision_encoder.logit": np.float32([0.5])})),
    error("FC204", "vision_encoder.logit"),
    joins=True,
)
THIN = "vision_encoder.vision_model.encoder.layers.1.mlp.fc1.bias"
add("wrong shape", weights(lambda t: t.update({THIN: t[THIN][:-1]})), error("FC205", THIN))

LOADER: Final = frozenset({("FC610", "info", "config.json")})
NO_RECORD: Final = frozenset({("FC611", "info", "record")})
NO_CONFIG: Final = warning("FC623", "keys")
#: What the headers are needed for.
NOT_RUN: Final = warning("FC623", "keys", "values", "config")
COLOURED = "perceiver.\x1b[31mred"
add(
    "control characters in a tensor's name",
    weights(lambda t: t.update({COLOURED: np.float32([0.5])})),
    error("FC505", COLOURED),
    warning("FC623", "container"),
    NOT_RUN,
)

INVISIBLE = "perceiver.latents\u200b"
add(
    "invisible characters in a tensor's name",
    weights(lambda t: t.update({INVISIBLE: np.float32([0.5])})),
    error("FC505", INVISIBLE),
    error("FC204", INVISIBLE),
)

# The weights: bytes.
END = FIRST + "fc1.weight"


def without_entry(header: dict[str, Any]) -> None:
    del header["perceiver.norm.weight"]


def one_back(header: dict[str, Any]) -> None:
    """A tensor begins before the one in front of it ends."""
    begin, end = header["perceiver.norm.bias"]["data_offsets"]
    header["perceiver.norm.bias"]["data_offsets"] = [begin - 4, end - 4]


def cut(path: Path, num_bytes: int) -> None:
    write(path, path.read_bytes()[:num_bytes])


def unlist(document: Any) -> None:
    document["weight_map"]["perceiver.absent"] = SHARDS[1]


add(
    "hole",
    lambda folder: one_shard(folder, SHARDS[1], change=without_entry),
    error("FC103", "perceiver.norm.bias"),
    NOT_RUN,
)
add(
    "overlap",
    lambda folder: one_shard(folder, SHARDS[1], change=one_back),
    error("FC103", "perceiver.norm.bias"),
    NOT_RUN,
)
add(
    "header cut off",
    lambda folder: cut(folder / SHARDS[0], 1000),
    error("FC102", SHARDS[0]),
    NOT_RUN,
)
add(
    "data cut off",
    lambda folder: cut(folder / SHARDS[0], 30000),
    error("FC102", SHARDS[0]),
    NOT_RUN,
)
add(
    "bytes after the data",
    lambda folder: one_shard(folder, SHARDS[0], tail=b"PK\3\4"),
    error("FC103", SHARDS[0]),
    NOT_RUN,
)
add(
    "index lists what no shard has",
    config(unlist, INDEX),
    error("FC107", "perceiver.absent"),
    NOT_RUN,
)
add(
    "shard gone",
    lambda folder: (folder / SHARDS[1]).unlink(),
    error("FC107", INDEX),
    NOT_RUN,
)
add(
    "weights gone",
    lambda folder: [one.unlink() for one in folder.glob("model*")],
    error("FC001", None),
    NOT_RUN,
)

# Files.
STRAY = "model-00003-of-00002.safetensors"
add(
    "stray shard",
    lambda folder: write(folder / STRAY, (folder / SHARDS[1]).read_bytes()),
    error("FC116", STRAY),
    joins=True,
)
add(".DS_Store", file(".DS_Store", b"\0\0\0\1Bud1"), warning("FC116", ".DS_Store"), joins=True)
add("empty file", file("vocab.txt", b""), warning("FC116", "vocab.txt"), joins=True)
add(
    "weights in a folder within",
    file("ema/model.safetensors", safetensors_bytes({"x": np.float32([0.5])})),
    warning("FC116", "ema/model.safetensors"),
    joins=True,
)
add(
    "weights of another kind",
    file("flax_model.msgpack", b"\0\1"),
    error("FC116", "flax_model.msgpack"),
    joins=True,
)
add(
    "pickled training arguments",
    file("training_args.bin", torch_pickle({"lr": 1e-4})),
    warning("FC116", "training_args.bin"),
    error("FC507", "training_args.bin"),
    joins=True,
)
add(
    "mode 0600",
    lambda folder: (folder / SHARDS[1]).chmod(0o600),
    warning("FC115", SHARDS[1]),
    is_after_sums=True,
    joins=True,
)
add(
    "data that can be executed",
    lambda folder: (folder / "tokenizer.json").chmod(0o755),
    warning("FC115", "tokenizer.json"),
    is_after_sums=True,
    joins=True,
)
add(
    "pipe",
    lambda folder: os.mkfifo(folder / "pipe"),
    error("FC116", "pipe"),
    joins=True,
)
add(
    "no weights but a pickle beside safetensors",
    file("pytorch_model.bin", torch_pickle({})),
    error("FC116", "pytorch_model.bin"),
    error("FC507", "pytorch_model.bin"),
    joins=True,
)
add(
    "pickle of an old protocol",
    file("processor.pkl", pickle.dumps(os.getcwd, protocol=0)),
    error("FC507", "processor.pkl"),
    joins=True,
)
add("Python code", file("modeling.py", "import os\n"), warning("FC508", "modeling.py"), joins=True)
add(
    "program under another name",
    file("kernel.dat", b"\x7fELF\2\1\1\0"),
    error("FC508", "kernel.dat"),
    joins=True,
)
add(
    "link inside",
    lambda folder: (folder / "words.json").symlink_to("tokenizer.json"),
    warning("FC510", "words.json"),
    joins=True,
)
add(
    "link out",
    lambda folder: (folder / "host.txt").symlink_to("/etc/hostname"),
    error("FC503", "host.txt"),
    joins=True,
)
add(
    "link to nothing",
    lambda folder: (folder / "old.txt").symlink_to("gone.txt"),
    error("FC510", "old.txt"),
    joins=True,
)
HOSTILE = "\x1b[2Jnotes.txt"
add(
    "control characters in a file's name",
    file(HOSTILE, "notes\n"),
    error("FC505", HOSTILE),
    joins=True,
)
add(
    "name that reads from right to left",
    file("model\u202egpj.txt", "notes\n"),
    error("FC505", "model\u202egpj.txt"),
    joins=True,
)

# What nobody should know.
add(
    "token in the card",
    card("# A tiny", f"`export HF_TOKEN={TOKEN}`\n\n# A tiny"),
    error("FC509", "README.md"),
    joins=True,
)
add(
    "token in the metadata",
    weights(lambda t: None, writer=f"login {TOKEN}"),
    error("FC509", "writer"),
    joins=True,
)
add(
    "token in a config",
    field("hub_token", TOKEN, "preprocessor_config.json"),
    error("FC509", "preprocessor_config.json"),
    joins=True,
)
add(
    "password in a file without a suffix",
    file("Dockerfile", f'ENV x=1\nRUN login --password="{PASSWORD}"\n'),
    error("FC509", "Dockerfile"),
    joins=True,
)
add(
    "path of a home in a config",
    field("_name_or_path", "/home/alice/runs/7"),
    warning("FC511", "config.json"),
    joins=True,
)
add(
    "token in the metadata of a stray file",
    file("ema/old.safetensors", safetensors_bytes({}, metadata={"login": TOKEN})),
    warning("FC116", "ema/old.safetensors"),
    error("FC509", "login"),
    joins=True,
)
add(
    "token in the metadata of the last shard",
    lambda folder: one_shard(folder, SHARDS[1], metadata={"format": "pt", "writer": TOKEN}),
    error("FC509", "writer"),
)
add(
    "token behind another value of the first shard",
    lambda folder: (
        one_shard(folder, SHARDS[0], metadata={"format": "pt", "writer": "somebody"}),
        one_shard(folder, SHARDS[1], metadata={"format": "pt", "writer": TOKEN}),
    ),
    error("FC509", "writer"),
    warning("FC209", "writer"),
)
add(
    "path in the metadata",
    weights(lambda t: None, source="/mnt/nfs/alice/x.pt"),
    warning("FC511", "source"),
)

# After all that writes the index again.
add(
    "index total wrong",
    field("metadata.total_size", 5, INDEX),
    warning("FC107", INDEX),
    joins=True,
)
# The config.
add(
    "own code in the config",
    field("auto_map", {"AutoModel": "modeling.Flamingo"}),
    warning("FC508", "config.json: auto_map"),
    instead=LOADER,
    joins=True,
)
add(
    "code of others in the config",
    field("auto_map", {"AutoModel": "mallory/x--modeling.Flamingo"}),
    error("FC508", "config.json: auto_map"),
    instead=LOADER,
)
add(
    "code of others deep in the config",
    field("text_config.auto_map", {"AutoConfig": "mallory/x--c.C"}),
    error("FC508", "config.json: auto_map"),
)
add(
    "code of others for the tokenizer, as a list",
    file("tokenizer_config.json", '{"auto_map": ["mallory/x--tokenization.T", null]}'),
    error("FC508", "tokenizer_config.json: auto_map"),
    joins=True,
)
add(
    "code of others for the processor",
    file("processor_config.json", '{"auto_map": {"AutoProcessor": "mallory/x--p.P"}}'),
    error("FC508", "processor_config.json: auto_map"),
    joins=True,
)
add(
    "config of another size",
    field("text_config.ffn_dim", 24),
    error("FC604", "text_config.ffn_dim"),
    error(
        "FC205",
        *(
            LAYER.format(at) + f"decoder_layer.{n}"
            for at in range(4)
            for n in ("fc1.weight", "fc1.bias", "fc2.weight")
        ),
    ),
)
add(
    "config that is no JSON",
    lambda folder: write(folder / "config.json", "{'model_type': 'flamingo'}"),
    error("FC401", "config.json"),
    NO_CONFIG,
    instead=LOADER,
)
add(
    "config gone",
    lambda folder: (folder / "config.json").unlink(),
    warning("FC623", "keys"),
    error("FC610", "config.json"),
    instead=LOADER,
)
add(
    "config without architectures",
    config(lambda d: d.pop("architectures")),
    warning("FC610", "config.json"),
)
add(
    "stated dtype",
    field("torch_dtype", "bfloat16"),
    warning("FC613", "config.json: torch_dtype"),
    joins=True,
)
add(
    "stated dtype that does not exist",
    field("torch_dtype", "float17"),
    error("FC401", "config.json"),
    NO_CONFIG,
    instead=LOADER,
)

# Tokenizer and preprocessing.


def without_image(document: Any) -> None:
    document["added_tokens"] = [
        one for one in document["added_tokens"] if one["content"] != "<image>"
    ]


def more_tokens(document: Any) -> None:
    document["added_tokens"].append({"id": ROWS + 3, "content": "<answer>"})


def exchanged(document: Any) -> None:
    first, second, *_ = document["added_tokens"]
    first["content"], second["content"] = second["content"], first["content"]


add(
    "tokenizer without <image>",
    config(without_image, "tokenizer.json"),
    error("FC605", "<image>"),
)
add(
    "tokenizer with more ids than rows",
    config(more_tokens, "tokenizer.json"),
    error("FC605", "embedding"),
    joins=True,
)
add(
    "tokens exchanged",
    config(exchanged, "tokenizer.json"),
    error("FC605", "media_token_id", "eoc_token_id"),
)
add(
    "wrong media_token_id", field("media_token_id", 3), error("FC605", "media_token_id"), joins=True
)
add(
    "two tokenizers",
    file("added_tokens.json", f'{{"<image>": {EOC}, "<PAD>": {ROWS - 2}}}'),
    error("FC605", "<image>"),
    warning("FC605", "<PAD>"),
)
add(
    "tokenizer gone",
    lambda folder: (folder / "tokenizer.json").unlink(),
    warning("FC605", "tokenizer.json"),
)
add(
    "tokenizer that is no JSON",
    lambda folder: write(folder / "tokenizer.json", "{"),
    error("FC401", "tokenizer.json"),
)
add(
    "mean of another tower",
    field("image_mean", [0.5, 0.5, 0.5], "preprocessor_config.json"),
    error("FC606", "preprocessor_config.json: image_mean"),
    joins=True,
)
add(
    "pictures of another size",
    field("crop_size", {"height": 10, "width": 10}, "preprocessor_config.json"),
    error("FC606", "preprocessor_config.json: crop_size"),
    joins=True,
)
add(
    "pictures that are not normalised",
    field("do_normalize", False, "preprocessor_config.json"),
    error("FC606", "preprocessor_config.json: do_normalize"),
    joins=True,
)
add(
    "another filter",
    field("resample", 2, "preprocessor_config.json"),
    warning("FC606", "preprocessor_config.json: resample"),
    joins=True,
)

# The card.
add("no license", card("license: mit\n", ""), error("FC601", "license"), joins=True)
add("license unnamed", card("license: mit", "license: other"), warning("FC601", "license"))
add(
    "base model not pinned",
    card(f"@{COMMITS[1]}", ""),
    warning("FC603", "openai/clip-vit-base-patch32"),
    joins=True,
)
add(
    "no base model",
    card("base_model:\n- facebook/opt-125m\n- openai/clip-vit-base-patch32\n", ""),
    error("FC603", "base_model"),
)
add(
    "broken front matter",
    card("license: mit", "license: [mit"),
    error("FC602", "README.md"),
    instead=NO_RECORD,
)
add(
    "front matter that is a list",
    lambda folder: write(folder / "README.md", "---\n- license\n---\n"),
    error("FC602", "README.md"),
    instead=NO_RECORD,
)
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
add(
    "YAML bomb",
    card("license: mit\n", BOMB + "license: mit\n"),
    error("FC602", "README.md"),
    instead=NO_RECORD,
)
add(
    "no card",
    lambda folder: (folder / "README.md").unlink(),
    error("FC602", "README.md"),
    instead=NO_RECORD,
)
RECORD = (
    "<!-- flamingo-ckpt conversion record: begin -->\n```yaml\n{}\n```\n"
    "<!-- flamingo-ckpt conversion record: end -->\n"
)
add(
    "record of other weights",
    card("# A tiny", RECORD.format("content: xxh3-128:00") + "# A tiny"),
    error("FC611", "record"),
    instead=NO_RECORD,
    joins=True,
)
add(
    "broken record",
    card("# A tiny", RECORD.format("content: x")[:60] + "\n# A tiny"),
    error("FC611", "README.md"),
    instead=NO_RECORD,
)

# The manifest.
add(
    "file changed after the manifest",
    lambda folder: write(folder / "LICENSE", "changed\n"),
    error("FC607", "LICENSE"),
    is_after_sums=True,
    joins=True,
)
add(
    "file that the manifest lacks",
    file("usage.txt", "hello\n"),
    error("FC607", "usage.txt"),
    is_after_sums=True,
    joins=True,
)
add(
    "file that only the manifest has",
    lambda folder: write(
        folder / "SHA256SUMS", (folder / "SHA256SUMS").read_text() + f"{'0' * 64}  gone.txt\n"
    ),
    error("FC607", "gone.txt"),
    is_after_sums=True,
    joins=True,
)
add(
    "manifest of no form",
    lambda folder: write(folder / "SHA256SUMS", "all is well\n"),
    error("FC607", "SHA256SUMS"),
    is_after_sums=True,
)
add(
    "no manifest",
    lambda folder: (folder / "SHA256SUMS").unlink(),
    frozenset({("FC612", "info", "SHA256SUMS")}),
    is_after_sums=True,
)
