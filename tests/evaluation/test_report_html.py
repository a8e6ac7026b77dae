import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from retinaface.evaluation import report_html as module
from retinaface.evaluation.describe import Layer
from retinaface.evaluation.evaluate import Accuracy, Evaluation, Photo
from retinaface.evaluation.report_html import layer_blocks, report_html, side_by_side
from retinaface.evaluation.report_text import environment
from retinaface.evaluation.wider_ap import SIZE_CLASSES, SUBSETS, Curve

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NAMES = ("teacher", "pruned", "int8")
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too'"
LAYERS = [
    Layer("backbone.stage1.0.0", (3, 3), 2, False, 8, 8, 216, 100),
    Layer("backbone.stage1.1.0", (3, 3), 1, True, 8, 8, 72, 100),
    Layer("backbone.stage2.0.0", (1, 1), 1, False, 64, 48, 500, 100),
    Layer("backbone.stage2.1.0", (1, 1), 1, False, 64, 16, 500, 100),
    Layer("class_heads.0", (1, 1), 1, False, 4, 4, 100, 100),
]


def model(name, speedup, size, compared=False, **changes):
    known = dict.fromkeys(SUBSETS) if compared else {"all": 0.8, "easy": None, "medium": None, "hard": None}
    return {
        "name": name,
        "ap": known,
        **({"agreement": 0.97} if compared else {}),
        "params": 300_000,
        "macs": 4e8,
        "onnx_bytes": size,
        "convolutions": 5,
        "int8_convolutions": 4,
        "float_convolutions": ["backbone.stage1.0.0"],
        "backend": "onnxruntime",
        "keep_float": ["backbone.*1.0"],
        "latency_ms_median": 20 / speedup,
        "latency_ms_p10": 19 / speedup,
        "latency_ms_p90": 21 / speedup,
        "speedup": speedup,
        **changes,
    }


def make_report(compared=False, **changes):
    machine = dict.fromkeys(
        ("cpu", "os", "python", "torch", "lightning", "torchao", "onnxruntime", "openvino"), "1.2.3"
    )
    models = [model("teacher", 1.0, 1_600_000, compared), model("pruned", 1.2, 900_000, compared)]
    return {
        "recipe": "demo",
        "machine": {**machine, "flags": ["avx2"], "cores": 2},
        "data": {
            "root": "/data/photos",
            "photos": 5,
            "official_photos": None,
            "faces": 5,
            "faces_by": "teacher" if compared else "labels",
        },
        "models": [*models, model("int8", 1.85, 400_000, compared)],
        "retention": None if compared else 0.984,
        "speedup": 1.85,
        "speedup_interval": [1.8, 1.9],
        "benchmark": {"size": 640, "threads": 2, "rounds": 100, "runtime": "onnxruntime"},
        "fastest": {
            "runtimes": ["onnxruntime", "openvino"],
            "teacher": {"runtime": "openvino", "median_ms": 8.6},
            "final": {"runtime": "onnxruntime", "median_ms": 7.0, "ratio": 1.23, "differs": True},
            "failures": [],
        },
        "reproduction": {
            "command": "python compress.py configs/recipes/demo.yaml",
            "recipe": "stages:\n  - name: teacher\n",
            "seeds": {"teacher": 0, "pruned": 0, "int8": 3},
            "commit": {"name": "0123456789abcdef", "changed": True},
        },
        **changes,
    }


def make_photos(root):
    photos = []
    for path in sorted((root / "WIDER_val").rglob("*.jpg")):
        faces = np.array([[20, 20, 60, 70]], np.float32)
        found = np.array([[21, 20, 60, 70, 0.9], [80, 80, 99, 99, 0.6], [0, 0, 9, 9, 0.4]], np.float32)
        photos.append(Photo(path, path.stem, found, faces, {"all": np.ones(1, bool)}))
    return photos


def make_evaluations(root):
    curve = Curve(np.linspace(0, 1, 50), np.linspace(1, 0.5, 50))
    accuracy = Accuracy(dict.fromkeys(SUBSETS, 0.8), dict.fromkeys(SIZE_CLASSES, 0.8), {"all": curve, "easy": curve})
    photos = make_photos(root)
    return {name: Evaluation(accuracy, None, 0, photos, None, 5, 1.0, "onnxruntime", "original") for name in NAMES}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose teacher was given, with the log of one stage; the other did not train."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "int8").mkdir()
    log = folder / "pruned" / "lightning_logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("step,train/loss,val/ap_all\n" + "".join(f"{step},{9 - step},0.{step}\n" for step in range(1, 9)))
    return folder


@pytest.fixture(scope="module")
def page(run_folder, tiny_root):
    return report_html(make_report(), make_evaluations(tiny_root), LAYERS, run_folder)


@pytest.fixture
def quick_plots(monkeypatch):
    """For pages whose plots are not looked at: each takes half a second."""
    monkeypatch.setattr(module, "_plot", lambda plot, text: module.Picture("data:,", text))


class Reader(HTMLParser):
    """Notes the elements, and that each is closed."""

    EMPTY = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.headings = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def text_of(page):
    """What the page says, without styles and marks."""
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


def test_one_file_that_needs_nothing_else(page):
    reader = Reader(page)
    assert reader.open == []
    assert dict(reader.elements)["html"]["lang"] == "en"
    assert not {"script", "iframe", "object"} & {tag for tag, _ in reader.elements}
    addresses = [value for _, attrs in reader.elements for name, value in attrs.items() if name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 1_000_000
    pictures = [attrs for tag, attrs in reader.elements if tag == "img"]
    assert len(pictures) == 1 + 2 + 1 + 4  # AP against latency, two subsets, one stage that trained, photos
    assert all(len(attrs["alt"]) > 20 for attrs in pictures)


def test_the_verdict_comes_first_and_the_rest_in_order(page):
    assert Reader(page).headings == [
        "demo",
        "Models",
        "Accuracy against time",
        "Precision and recall",
        "Layers: channels kept, and what is INT8",
        "Training",
        "The same photos by teacher (left) and int8 (right)",
        "How it was measured",
        "How to reproduce",
    ]
    text = text_of(page)
    verdict = text.index("98.4% of the teacher's AP kept 1.85x as fast as the teacher 4.0x smaller file")
    assert verdict < text.index("95 % interval 1.80-1.90") < text.index("5 photos, 5 faces") < text.index("Models")
    assert "(95 % interval 1.80-1.90)" in text
    for what in ("backbone.stage2 50 % kept 2/2 INT8", "backbone.stage1.1.0 depthwise 8 of 8 INT8",
                 "backbone.stage1.0.0 8 of 8 float", "leave backbone.*1.0 in float"):  # fmt: skip
        assert what in text
    assert "Given, not trained here." in text
    assert "No curves: the stage did not train" in text
    for what in ("python compress.py configs/recipes/demo.yaml", "0123456789abcdef , with changes that are not",
                 "teacher: 0, pruned: 0, int8: 3", "stages: - name: teacher", "torch 1.2.3"):  # fmt: skip
        assert what in text


def test_what_users_named_is_escaped(run_folder, tiny_root, quick_plots):
    report = make_report(recipe=HOSTILE)
    report["data"]["root"] = HOSTILE
    report["models"][-1]["keep_float"] = [HOSTILE]
    report["reproduction"] |= {"command": HOSTILE, "recipe": HOSTILE}
    evaluations = make_evaluations(tiny_root)
    photos = [Photo(p.path, f'x" onload="{HOSTILE}', *list(vars(p).values())[2:]) for p in make_photos(tiny_root)]
    evaluations["teacher"] = Evaluation(**{**vars(evaluations["teacher"]), "photos": photos})
    page = report_html(report, evaluations, LAYERS, run_folder)
    reader = Reader(page)
    assert "script" not in {tag for tag, _ in reader.elements}
    assert not any("onload" in attrs for _, attrs in reader.elements)
    assert text_of(page).count(HOSTILE) >= 6
    assert HOSTILE in reader.headings


def test_what_was_not_gained_is_not_claimed(run_folder, tiny_root, quick_plots):
    report = make_report(speedup=1.02, speedup_interval=[0.97, 1.05])
    report["models"][-1]["onnx_bytes"] = 3_200_000
    text = text_of(report_html(report, make_evaluations(tiny_root), LAYERS, run_folder))
    assert "no difference in speed was measured (1.02x, 95 % interval 0.97-1.05)" in text
    assert "1.02x as fast: no difference measured" in text
    assert "as fast as the teacher" not in text
    assert "2.0x larger file" in text
    assert "its file is 2.0x larger" in text
    assert "smaller" not in text


def test_a_report_without_labels_reproduction_and_known_names(run_folder, tiny_root, quick_plots):
    report = make_report(compared=True, reproduction=None, speedup_interval=[None, None])
    report["models"][-1]["float_convolutions"] = ["node_conv_1"]
    report["models"][-1]["keep_float"] = None
    page = report_html(report, make_evaluations(tiny_root), LAYERS, run_folder)
    headings, text = Reader(page).headings, text_of(page)
    assert "Agreement against time" in headings
    assert "Precision and recall" not in headings
    assert "97.0% agreement with the teacher" in text
    assert "too few rounds for an interval" in text
    assert "faces that both find green, those of int8 alone red" in text
    assert "it is a float model" in text
    assert "2/2 INT8" not in text
    assert "backbone.stage1.0.0 8 of 8 backbone" in text  # neither INT8 nor float
    assert "torch 1.2.3" in text
    assert "Seed" not in text


def test_where_curves_are_that_are_in_tensorboard(tmp_path, tiny_root, quick_plots):
    events = tmp_path / "int8" / "lightning_logs" / "version_0" / "events.out.tfevents.1.host.2.0"
    events.parent.mkdir(parents=True)
    events.touch()
    text = text_of(report_html(make_report(), make_evaluations(tiny_root), LAYERS, tmp_path))
    assert f"tensorboard --logdir {events.parents[1]}" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["avx2", "avx512_vnni"], "2 cores, INT8 instructions: avx512_vnni; "),
        (["avx2"], "2 cores, no INT8 instructions known (avx2); "),
    ],
)
def test_int8_instructions_are_those_that_make_it_fast(flags, said):
    machine = make_report()["machine"]
    assert said in environment({**machine, "flags": flags})["Machine"]


def test_layers_are_grouped_by_part():
    first, second, heads = layer_blocks(LAYERS, ["class_heads.0"])
    assert [first.name, second.name, heads.name] == ["backbone.stage1", "backbone.stage2", "class_heads"]
    assert [first.kept, second.kept, heads.kept] == [1, 0.5, 1]
    assert [first.in_int8, second.in_int8, heads.in_int8] == [2, 2, 0]
    assert not any(block.told for block in layer_blocks(LAYERS, ["class_heads.0", "node_conv"]))


def test_photos_are_spread_over_those_with_faces(tiny_root):
    (photo, *_) = make_photos(tiny_root)
    names = [str(number) for number in range(20)]
    photos = [Photo(photo.path, name, *list(vars(photo).values())[2:]) for name in names]
    without = Photo(photo.path, "none", photo.detections, photo.faces[:0], {"all": np.empty(0, bool)})
    pictures = side_by_side([without, *photos, without], [without, *photos, without], "both")
    assert [picture.text for picture in pictures] == ["0: both", "6: both", "13: both", "19: both"]
    assert side_by_side([without], [without], "both") == []
    assert len(side_by_side([photo], [photo], "both")) == 1


def look(page, folder, width, *flags):
    """Shows a page in a frame of this width, as a phone has no narrower window than 500 pixels, and asks about it."""
    question = """
    const page = document.querySelector('iframe').contentDocument;
    document.title = JSON.stringify({
      images: [...page.images].map(image => image.naturalWidth),
      shown: [...page.images].map(image => image.getBoundingClientRect().width),
      wide: page.documentElement.scrollWidth,
      background: getComputedStyle(page.body).backgroundColor,
    });
    """
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><body style="margin: 0"><iframe style="border: 0; width: {width}px; height: 3000px" '
        f'srcdoc="{html.escape(page)}"></iframe><script>onload = () => {{ {question} }}</script>'
    )
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"),
        *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
        *(f"--window-size={max(500, width)},3000", f"--screenshot={folder / 'page.png'}"),
    ]
    command = [CHROMIUM, *options, "--dump-dom", *flags, outer.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answer = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", run.stdout)[1]))
    console = [line for line in run.stderr.splitlines() if ":CONSOLE" in line]
    return answer, console, cv2.imread(str(folder / "page.png"))


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_without_complaint(width, page, tmp_path):
    answer, console, shot = look(page, tmp_path, width)
    assert console == []
    assert len(answer["images"]) == 8
    assert all(natural > 100 for natural in answer["images"])
    assert all(250 < shown <= width for shown in answer["shown"])
    assert answer["wide"] == width  # tables scroll within themselves
    assert answer["background"] == "rgb(255, 255, 255)"
    assert shot.std() > 20


@needs_chromium
def test_the_browser_would_notice(page, tmp_path):
    """The same questions to a page with a broken picture, an error and a line that is too long, in the dark."""
    broken = re.sub(r'src="data:image/svg[^"]*"', 'src="data:image/svg+xml;base64,AAAA"', page, count=1)
    broken = broken.replace("</main>", '<p style="min-width: 900px">x</p><img src="https://example.org/a.png"></main>')
    dark = "--blink-settings=preferredColorScheme=0"
    answer, console, _ = look(broken, tmp_path, 360, dark)
    assert answer["images"][0] == answer["images"][-1] == 0
    assert answer["wide"] > 900
    assert any("Content Security Policy" in line for line in console)
    assert answer["background"] == "rgb(21, 24, 27)"


def test_the_fastest_runtimes_are_compared_too(run_folder, tiny_root, quick_plots):
    def text(**changes):
        return text_of(report_html(make_report(**changes), make_evaluations(tiny_root), LAYERS, run_folder))

    both = text()
    assert "is 1.85x as fast (95 % interval 1.80-1.90) in ONNX Runtime" in both
    assert "int8 in ONNX Runtime (7.00 ms) is 1.23x as fast as teacher in float in OpenVINO (8.60 ms)" in both
    fastest = make_report()["fastest"]
    noise = {**fastest, "final": {**fastest["final"], "ratio": 1.01, "differs": False}}
    assert "is not measurably faster or slower (1.01x) than teacher" in text(fastest=noise)
    assert "OpenVINO is not installed" in text(fastest={**fastest, "runtimes": ["onnxruntime"]})
    failures = [{"model": "int8", "runtime": "openvino", "reason": "OpenVINO cannot load it (too odd)"}]
    assert "int8 in OpenVINO not timed: OpenVINO cannot load it (too odd)." in text(
        fastest={**fastest, "failures": failures}
    )
    none_run = {**fastest, "runtimes": ["onnxruntime"], "failures": failures}
    assert "OpenVINO runs none of these files, so it is not known" in text(fastest=none_run)
    measured = {**make_report()["benchmark"], "runtime": "openvino"}
    assert "made for onnxruntime; what OpenVINO makes of it" in text(benchmark=measured)
