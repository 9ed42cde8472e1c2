"""Frechet distance and KID of images: labels, floors, references, missing weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation import fashion
from qdm_cli.engine.evaluation.distribution import (
    Extractor,
    Reference,
    distances,
    extract,
    fashion_extractor,
    inception_extractor,
    reference_from,
    shipped_reference,
    skipped,
)
from qdm_cli.engine.evaluation.frechet import frechet_distance, gaussian_of
from qdm_cli.engine.evaluation.names import METRICS


def pixels_extractor(label: str = "") -> Extractor:
    """Mean of each quarter of the image: four features."""

    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 2).flatten(1)

    return Extractor(label, "quarters", "f" * 64, "none", features)


def random_features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return shift + torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def reference(count: int = 400) -> Reference:
    features = random_features(count, 0)
    return Reference("random", "a" * 64, gaussian_of(features), features)


def test_every_distance_comes_with_its_floor() -> None:
    found = distances(pixels_extractor(), reference(), random_features(50, 1, shift=1.0), random_features(50, 2), seed=0)
    for name in ("fid", "fid_floor", "fid_floor_at_n", "fid_base", "kid", "kid_std", "kid_floor", "kid_base"):
        assert isinstance(found[name], float)
    assert found["fid"] > 10 * found["fid_base"]
    assert found["kid"] > 10 * abs(found["kid_base"])
    assert found["fid_floor"] < found["fid_floor_at_n"] < 5 * found["fid_base"], "few images score worse than many"


def test_all_names_are_in_the_table_of_metrics() -> None:
    for label in ("", "[fashion]"):
        found = distances(pixels_extractor(label), reference(), random_features(50, 1), None, seed=0)
        names = {name for name in found if not name.endswith("_why")}
        assert names == {name for name in skipped(label, "x") if not name.endswith("_why")}
        assert names <= set(METRICS)


def test_null_metrics_have_a_reason() -> None:
    moments_only = Reference("npz", "a" * 64, gaussian_of(random_features(400, 0)))
    found = distances(pixels_extractor(), moments_only, random_features(300, 1), None, seed=0)
    nulls = [name for name, value in found.items() if value is None]
    assert set(nulls) == {"fid_base", "fid_floor", "fid_floor_at_n", "kid", "kid_std", "kid_floor", "kid_base"}
    assert all(isinstance(found[f"{name}_why"], str) for name in nulls)
    assert found["fid"] == pytest.approx(frechet_distance(gaussian_of(random_features(300, 1)), moments_only.moments))


def test_more_images_than_half_the_reference_have_no_floor_at_n() -> None:
    found = distances(pixels_extractor(), reference(100), random_features(60, 1), None, seed=0)
    assert found["fid_floor_at_n"] is None and "100" in found["fid_floor_at_n_why"]


def test_another_number_of_features_is_refused() -> None:
    with pytest.raises(InputError, match="has 4 features, quarters gives 5"):
        distances(pixels_extractor(), reference(), torch.randn(10, 5), None, seed=0)


def test_images_are_rounded_to_eight_bits_first() -> None:
    seen: list[torch.Tensor] = []

    def features(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.flatten(1).float()

    extract(Extractor("", "x", None, "none", features), [torch.full((1, 1, 2, 2), 0.5)])
    assert seen[0].dtype == torch.uint8 and seen[0].unique().tolist() == [128]


def save_images(folder: Path, images: torch.Tensor) -> None:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")


def test_a_folder_of_images_is_a_reference(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_images(tmp_path / "a", images)
    found = reference_from(str(tmp_path / "a"), pixels_extractor(), (1, 8, 8), None, 6)
    assert found.features is not None
    assert torch.allclose(found.features, pixels_extractor().features(images), atol=1e-4)
    with pytest.raises(InputError, match=r"\(1, 8, 8\).*\(1, 16, 16\)"):
        reference_from(str(tmp_path / "a"), pixels_extractor(), (1, 16, 16), None, 6)


def test_moments_of_an_npz_are_a_reference(tmp_path: Path) -> None:
    moments = gaussian_of(random_features(100, 0))
    np.savez(tmp_path / "stats.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    found = reference_from(str(tmp_path / "stats.npz"), pixels_extractor(), (1, 8, 8), None, 6)
    assert found.features is None
    assert torch.equal(found.moments.covariance, moments.covariance)


@pytest.mark.parametrize("what", ["empty folder", "absent", "no moments", "pickled"])
def test_other_references_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / {"empty folder": "e", "absent": "none", "no moments": "x.npz", "pickled": "p.npz"}[what]
    if what == "empty folder":
        path.mkdir()
    if what == "no moments":
        np.savez(path, other=np.zeros(3))
    if what == "pickled":
        np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.zeros(1))
    with pytest.raises(InputError):
        reference_from(str(path), pixels_extractor(), (1, 8, 8), None, 6)


def test_the_base_model_is_not_compared_with_itself() -> None:
    with pytest.raises(InputError, match="other than its own images"):
        reference_from("auto", pixels_extractor(), (3, 64, 64), None, 6)


def test_inception_without_weights_is_null_with_the_reason(tmp_path: Path) -> None:
    assert inception_extractor(None, offline=True, device="cpu") == (None, "evaluate.weights.inception is not set")
    network, why = inception_extractor("auto", offline=True, device="cpu")
    assert network is None and "offline" in str(why)
    with pytest.raises(InputError, match="no such file"):
        inception_extractor(str(tmp_path / "absent.pth"), offline=True, device="cpu")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not weights")
    network, why = inception_extractor(str(broken), offline=True, device="cpu")
    assert network is None and "could not be loaded" in str(why)


# ---------------------------------------------------------------- what ships


def test_the_shipped_statistics_belong_to_the_shipped_network() -> None:
    stored = fashion.load_reference()
    assert stored.meta["weights_sha256"] == hashlib.sha256((fashion.FOLDER / fashion.WEIGHTS_FILE).read_bytes()).hexdigest()
    assert stored.meta["accuracy"] >= 0.91
    assert stored.features.shape == (10_000, 64) and stored.covariance.shape == (64, 64)
    # features are stored in float16: nothing that a distance shows
    again = gaussian_of(stored.features)
    assert frechet_distance(again, shipped_reference().moments) < 1e-4


def test_the_shipped_floor_is_reproduced() -> None:
    reference, floor = shipped_reference(), fashion.load_reference().meta["floor"]
    assert reference.features is not None
    even, odd = reference.features[0::2], reference.features[1::2]
    assert frechet_distance(gaussian_of(even), gaussian_of(odd)) == pytest.approx(floor["frechet"], rel=1e-2)
    assert reference.floor == (floor["frechet"], floor["kid"])


def test_the_network_takes_bytes_and_floats_alike() -> None:
    images = torch.randint(0, 256, (4, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    extractor = fashion_extractor("cpu")
    features = extractor.features(images)
    assert features.shape == (4, fashion.FEATURES) and extractor.label == "[fashion]"
    assert torch.allclose(features, extractor.features(images.float() / 255), atol=1e-5)


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").exists(), reason="Fashion-MNIST is not installed")
def test_real_images_give_the_stored_features_and_accuracy() -> None:
    from qdm_cli.engine.zoo.fashion import load_split

    images, labels = load_split("t10k")
    network = fashion.load_features()
    features = network(images[:1000])
    assert torch.allclose(features, fashion.load_reference().features[:1000].float(), atol=2e-2)
    assert (network.head(features).argmax(1) == labels[:1000]).float().mean() > 0.9
