from copy import deepcopy

import pytest

from retinaface.compression.quantization import QuantizationSettings, prepare_for_training


@pytest.mark.slow
def test_what_is_left_out_of_preparing_for_int8_changes_nothing(prepare_for_int8_sooner, compressed, monkeypatch):
    """Same code and state, bit for bit, for a pruned network whose shape has been traced with other weights."""
    network, settings = deepcopy(compressed.pruned), QuantizationSettings(keep_float=("*_heads",))
    for weight in network.parameters():
        weight.data += 0.1
    sooner = prepare_for_training(network, settings)
    for (module, name), original in prepare_for_int8_sooner.items():
        monkeypatch.setattr(module, name, original)
    whole = prepare_for_training(network, settings)
    assert sooner.graph.code == whole.graph.code
    first, second = ({name: value.numpy().tobytes() for name, value in network.state_dict().items()}
                     for network in (sooner, whole))  # fmt: skip
    assert first == second
