import io
import json
from copy import deepcopy
from itertools import product
from typing import get_args

import pytest
import torch
import torch_pruning as tp
from torch import nn

from retinaface.compression.channel_groups import Importance, find_groups, heads, loss_gradients
from retinaface.compression.pruning import (
    PruningSettings,
    PruningTarget,
    Ranking,
    apply_plan,
    bearable_ratio,
    count_complexity,
    make_plan,
)
from retinaface.errors import InputError
from retinaface.model.network import NetworkConfig, RetinaFace

IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5)) * 255 - 110


def run(network):
    """Outputs in double precision, so that what differs is not rounding."""
    with torch.no_grad():
        return deepcopy(network).eval().double()(IMAGES.double())


def widths(network):
    return {name: m.out_channels for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}


def pruned(network, **settings):
    network = deepcopy(network)
    plan = make_plan(network, PruningSettings(**settings))
    apply_plan(network, plan)
    return network, plan


def identity(batch_norm):
    """A number that tells the channels of a batch norm apart."""
    return batch_norm.running_mean.double() + 1000 * batch_norm.running_var.double()


def kept_channels(before, after):
    """Each batch norm, and which of its channels are left."""
    after = dict(after.named_modules())
    for name, module in before.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            kept = torch.isin(identity(module), identity(after[name]))
            assert kept.sum() == after[name].num_features
            yield module, kept


def zero_removed(before, after):
    """The unpruned network with the removed channels silenced: their batch norms give zero, so do the activations."""
    silenced = deepcopy(before)
    for module, kept in kept_channels(silenced, after):
        module.weight.data[~kept] = 0
        module.bias.data[~kept] = 0
    return silenced


@pytest.fixture(scope="module", params=["mobilenet0.25", "resnet50"])
def pair(request, build_network):
    """A network, the same pruned, and the plan."""
    network = build_network(backbone=request.param, channels=32)
    return network, *pruned(network, ratio=0.4)


def test_a_pruned_network_is_the_network_with_the_removed_channels_silenced(pair):
    before, after, _ = pair
    changed = run(zero_removed(before, after))
    for expected, actual, untouched in zip(changed, run(after), run(before), strict=True):
        scale = expected.abs().max()
        assert (expected - actual).abs().max() < 1e-9 * scale
        assert (expected - untouched).abs().max() > 1e-2 * scale  # or the test would not tell


def test_smaller_everywhere_but_at_the_heads(pair):
    before, after, plan = pair
    assert plan
    was, now = widths(before), widths(after)
    heads = [name for name in was if "heads" in name]
    assert len(heads) == 9
    assert all(was[name] == now[name] for name in heads)
    assert all(now[name] < was[name] and now[name] % 8 == 0 for name in was if name not in heads and was[name] > 8)
    (params, macs), (fewer_params, fewer_macs) = count_complexity(before, 64), count_complexity(after, 64)
    assert fewer_params < 0.6 * params
    assert fewer_macs < 0.65 * macs
    assert [output.shape for output in run(after)] == [output.shape for output in run(before)]


def test_a_plan_rebuilds_the_network_from_a_file(pair, build_network):
    _, after, plan = pair
    file = io.BytesIO()
    torch.save({"plan": plan, "state_dict": after.state_dict()}, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    assert content["plan"] == plan
    fresh = RetinaFace(after.config)
    apply_plan(fresh, content["plan"])
    fresh.load_state_dict(content["state_dict"])
    for ours, theirs in zip(run(fresh), run(after), strict=True):
        assert torch.equal(ours, theirs)


def test_the_network_is_left_as_it_was_by_planning(tiny_network):
    tiny_network.requires_grad_(False)
    state = {key: value.clone() for key, value in tiny_network.state_dict().items()}
    plan = make_plan(tiny_network, PruningSettings(ratio=0.5))
    assert plan
    assert all(torch.equal(value, state[key]) for key, value in tiny_network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tiny_network.parameters())
    assert plan == make_plan(tiny_network, PruningSettings(ratio=0.5))


def test_the_least_important_channels_go(tiny_network):
    convolution, batch_norm = tiny_network.backbone.stage1[0][0], tiny_network.backbone.stage1[0][1]
    depthwise = tiny_network.backbone.stage1[1][0]
    for weight in (convolution.weight, depthwise.weight):
        weight.data[[2, 5]] *= 1e-3
    means = batch_norm.running_mean.clone()
    after, _ = pruned(tiny_network, ratio=0.25, round_to=2)
    left = [index for index in range(8) if index not in (2, 5)]
    assert torch.equal(after.backbone.stage1[0][1].running_mean, means[left])


@pytest.mark.parametrize("round_to", [1, 4, 16])
def test_rounding(build_network, round_to):
    after, _ = pruned(build_network(channels=64), ratio=0.3, round_to=round_to)
    now = {count for name, count in widths(after).items() if "heads" not in name}
    assert all(count % round_to == 0 for count in now if count > 16)
    assert any(count % 2 for count in now) == (round_to == 1)


def test_kept_modules_lose_nothing(tiny_network):
    after, _ = pruned(tiny_network, ratio=0.5, keep=("backbone.stage1", "fpn"))
    was, now = widths(tiny_network), widths(after)
    for name in was:
        if name.startswith(("backbone.stage1.", "fpn.")):
            assert now[name] == was[name], name
    assert now["backbone.stage3.1.3"] < was["backbone.stage3.1.3"]
    with pytest.raises(InputError, match=r"keep names stage9\*"):
        make_plan(tiny_network, PruningSettings(keep=("fpn", "stage9*")))


def test_wildcards_in_keep(tiny_network):
    plan = make_plan(tiny_network, PruningSettings(ratio=0.5, keep=("backbone.*1", "ssh.[01]")))
    assert plan == make_plan(tiny_network, PruningSettings(ratio=0.5, keep=("backbone.stage1", "ssh.0", "ssh.1")))
    assert plan != make_plan(tiny_network, PruningSettings(ratio=0.5))


def test_global_ranking_takes_more_from_some_layers(tiny_network):
    after, _ = pruned(tiny_network, ratio=0.4, ranking="global", max_ratio=0.75)
    was, now = widths(tiny_network), widths(after)
    shares = {round(now[name] / was[name], 2) for name in was if "heads" not in name}
    assert len(shares) > 2
    assert min(shares) >= 0.25


def test_nothing_to_prune(tiny_network):
    after, _ = pruned(tiny_network, ratio=0.0)
    assert widths(after) == widths(tiny_network)
    assert all(torch.equal(a, b) for a, b in zip(run(after), run(tiny_network), strict=True))


def test_a_second_pruning_on_top(pair):
    before, after, plan = pair
    twice, second = pruned(after, ratio=0.4)
    assert count_complexity(twice, 64)[1] < 0.8 * count_complexity(after, 64)[1]
    fresh = RetinaFace(before.config)
    for part in (plan, second):
        apply_plan(fresh, part)
    fresh.load_state_dict(twice.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(run(fresh), run(twice), strict=True))


def test_a_pruned_network_can_be_trained(tiny_network):
    after, _ = pruned(tiny_network, ratio=0.4)
    sum(output.square().mean() for output in after.train()(IMAGES)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in after.parameters())


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        ({"backbone": "resnet50"}, None),
        ({"channels": 16}, [("backbone.stage1.0.0", [99])]),
        ({"channels": 16}, [("fpn", [1])]),
        ({"channels": 16}, [("backbone.layer1.0.conv1", [1])]),
        ({"channels": 16}, [("backbone.stage1.0.0", [-1])]),
        ({"channels": 16}, [("backbone.stage1.0.0", [1, 1])]),
        ({"channels": 16}, [("backbone.stage1.0.0", list(range(8)))]),
        ({"channels": 16}, [("backbone.stage1.0.0", [0, 1]), ("backbone.stage1.0.0", [7])]),
        ({"channels": 16}, [("class_heads.0", [1])]),
    ],
    ids=["another backbone", "channel", "no layer", "name", "negative", "twice", "all", "one after two went", "head"],
)
def test_a_plan_of_another_network(tiny_network, config, plan):
    plan = plan or make_plan(tiny_network, PruningSettings())
    with pytest.raises(InputError, match="belongs to another network"):
        apply_plan(RetinaFace(NetworkConfig(**config)), plan)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"round_to": 0},
        {"max_ratio": 1.5},
        {"min_channels": 0},
        {"importance": "l3"},
        {"ratio": 0.9},
        {"ratio": 0.4, "target": PruningTarget(macs=0.5)},
        {"ranking": "none"},
        {"sensitivity": "sensitivity.json"},
    ],
)
def test_impossible_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        PruningSettings(**settings)


def test_impossible_ratio_of_a_module():
    with pytest.raises(InputError, match=r"fpn is 1\.0"):
        PruningSettings(ratios={"fpn": 1.0})


@pytest.mark.parametrize("target", [{}, {"macs": 0.5, "params": 0.5}, {"macs": 1.2}, {"params": 0.0}, {"speedup": 0.8}])
def test_impossible_targets(target):
    with pytest.raises(InputError, match="target"):
        PruningTarget(**target)


def gradients_of(network):
    losses = (sum(output.square().mean() for output in network(IMAGES)) for _ in range(2))
    return loss_gradients(network, losses)


@pytest.mark.parametrize(
    ("backbone", "importance", "ranking"),
    [
        *product(["mobilenet0.25"], get_args(Importance), ["local"]),
        ("mobilenet0.25", "lamp", "global"),
        ("mobilenet0.25", "fpgm", "isomorphic"),
        ("resnet50", "taylor", "global"),
        ("resnet50", "bn_scale", "isomorphic"),
    ],
)
def test_every_importance_and_ranking_removes_channels_and_nothing_else(build_network, backbone, importance, ranking):
    before = build_network(backbone=backbone, channels=32)
    gradients = gradients_of(before) if importance == "taylor" else None
    settings = PruningSettings(ratio=0.4, importance=importance, ranking=ranking, round_to=4)
    after = deepcopy(before)
    apply_plan(after, make_plan(before, settings, gradients))
    assert 0.1 < count_complexity(after, 64)[1] / count_complexity(before, 64)[1] < 0.9
    for expected, actual in zip(run(zero_removed(before, after)), run(after), strict=True):
        assert (expected - actual).abs().max() < 1e-9 * expected.abs().max()


def test_what_is_added_up_shrinks_together(build_network):
    network = build_network(channels=32)
    together = [set(group.layers) for group in find_groups(network)]
    assert {f"fpn.lateral.{index}.{part}" for index in (1, 2) for part in (0, 1)} in together
    assert {f"fpn.{place}.{part}" for place in ("lateral.0", "merge.1") for part in (0, 1)} in together
    after, _ = pruned(
        network, ratio=0, ratios={"fpn.lateral.2": 0.5, "fpn.merge.0": 0.25, "ssh.0.conv5_1": 0.5}, round_to=4
    )
    now = {name: count for name, count in widths(after).items() if count != widths(network)[name]}
    assert now == {"fpn.lateral.1.0": 16, "fpn.lateral.2.0": 16, "fpn.merge.0.0": 24, "ssh.0.conv5_1.0": 4}
    for expected, actual in zip(run(zero_removed(network, after)), run(after), strict=True):
        assert (expected - actual).abs().max() < 1e-9 * expected.abs().max()


def test_groups_are_named_by_their_first_convolution(build_network):
    names = [group.name for group in find_groups(build_network(backbone="resnet50", channels=32))]
    assert names[:4] == [
        "backbone.conv1",
        "backbone.layer1.0.conv1",
        "backbone.layer1.0.conv2",
        "backbone.layer1.0.conv3",
    ]
    assert len(names) == 55
    assert not any("downsample" in name or "layer1.1.conv3" in name or "heads" in name for name in names)


IMPORTANCES = {
    "l1": tp.importance.MagnitudeImportance(p=1),
    "l2": tp.importance.MagnitudeImportance(p=2),
    "bn_scale": tp.importance.BNScaleImportance(),
    "fpgm": tp.importance.FPGMImportance(),
}


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("ranking", get_args(Ranking))
def test_the_same_channels_as_torch_pruning_chooses(build_network, importance, ranking):
    network = build_network(channels=64)
    theirs = deepcopy(network)
    pruner = tp.pruner.BasePruner(
        theirs,
        torch.zeros(1, 3, 64, 64),
        importance=IMPORTANCES[importance],
        pruning_ratio=0.3,
        round_to=2,
        global_pruning=ranking != "local",
        isomorphic=ranking == "isomorphic",
        ignored_layers=heads(theirs),
    )
    pruner.step()
    ours, _ = pruned(network, ratio=0.3, importance=importance, ranking=ranking, round_to=2, max_ratio=0.99)
    assert widths(ours) == widths(theirs) != widths(network)
    for (name, expected), actual in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), name


def test_taylor_keeps_the_channels_that_the_loss_hangs_on(tiny_network):
    network = tiny_network
    batch_norm, following = network.backbone.stage3[1][1], network.backbone.stage3[1][3]
    silent = torch.arange(0, 256, 4)
    batch_norm.weight.data[silent] = batch_norm.bias.data[silent] = 0  # large weights, but the loss does not see them
    network.backbone.stage3[0][3].weight.data[silent] *= 10
    following.weight.data[:, silent] *= 10
    taylor = make_plan(network, PruningSettings(ratio=0.25, importance="taylor"), gradients_of(network))
    by_weight = make_plan(network, PruningSettings(ratio=0.25, importance="l1"))
    removed, wrongly = (dict(plan)["backbone.stage3.0.3"] for plan in (taylor, by_weight))
    assert removed == silent.tolist()
    assert not set(wrongly) & set(silent.tolist())


def test_gradients_are_summed_over_the_losses(tiny_network):
    def loss():
        return sum(output.sum() for output in tiny_network(IMAGES))

    once = loss_gradients(tiny_network, [loss()])
    twice = loss_gradients(tiny_network, (loss() for _ in range(2)))
    assert once.keys() == dict(tiny_network.named_parameters()).keys()
    assert all(torch.allclose(twice[name], 2 * once[name], rtol=1e-4) for name in once)
    assert any(gradient.abs().sum() > 0 for gradient in once.values())
    assert all(parameter.grad is None for parameter in tiny_network.parameters())


def test_random_depends_on_the_seed_alone(tiny_network):
    plans = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        torch.rand(seed)
        plans.append(make_plan(tiny_network, PruningSettings(importance="random")))
    assert plans[0] == plans[2] != plans[1]


def test_ratios_of_their_own(tiny_network):
    after, _ = pruned(
        tiny_network, ratio=0.25, ratios={"backbone.stage2": 0.5, "backbone.stage2.5": 0.0, "fpn": 0.75}, round_to=4
    )
    now = widths(after)
    assert now["backbone.stage2.0.3"] == now["backbone.stage2.1.0"] == 64
    assert now["backbone.stage2.5.3"] == 128
    assert now["backbone.stage3.1.3"] == 192
    assert {now[name] for name in now if name.startswith("fpn")} == {4}
    with pytest.raises(InputError, match=r"ratios names class_heads.*no channels to remove"):
        make_plan(tiny_network, PruningSettings(ratios={"class_heads": 0.5}))
    with pytest.raises(InputError, match=r"ratios names stage9"):
        make_plan(tiny_network, PruningSettings(ratios={"stage9": 0.5}))


@pytest.mark.parametrize("ranking", get_args(Ranking))
def test_limits_hold_in_every_ranking(build_network, ranking):
    network = build_network(channels=64)
    was = widths(network)
    few, _ = pruned(network, ratio=0.7, ranking=ranking, min_channels=20, round_to=4)
    assert all(count >= min(20, was[name]) for name, count in widths(few).items())
    shares, _ = pruned(network, ratio=0.5, ranking=ranking, max_ratio=0.5, round_to=1)
    assert min(count / was[name] for name, count in widths(shares).items()) == 0.5


@pytest.mark.parametrize(
    ("ranking", "kind", "left"), [("local", "macs", 0.35), ("global", "macs", 0.6), ("isomorphic", "params", 0.4)]
)
def test_target(build_network, ranking, kind, left):
    network = build_network()
    after, _ = pruned(network, target=PruningTarget(**{kind: left}), ranking=ranking)
    index = ("params", "macs").index(kind)
    assert count_complexity(after, 64)[index] / count_complexity(network, 64)[index] == pytest.approx(left, rel=0.05)


@pytest.mark.parametrize("ranking", get_args(Ranking))
def test_a_ratio_of_zero_is_the_same_as_keep(build_network, ranking):
    network = build_network(channels=32)
    settings = PruningSettings(ratio=0.4, ranking=ranking, ratios={"backbone": 0.0})
    assert make_plan(network, settings) == make_plan(
        network, PruningSettings(ratio=0.4, ranking=ranking, keep=("backbone",))
    )


def test_ratios_of_their_own_are_not_moved_by_a_target(build_network):
    network = build_network()
    after, _ = pruned(network, target=PruningTarget(macs=0.5), ratios={"ssh": 0.0, "backbone.stage3": 0.5})
    now = widths(after)
    assert now["backbone.stage3.1.3"] == 128
    assert all(now[name] == count for name, count in widths(network).items() if name.startswith("ssh"))


def test_target_for_the_speed(build_network):
    network = build_network()
    whole = count_complexity(network, 64)[1]
    tried = []

    def measure(candidate):
        tried.append(count_complexity(candidate, 64)[1])
        return 1 / (0.3 + 0.7 * tried[-1] / whole)  # three tenths of the time do not depend on the channels

    settings = PruningSettings(target=PruningTarget(speedup=1.7))
    plan = make_plan(network, settings, measure_speedup=measure)
    apply_plan(network, plan)
    assert measure(network) == pytest.approx(1.7, rel=0.05)
    assert len(set(tried)) == len(tried) - 3 * 2 - 1  # the three nearest twice again, and the last here
    assert len(tried) < 22
    with pytest.raises(InputError, match=r"speedup: 3\.30.* cannot be reached.*speedup: (2\.[5-9]|3\.)"):
        make_plan(build_network(), PruningSettings(target=PruningTarget(speedup=3.3)), measure_speedup=measure)


def test_a_lucky_timing_does_not_decide_the_speed(build_network):
    network = build_network()
    whole = count_complexity(network, 64)[1]
    seen = set()

    def measure(candidate):
        macs = count_complexity(candidate, 64)[1]
        first = macs not in seen
        seen.add(macs)
        return whole / macs * (1.25 if first and 0.72 < macs / whole < 0.75 else 1)

    plan = make_plan(network, PruningSettings(target=PruningTarget(speedup=1.7)), measure_speedup=measure)
    apply_plan(network, plan)
    assert measure(network) == pytest.approx(1.7, rel=0.05)


def test_a_confirmed_plan_is_not_forgotten_for_lucky_ones(build_network):
    network = build_network()
    whole = count_complexity(network, 64)[1]
    times = {}

    def measure(candidate):
        macs = count_complexity(candidate, 64)[1]
        times[macs] = times.get(macs, 0) + 1
        true = whole / macs
        if times[macs] > 1:
            return true
        return 1.7 if not 1.6 < true < 1.8 else true * 0.97  # everything far off looks perfect once

    plan = make_plan(network, PruningSettings(target=PruningTarget(speedup=1.7)), measure_speedup=measure)
    confirmed = [whole / macs for macs, count in times.items() if count > 1]
    apply_plan(network, plan)
    assert abs(1.7 - whole / count_complexity(network, 64)[1]) == min(abs(1.7 - each) for each in confirmed)


@pytest.mark.parametrize("target", [{"macs": 0.95}, {"params": 0.9}])
def test_ratios_that_remove_more_than_the_target(build_network, target):
    settings = PruningSettings(target=PruningTarget(**target), ratios={"backbone": 0.5})
    with pytest.raises(InputError, match=r"cannot be met.*what `ratios` says.*0\.[2-8]\d+.* is left already"):
        make_plan(build_network(), settings)


def test_target_that_cannot_be_reached(tiny_network):
    with pytest.raises(InputError, match=r"macs: 0\.200.* cannot be reached.*macs: 0\.[3-9].*max_ratio"):
        make_plan(tiny_network, PruningSettings(target=PruningTarget(macs=0.2), max_ratio=0.3))


def test_target_between_two_steps_is_told(build_network):
    settings = PruningSettings(target=PruningTarget(macs=0.9), round_to=32, keep=("backbone", "ssh"))
    with pytest.warns(UserWarning, match=r"macs: 0\.900.*missed.*macs: \d\.\d+.* round_to"):
        make_plan(build_network(), settings)


def sensitivity_file(network, path, losses):
    groups = [
        {
            "name": group.name,
            "channels": group.channels,
            "points": [{"ratio": r, "ap_loss": loss} for r, loss in losses(group.name).items()],
        }
        for group in find_groups(network)
    ]
    path.write_text(json.dumps({"importance": "l1", "groups": groups}))
    return str(path)


def test_ratios_that_follow_a_sensitivity_file(build_network, tmp_path):
    network = build_network()

    def losses(name):
        frail = name.startswith(("backbone.stage1.1", "backbone.stage2"))
        return {0.25: 0.1, 0.5: 0.4, 0.75: 0.8} if frail else {0.25: -0.01, 0.5: 0.1, 0.75: 0.2}

    file = sensitivity_file(network, tmp_path / "sensitivity.json", losses)
    after, _ = pruned(network, target=PruningTarget(macs=0.5), sensitivity=file)
    was, now = widths(network), widths(after)
    assert count_complexity(after, 64)[1] / count_complexity(network, 64)[1] == pytest.approx(0.5, rel=0.05)
    assert now["backbone.stage2.3.3"] / was["backbone.stage2.3.3"] > 0.75
    assert now["backbone.stage1.1.3"] == 16  # the first step of 8 channels would be half of them
    assert now["backbone.stage3.1.3"] / was["backbone.stage3.1.3"] < 0.6
    with pytest.raises(InputError, match=r"sensitivity\.json: says nothing about backbone\.stage\S+ with \d+ channels"):
        make_plan(after, PruningSettings(target=PruningTarget(macs=0.5), round_to=1, sensitivity=file, keep=("fpn",)))


def test_all_losses_negative(build_network, tmp_path):
    """Then everything that was measured costs nothing, and can go."""
    network = build_network()
    file = sensitivity_file(network, tmp_path / "sensitivity.json", lambda _: {0.25: -0.3, 0.5: -0.1, 0.75: -0.2})
    after, _ = pruned(network, target=PruningTarget(macs=0.3), sensitivity=file, round_to=1)
    assert count_complexity(after, 64)[1] / count_complexity(network, 64)[1] == pytest.approx(0.3, rel=0.05)


def test_a_file_of_another_importance_is_told(build_network, tmp_path):
    network = build_network(channels=16)
    file = sensitivity_file(network, tmp_path / "sensitivity.json", lambda _: {0.5: 0.1, 0.75: 0.2})
    settings = PruningSettings(target=PruningTarget(macs=0.7), sensitivity=file, importance="fpgm", round_to=1)
    with pytest.warns(UserWarning, match=r"sensitivity\.json: measured with importance l1.*fpgm"):
        make_plan(network, settings)


def test_a_target_that_costs_nothing_takes_a_part_of_what_costs_nothing(build_network, tmp_path):
    network = build_network()
    free = {0.25: -0.01, 0.5: 0.0, 0.75: 0.3}
    file = sensitivity_file(network, tmp_path / "sensitivity.json", lambda _: free)
    after, _ = pruned(network, target=PruningTarget(macs=0.9), sensitivity=file, round_to=1)
    assert count_complexity(after, 64)[1] / count_complexity(network, 64)[1] == pytest.approx(0.9, rel=0.05)


def points(**point):
    return json.dumps(
        {
            "importance": "l1",
            "groups": [{"name": "fpn.lateral.0.0", "channels": 16, "points": [point] if point else []}],
        }
    )


@pytest.mark.parametrize(
    "content",
    [
        None,
        "no JSON",
        "[]",
        '{"groups": [{"name": "a"}]}',
        points(),
        points(ratio=0.0, ap_loss=0.1),
        points(ratio=1.5, ap_loss=0.1),
        points(ratio=0.5, ap_loss=float("nan")),
    ],
)
def test_a_file_that_holds_no_sensitivities(tiny_network, tmp_path, content):
    path = tmp_path / "wrong.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"wrong\.json: not a file of `python -m retinaface sensitivity`"):
        make_plan(tiny_network, PruningSettings(target=PruningTarget(macs=0.5), sensitivity=str(path)))


@pytest.mark.parametrize(
    ("budget", "ratio"), [(0.0, 0.0), (0.01, 0.125), (0.02, 0.25), (0.06, 0.4375), (0.5, 0.75), (9.0, 0.75)]
)
def test_bearable_ratio(budget, ratio):
    assert bearable_ratio({0.75: 0.1, 0.25: 0.02, 0.5: 0.08 - 0.0066666}, budget) == pytest.approx(ratio, abs=2e-3)


def test_a_gain_on_the_way_is_no_budget():
    losses = {0.25: -0.1, 0.5: 0.1, 0.75: 0.05}
    assert bearable_ratio(losses, 0.0) == 0.25
    assert bearable_ratio(losses, 0.05) == 0.375  # it does not jump over the worse point to the better one


def test_macs_against_arithmetic():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.Conv2d(8, 4, 1))
    assert count_complexity(network, 32) == (3 * 8 * 9 + 8 * 4 + 4, (3 * 8 * 9 + 8 * 4) * 16 * 16)
    assert network.training
