from retinaface.evaluation.speedup import speedup_meter


def test_a_network_is_timed_against_the_one_it_comes_from(tiny_network, monkeypatch):
    exported = []

    def export(network, path):
        exported.append(network)
        path.write_text("")

    def benchmark(models, size, threads, warmup, rounds):
        assert all(model.is_file() for model in models)
        assert (size, threads) == (96, 1)
        return [model.stem for model in models]

    monkeypatch.setattr("retinaface.evaluation.speedup.export_onnx", export)
    monkeypatch.setattr("retinaface.evaluation.speedup.benchmark", benchmark)
    with speedup_meter(tiny_network, 96, 1) as measure:
        assert exported == []  # nothing is exported before something is timed
        assert measure("first") == ("original", "pruned")
        assert measure("second") == ("original", "pruned")
    assert exported == [tiny_network, "first", "second"]


def test_the_same_network_is_as_fast(tiny_network, quick_export):
    with speedup_meter(tiny_network, 64, 1, rounds=40) as measure:
        before, after = measure(tiny_network)
    assert before.ratio == 1
    assert 0.7 < after.ratio < 1.4  # other processes may disturb one of the two
    assert (after.size, after.threads, after.rounds) == (64, 1, 40)
