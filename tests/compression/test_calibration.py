from copy import deepcopy
from typing import get_args

import cv2
import numpy as np
import pytest
import torch

from retinaface.compression import calibration
from retinaface.compression.calibration import CalibrationPictures, CalibrationSettings, Observer, calibrate
from retinaface.compression.quantization import QuantizationSettings, prepare_for_training
from retinaface.data.annotations import load_split
from retinaface.errors import InputError
from retinaface.model.network import normalize


def pictures(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, 3, 64, 96, generator=generator) * 255 - 110 for _ in range(count)]


@pytest.fixture(scope="module")
def uncalibrated(build_network):
    return prepare_for_training(build_network(channels=16), QuantizationSettings())


@pytest.fixture
def fresh(uncalibrated):
    return deepcopy(uncalibrated)


def calibrated(network, settings):
    calibrate(network, pictures(), settings)
    return network


def run(network, images):
    with torch.no_grad():
        return network(images)


def first_range(network):
    """The range of the input pictures."""
    first = network.activations()[0]
    return (0 - float(first.zero_point)) * float(first.scale), (255 - float(first.zero_point)) * float(first.scale)


def test_minmax_holds_all_that_was_seen(fresh):
    calibrated(fresh, CalibrationSettings("minmax", correct_biases=False))
    low, high = first_range(fresh)
    step = float(fresh.activations()[0].scale)
    seen = torch.stack(pictures())
    assert low == pytest.approx(float(seen.min()), abs=step)
    assert high == pytest.approx(float(seen.max()), abs=step)


def test_percentile_leaves_rare_values_out(fresh):
    network = calibrated(fresh, CalibrationSettings("percentile", 90.0, correct_biases=False))
    low, high = first_range(network)
    expected = np.quantile(torch.stack(pictures()).numpy(), [0.1, 0.9])
    assert (low, high) == pytest.approx(tuple(expected), abs=1.5)


def test_moving_average_lies_within_what_was_seen(fresh):
    photos = pictures(1)
    outlier = photos[0].clone()
    outlier[0, 0, 0, 0] = 1000
    calibrate(fresh, [*photos, outlier, *photos], CalibrationSettings("moving_average", correct_biases=False))
    _, high = first_range(fresh)
    assert float(photos[0].max()) < high < 200  # a hundredth of the way to the outlier


@pytest.mark.parametrize("observer", get_args(Observer))
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_every_observer_makes_int8_like_float(build_network, observer, backend):
    network = build_network(channels=16)
    prepared = prepare_for_training(network, QuantizationSettings(backend=backend))
    calibrated(prepared, CalibrationSettings(observer, correct_biases=False))
    images = pictures(1, seed=9)[0]
    for exact, rounded in zip(run(network, images), run(prepared, images), strict=True):
        assert 0 < (exact - rounded).abs().mean() < 0.5 * exact.std()
    assert all(float(activation.scale) != 1 for activation in prepared.activations())
    if backend == "tensorrt":
        assert not any(int(activation.zero_point) for activation in prepared.activations())


def test_training_goes_on_from_the_ranges(fresh):
    calibrated(fresh, CalibrationSettings("percentile", 90.0, correct_biases=False))
    before = first_range(fresh)
    fresh.train()
    run(fresh, pictures(1)[0])
    after = first_range(fresh)
    assert after != before  # one batch moves a range by a fiftieth of the way
    assert np.abs(np.subtract(after, before)).max() < 2.0


def channel_means(network):
    """Mean of every channel before its activation function, by convolution, over all pictures."""
    total = []
    for images in pictures():
        with torch.no_grad():
            (run := calibration._ChannelMeans(network.graph)).run(images)
        total.append(torch.cat([mean for _, mean in sorted(run.means.items(), key=lambda item: item[0].name)]))
    return torch.stack(total).mean(0)


def test_corrected_biases_bring_the_means_back(fresh):
    before = {name: value.clone() for name, value in fresh.named_parameters()}
    run(fresh.eval(), pictures()[0])  # brings the graph into evaluation mode
    with fresh.without_rounding():
        exact = channel_means(fresh)
    rounded = channel_means(calibrated(deepcopy(fresh), CalibrationSettings("percentile", 95.0, correct_biases=False)))
    corrected = calibrated(fresh, CalibrationSettings("percentile", 95.0, correct_biases=True))
    assert (channel_means(corrected) - exact).abs().mean() < 0.05 * (rounded - exact).abs().mean()
    changed = [name for name, value in corrected.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) == 56  # one per convolution
    assert all(name.endswith("bias") for name in changed)


def test_pictures_are_photos_at_their_own_size_from_everywhere(tiny_root):
    samples = load_split(tiny_root, "train")
    found = list(CalibrationPictures(samples, 3))
    assert len(CalibrationPictures(samples, 3)) == 3
    assert len(CalibrationPictures(samples, 99)) == len(samples)
    for images, sample in zip(found, (samples[0], samples[2], samples[5]), strict=True):
        expected = normalize(torch.from_numpy(cv2.imread(str(sample.path))).permute(2, 0, 1)[None])
        assert torch.equal(images, expected)


@pytest.mark.parametrize("setting", [{"observer": "best"}, {"percentile": 50}, {"percentile": 100.1}], ids=str)
def test_bad_settings_are_named(setting):
    (name,) = setting
    with pytest.raises(InputError, match=f"{name} is "):
        CalibrationSettings(**setting)
