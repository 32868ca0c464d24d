"""`load_pretrained`: each way in which upstream's `strict=False` hid a load that did not happen."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CkptError, LoadError
from flamingo_ckpt.loading.flamingo import create_model_and_transforms
from flamingo_ckpt.loading.pretrained import load_pretrained
from tests import zoo
from tests.hub_server import HubServer, serving
from tests.loading.flamingo_files import create, save_parts

Create = Callable[..., Any]
REPO = "openflamingo/OpenFlamingo-Tiny"


@pytest.fixture(scope="module")
def created(tmp_path_factory: pytest.TempPathFactory) -> Create:
    """A fresh copy of the model of a family, its frozen parts filled."""
    made: dict[tuple[Any, ...], Any] = {}

    def create(family: str = "llama", every: int = 2, **options: Any) -> Any:
        key = (family, every, *options.items())
        if key not in made:
            parts = save_parts(family, tmp_path_factory.mktemp(family))
            with torch.random.fork_rng():
                torch.manual_seed(7)
                made[key], _, _ = create_model_and_transforms(
                    **parts, cross_attn_every_n_layers=every, **options
                )
        return copy.deepcopy(made[key])

    return create


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as hub:
        yield hub


def trained(family: str = "llama", **options: Any) -> dict[str, Any]:
    return dict(zoo.openflamingo(family, **options).partial)


def assert_loaded(model: Any, wanted: Mapping[str, torch.Tensor]) -> None:
    found = model.state_dict()
    names = [name for name in wanted if name in found]
    assert any("gated" in name for name in names)
    assert any("perceiver" in name for name in names)
    for name in names:
        assert torch.equal(found[name], wanted[name]), name


def refused(model: Any, path: Path, **options: Any) -> CkptError:
    """The error; and the model is what it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CkptError) as caught:
        load_pretrained(model, path, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    return caught.value


# --- what has to work -----------------------------------------------------------------------------


@pytest.mark.parametrize("era", ["now", "2023"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_what_upstream_saves(family: str, era: str, created: Create, tmp_path: Path) -> None:
    """Of today's transformers and of the releases': `embed_out`, masks, `inv_freq`, no head."""
    made = zoo.openflamingo(family, era=era)
    model = created(family)
    report = load_pretrained(model, zoo.save_torch(made.partial, tmp_path / "checkpoint.pt"))
    assert_loaded(model, trained(family))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert set(report.absent_by_design.values()) == {"vision", "language"}
    names = {name for name, one in model.named_parameters() if one.requires_grad}
    assert names.isdisjoint(report.absent_by_design)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [(None, ""), (None, "module."), ("model_state_dict", "module."), ("state_dict", "_orig_mod.")],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_and_wrappers(
    wrapper: str | None, prefix: str, suffix: str, created: Create, tmp_path: Path
) -> None:
    """A release was first uploaded with `module.` before every key: nothing was loaded."""
    if suffix == "safetensors":
        named = {prefix + name: tensor for name, tensor in trained().items()}
        path = zoo.save_safetensors(named, tmp_path / "x.safetensors")
    else:
        path = zoo.save_torch(trained(), tmp_path / "x.pt", wrapper=wrapper, prefix=prefix)
    model = created()
    load_pretrained(model, path)
    assert_loaded(model, trained())


def test_version_1_with_its_aliases_and_buffers(created: Create, tmp_path: Path) -> None:
    model, state = created(), zoo.openflamingo_v1()
    load_pretrained(model, zoo.save_torch(state, tmp_path / "v1.pt"))
    assert_loaded(model, state)


def test_a_whole_state_dict_with_both_alias_trees(created: Create, tmp_path: Path) -> None:
    model, full = created(), zoo.openflamingo("llama").full
    report = load_pretrained(model, zoo.save_torch(full, tmp_path / "full.pt"))
    assert_loaded(model, full)
    assert not report.absent_by_design


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_the_hugging_face_port(sharded: bool, created: Create, tmp_path: Path) -> None:
    made = zoo.hf_flamingo("llama")
    folder = zoo.save_folder(made.state, made.config, tmp_path / "hf")
    if sharded:
        (folder / "model.safetensors").unlink()
        names, weight_map = sorted(made.state), {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"model-{number:05}-of-00002.safetensors"
            zoo.save_safetensors({name: made.state[name] for name in part}, folder / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = created()
    report = load_pretrained(model, folder)
    assert report.layout == "hf-flamingo"
    wanted = made.source.full
    assert_loaded(model, {n: t for n, t in wanted.items() if n != "vision_encoder.proj"})


def test_a_model_of_two_dtypes_is_cast_and_told(created: Create, tmp_path: Path) -> None:
    model = created().bfloat16()
    report = load_pretrained(model, zoo.save_torch(trained(), tmp_path / "x.pt"))
    assert model.perceiver.latents.dtype == torch.bfloat16
    assert report.cast["perceiver.latents"] == ("F32", "BF16")
    assert torch.equal(model.perceiver.latents, trained()["perceiver.latents"].bfloat16())


def test_parameters_stay_those_that_an_optimizer_knows(created: Create, tmp_path: Path) -> None:
    model = created()
    before = {name: (one, one.requires_grad) for name, one in model.named_parameters()}
    load_pretrained(model, zoo.save_torch(trained(), tmp_path / "x.pt"), device="cpu")
    for name, one in model.named_parameters():
        assert one is before[name][0], name
        assert one.requires_grad == before[name][1], name


def test_gates_that_were_never_opened(
    created: Create, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained()
    load_pretrained(created(), zoo.save_torch(state, tmp_path / "x.pt"))
    assert not caplog.records
    state |= {name: torch.zeros(1) for name in state if name.endswith("_gate")}
    load_pretrained(created(), zoo.save_torch(state, tmp_path / "closed.pt"))
    assert "all 4 gates of" in caplog.text


def test_training_leaves_the_files_alone(tmp_path: Path) -> None:
    """What is mapped from a file is written to in memory only."""
    parts = save_parts("llama", tmp_path)
    folder = Path(parts["lang_encoder_path"])
    made = zoo.openflamingo("llama")
    rows = {"vocab_size": zoo.flamingo_rows("llama")}  # so that nothing is resized
    state = dict(made.language)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], state[name][:3] + 1])
    zoo.save_folder(state, made.text_config | rows, folder)
    files = [folder / "model.safetensors", zoo.save_safetensors(trained(), tmp_path / "ck")]
    before = [file.read_bytes() for file in files]
    model = create(parts, cross_attn_every_n_layers=2)
    load_pretrained(model, files[1])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs = made.inputs()
    loss = model(**inputs, labels=inputs["lang_x"]).loss
    loss.backward()
    optimizer.step()
    assert model(**inputs, labels=inputs["lang_x"]).loss < loss
    assert [file.read_bytes() for file in files] == before


# --- what has to be refused -----------------------------------------------------------------------


def without(state: Mapping[str, Any], part: str) -> dict[str, Any]:
    kept = {name: tensor for name, tensor in state.items() if part not in name}
    assert len(kept) < len(state)
    return kept


@pytest.mark.parametrize(
    "part",
    [
        "3.gated_cross_attn_layer.attn_gate",
        "_gate",
        "3.gated_cross_attn_layer",
        "gated_cross_attn_layer",
        "perceiver.latents",
        "perceiver.layers.5.",
        "perceiver.",
        "embed_tokens.weight",  # it is trained
    ],
)
def test_something_trained_is_missing(part: str, created: Create, tmp_path: Path) -> None:
    error = refused(created(), zoo.save_torch(without(trained(), part), tmp_path / "x.pt"))
    assert isinstance(error, LoadError)
    missing = error.report.missing_keys
    assert missing
    assert all(part.strip(".") in name or "gated_cross_attn_layers" in name for name in missing)


def test_a_frozen_embedding_may_be_absent(created: Create, tmp_path: Path) -> None:
    model = created(freeze_lm_embeddings=True)
    path = zoo.save_torch(without(trained(), "embed_tokens.weight"), tmp_path / "x.pt")
    report = load_pretrained(model, path)
    assert report.absent_by_design["lang_encoder.model.embed_tokens.weight"] == "language"


def test_something_nobody_knows(created: Create, tmp_path: Path) -> None:
    state = trained() | {"perceiver.extra.weight": torch.ones(3)}
    error = refused(created(), zoo.save_torch(state, tmp_path / "x.pt"))
    assert isinstance(error, LoadError)
    assert error.report.unexpected_keys == ("perceiver.extra.weight",)


@pytest.mark.parametrize(("file", "model"), [(1, 2), (2, 1), (4, 2), (2, 4), (1, 4)])
def test_another_interval(file: int, model: int, created: Create, tmp_path: Path) -> None:
    """Upstream loads half of the blocks, or half of the file, and says nothing."""
    path = zoo.save_torch(trained(every_n=file), tmp_path / "x.pt")
    error = refused(created(every=model), path)
    assert isinstance(error, LoadError)
    assert "`cross_attn_every_n_layers`" in (error.hint or "")


def test_a_prefix_that_nobody_knows(created: Create, tmp_path: Path) -> None:
    path = zoo.save_torch(trained(), tmp_path / "x.pt", prefix="my_wrapper.")
    error = refused(created(), path)
    assert isinstance(error, LoadError)
    assert error.report.num_loaded == 0


def test_another_number_of_rows(created: Create, tmp_path: Path) -> None:
    state = trained()
    name = "lang_encoder.model.embed_tokens.weight"
    state[name] = torch.cat([state[name], state[name][:1]])
    error = refused(created(), zoo.save_torch(state, tmp_path / "x.pt"))
    assert isinstance(error, LoadError)
    rows = zoo.flamingo_rows("llama")
    assert error.report.mismatched[name] == ((rows + 1, 48), (rows, 48))


@pytest.mark.parametrize("family", ["opt", "mpt7b", "gpt_neox"])
def test_another_family(family: str, created: Create, tmp_path: Path) -> None:
    error = refused(created(), zoo.save_torch(trained(family), tmp_path / "x.pt"))
    assert isinstance(error, LoadError)


def test_another_size(created: Create, tmp_path: Path) -> None:
    state = {
        name: tensor[..., :40] if tensor.shape[-1:] == (48,) else tensor
        for name, tensor in trained().items()
    }
    error = refused(created(), zoo.save_torch(state, tmp_path / "x.pt"))
    assert isinstance(error, LoadError)
    assert "lang_encoder.model.embed_tokens.weight" in error.report.mismatched


def test_alias_trees_that_differ(created: Create, tmp_path: Path) -> None:
    full = zoo.openflamingo("llama").full
    name = "lang_encoder.gated_cross_attn_layers.3.ff.1.weight"
    full[name] = full[name] + 1
    error = refused(created(), zoo.save_torch(full, tmp_path / "x.pt"))
    assert name in f"{error.message} {error.key}"


def test_code_in_a_pickle(created: Create, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({**trained(), "z": Trap()}, tmp_path / "pytorch_model.bin")
    error = refused(created(), tmp_path / "pytorch_model.bin")
    assert error.code == "FC501"
    assert not (tmp_path / "ran").exists()


def test_frozen_parts_without_weights(created: Create, tmp_path: Path) -> None:
    """A model on meta is not filled by a checkpoint that has a tenth of it."""
    model = created().to("meta")
    with pytest.raises(LoadError) as caught:
        load_pretrained(model, zoo.save_torch(trained(), tmp_path / "x.pt"), device="cpu")
    assert any("decoder_layer" in name for name in caught.value.report.left_on_meta)
    assert any("vision_encoder" in name for name in caught.value.report.left_on_meta)
    assert all(one.is_meta for one in model.parameters())


def test_a_model_on_meta_is_filled_by_a_whole_state_dict(created: Create, tmp_path: Path) -> None:
    full = zoo.openflamingo("llama").full
    model, real = created().to("meta"), created()
    load_pretrained(model, zoo.save_torch(full, tmp_path / "x.pt"), device="cpu")
    assert_loaded(model, full)
    load_pretrained(real, tmp_path / "x.pt")
    inputs = zoo.openflamingo("llama").inputs()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, real(**inputs).logits)


def test_only_trained_parts_on_meta(created: Create, tmp_path: Path) -> None:
    """The frozen towers have their weights; what the checkpoint brings need not exist before."""
    model = created()
    model.perceiver.to("meta")
    load_pretrained(model, zoo.save_torch(trained(), tmp_path / "x.pt"), device="cpu")
    assert_loaded(model, trained())


# --- places ---------------------------------------------------------------------------------------


def test_folders_and_files(created: Create, tmp_path: Path) -> None:
    model = created()
    zoo.save_torch(trained(), tmp_path / "run" / "checkpoint.pt")
    load_pretrained(model, tmp_path / "run")
    assert_loaded(model, trained())
    other = trained(seed=1)
    zoo.save_torch(other, tmp_path / "run" / "checkpoint_9.pt")
    load_pretrained(model, str(tmp_path / "run"), "checkpoint_9.pt")
    assert_loaded(model, other)
    with pytest.raises(CkptError, match="nothing"):
        load_pretrained(model, tmp_path / "run", "nothing.pt")
    for code, path, options in (
        ("FC450", "./nothing/there.pt", {}),
        ("FC006", tmp_path / "run", {"revision": "main"}),
    ):
        with pytest.raises(CkptError) as caught:
            load_pretrained(model, path, **options)
        assert caught.value.code == code


def test_from_the_hub_and_then_from_its_cache(
    server: HubServer, created: Create, tmp_path: Path
) -> None:
    path = zoo.save_torch(trained(), tmp_path / "checkpoint.pt")
    first = server.push(REPO, {"checkpoint.pt": path.read_bytes()})
    later = zoo.save_torch(trained(seed=1), tmp_path / "later.pt")
    server.push(REPO, {"checkpoint.pt": later.read_bytes()})
    cache, model = {"cache_dir": tmp_path / "cache"}, created()
    load_pretrained(model, REPO, **cache)
    assert_loaded(model, trained(seed=1))
    load_pretrained(model, REPO, revision=first, **cache)
    assert_loaded(model, trained())
    stores = {one.port for one in server.asked("GET", "/store/")}
    assert stores == {server.ports[1]}

    server.requests.clear()
    load_pretrained(model, REPO, local_files_only=True, **cache)
    assert_loaded(model, trained(seed=1))
    assert server.requests == []
    for code, repo_id, name in (("FC471", REPO, "no.pt"), ("FC470", "open/no", "checkpoint.pt")):
        with pytest.raises(CkptError) as caught:
            load_pretrained(model, repo_id, name, **cache)
        assert caught.value.code == code
    assert_loaded(model, trained(seed=1))


@pytest.mark.parametrize("filename", [None, "model.safetensors.index.json"])
def test_shards_from_the_hub(
    filename: str | None, server: HubServer, created: Create, tmp_path: Path
) -> None:
    made = zoo.hf_flamingo("llama")
    names, weight_map = sorted(made.state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        zoo.save_safetensors({n: made.state[n] for n in part}, tmp_path / "up" / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "up" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "up" / "config.json").write_text(json.dumps(made.config))
    (tmp_path / "up" / "other.bin").write_bytes(b"unwanted")
    server.push_folder(REPO, tmp_path / "up")
    model = created()
    report = load_pretrained(model, REPO, filename, cache_dir=tmp_path / "cache")
    assert report.layout == "hf-flamingo"
    assert not [one for one in server.requests if "other.bin" in one.path]
    wanted = made.source.full
    assert_loaded(model, {n: t for n, t in wanted.items() if n != "vision_encoder.proj"})
