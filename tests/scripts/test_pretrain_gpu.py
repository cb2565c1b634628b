"""The pre-training that holds its pictures on a GPU, here on a CPU: what it draws, packs, trains and goes on with."""

import json
import math
from dataclasses import replace

import gpu_pictures
import numpy as np
import pretrain_gpu
import pytest
import torch
from PIL import Image

from networks import ResNet3DClassifier
from vdt_transforms import ImageToVolume

CPU = torch.device("cpu")


@pytest.fixture
def packed(tmp_path):
    """Twelve pictures of three classes, as files and as a pack."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    gpu_pictures.pack(str(tmp_path / "pictures"), str(tmp_path / "pack.pt"))
    return tmp_path


def test_a_pack_holds_the_pictures_and_their_classes(packed):
    pictures = gpu_pictures.load(str(packed / "pack.pt"), CPU)
    assert pictures.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    pixels = np.asarray(Image.open(packed / "pictures" / "dog" / "1.png"))
    assert np.array_equal(pictures.images[5].permute(1, 2, 0), pixels)


def test_packs_of_other_classes_or_named_twice_are_refused(packed):
    pack = torch.load(packed / "pack.pt", weights_only=True)
    torch.save({**pack, "classes": ["cat", "cow", "owl"]}, packed / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: its classes must be the 3 of the first pack, \['cow', 'dog'\]"):
        gpu_pictures.load(f"{packed / 'pack.pt'},{packed / 'other.pt'}", CPU)
    with pytest.raises(ValueError, match="classes must be"):
        gpu_pictures.load(str(packed / "other.pt"), CPU, pack["classes"])
    with pytest.raises(ValueError, match=r"pack\.pt: a pack must be named once, got it 2 times"):
        gpu_pictures.load(",".join([str(packed / "pack.pt")] * 2), CPU)


def test_pictures_become_the_volumes_of_the_transform(packed):
    images = gpu_pictures.load(str(packed / "pack.pt"), CPU).images
    ours = gpu_pictures.to_volumes(images, gpu_pictures.Run("plain"))
    transform = ImageToVolume(mean=gpu_pictures.MEAN, std=gpu_pictures.STD)
    assert torch.allclose(ours, torch.stack([transform(image) for image in images]), atol=1e-5)


def test_a_crop_of_the_whole_picture_is_the_picture_or_its_mirror_image(packed):
    images = gpu_pictures.load(str(packed / "pack.pt"), CPU).images
    draw = torch.Generator().manual_seed(0)
    widths = 4 / 3  # whole where the drawn aspect is 1: sides are cut at the picture's
    crops = gpu_pictures.crop(images, draw, (widths, widths))
    same = [torch.allclose(a, b.float(), atol=0.1) for a, b in zip(crops, images, strict=True)]
    mirrored = [torch.allclose(a, b.float().flip(-1), atol=0.1) for a, b in zip(crops, images, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert any(same)
    assert any(mirrored)


def test_a_run_that_was_cut_off_ends_with_the_weights_of_one_that_was_not(packed, monkeypatch):
    pictures = gpu_pictures.load(str(packed / "pack.pt"), CPU)
    run = gpu_pictures.Run("small", width=8, slices=5, drift=1.0, channels_last=False)
    monkeypatch.setattr(pretrain_gpu, "SAVE_EVERY", -1)
    ends = []
    for name, times in (("whole", [math.inf]), ("cut", [0.0, math.inf])):
        (packed / name).mkdir()
        for until in times:
            network, done = pretrain_gpu.train_run(replace(run), pictures, pictures, 4, 0.1, 4, packed / name, until)
        ends.append(network.state_dict())
        assert done["steps"] == done["of"] == 12
    assert all(torch.equal(one, other) for one, other in zip(ends[0].values(), ends[1].values(), strict=True))


@pytest.mark.slow
def test_training_a_list_leaves_half_precision_weights_and_a_log(packed):
    runs = packed / "runs.json"
    runs.write_text(json.dumps([{"name": "a", "width": 8}, {"name": "b", "width": 8, "twin": True, "rate": 0.1}]))
    pack = str(packed / "pack.pt")
    pretrain_gpu.train(pack, pack, str(runs), str(packed / "out"), epochs=1, batch=4)
    weights = torch.load(packed / "out" / "a.pt", weights_only=True)
    assert weights["head.fc.weight"].dtype == torch.float16
    ResNet3DClassifier(18, 3, base_channels=8).load_state_dict(weights)
    log = json.loads((packed / "out" / "log.json").read_text())
    assert [run["name"] for run in log] == ["a", "b"]
    assert log[0]["used_rate"] in pretrain_gpu.RATES
    assert not list((packed / "out").glob("*resume*"))
