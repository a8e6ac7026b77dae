import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou

from retinaface.compression.distillation import (
    DistillationSettings,
    channel_distillation,
    class_weight,
    distillation_losses,
    giou_distillation,
    hint_distillation,
    logit_distillation,
    pearson_distillation,
    teacher_certainty,
)
from retinaface.errors import InputError
from retinaface.model.anchors import make_anchors
from retinaface.model.boxes import decode_boxes
from retinaface.model.losses import mean_over_processes, own_divisor, own_mean, shared_divisor

DEFAULTS = DistillationSettings()
GIOU = DistillationSettings(box_loss="giou")


def random_outputs():
    return torch.randn(2, 50, 2) * 2, torch.randn(2, 50, 4), torch.randn(2, 50, 10)


def random_features(*widths):
    return [torch.randn(2, width, size, size + 1) for width, size in zip(widths, (5, 3, 2), strict=True)]


@pytest.mark.parametrize("settings", [DEFAULTS, GIOU], ids=lambda settings: settings.box_loss)
def test_nothing_to_learn_from_oneself(settings):
    outputs = random_outputs()
    losses = distillation_losses(outputs, outputs, settings)
    assert sum(losses.values()).item() == pytest.approx(0, abs=1e-6)


def test_nothing_to_learn_from_own_features():
    outputs, features = random_outputs(), random_features(3, 4, 5)
    for kind in ("pkd", "cwd", "mse"):
        settings = DistillationSettings(features=1.0, feature_loss=kind)
        losses = distillation_losses(outputs, outputs, settings, features, features)
        assert losses["features"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("settings", [DEFAULTS, GIOU], ids=lambda settings: settings.box_loss)
def test_every_part_notices_its_own_difference(settings):
    teacher = random_outputs()
    for index in range(3):
        student = list(teacher)
        student[index] = random_outputs()[index]
        losses = distillation_losses(tuple(student), teacher, settings)
        assert [loss.item() > 1e-3 for loss in losses.values()] == [index == part for part in range(3)]


def test_weights_of_the_parts():
    student, teacher = random_outputs(), random_outputs()
    own, wanted = random_features(3, 4, 5), random_features(3, 4, 5)
    ones = distillation_losses(student, teacher, DistillationSettings(features=1.0), own, wanted)
    assert list(ones) == ["logits", "boxes", "landmarks", "features"]
    for part in ones:
        weights = dict.fromkeys(ones, 0.0) | {part: 2.5}
        losses = distillation_losses(student, teacher, DistillationSettings(**weights), own, wanted)
        assert losses == {part: 2.5 * ones[part]}
    assert list(distillation_losses(student, teacher, DEFAULTS)) == ["logits", "boxes", "landmarks"]


@pytest.mark.parametrize("settings", [DEFAULTS, GIOU], ids=lambda settings: settings.box_loss)
def test_mean_over_processes_is_the_loss_of_one_with_all_pictures(settings, in_two_processes):
    """The teacher is sure of more faces in the first process's picture, and each part counts them."""
    student, teacher = random_outputs(), random_outputs()
    teacher[0][0, :, 1] += 2

    def losses(own, divisor):
        pictures = ([output[own] for output in outputs] for outputs in (student, teacher))
        return torch.stack([*distillation_losses(*pictures, settings, divisor=divisor).values()])

    whole = losses(slice(None), own_divisor)
    for divisor in (shared_divisor, own_divisor):
        first, second = in_two_processes(lambda own, d=divisor: losses(own, d), slice(0, 1), slice(1, 2))
        same = torch.isclose((first + second) / 2, whole)
        assert same.all() if divisor is shared_divisor else not same.any()


@pytest.mark.parametrize("distance", [pearson_distillation, hint_distillation])
def test_statistics_of_features_are_those_of_all_pictures(distance, in_two_processes):
    """Also of channels whose means and spreads differ between the processes."""
    student, teacher = (torch.randn(2, 3, 5, 6) for _ in range(2))
    teacher[1] = 3 * teacher[1] + 5
    student[1] = 2 * student[1] - 4

    def value_and_gradient(own, mean):
        maps = student.clone().requires_grad_()
        loss = distance(maps[own], teacher[own], mean)
        loss.backward()
        return torch.cat([loss.detach()[None], maps.grad.flatten()])

    whole = value_and_gradient(slice(None), own_mean)
    for mean in (mean_over_processes, own_mean):
        halves = in_two_processes(lambda own, m=mean: value_and_gradient(own, m), slice(0, 1), slice(1, 2))
        assert torch.allclose(sum(halves) / 2, whole, atol=1e-6) == (mean is mean_over_processes)


def test_processes_exchange_once():
    counted = []
    distillation_losses(random_outputs(), random_outputs(), DEFAULTS, divisor=lambda x: counted.append(x) or x)
    assert [counts.shape for counts in counted] == [(2,)]


@pytest.mark.parametrize("distance", [pearson_distillation, hint_distillation])
def test_processes_exchange_once_for_each_level(distance):
    counted = []
    distance(*random_features(3, 4, 5)[:1] * 2, lambda x: counted.append(x) or x)
    assert len(counted) == 1


def test_gradients_reach_the_student_only():
    student = tuple(output.requires_grad_() for output in random_outputs())
    teacher = tuple(output.requires_grad_() for output in random_outputs())
    losses = distillation_losses(student, tuple(output.detach() for output in teacher), DEFAULTS)
    sum(losses.values()).backward()
    assert all(output.grad.abs().sum() > 0 for output in student)
    assert all(output.grad is None for output in teacher)


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_boxes_are_learnt_only_where_the_teacher_is_confident(box_loss):
    teacher = random_outputs()
    score = teacher[0].softmax(-1)[..., 1]
    student = tuple(output.requires_grad_() for output in random_outputs())
    settings = DistillationSettings(confidence=0.6, box_loss=box_loss)
    sum(distillation_losses(student, teacher, settings).values()).backward()
    for output in student[1:]:
        assert torch.equal(output.grad.abs().sum(-1) > 0, score >= 0.6)


@pytest.mark.parametrize("settings", [DEFAULTS, GIOU], ids=lambda settings: settings.box_loss)
def test_a_teacher_without_faces_gives_finite_gradients(settings):
    teacher = random_outputs()
    teacher[0][..., 1] = -40
    student = tuple(output.requires_grad_() for output in random_outputs())
    losses = distillation_losses(student, teacher, settings)
    sum(losses.values()).backward()
    assert losses["boxes"] == losses["landmarks"] == 0
    assert student[0].grad.isfinite().all()
    assert all(not output.grad.any() for output in student[1:])


@pytest.mark.parametrize("settings", [DEFAULTS, GIOU], ids=lambda settings: settings.box_loss)
def test_an_untrained_student_has_a_finite_loss(settings):
    """Deltas of 1000 make boxes of e^200 anchors, which float32 does not hold."""
    teacher = random_outputs()
    student = tuple((output * 1000).requires_grad_() for output in random_outputs())
    losses = distillation_losses(student, teacher, settings)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(output.grad.isfinite().all() for output in student)


def test_giou_is_that_of_torchvision_on_decoded_boxes():
    anchors = make_anchors(64, 96, ((16, 32), (64, 128)), (8, 16))
    deltas = torch.randn(2, 2, len(anchors), 4) * 3
    certainty = torch.rand(2, len(anchors)).clamp(min=0.5) - 0.5
    own, wanted = (decode_boxes(each, anchors) for each in deltas.double())
    errors = torch.stack([1 - generalized_box_iou(a, b).diagonal() for a, b in zip(own, wanted, strict=True)])
    expected = (errors * certainty).sum()
    torch.testing.assert_close(giou_distillation(*deltas, certainty), expected.float())


def test_certainty_is_the_score_of_a_confident_teacher():
    logits = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]])
    expected = torch.tensor([[1 / (1 + torch.tensor(-1.0).exp()), 0.5, 0.0]])
    torch.testing.assert_close(teacher_certainty(logits, 0.4), expected)


def test_pearson_is_half_the_squared_error_of_standardised_features():
    student, teacher = torch.randn(3, 4, 5, 6) * 7 + 2, torch.randn(3, 4, 5, 6) * 0.1 - 4
    teacher = teacher + 0.02 * student
    own, wanted = (F.batch_norm(maps.double(), None, None, training=True, eps=1e-12) for maps in (student, teacher))
    loss = pearson_distillation(student, teacher)
    torch.testing.assert_close(loss, F.mse_loss(own, wanted).float() / 2)
    of_channels = [
        torch.corrcoef(torch.stack([maps[:, channel].flatten() for maps in (student, teacher)]))[0, 1]
        for channel in range(4)
    ]
    torch.testing.assert_close(loss, 1 - torch.stack(of_channels).mean())


def test_pearson_sees_neither_scale_nor_offset():
    features = torch.randn(2, 3, 4, 5)
    scaled = features * torch.tensor([0.1, 2.0, 30.0]).view(3, 1, 1) + torch.tensor([-5.0, 0.0, 9.0]).view(3, 1, 1)
    assert pearson_distillation(scaled, features).item() == pytest.approx(0, abs=1e-5)
    assert pearson_distillation(-scaled, features).item() == pytest.approx(2, abs=1e-5)


def test_a_constant_channel_is_uncorrelated_and_passes_no_gradient():
    """As after a ReLU that never opens; the standard deviation's gradient would be infinite."""
    student, teacher = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    student[:, 1] = 0
    student.requires_grad_()
    loss = pearson_distillation(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss, (pearson_distillation(student[:, :1], teacher[:, :1]) + 1) / 2)
    assert student.grad[:, 0].any()
    assert not student.grad[:, 1].any()


def test_channel_distillation_against_a_plain_restatement():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for temperature in (1.0, 4.0):
        expected = 0.0
        for own, wanted in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
            own, wanted = ((maps / temperature).exp() / (maps / temperature).exp().sum() for maps in (own, wanted))
            expected = expected + temperature**2 * (wanted * (wanted / own).log()).sum() / 6
        torch.testing.assert_close(channel_distillation(student, teacher, temperature), expected)


def test_hint_distillation_against_a_plain_restatement():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5) * torch.tensor([0.5, 1, 9]).view(1, 3, 1, 1)
    errors = [
        ((student[:, channel] - wanted) ** 2).mean() / ((wanted - wanted.mean()) ** 2).mean()
        for channel, wanted in enumerate(teacher.unbind(1))
    ]
    torch.testing.assert_close(hint_distillation(student, teacher), sum(errors) / 3, rtol=1e-3, atol=0)
    mean = teacher.mean((0, 2, 3), keepdim=True).expand_as(teacher)
    assert hint_distillation(mean, teacher).item() == pytest.approx(1, rel=1e-3)


def test_a_channel_that_the_teacher_does_not_use_passes_a_gradient():
    """The student's must become constant as well."""
    student, teacher = torch.randn(2, 2, 3, 4, requires_grad=True), torch.zeros(2, 2, 3, 4)
    hint_distillation(student, teacher).backward()
    assert (student.grad.sign() == student.sign()).all()


def test_features_are_averaged_over_levels():
    outputs, own, wanted = random_outputs(), random_features(3, 4, 5), random_features(3, 4, 5)
    settings = DistillationSettings(features=2.0, feature_loss="cwd", temperature=5.0)
    expected = 2 * sum(channel_distillation(*pair, 5.0) for pair in zip(own, wanted, strict=True)) / 3
    torch.testing.assert_close(distillation_losses(outputs, outputs, settings, own, wanted)["features"], expected)


def test_temperature_against_a_plain_restatement():
    student, teacher = torch.randn(3, 2), torch.randn(3, 2)
    for temperature in (1.0, 4.0):
        wanted = (teacher / temperature).softmax(-1)
        divergence = (wanted * (wanted.log() - (student / temperature).log_softmax(-1))).sum(-1)
        weight = torch.maximum(student.softmax(-1)[:, 1], teacher.softmax(-1)[:, 1])
        expected = temperature**2 * (weight * divergence).sum()
        torch.testing.assert_close(class_weight(student, teacher), weight)
        torch.testing.assert_close(logit_distillation(student, teacher, temperature, weight), expected)


def test_faces_and_false_alarms_count_more_than_background():
    """The same difference in logits on a face, on a false alarm of the student, and on plain background."""
    background, face = torch.tensor([6.0, -6.0]), torch.tensor([-2.0, 2.0])
    student = torch.stack([background] * 3)[None].repeat(1, 1, 1)
    teacher = student.clone()
    teacher[0, 0] = face  # a face that the student misses
    student[0, 1] = face  # a false alarm
    student[0, 2] = background + torch.tensor([1.0, -1.0])
    student.requires_grad_()
    logit_distillation(student, teacher, 3.0, class_weight(student, teacher)).backward()
    miss, alarm, plain = student.grad[0].abs().sum(-1)
    assert min(miss, alarm) > 100 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_compared_in_float(dtype):
    settings = DistillationSettings(features=1.0, box_loss="giou")
    given = [*random_outputs(), *random_features(3, 4, 5)], [*random_outputs(), *random_features(3, 4, 5)]
    short = [[values.to(dtype) for values in each] for each in given]
    with torch.autocast("cpu", torch.bfloat16):
        losses = distillation_losses(short[0][:3], short[1][:3], settings, short[0][3:], short[1][3:])
    same = [[values.to(dtype).float() for values in each] for each in given]
    expected = distillation_losses(same[0][:3], same[1][:3], settings, same[0][3:], same[1][3:])
    assert losses == expected
    assert all(loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": 1.1},
        {"confidence": -0.1},
        {"temperature": 0},
        {"boxes": -1},
        {"features": float("nan")},
        {"box_loss": "iou"},
        {"feature_loss": "l1"},
        {"feature_levels": "backbone"},
        {"teacher_precision": "int8"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_bad_settings_are_named(settings):
    with pytest.raises(InputError, match=f"distillation: {next(iter(settings))} is .*; expected"):
        DistillationSettings(**settings)


def test_something_must_be_taught():
    parts = {"logits": 0, "boxes": 0, "landmarks": 0}
    with pytest.raises(InputError, match="are all 0"):
        DistillationSettings(**parts)
    assert DistillationSettings(weight=0, **parts).features == 0
