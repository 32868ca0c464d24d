"""Pictures and prompts as inputs: what the model's own processor makes of them, or why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo_ckpt.bases import Base
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.parity.inputs import Inputs
from flamingo_ckpt.parity.opening import Side, open_pair
from flamingo_ckpt.parity.prompts import prompt_inputs
from tests import zoo
from tests.layout_support import Files
from tests.loading.flamingo_files import (
    refused,
    save_language_model,
    save_open_clip,
    save_tokenizer,
    tokenizer_of,
)
from tests.loading.folders import write_folder, write_tokenizer
from tests.support import FIXTURES, Outcome, cli
from tests.zoo_clip import IMAGE, TEXT_TOKENS, TEXT_WORDS, open_clip_cfg
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN
from tests.zoo_lms import POSITIONS, WORDS
from tests.zoo_paligemma import WORDS as GEMMA_WORDS

RED, BLUE = FIXTURES / "red-ball.png", FIXTURES / "blue-ball.png"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Pair = tuple[Side, Side]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("flamingos"))


@pytest.fixture(scope="module")
def tokenizer(files: Files) -> Path:
    return tokenizer_of("llama", files.folder / "tokenizer")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One CLIP in the folders of transformers and of open_clip, with different statistics."""
    folder, model = tmp_path_factory.mktemp("clips"), zoo.clip(layers=2)
    theirs = zoo.save_folder(model.hf, model.config, folder / "hf")
    own = folder / "open_clip"
    zoo.save_safetensors(model.open_clip, own / "open_clip_model.safetensors")
    config = {"model_cfg": open_clip_cfg(2), "preprocess_cfg": {"mean": [0.4, 0.5, 0.6]}}
    (own / "open_clip_config.json").write_text(json.dumps(config))
    return theirs, own


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One PaliGemma in two layouts, each folder with the tokenizer."""
    folder, model = tmp_path_factory.mktemp("gemmas"), zoo.paligemma(layers=2)
    return (
        write_folder(folder / "a", model.config, model.layout("L4")),
        write_folder(folder / "b", model.config, model.layout("L1")),
    )


@pytest.fixture
def gemma(gemmas: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return shutil.copytree(gemmas[0], tmp_path / "gemma")


def flamingos(files: Files, **options: Any) -> Pair:
    """The partial checkpoint with its bases, and the whole folder."""
    bases = [
        Base(kind=kind, manifest=open_checkpoint(str(files.write(what, "llama"))))
        for kind, what in (("vision", "clip"), ("language", "language"))
    ]
    pair = str(files.write("partial", "llama")), str(files.whole("llama"))
    return open_pair(*pair, **{"config": str(files.config("llama")), "bases": bases, **options})


def made(pair: Pair, *images: Path, prompt: str = "", tokenizer: Path | None = None) -> Inputs:
    make = prompt_inputs(
        pair, [str(one) for one in images], prompt, None if tokenizer is None else str(tokenizer)
    )
    return make(pair[0].model, pair[1].model)


def config_with(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps(zoo.flamingo_config(zoo.openflamingo("llama"), **changes)))
    return str(path)


def by_open_clip(path: Path, mean: Any = CLIP_MEAN, std: Any = CLIP_STD) -> torch.Tensor:
    """What CLIP does to a picture: shrink the shorter side, cut out the middle, normalise."""
    with Image.open(path) as picture:
        width, height = (side * IMAGE // min(picture.size) for side in picture.size)
        shrunk = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - IMAGE) // 2, (height - IMAGE) // 2
    middle = np.asarray(shrunk, np.float64)[top : top + IMAGE, left : left + IMAGE]
    values = (middle / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(values.transpose(2, 0, 1).astype(np.float32))


# --- from the command line ------------------------------------------------------------------------


def run(files: Files, *options: object) -> Outcome:
    part, whole = files.write("partial", "llama"), files.whole("llama")
    return cli(
        *("parity", part, whole, *files.bases("llama"), "--config", files.config("llama")),
        *(*options, "--greedy", 2, "--json"),
    )


def test_a_flamingo_is_shown_a_picture(files: Files, tokenizer: Path) -> None:
    found = run(
        files, "--image", RED, "--prompt", "<image>An image of two cats.", "--tokenizer", tokenizer
    )
    assert found.code == 0, found
    data = found.document["data"]
    assert (data["source"], data["seed"]) == (str(RED), None)
    shapes = {one["name"]: one["shape"] for one in data["tensors"]}
    assert shapes == {
        "vision_x": [1, 1, 1, 3, IMAGE, IMAGE],
        "lang_x": [1, 7],
        "attention_mask": [1, 7],
    }
    assert "pictures prepared as open_clip does for CLIP" in data["description"]
    assert f"whose `<image>` is {MEDIA_TOKEN}" in data["description"]
    assert found.document["verdict"] == "pass"


def test_a_fault_is_found_with_a_picture_too(files: Files, tokenizer: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(files.whole("llama"), tmp_path / "whole")
    config = json.loads((whole / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (whole / "config.json").write_text(json.dumps(config))
    found = cli(
        *("parity", files.write("partial", "llama"), whole, *files.bases("llama")),
        *("--config", files.config("llama"), "--image", RED, "--prompt", "<image>a sink"),
        *("--tokenizer", tokenizer, "--greedy", 0, "--json"),
    )
    assert found.code == 1, found
    assert "FC480" in found.codes


def test_a_paligemma_is_shown_a_picture(gemmas: tuple[Path, Path]) -> None:
    found = cli("parity", *gemmas, "--image", RED, "--prompt", "w7 w8", "--greedy", 2, "--json")
    assert found.code == 0, found
    assert found.document["verdict"] == "pass"


def test_a_clip_is_shown_two_pictures(clips: tuple[Path, Path], tokenizer: Path) -> None:
    found = cli(
        *("parity", *clips, "--image", RED, "--image", BLUE, "--prompt", "a cat"),
        *("--tokenizer", tokenizer, "--json"),
    )
    assert found.code == 0, found
    assert found.document["data"]["source"] == f"{RED}, {BLUE}"
    assert found.document["summary"]["layers"][-1]["stage"] == "logits"
    assert found.document["verdict"] == "pass"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "<image>An"], "a Flamingo needs a picture"),
        (["--image", RED, "--prompt", "An"], "has 0 `<image>` for 1 --image"),
        (["--image", RED, "--prompt", "<image>An<image>"], "has 2 `<image>` for 1 --image"),
        (["--image", RED, "--image", BLUE, "--prompt", "<image>"], "1 `<image>` for 2 --image"),
        (["--image", "nowhere.png", "--prompt", "<image>"], "no file `nowhere.png`"),
        (["--image", FIXTURES, "--prompt", "<image>"], "no file"),
        (["--image", FIXTURES / "README.md", "--prompt", "<image>"], "cannot be read as a picture"),
        (["--image", RED, "--prompt", "<image>" + "An " * POSITIONS], "model takes 64"),
    ],
)
def test_what_does_not_serve_is_refused(
    files: Files, tokenizer: Path, options: list[object], words: str
) -> None:
    found = run(files, *options, "--tokenizer", tokenizer)
    assert (found.code, found.codes) == (2, ["FC484"]), found
    (finding,) = found.document["findings"]
    assert words in finding["detail"]
    assert finding["hint"]


def test_without_a_tokenizer_the_way_on_is_told(files: Files) -> None:
    found = run(files, "--image", RED, "--prompt", "<image>An")
    assert (found.code, found.codes) == (2, ["FC484"])
    (finding,) = found.document["findings"]
    assert "there is no tokenizer in" in finding["detail"]
    assert "--tokenizer" in finding["hint"]
    found = run(files, "--image", RED, "--prompt", "<image>An", "--tokenizer", "no/where")
    assert (found.code, found.codes) == (2, ["FC484"])  # and no repository is asked for
    found = run(files, "--image", RED, "--prompt", "<image>An", "--tokenizer", FIXTURES)
    assert (found.code, found.codes) == (2, ["FC454"])


# --- Flamingo -------------------------------------------------------------------------------------


def test_the_same_as_the_models_own_processor(files: Files, tokenizer: Path) -> None:
    pair = flamingos(files)
    prompt = "<image>An image of two cats.<|endofchunk|><image>a"
    found = made(pair, RED, BLUE, prompt=prompt, tokenizer=tokenizer)
    tensors = found.tensors
    assert {name: tuple(one.shape) for name, one in tensors.items()} == {
        "vision_x": (1, 2, 1, 3, IMAGE, IMAGE),
        "lang_x": (1, 10),
        "attention_mask": (1, 10),
    }
    wanted = [MEDIA_TOKEN, 2, 3, 4, 5, 6, 7, EOC_TOKEN, MEDIA_TOKEN, 8]
    assert tensors["lang_x"].tolist() == [wanted]
    assert tensors["lang_x"].dtype == tensors["attention_mask"].dtype == torch.int64
    assert (tensors["attention_mask"] == 1).all()
    assert tensors["vision_x"].dtype == torch.float32
    for at, path in enumerate((RED, BLUE)):
        assert torch.allclose(tensors["vision_x"][0, at, 0], by_open_clip(path), atol=1e-5)
    assert (found.kind, found.media_token_id, found.seed) == ("flamingo", MEDIA_TOKEN, None)
    assert found.source == f"{RED}, {BLUE}"
    assert found.describe() == f"1 row of 10 tokens, with 2 images of {IMAGE}x{IMAGE}"


def test_without_a_prompt_each_picture_has_its_token(
    files: Files, tokenizer: Path, tmp_path: Path
) -> None:
    found = made(flamingos(files), RED, BLUE, tokenizer=tokenizer)
    assert found.tokens.tolist() == [[MEDIA_TOKEN] * 2]
    # without a tokenizer, where the config tells the token; else there is no way to know it
    config = config_with(tmp_path / "config.json", media_token_id=MEDIA_TOKEN)
    found = made(flamingos(files, config=config), RED, BLUE)
    assert found.tokens.tolist() == [[MEDIA_TOKEN] * 2]
    assert "no prompt and no tokenizer" in found.note
    refused("FC484", made, flamingos(files), RED)


def test_a_tokenizer_that_begins_every_text(files: Files, tmp_path: Path) -> None:
    """As LLaMA's: what comes before the first picture is the tokenizer's business."""
    from tokenizers import Tokenizer, processors

    folder = tokenizer_of("llama", tmp_path / "tokenizer")
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    inner.save(str(folder / "tokenizer.json"))
    found = made(flamingos(files), RED, prompt="<image>An", tokenizer=folder)
    assert found.tokens.tolist() == [[1, MEDIA_TOKEN, 2]]


def test_config_and_tokenizer_agree_on_the_token(
    files: Files, tokenizer: Path, tmp_path: Path
) -> None:
    config = config_with(tmp_path / "config.json", media_token_id=MEDIA_TOKEN)
    found = made(flamingos(files, config=config), RED, tokenizer=tokenizer)
    assert found.media_token_id == MEDIA_TOKEN
    assert "whose" not in found.note
    config = config_with(tmp_path / "config.json", media_token_id=MEDIA_TOKEN + 1)
    error = refused("FC484", made, flamingos(files, config=config), RED, tokenizer=tokenizer)
    assert str(MEDIA_TOKEN) in error.message
    assert str(MEDIA_TOKEN + 1) in error.message


def test_tokens_without_a_row(files: Files, tokenizer: Path, tmp_path: Path) -> None:
    pair = flamingos(files)
    other = save_tokenizer(tmp_path / "other", words=WORDS + 20)
    error = refused("FC484", made, pair, RED, tokenizer=other)
    assert f"`<image>` is token {WORDS + 21} of the prompt" in error.message
    assert "of A has 96 rows" in error.message
    # B alone may lack it: its embedding was not resized
    text = {**pair[1].model.data["text_config"], "vocab_size": WORDS}
    from flamingo_ckpt.models.config import parse_config

    short = parse_config({**pair[1].model.data, "text_config": text}, "short")
    make = prompt_inputs(pair, [str(RED)], "", str(tokenizer))
    # which is for the check to find, not for the inputs to refuse
    assert int(make(pair[0].model, short).tokens.max()) == MEDIA_TOKEN


def test_more_pictures_than_the_model_takes(files: Files, tokenizer: Path, tmp_path: Path) -> None:
    config = config_with(tmp_path / "config.json", max_num_media=1)
    pair = flamingos(files, config=config)
    assert made(pair, RED, tokenizer=tokenizer).pixels.shape[1] == 1
    error = refused("FC484", made, pair, RED, BLUE, tokenizer=tokenizer)
    assert "2 pictures, and the model takes 1" in error.message


def test_the_first_tokenizer_that_is_found(files: Files, tokenizer: Path, tmp_path: Path) -> None:
    """The named one, A's, B's, the language base's; its folder is told."""
    language = save_language_model("llama", tmp_path / "language")
    whole = shutil.copytree(files.whole("llama"), tmp_path / "whole")
    vision = Base(kind="vision", manifest=open_checkpoint(str(files.write("clip", "llama"))))
    pair = str(files.write("partial", "llama")), str(whole)

    def told(given: Path | None = None) -> str:
        base = Base(kind="language", manifest=open_checkpoint(str(language)))
        sides = open_pair(*pair, config=str(files.config("llama")), bases=[vision, base])
        found = made(sides, RED, prompt="<image>An", tokenizer=given)
        assert found.tokens.tolist() == [[MEDIA_TOKEN, 2]]
        return found.note

    tokenizer_of("llama", language)
    assert f"tokenizer in {language}" in told()
    tokenizer_of("llama", whole)
    assert f"tokenizer in {whole}" in told()
    assert f"tokenizer in {tokenizer}" in told(tokenizer)


def test_the_first_preprocessing_that_is_found(
    files: Files, tokenizer: Path, tmp_path: Path
) -> None:
    """A's folder, B's, the vision base's."""
    clip = save_open_clip(tmp_path / "clip")
    whole = shutil.copytree(files.whole("llama"), tmp_path / "whole")
    language = Base(
        kind="language", manifest=open_checkpoint(str(files.write("language", "llama")))
    )
    pair = str(files.write("partial", "llama")), str(whole)

    def check(place: Path, mean: list[float], std: list[float] | None = None) -> None:
        base = Base(kind="vision", manifest=open_checkpoint(str(clip)))
        sides = open_pair(*pair, config=str(files.config("llama")), bases=[base, language])
        found = made(sides, RED, tokenizer=tokenizer)
        assert f"pictures prepared by {place}" in found.note
        wanted = by_open_clip(RED, mean, std or CLIP_STD)
        assert torch.allclose(found.pixels[0, 0, 0], wanted, atol=1e-5)

    check(clip / "open_clip_config.json", [0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    nested = whole / "processor_config.json"  # as transformers 5 saves a processor
    nested.write_text(json.dumps({"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}))
    check(nested, [0.1, 0.2, 0.3])
    own = whole / "preprocessor_config.json"
    own.write_text(json.dumps({"image_mean": [0.5, 0.2, 0.3], "do_center_crop": True}))
    check(own, [0.5, 0.2, 0.3])


# --- CLIP -----------------------------------------------------------------------------------------


def test_each_picture_has_its_row_of_text(clips: tuple[Path, Path], tokenizer: Path) -> None:
    found = made(open_pair(*map(str, clips)), RED, BLUE, prompt="a cats", tokenizer=tokenizer)
    row = [8, 6] + [0] * (TEXT_TOKENS - 2)
    assert found.tensors["text"].tolist() == [row, row]
    assert found.tensors["image"].shape == (2, 3, IMAGE, IMAGE)
    mean = (0.4, 0.5, 0.6)  # of B's folder: A's has none
    assert torch.allclose(found.pixels[0], by_open_clip(RED, mean), atol=1e-5)
    assert found.media_token_id is None
    assert "attention_mask" not in found.tensors


def test_a_prompt_alone_is_compared_with_a_generated_picture(
    clips: tuple[Path, Path], tokenizer: Path
) -> None:
    pair = open_pair(*map(str, clips))
    found = made(pair, prompt="a", tokenizer=tokenizer)
    assert found.pixels.shape == (1, 3, IMAGE, IMAGE)
    assert "no --image" in found.note
    assert found.source == "a prompt"
    assert "no tokenizer" in refused("FC484", made, pair, RED, prompt="a").message


def test_a_long_prompt_is_cut_and_that_is_told(clips: tuple[Path, Path], tokenizer: Path) -> None:
    pair = open_pair(*map(str, clips))
    whole = made(pair, RED, prompt="a " * TEXT_TOKENS, tokenizer=tokenizer)
    cut = made(pair, RED, prompt="a " * 40, tokenizer=tokenizer)
    assert whole.tokens.equal(cut.tokens)
    assert "cut to the 12 tokens" in cut.note
    assert "cut" not in whole.note


def test_text_without_tokens_or_rows(
    clips: tuple[Path, Path], tokenizer: Path, tmp_path: Path
) -> None:
    pair = open_pair(*map(str, clips))
    refused("FC484", made, pair, RED, tokenizer=tokenizer)
    large = save_tokenizer(tmp_path / "large", words=TEXT_WORDS + 30)
    error = refused("FC484", made, pair, RED, prompt="word110", tokenizer=large)
    assert f"has {TEXT_WORDS} rows" in error.message
    refused("FC456", made, pair, RED, prompt="a", tokenizer=FIXTURES)


def own_vocabulary(folder: Path, **changes: Any) -> Pair:
    """A small CLIP with the vocabulary that open_clip ships, of both libraries."""
    text = {"context_length": 10, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = open_clip_cfg(1) | {"text_cfg": {**text, **changes}}
    from open_clip.model import CLIP

    with torch.random.fork_rng():
        model = CLIP(**config)
    zoo.save_safetensors(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return open_pair(str(folder), str(folder))


def test_open_clips_own_tokenizer(tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    pair = own_vocabulary(tmp_path)
    theirs = SimpleTokenizer(context_length=10)
    for prompt, is_cut in (
        ("", False),
        ("A photo of a Cat.", False),
        ("one two three four five six seven eight", False),
        ("one two three four five six seven eight nine", True),
    ):
        found = made(pair, RED, BLUE, prompt=prompt)
        assert found.tensors["text"].equal(theirs([prompt] * 2))
        assert ("cut to the 10 tokens" in found.note) is is_cut
        assert "open_clip's tokenizer" in found.note
    error = refused("FC484", made, own_vocabulary(tmp_path, hf_tokenizer_name="bert"), RED)
    assert "no tokenizer" in error.message


def test_the_image_tower_alone_is_shown_pictures(tmp_path: Path) -> None:
    model = zoo.clip(layers=2)
    path = str(zoo.save_folder(model.hf_vision, model.vision_config, tmp_path / "tower"))
    found = made(open_pair(path, path), RED, BLUE)
    assert (found.kind, list(found.tensors)) == ("tower", ["image"])
    assert torch.allclose(found.pixels[1], by_open_clip(BLUE), atol=1e-5)
    assert "needs a picture" in refused("FC484", made, open_pair(path, path)).message
    assert "no text" in refused("FC484", made, open_pair(path, path), RED, prompt="a").message
    outcome = cli("parity", path, path, "--image", RED, "--json")
    assert (outcome.code, outcome.document["verdict"]) == (0, "pass")


# --- PaliGemma ------------------------------------------------------------------------------------


def by_transformers(folder: Path, prompt: str, **settings: Any) -> Mapping[str, torch.Tensor]:
    """What transformers' own processor makes of a picture and a prompt."""
    from transformers import AutoTokenizer, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size = {"height": IMAGE, "width": IMAGE}
    processor = SiglipImageProcessorPil(size=size, **settings)
    processor.image_seq_length = (IMAGE // 8) ** 2
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    whole = PaliGemmaProcessor(image_processor=processor, tokenizer=tokens)
    text = prompt if "<image>" in prompt else f"<image>{prompt}"
    with Image.open(RED) as picture:
        found = whole(images=picture.convert("RGB"), text=text)
    return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}


@pytest.mark.parametrize("prompt", ["", "w5 w6", "<image>", "<image> w5", "w3 <image> w5 w6"])
def test_the_same_as_transformers_processor(gemmas: tuple[Path, Path], prompt: str) -> None:
    found = made(open_pair(*map(str, gemmas)), RED, prompt=prompt)
    wanted = by_transformers(gemmas[0], prompt)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert found.tensors[name].equal(wanted[name]), name
        assert found.tensors[name].dtype == torch.int64
    assert torch.allclose(found.pixels, wanted["pixel_values"], atol=1e-6)
    assert found.pixels.dtype == torch.float32
    assert "prepared as for SigLIP" in found.note


def test_its_preprocessor_is_followed(gemma: Path) -> None:
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1], "resample": 2}
    size = {"height": IMAGE, "width": IMAGE}
    document = {**settings, "size": size, "do_resize": True, "rescale_factor": 1 / 255}
    path = gemma / "preprocessor_config.json"
    path.write_text(json.dumps({**document, "do_convert_rgb": None, "image_seq_length": 16}))
    found = made(open_pair(str(gemma), str(gemma)), RED)
    wanted = by_transformers(gemma, "", **settings)
    assert torch.allclose(found.pixels, wanted["pixel_values"], atol=1e-5)
    assert "prepared by" in found.note


def test_one_picture_and_one_place_for_it(gemmas: tuple[Path, Path]) -> None:
    pair = open_pair(*map(str, gemmas))
    assert "needs a picture" in refused("FC484", made, pair, prompt="w5").message
    assert "takes one" in refused("FC484", made, pair, RED, BLUE).message
    error = refused("FC484", made, pair, RED, prompt="<image> w5 <image>")
    assert "has 2 `<image>` for 1 --image" in error.message
    error = refused("FC484", made, pair, RED, prompt="w5 " * 60)
    assert "model takes 64" in error.message


def test_tokenizers_that_are_not_paligemmas(gemma: Path, tokenizer: Path) -> None:
    pair = open_pair(str(gemma), str(gemma))
    assert "begins a text" in refused("FC484", made, pair, RED, tokenizer=tokenizer).message
    config = json.loads((gemma / "config.json").read_text())
    config["image_token_index"] = GEMMA_WORDS - 1
    (gemma / "config.json").write_text(json.dumps(config))
    error = refused("FC484", made, open_pair(str(gemma), str(gemma)), RED)
    assert f"`<image>` is {GEMMA_WORDS}" in error.message
    (gemma / "tokenizer.json").write_text("{")
    refused("FC456", made, pair, RED)
    for path in gemma.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in refused("FC484", made, pair, RED).message


def test_the_tokenizer_may_be_with_b(gemmas: tuple[Path, Path], gemma: Path) -> None:
    for path in gemma.glob("tokenizer*"):
        path.unlink()
    found = made(open_pair(str(gemma), str(gemmas[1])), RED, prompt="w5")
    assert f"tokenizer in {gemmas[1]}" in found.note
    write_tokenizer(gemma)
    assert f"tokenizer in {gemma}" in made(open_pair(str(gemma), str(gemmas[1])), RED).note
