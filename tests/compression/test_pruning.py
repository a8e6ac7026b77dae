import io
from copy import deepcopy

import pytest
import torch
from torch import nn

from retinaface.compression.pruning import PruningSettings, apply_plan, count_complexity, make_plan
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
    after, _ = pruned(tiny_network, ratio=0.4, global_ranking=True, max_ratio=0.75)
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
        ({"channels": 16}, [("backbone.stage1.0.0", True, [99])]),
        ({"channels": 16}, [("fpn", True, [1])]),
        ({"channels": 16}, [("backbone.layer1.0.conv1", True, [1])]),
        ({"channels": 16}, [("backbone.stage1.0.0", True, [-1])]),
    ],
    ids=["another backbone", "channel", "no layer", "name", "negative"],
)
def test_a_plan_of_another_network(tiny_network, config, plan):
    plan = plan or make_plan(tiny_network, PruningSettings())
    with pytest.raises(InputError, match="belongs to another network"):
        apply_plan(RetinaFace(NetworkConfig(**config)), plan)


@pytest.mark.parametrize("settings", [{"ratio": 1.0}, {"ratio": -0.1}, {"round_to": 0}, {"max_ratio": 1.5}])
def test_impossible_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        PruningSettings(**settings)


def test_macs_against_arithmetic():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.Conv2d(8, 4, 1))
    assert count_complexity(network, 32) == (3 * 8 * 9 + 8 * 4 + 4, (3 * 8 * 9 + 8 * 4) * 16 * 16)
    assert network.training
