from statistics import median

import lightning as L
import pytest
import torch

from callbacks import SparsityRegularization
from lightning_modules import RetinaFaceModule
from retinaface.compression.channel_groups import find_groups
from retinaface.compression.pruning import apply_plan
from retinaface.errors import InputError
from retinaface.model.network import NetworkConfig


@pytest.fixture
def module(build_network) -> RetinaFaceModule:
    module = RetinaFaceModule(NetworkConfig(channels=16))
    module.network.load_state_dict(build_network(channels=16).state_dict())
    return module


def start(callback, module, checkpoint: str | None = None) -> L.Trainer:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.ckpt_path = checkpoint
    callback.on_fit_start(trainer, module)
    return trainer


def without_gradient(module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)


def pull(module, name="backbone.stage1.0.0"):
    """The regularisation's gradient of each channel of a convolution, relative to its weights, and who is weaker."""
    weight = module.network.get_submodule(name).weight
    scores = next(group.scores for group in find_groups(module.network, "l2") if group.name == name)
    return (weight.grad / weight.detach()).mean((1, 2, 3)), scores


def test_group_lasso_pulls_the_weakest_channel_most(module):
    callback = SparsityRegularization("group_lasso", 0.01)
    trainer = start(callback, module)
    without_gradient(module)
    callback.on_before_optimizer_step(trainer, module, None)
    strengths, scores = pull(module)
    assert strengths.argsort().tolist() == scores.argsort(descending=True).tolist()
    assert strengths.max().item() == pytest.approx(0.16, rel=1e-3)
    assert strengths.min().item() == pytest.approx(0.01, rel=1e-3)
    heads = [*module.network.class_heads, *module.network.box_heads, *module.network.landmark_heads]
    assert all((head.bias.grad == 0).all() for head in heads)


def test_a_single_channel_is_left_alone(module):
    apply_plan(module.network, [("ssh.0.conv5_1.0", list(range(1, 4)))])
    callback = SparsityRegularization("group_lasso", 0.01)
    trainer = start(callback, module)
    without_gradient(module)
    callback.on_before_optimizer_step(trainer, module, None)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("method", ["group_lasso", "growing"])
def test_channels_that_matter_alike_do_no_harm(module, method, value):
    """In any step; all of them may have come to nothing, and come back."""
    callback = SparsityRegularization(method, 0.01)
    trainer = start(callback, module)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for weights in ([torch.full_like(weight, value) for weight in before], before):
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.data.copy_(weight)
        without_gradient(module)
        callback.on_before_optimizer_step(trainer, module, None)
        callback.on_train_epoch_end(trainer, module)
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert pull(module)[0].abs().min() >= 0.01 * (1 - 1e-3)
    assert all(strengths.isfinite().all() for strengths in callback.state_dict()["strengths"])


def test_growing_pulls_the_weak_harder_after_every_epoch(module):
    callback = SparsityRegularization("growing", 0.01)
    trainer = start(callback, module)
    found = []
    for _ in range(3):
        without_gradient(module)
        callback.on_before_optimizer_step(trainer, module, None)
        found.append(pull(module)[0])
        callback.on_train_epoch_end(trainer, module)
    weakest = pull(module)[1].argmin()
    assert torch.allclose(found[0], torch.tensor(0.01), rtol=1e-3)
    assert [strengths[weakest].item() for strengths in found] == pytest.approx([0.01, 0.02, 0.03], rel=1e-3)
    assert all(strengths[pull(module)[1].argmax()].item() == pytest.approx(0.01, rel=1e-3) for strengths in found)


@pytest.mark.parametrize("method", ["group_lasso", "growing"])
def test_channels_shrink_and_spread(module, method):
    def norms():
        return torch.stack([m.weight.detach().flatten(1).norm(dim=1).mean() for m in convolutions])

    def spread():
        return sum(group.scores.std().item() for group in find_groups(module.network, "l2"))

    convolutions = [m for m in module.network.backbone.modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 1]
    callback = SparsityRegularization(method, 0.02)
    trainer = start(callback, module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    norms_before, spread_before = norms(), spread()
    for _ in range(20):
        without_gradient(module)
        callback.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
        callback.on_train_epoch_end(trainer, module)
    assert (norms() < norms_before).all()
    assert spread() > 1.3 * spread_before


def test_what_has_grown_goes_on_in_a_resumed_fit(module):
    first, resumed = SparsityRegularization("growing", 0.01), SparsityRegularization("growing", 0.01)
    trainer = start(first, module)
    first.on_train_epoch_end(trainer, module)
    resumed.load_state_dict(first.state_dict())
    start(resumed, module)
    gradients = []
    for callback in (first, resumed):
        without_gradient(module)
        callback.on_before_optimizer_step(trainer, module, None)
        gradients.append(pull(module)[0])
    assert torch.equal(*gradients)
    assert gradients[0].max() > 0.019
    assert SparsityRegularization().state_dict() == {"method": "group_lasso", "keep": [], "strengths": []}


@pytest.mark.parametrize("method", ["group_lasso", "growing"])
def test_what_is_kept_is_left_alone(module, method):
    callback = SparsityRegularization(method, 0.01, keep=["backbone.stage2"])
    trainer = start(callback, module)
    without_gradient(module)
    callback.on_before_optimizer_step(trainer, module, None)
    pulled = {name for name, parameter in module.network.named_parameters() if parameter.grad.any()}
    assert not any(name.startswith("backbone.stage2.") for name in pulled)
    assert any(name.startswith("backbone.stage1.") for name in pulled)
    assert any(name.startswith("backbone.stage3.") for name in pulled)


def test_unknown_module_to_keep_is_named(module):
    with pytest.raises(InputError, match=r"sparsity: keep.*backbone\.stage9"):
        start(SparsityRegularization(keep=["backbone.stage9"]), module)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"method": "growing"}, {"method": "group_lasso"}),
        ({"method": "group_lasso"}, {"method": "growing"}),
        ({"method": "growing"}, {"method": "growing", "keep": ["backbone.stage1"]}),
        ({}, {"keep": ["backbone.stage1"]}),
    ],
    ids=str,
)
def test_refuses_to_go_on_with_other_settings(module, before, after):
    first, resumed = SparsityRegularization(**before), SparsityRegularization(**after)
    start(first, module)
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(InputError, match=r"^/runs/last\.ckpt: .*another method or keep"):
        start(resumed, module, "/runs/last.ckpt")


def test_refusal_to_go_on_is_one_line(pruned_again_run, tmp_path, run_stage, capsys):
    options = [f"--ckpt_path={pruned_again_run.checkpoint}", "--trainer.callbacks.init_args.method=group_lasso"]
    with pytest.raises(SystemExit):
        run_stage(pruned_again_run.arguments, tmp_path, *options)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {pruned_again_run.checkpoint}: was trained with another method")


def test_checkpoint_has_what_has_grown_in_all_epochs(pruned_again_run):
    content = torch.load(pruned_again_run.checkpoint, weights_only=True)
    strengths = content["callbacks"]["SparsityRegularization"]["strengths"]
    grown = 0.01 * (1 + content["epoch"] + 1)  # once after every epoch, the last one too
    least, most = (sorted(getattr(each, end)().item() for each in strengths) for end in ("min", "max"))
    assert least[0] >= 0.01 * (1 - 1e-3)
    assert most[-1] <= grown * (1 + 1e-3)
    # Which channel of a group is the strongest, or the weakest, may change from epoch to epoch; in few groups it does.
    assert [median(least), median(most)] == pytest.approx([0.01, grown], rel=1e-3)


@pytest.mark.slow
def test_two_processes_stay_in_step(pruned_run, tmp_path, check_two_processes):
    """In the stage before pruning it would be the same; here a stage is there that only needs the callback."""
    options = ["--trainer.callbacks+=callbacks.SparsityRegularization", "--trainer.callbacks.init_args.method=growing"]
    check_two_processes([*pruned_run.arguments, *options], tmp_path)


def test_the_stage_before_pruning(
    tiny_root, tiny_checkpoint, tmp_path, run_stage, make_stage_arguments, monkeypatch, without_export
):
    roles = [f"--model.init_args.{role}={tiny_checkpoint}" for role in ("student", "teacher")]
    cli = run_stage(make_stage_arguments("sparsify", tiny_root, *roles), tmp_path, "--trainer.max_epochs=1")
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, SparsityRegularization))
    assert callback.method == "group_lasso"
    assert cli.model.structure.plans == []
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["callbacks"]["SparsityRegularization"]["strengths"] == []


def test_refuses_a_quantized_network(quantized_run):
    with pytest.raises(InputError, match=r"sparsity.*quantized already"):
        start(SparsityRegularization(), quantized_run.cli.model)


@pytest.mark.parametrize("setting", [{"method": "lasso"}, {"strength": 0.0}], ids=str)
def test_bad_settings_are_named(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        SparsityRegularization(**setting)
