import pytest
import torch
from torchvision.ops import nms

from retinaface.model.anchors import make_anchors
from retinaface.model.boxes import decode_boxes, decode_landmarks
from retinaface.model.network import NetworkConfig
from retinaface.model.postprocess import postprocess, suppress

CONFIG = NetworkConfig(anchor_sizes=[[16, 32], [64, 128], [256, 512]], strides=[8, 16, 32])
SIZE = (96, 128)


def random_outputs(batch, size=SIZE):
    count = len(make_anchors(*size, ((16, 32), (64, 128), (256, 512)), (8, 16, 32)))
    return torch.randn(batch, count, 2) * 2, torch.randn(batch, count, 4), torch.randn(batch, count, 10)


def plain(outputs, size, score_threshold, nms_threshold, top_k, keep):
    """The same, picture by picture, decoding everything."""
    anchors = make_anchors(*size, ((16, 32), (64, 128), (256, 512)), (8, 16, 32))
    scale = torch.tensor([size[1], size[0]])
    results = []
    for logits, box_deltas, landmark_deltas in zip(*outputs, strict=True):
        scores = logits.softmax(-1)[:, 1]
        boxes = decode_boxes(box_deltas, anchors) * scale.repeat(2)
        landmarks = decode_landmarks(landmark_deltas, anchors) * scale
        order = scores.argsort(descending=True)[:top_k]
        order = order[scores[order] >= score_threshold]
        order = order[nms(boxes[order], scores[order], nms_threshold)][:keep]
        results.append((boxes[order], scores[order], landmarks[order]))
    return results


@pytest.mark.parametrize(
    "settings", [(0.5, 0.4, 5000, 750), (0.02, 0.4, 5000, 750), (0.02, 0.7, 40, 750), (0.02, 0.4, 5000, 7)]
)
def test_against_a_plain_restatement(settings):
    outputs = random_outputs(3)
    expected = plain(outputs, SIZE, *settings)
    for found, wanted in zip(postprocess(outputs, SIZE, CONFIG, *settings), expected, strict=True):
        assert 0 < len(wanted[1]) <= settings[3]
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_of_equal_scores_the_first_is_the_best():
    """As INT8 has many of; every runtime's suppression is to keep the same faces."""
    logits, box_deltas, landmark_deltas = random_outputs(1)
    logits = logits.round()
    first = plain_first(logits[0, :, 1] - logits[0, :, 0], 20)
    found = postprocess((logits, box_deltas * 0, landmark_deltas), SIZE, CONFIG, 0.5, 1.0, top_k=20)[0]
    anchors = make_anchors(*SIZE, CONFIG.anchor_sizes, CONFIG.strides)
    wanted = decode_boxes(box_deltas[0, first] * 0, anchors[first]) * torch.tensor([SIZE[1], SIZE[0]] * 2)
    torch.testing.assert_close(found.boxes, wanted)


def plain_first(scores, count):
    return sorted(range(len(scores)), key=lambda anchor: (-scores[anchor].item(), anchor))[:count]


def test_a_batch_gives_what_its_pictures_give():
    outputs = random_outputs(4)
    outputs[0][2, :, 1] = -50  # a picture without faces between others
    together = postprocess(outputs, SIZE, CONFIG)
    for index, faces in enumerate(together):
        alone = postprocess(tuple(output[index : index + 1] for output in outputs), SIZE, CONFIG)[0]
        for ours, theirs in zip(faces, alone, strict=True):
            assert torch.equal(ours, theirs)
    assert [len(faces.scores) > 0 for faces in together] == [True, True, False, True]


@pytest.mark.parametrize("keep", [1, 200, 400, 1000])
def test_suppression_in_pieces_is_that_of_all_at_once(keep):
    generator = torch.Generator().manual_seed(keep)
    corners = torch.rand(2000, 2, generator=generator) * 500
    boxes = torch.cat([corners, corners + 10 + torch.rand(2000, 2, generator=generator) * 30], dim=1)
    scores = torch.rand(2000, generator=generator).sort(descending=True).values
    whole = nms(boxes, scores, 0.3)
    assert 400 < len(whole) < 1500
    assert torch.equal(suppress(boxes, scores, 0.3, keep), whole[:keep])


def test_no_face_gives_empty_tensors_of_the_right_shape():
    faces = postprocess(random_outputs(1), SIZE, CONFIG, score_threshold=1.1)[0]
    assert [tuple(value.shape) for value in faces] == [(0, 4), (0,), (0, 5, 2)]


def test_half_precision_outputs_are_decoded_in_float():
    outputs = random_outputs(1)
    faces = postprocess(tuple(output.bfloat16() for output in outputs), SIZE, CONFIG)[0]
    assert {value.dtype for value in faces} == {torch.float32}
