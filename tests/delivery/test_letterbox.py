import numpy as np
import pytest
import torch

from retinaface.delivery.letterbox import letterbox, to_photo, without_padding
from retinaface.errors import InputError
from retinaface.model.anchors import make_anchors
from retinaface.model.network import NetworkConfig, as_input, pad_small
from retinaface.model.postprocess import Detections


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pictures_of_one_size_are_only_put_together():
    pictures = [picture(70, 90, seed) for seed in range(3)]
    boxed = letterbox(pictures)
    assert torch.equal(boxed.images, torch.cat([as_input(each) for each in pictures]))
    assert boxed.extents == [(70, 90)] * 3
    assert torch.equal(boxed.scales, torch.ones(3, 2))


@pytest.mark.parametrize("size", [(20, 90), (90, 20), (1, 1), (64, 64)])
def test_small_pictures_are_filled_up_as_in_training(size):
    image = picture(*size)
    boxed = letterbox([image])
    assert torch.equal(boxed.images, pad_small(as_input(image)))
    assert boxed.extents == [size]


def test_others_are_filled_up_with_the_mean_colour():
    pictures = [picture(70, 90), picture(100, 80)]
    boxed = letterbox(pictures)
    assert boxed.images.shape == (2, 3, 100, 90)
    for image, found, (height, width) in zip(pictures, boxed.images, boxed.extents, strict=True):
        assert (height, width) == image.shape[:2]
        assert torch.equal(found[None, :, :height, :width], as_input(image))
        assert not found[:, height:].any()
        assert not found[:, :, width:].any()


def test_what_does_not_fit_in_a_fixed_size_is_shrunk():
    """A white rectangle stays where it is, in pixels of the photo."""
    image = np.zeros((300, 150, 3), np.uint8)
    image[100:200, 50:100] = 255
    boxed = letterbox([image, picture(60, 90)], (100, 120))
    assert boxed.images.shape == (2, 3, 100, 120)
    assert boxed.extents == [(100, 50), (60, 90)]
    rows, columns = (boxed.images[0, 0] > 0).nonzero().T
    corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()[None]
    faces = to_photo(Detections(corners, torch.ones(1), corners[:, None, :2].expand(1, 5, 2)), boxed.scales[0])
    torch.testing.assert_close(faces.boxes, torch.tensor([[50.0, 100.0, 100.0, 200.0]]), rtol=0, atol=3)
    torch.testing.assert_close(faces.landmarks[0, 4], torch.tensor([50.0, 100.0]), rtol=0, atol=3)
    assert torch.equal(boxed.scales[1], torch.ones(2))


@pytest.mark.parametrize(("size", "extents"), [(None, [(100, 50), (67, 100)]), ((128, 80), [(100, 50), (53, 80)])])
def test_large_pictures_are_shrunk_where_asked(size, extents):
    boxed = letterbox([picture(300, 150), picture(120, 180)], size, longest=100)
    assert boxed.extents == extents
    assert boxed.images.shape[2:] == (size or (100, 100))
    assert letterbox([picture(80, 100)], longest=100).extents == [(80, 100)]
    with pytest.raises(InputError, match="longest: found 63; expected 64"):
        letterbox([picture(80, 100)], longest=63)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "there is none; cv2.imread gives None"),
        (np.zeros((70, 70, 3), np.float32), r"found float32 of shape \(70, 70, 3\); expected uint8"),
        (np.zeros((70, 70, 3), np.uint16), "found uint16"),
        (np.zeros((70, 70), np.uint8), r"shape \(70, 70\); expected"),
        (np.zeros((70, 70, 4), np.uint8), r"shape \(70, 70, 4\)"),
        (np.zeros((0, 70, 3), np.uint8), r"shape \(0, 70, 3\)"),
    ],
    ids=["missing", "float", "16 bits", "grey", "transparent", "empty"],
)
def test_what_is_no_picture_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        letterbox([picture(70, 70), image])


def test_anchors_that_a_picture_alone_would_not_have_find_nothing():
    config = NetworkConfig()
    pictures = [picture(70, 130), picture(100, 90), picture(30, 40)]
    boxed = letterbox(pictures)
    size = tuple(boxed.images.shape[2:])
    anchors = make_anchors(*size, config.anchor_sizes, config.strides)
    outputs = (torch.zeros(3, len(anchors), 2), torch.zeros(3, len(anchors), 4), torch.zeros(3, len(anchors), 10))
    logits, boxes, landmarks = without_padding(outputs, boxed, config)
    assert torch.equal(boxes, outputs[1])
    assert torch.equal(landmarks, outputs[2])
    scale = torch.tensor(size[::-1]).repeat(2)
    for image, found in zip(pictures, logits, strict=True):
        height, width = pad_small(as_input(image)).shape[2:]
        alone = make_anchors(height, width, config.anchor_sizes, config.strides)
        wanted = alone * torch.tensor([width, height]).repeat(2)
        left = (anchors * scale)[found[:, 1] == 0]
        torch.testing.assert_close(left, wanted, rtol=1e-5, atol=1e-3)
        assert (found[:, 1].isneginf() | (found[:, 1] == 0)).all()
        assert not found[:, 0].any()
