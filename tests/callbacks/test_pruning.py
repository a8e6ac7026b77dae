import lightning as L
import pytest
import torch

from callbacks import ChannelPruning
from lightning_modules import CompressionModule, RetinaFaceModule
from retinaface.compression.structure import load_network
from retinaface.errors import InputError
from retinaface.model.network import NetworkConfig


def test_student_is_smaller_and_trained(pruned_run, tiny_checkpoint):
    module = pruned_run.cli.model
    before, _ = load_network(tiny_checkpoint)
    assert sum(p.numel() for p in module.network.parameters()) < 0.6 * sum(p.numel() for p in before.parameters())
    assert module.structure.plans
    assert module.structure.network.activation == "relu"
    untrained = CompressionModule(str(tiny_checkpoint), activation="relu")
    ChannelPruning(ratio=0.4).setup(trainer(), untrained, "fit")
    changed = [
        name
        for (name, new), old in zip(module.network.named_parameters(), untrained.network.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert len(changed) == len(list(module.network.parameters()))  # so the optimizer held the pruned parameters


def test_batch_statistics_move_while_fine_tuning(pruned_run):
    norms = {k: v for k, v in pruned_run.cli.model.network.state_dict().items() if k.endswith("num_batches_tracked")}
    assert {int(count) for count in norms.values()} == {6}  # 3 epochs of 2 batches
    assert all(module.training for module in pruned_run.cli.model.network.modules())


def test_killed_and_resumed_run_ends_like_an_uninterrupted_one(pruned_run, tmp_path, check_resume):
    check_resume(pruned_run, tmp_path)


def test_two_processes_end_with_the_same_trained_parameters(pruned_run, tmp_path, check_two_processes):
    check_two_processes(pruned_run.arguments, tmp_path)


def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def test_same_network_is_pruned_twice_in_two_stages(tiny_checkpoint):
    module = CompressionModule(str(tiny_checkpoint))
    widths = []
    for _ in range(2):
        ChannelPruning(ratio=0.3).setup(trainer(), module, "fit")
        widths.append(sum(p.numel() for p in module.network.parameters()))
    assert widths[1] < widths[0]
    assert len(module.structure.plans) == 2
    rebuilt = module.structure.build()
    assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in module.network.parameters()]


def test_only_a_fit_prunes(tiny_checkpoint):
    module = CompressionModule(str(tiny_checkpoint))
    for stage in ("validate", "test", "predict"):
        ChannelPruning().setup(trainer(), module, stage)
    assert module.structure.plans == []


def test_refuses_a_quantized_network(quantized_run):
    with pytest.raises(InputError, match=r"pruning.*quantized already"):
        ChannelPruning().setup(trainer(), quantized_run.cli.model, "fit")


def test_refuses_to_resume_from_a_quantized_checkpoint(pruned_run, quantized_run, tmp_path, run_stage, capsys):
    with pytest.raises(SystemExit):
        run_stage(pruned_run.arguments, tmp_path, f"--ckpt_path={quantized_run.checkpoint}")
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert str(quantized_run.checkpoint) in message
    assert "quantized" in message


def test_refuses_to_resume_from_another_stage():
    module = RetinaFaceModule(NetworkConfig(channels=16))
    with pytest.raises(InputError, match="not of a pruning stage"):
        ChannelPruning().on_fit_start(trainer(), module)


def test_bad_settings_are_named():
    with pytest.raises(InputError, match=r"ratio is 1\.5"):
        ChannelPruning(ratio=1.5)
