import numpy as np
import pytest
import torch

from retinaface.evaluation import protocols as module
from retinaface.evaluation.protocols import View, detect_in_views, views_of, vote
from retinaface.model.postprocess import Detections


def faces(boxes, scores, shift=0.0):
    """Detections whose landmarks are the boxes' centres, moved to the right by ``shift``."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + torch.tensor([shift, 0.0])
    return Detections(boxes, torch.tensor(scores), centres[:, None].expand(-1, 5, 2))


@pytest.mark.parametrize(
    ("protocol", "size", "expected"),
    [
        ("original", (683, 1024), (683, 1024)),
        ("vga", (768, 1024), (480, 640)),
        ("vga", (1024, 1024), (480, 480)),  # squarer than 4:3: the short side decides
        ("vga", (683, 1024), (427, 640)),
        ("vga", (1024, 512), (640, 320)),  # upright
        ("vga", (120, 160), (480, 640)),  # enlarged
        ("long640", (1024, 1024), (640, 640)),
        ("long640", (683, 1024), (427, 640)),
        ("long640", (320, 100), (640, 200)),
        ("long640", (1, 4000), (1, 640)),
    ],
)
def test_one_view(protocol, size, expected):
    assert views_of(*size, protocol) == [View(*expected)]


def test_ten_views():
    """The short side of 1000 would be 800, but then the long one would be 1280: 1200 decides."""
    views = views_of(1000, 1600, "multiscale")
    assert [view.width for view in views[::2]] == [750, 1200, 1650, 2100, 2550]
    assert [view.height for view in views[::2]] == [469, 750, 1031, 1312, 1594]
    assert [view.mirrored for view in views] == [False, True] * 5
    assert [view.width for view in views_of(400, 400, "multiscale")[::2]] == [500, 800, 1100, 1400, 1700]


class Finder:
    """Stands in for a detector: finds the white block, its top left quarter's corner as every landmark."""

    def __init__(self):
        self.calls = []

    def detect(self, image, score_threshold, nms_threshold, keep):
        self.calls.append((image.shape[:2], score_threshold, nms_threshold, keep))
        ys, xs = np.nonzero(image.max(axis=2) > 127)
        box = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], dtype=torch.float32)
        corner = np.argwhere(image[..., 0] > 127).mean(axis=0)[::-1] + 0.5  # of the blue part
        points = torch.tensor(corner.copy(), dtype=torch.float32) + torch.arange(5)[:, None] * torch.tensor([1.0, 0.0])
        return Detections(box, torch.tensor([0.9]), points[None])


@pytest.mark.parametrize("protocol", ["original", "vga", "long640", "multiscale"])
def test_what_is_found_is_in_pixels_of_the_photo(protocol):
    image = np.zeros((90, 160, 3), np.uint8)
    image[30:70, 40:100] = (0, 0, 255)
    image[30:50, 40:60, 0] = 255
    finder = Finder()
    found = detect_in_views(finder, image, protocol)
    assert [call[0] for call in finder.calls] == [view[:2] for view in views_of(90, 160, protocol)]
    assert {call[1:] for call in finder.calls} == {(0.02, 0.4, 750)}
    torch.testing.assert_close(found.boxes, torch.tensor([[40.0, 30, 100, 70]]), atol=0.6, rtol=0)
    assert found.scores.tolist() == pytest.approx([0.9])
    torch.testing.assert_close(found.landmarks[0, 2, 1].item(), 40.0, atol=0.6, rtol=0)


def test_mirrored_view_has_left_and_right_in_their_places():
    image = np.zeros((90, 160, 3), np.uint8)
    image[30:70, 40:100] = (0, 0, 255)
    image[30:50, 40:60, 0] = 255
    found = module._detect(Finder(), image, View(90, 160, mirrored=True))
    assert found.boxes.tolist() == [[40, 30, 100, 70]]
    # Points to the right in the mirrored picture, so to the left in the photo; eyes and mouth corners are exchanged.
    assert found.landmarks[0, :, 0].tolist() == [50 - step for step in (1, 0, 2, 4, 3)]


def test_boxes_that_overlap_vote():
    first = faces([[0, 0, 10, 10], [100, 0, 140, 40]], [0.8, 0.3])
    second = faces([[2, 0, 12, 10]], [0.2], shift=5)
    found = vote([first, second])
    torch.testing.assert_close(found.scores, torch.tensor([0.8, 0.3]))
    expected = torch.tensor([[0.4, 0, 10.4, 10], [100, 0, 140, 40]])  # 0.8 to 0.2; a single box stays
    torch.testing.assert_close(found.boxes, expected)
    torch.testing.assert_close(found.landmarks[0, 0], torch.tensor([0.8 * 5 + 0.2 * 12, 5.0]))


def test_votes_against_a_plain_restatement():
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(60, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(60, 2, generator=generator) * 20], dim=1)
    scores = torch.rand(60, generator=generator)
    halves = [faces(boxes[part].tolist(), scores[part].tolist()) for part in (slice(0, 25), slice(25, 60))]
    expected = []
    left = sorted(zip(scores.tolist(), boxes.tolist(), strict=True), reverse=True)
    while left:
        leader = left[0][1]
        group = [one for one in left if overlap(leader, one[1]) > 0.4]
        left = [one for one in left if one not in group]
        total = sum(score for score, _ in group)
        expected.append([sum(score * box[side] for score, box in group) / total for side in range(4)])
    torch.testing.assert_close(vote(halves).boxes, torch.tensor(expected), rtol=1e-4, atol=1e-3)


def overlap(a, b):
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def test_votes_on_nothing_and_on_boxes_without_area():
    assert [tuple(value.shape) for value in vote([faces([], []), faces([], [])])] == [(0, 4), (0,), (0, 5, 2)]
    flat = vote([faces([[5, 5, 5, 9], [0, 0, 4, 4]], [0.7, 0.5])])
    assert flat.boxes.tolist() == [[5, 5, 5, 9], [0, 0, 4, 4]]
