"""Features are the means of the encoder's maps, of the volumes and cubes that the table names."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from networks import ResNet2D, ResNet3D, ResNet3DClassifier
from tests.makers.nodules import make_list, nodule_id, write_nodules
from tests.makers.volumes import make_affine, write_volume
from vdt_workflows.evaluation.features import PooledEncoder, embed, embed_volumes, load_encoder
from vdt_workflows.training.checkpoints import save_weights
from vdt_workflows.training.shipped import find_weights

STAGES = {"out_indices": (0, 1, 2, 3), "base_channels": 4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A pre-trained classifier's file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.pt"
    save_weights(ResNet3DClassifier(18, 3, base_channels=4).eval(), path)
    return path


def load_plain(weights):
    network = ResNet3D(18, depth_stride=True, **STAGES)
    named = torch.load(weights, weights_only=True)
    network.load_state_dict({n.removeprefix("backbone."): t for n, t in named.items() if n.startswith("backbone.")})
    return network.eval()


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def values_of(rows):
    return np.array([[float(v) for n, v in row.items() if n.startswith("stage")] for row in rows])


def test_features_are_the_means_of_the_four_maps_in_batches_of_any_size(weights):
    encoder, volumes = load_encoder(weights), torch.randn(5, 1, 8, 20, 24)
    with torch.inference_mode():
        wanted = torch.cat([m.mean((2, 3, 4)) for m in load_plain(weights)(volumes)], 1)
    torch.testing.assert_close(embed(encoder, volumes, batch_size=2), wanted)
    torch.testing.assert_close(embed(encoder, volumes[3, 0]), wanted[3:4])
    assert (len(encoder.names), encoder.names[0], encoder.names[-1]) == (60, "stage1_000", "stage4_031")
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(("colours", "shifts"), [("neighbours", (-1, 0, 1)), ("repeat", (0, 0, 0))])
def test_a_2d_network_sees_slice_by_slice_and_its_features_are_averaged(tmp_path, colours, shifts):
    network = ResNet2D(18, base_channels=4).eval()
    torch.save({f"backbone.{n}": t.half() for n, t in network.state_dict().items()}, tmp_path / "twin.pt")
    encoder, volume = load_encoder(tmp_path / "twin.pt", colours=colours), torch.randn(6, 32, 40)
    found = []
    for i in range(6):
        image = torch.stack([volume[min(max(i + s, 0), 5)] for s in shifts])[None]
        with torch.inference_mode():
            found.append(encoder.network(image).mean((2, 3)))
    torch.testing.assert_close(embed(encoder, volume)[:, -32:], torch.cat(found).mean(0, keepdim=True))


def test_shipped_weights_are_taken_by_name_and_others_by_path(tmp_path):
    shipped = load_encoder()
    assert len(shipped.names) == 240
    by_path = load_encoder(find_weights("vdt_resnet3d18_w16") / "model.pt")
    torch.testing.assert_close(by_path.state_dict(), shipped.state_dict())
    with pytest.raises(ValueError, match="weights 'vdt': there are none of this name; there are"):
        load_encoder("vdt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint file"):
        load_encoder(tmp_path / "none.pt")


def test_untrained_weights_are_drawn_by_their_seed_and_leave_torchs_own_draws_alone(weights):
    volumes = torch.randn(2, 1, 4, 16, 16)
    torch.manual_seed(5)
    first, second, third = (embed(load_encoder(weights, untrained=seed), volumes) for seed in (1, 1, 2))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)


def test_a_volume_of_any_axes_is_read_depth_first_and_scored_as_its_own_mean_and_deviation(tmp_path, weights):
    values = np.random.default_rng(0).normal(50, 9, (24, 20, 8)).astype(np.float32)
    affine = make_affine((1.0, 1.0, 2.5))
    write_volume(tmp_path / "data" / "sub-01.nii.gz", values, affine=affine)
    flipped = affine @ np.array([[-1, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    write_volume(tmp_path / "data" / "other.nii.gz", values[::-1], affine=flipped)
    found = embed_volumes(str(tmp_path / "data"), str(tmp_path / "f.csv"), weights=str(weights))
    assert {**found, "output": ""} == {"output": "", "rows": 2, "features": 60, "left_out": 0}
    rows = read_rows(tmp_path / "f.csv")
    assert [(r["volume"], r["patient_id"]) for r in rows] == [("other", "other"), ("sub-01", "sub-01")]
    volume = torch.from_numpy((values - values.mean()) / values.std()).permute(2, 1, 0)
    wanted = embed(load_encoder(weights), volume)
    np.testing.assert_allclose(values_of(rows), wanted.expand(2, -1), rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "f.json").read_text())["spacing"] == "own"


def test_cubes_of_nodules_are_cut_resampled_and_windowed_beside_their_ratings(tmp_path, weights):
    nodules = write_nodules(tmp_path / "lidc", make_list(2), size=24)
    options = {"weights": str(weights), "size": 16, "spacing": 1.0, "batch_size": 2}
    embed_volumes(str(tmp_path / "lidc"), str(tmp_path / "f.csv"), **options)
    rows = read_rows(tmp_path / "f.csv")
    assert [r["nodule_id"] for r in rows] == [nodule_id(n) for n in nodules]
    assert {"patient_id", "malignancy_mean", "malignancy_mode", "diameter_mm"} <= {*rows[0]}
    import nibabel as nib

    hu = np.asarray(nib.load(tmp_path / "lidc" / "images" / f"{nodule_id(nodules[0])}.nii.gz").dataobj)
    cube = np.flip(hu, (0, 1))[4:20, 4:20, 4:20].clip(-1024, 400)
    scaled = torch.from_numpy(((cube + 1024.0) / 1424 * 255 - 99) / 77).float()
    wanted = embed(load_encoder(weights), scaled.permute(2, 1, 0))
    np.testing.assert_allclose(values_of(rows[:1]), wanted, rtol=1e-3, atol=1e-4)


def test_a_damaged_volume_is_refused_or_left_out_and_counted(tmp_path, weights):
    write_volume(tmp_path / "data" / "a.nii.gz", shape=(8, 8, 8))
    write_volume(tmp_path / "data" / "b.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    given = str(tmp_path / "data"), str(tmp_path / "f.csv")
    with pytest.raises(ValueError, match=r"b\.nii\.gz"):
        embed_volumes(*given, weights=str(weights))
    with pytest.raises(ValueError, match=r"f\.json: expected a name as features\.csv; the settings are written beside"):
        embed_volumes(given[0], str(tmp_path / "f.json"), weights=str(weights))
    found = embed_volumes(*given, weights=str(weights), on_error="skip")
    assert (found["rows"], found["left_out"]) == (1, 1)
    with pytest.raises(FileExistsError, match=r"f\.csv: exists"):
        embed_volumes(*given, weights=str(weights))


def test_what_cannot_be_embedded_is_refused_in_a_sentence(tmp_path, weights):
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not the weights of a ResNet"):
        load_encoder(tmp_path / "other.pt")
    encoder = load_encoder(weights)
    with pytest.raises(ValueError, match="must have the shape"):
        embed(encoder, torch.zeros(1, 2, 4, 8, 8))
    with pytest.raises(ValueError, match="not finite"):
        embed(encoder, torch.full((4, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="colours must be"):
        PooledEncoder(ResNet2D(18, base_channels=4), "grey")
    with pytest.raises(ValueError, match="size needs a window"):
        embed_volumes(str(tmp_path), str(tmp_path / "f.csv"), weights=str(weights), size=16)
