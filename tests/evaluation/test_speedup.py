from types import SimpleNamespace

from retinaface.evaluation.speedup import speedup_meter


def test_a_network_is_timed_against_the_one_it_comes_from(tiny_network, monkeypatch):
    exported, timed = [], []

    def export(network, path):
        exported.append(network)
        path.write_text("")

    def benchmark(models, size, threads, warmup, rounds):
        assert all(model.is_file() for model in models)
        assert (size, threads) == (96, 1)
        timed.append(rounds)
        return [SimpleNamespace(name=model.stem, median_ms=20.0) for model in models]

    monkeypatch.setattr("retinaface.evaluation.speedup.export_onnx", export)
    monkeypatch.setattr("retinaface.evaluation.speedup.benchmark", benchmark)
    with speedup_meter(tiny_network, 96, 1) as measure:
        assert exported == []  # nothing is exported before something is timed
        assert [timing.name for timing in measure("first")] == ["original", "pruned"]
        assert [timing.name for timing in measure("second")] == ["original", "pruned"]
    assert exported == [tiny_network, "first", "second"]
    assert timed == [5, 250, 250]  # after a short trial: 10 seconds for two models of 20 ms


def test_the_same_network_is_as_fast(tiny_network, quick_export):
    with speedup_meter(tiny_network, 64, 1, seconds=0.001) as measure:
        before, after = measure(tiny_network)
    assert before.ratio == 1
    assert 0.7 < after.ratio < 1.4  # other processes may disturb one of the two
    assert (after.size, after.threads, after.rounds) == (64, 1, 30)
