"""The report page: complete, harmless, small, and honest about what is missing."""

import base64
import csv
import html.parser
import json
import re
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from sss_jax.data.synthetic import CLASS_NAMES, SplitSizes, write_phantoms
from sss_jax.errors import DataError
from sss_jax.evaluate import evaluate
from sss_jax.png import grey_png
from sss_jax.report import write_report
from sss_jax.report_overlay import _choose, case_views, contour_path
from sss_jax.report_svg import Series, line_chart, nice_ticks, thin, tick_text

VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced and collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.values, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def visible(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sizes = SplitSizes(labelled=1, unlabelled=1, val=1, test=3)
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", subjects=sizes)


def write_log(path, steps=40):
    rows = []
    for step in range(1, steps + 1):
        rows.append(
            {"kind": "train", "step": step, "loss": 2 / step, "loss_labelled": 1 / step}
            | {"coverage": step / steps, "rate": 1e-3, "slices_per_s": 40.0, "data_wait": 0.01}
            | {"other_1": 0.5, "other_2": 0.6}
            | {"coverage_foreground": 0.111, "prompts_valid": 0.222, "loss_unlabelled": 0.5}
            | {"similarity_level_4": 0.333, "similarity_level_8": 0.444, "grad_norm": "Infinity"}
        )
        if step % 10 == 0:
            dice = step / (2 * steps)
            found = {"pseudo_precision": 0.555, "pseudo_recall": 0.666, "prompts_found": 0.777}
            row = {"kind": "val", "step": step, "dice": dice, "dice_1": dice, **found}
            rows.append(row | ({"prompt_iou": 0.888} if step > 10 else {}))
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def run(tmp_path, data):
    """A run folder whose predictions get worse from case to case; the last lacks a class."""
    folder = tmp_path / "run_7"
    (folder / "test").mkdir(parents=True)
    split = json.loads((data / "split.json").read_text())
    for number, case in enumerate(split["test"]):
        label = nib.load(data / "labels" / f"{case}.nii.gz")
        array = ndimage.shift(np.asarray(label.dataobj), (number * 2, 0, 0), order=0)
        if number == 2:
            array[array == 3] = 0
        nib.save(nib.Nifti1Image(array, None, label.header), folder / "test" / f"{case}.nii.gz")
    evaluate(folder / "test", data / "labels", folder / "test", class_names=CLASS_NAMES)
    config = {
        "method": "sss",
        "model": {"preset": "nano", "image_size": 64, "num_classes": 3, "dtype": "float32"},
        "train": {"steps": 40, "seed": 5},
    }
    (folder / "config.json").write_text(json.dumps(config))
    about = {
        "data": str(data),
        "split": "split.json",
        "split_digest": "0123456789abcdef",
        "cases": {"labelled": 1, "unlabelled": 1, "val": 1, "test": 3},
        "versions": {"sss_jax": "0.1.0", "jax": "0.10.2"},
        "device": "cpu",
        "devices": 1,
    }
    (folder / "run.json").write_text(json.dumps(about))
    write_log(folder / "metrics.jsonl")
    return folder


def read(folder, **arguments):
    path = write_report(folder, **arguments)
    text = path.read_text(encoding="utf-8")
    assert len(text) < 5_000_000
    return text, Page(text)


def test_whole_run(run):
    text, page = read(run)
    summary = json.loads((run / "test" / "summary.json").read_text())
    assert f"Mean Dice {summary['mean']['dice']:.3f}" in page.visible
    for row in summary["classes"]:
        assert f"{row['name']} {row['dice']['mean']:.3f}" in page.visible
    for word in (
        "run_7", "nano, 64 px", "40 of 40", "phantoms", "1 unlabelled", "0123456789ab",
        "jax 0.10.2", "cpu", "NSD at 1 mm", "Validation Dice", "Losses", "Learning rate",
        "slices per second", "3 of 3 test cases", "Settings", "diagonal of the volume",
    ):  # fmt: skip
        assert word in page.visible, word
    assert 'class="note"' not in text
    # Two slices of each case, one of the case without an error; every picture is stored once.
    assert page.tags.count("image") == 5
    assert page.tags.count("use") == 10
    assert list(run.glob("*.html")) == [run / "report.html"]
    assert not [p for p in run.iterdir() if p.name.startswith(".tmp")]


def test_cases_come_worst_first_with_their_figures(run):
    _, page = read(run)
    with open(run / "test" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    mean = {
        case: np.mean([float(r["dice"]) for r in rows if r["case"] == case])
        for case in {r["case"] for r in rows}
    }
    order = sorted(mean, key=mean.get)
    assert re.findall(r"\d\. (phantom_\d+)", page.visible) == order
    for number, case in enumerate(order, start=1):
        assert f"{number}. {case} mean Dice {mean[case]:.3f}" in page.visible
    assert "vessel 0.000 (missed)" in page.visible
    assert "no disagreement in any slice" in page.visible  # the case that is right everywhere


INSIGHTS = {
    "Pseudo-labels in use": ("confident 1.00", "confident foreground 0.111"),
    "Pseudo-labels against the truth": ("right (precision) 0.555", "found (recall) 0.666"),
    "PCSW prompts": (
        "classes with a prompt (unlabelled clips) 0.222",
        "true objects with a prompt (validation) 0.777",
        "IoU of box and true object (validation) 0.888",
    ),
    "DFE similarity": ("finest level 0.333", "middle level 0.444"),
}


def figures(text):
    """Each chart's words by its title."""
    found = {}
    for figure in re.findall(r'<figure class="chart">.*?</figure>', text, re.DOTALL):
        page = Page(figure)
        title = re.search("<figcaption>(.*?)</figcaption>", figure).group(1)
        assert title not in found
        found[title] = figure, page.visible
    return found


def test_pseudo_labels_have_charts_that_say_how_to_read_them(run):
    charts = figures(read(run)[0])
    for title, entries in INSIGHTS.items():
        figure, visible = charts[title]
        for entry in entries:
            assert entry in visible, (title, entry)
        assert figure.count('class="series"') == len(entries)
        (about,) = re.findall("<p>(.*?)</p>", figure)
        assert about.endswith(".")
        assert about.count(". ") == 0, "one sentence"
    drawn = "".join(text for _, text in charts.values())
    raw = re.search("coverage_|prompts?_|pseudo_|similarity_", drawn)
    assert raw is None, "every quantity is drawn once, in words"


def test_what_has_no_chart_of_its_own_is_drawn_by_its_name(run):
    figure, visible = figures(read(run)[0])["other"]
    assert "other_1 0.500 other_2 0.600" in visible
    assert "<p>" not in figure


def test_a_run_without_unlabelled_data_has_no_such_charts(run):
    names = "coverage|pseudo_|prompt|similarity_"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not re.match(names, k)} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    charts = figures(read(run)[0])
    assert {"Losses", "Validation Dice"} <= set(charts)
    assert not set(INSIGHTS) & set(charts)


def test_same_run_gives_the_same_page(run, tmp_path):
    first, _ = read(run)
    second, _ = read(run, output=tmp_path / "deep" / "other.html")
    assert first == second


def test_nothing_is_loaded_and_nothing_runs(run):
    text, page = read(run)
    assert "default-src 'none'" in text
    assert not {"script", "link", "iframe", "object", "embed", "form", "a"} & set(page.tags)
    for tag, name, value in page.values:
        assert not name.startswith("on")
        if name in ("href", "src"):
            assert value.startswith(("data:image/png;base64,", "#picture-")), (tag, value)
    assert "url(" not in text
    assert "@import" not in text
    identities = [value for _, name, value in page.values if name == "id"]
    assert len(set(identities)) == len(identities)


def test_hostile_names_stay_text(run, data, tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    about = json.loads((run / "run.json").read_text())
    config = json.loads((run / "config.json").read_text())
    summary = json.loads((run / "test" / "summary.json").read_text())
    about |= {"device": evil, "versions": {evil: evil}, "split": evil}
    config |= {"method": evil, evil: {evil: evil}}
    summary["conventions"] = [evil]
    summary["classes"][0]["name"] = evil
    (run / "run.json").write_text(json.dumps(about))
    (run / "config.json").write_text(json.dumps(config))
    (run / "test" / "summary.json").write_text(json.dumps(summary))
    scores = (run / "test" / "metrics.csv").read_text().replace("phantom_003", "<script>x")
    (run / "test" / "metrics.csv").write_text(scores)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": 41, evil: 1.0}) + "\n")
    renamed = run.with_name("<script>run")
    run.rename(renamed)
    text, page = read(renamed)
    assert "script" not in page.tags
    assert "<script" not in text.lower()
    assert page.visible.count(evil) >= 6
    assert "<script>x" in page.visible  # shown as text, with a note instead of a picture
    assert "is not there" in page.visible


def test_class_names_come_from_the_split_file_where_the_scores_have_none(run, data):
    evaluate(run / "test", data / "labels", run / "test")
    _, page = read(run)
    assert "class 1" not in page.visible
    assert "organ" in page.visible


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("config.json", "the settings are not shown"),
        ("run.json", "versions, device and data are not shown"),
        ("metrics.jsonl", "no curves are shown"),
        ("test/summary.json", "the test scores are not shown"),
        ("test/metrics.csv", "single cases are not shown"),
    ],
)
def test_missing_parts_are_named(run, missing, expected):
    (run / missing).unlink()
    _, page = read(run)
    assert expected in page.visible


@pytest.mark.parametrize("name", ["config.json", "run.json", "test/summary.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b'{"classes": 3, "model": 4}'])
def test_damaged_parts_do_not_stop_the_page(run, name, content):
    (run / name).write_bytes(content)
    _, page = read(run)
    if not (name == "run.json" and b"classes" in content):
        assert name in page.visible


def test_run_in_training_shows_validation(run):
    for path in (run / "test").iterdir():
        path.unlink()
    (run / "test").rmdir()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut off by a kill: normal, not worth a note
    _, page = read(run)
    assert "Best validation Dice 0.500" in page.visible
    assert "no test scores yet" in page.visible
    assert "could not be read" not in page.visible


def test_lost_data_and_damaged_volumes_are_named(run, tmp_path):
    case = max((run / "test").glob("*.nii.gz"))
    case.write_bytes(case.read_bytes()[:-30])
    _, page = read(run)
    assert page.visible.count("No picture:") == 1
    assert page.tags.count("image") == 3
    about = json.loads((run / "run.json").read_text()) | {"data": str(tmp_path / "gone")}
    (run / "run.json").write_text(json.dumps(about))
    _, page = read(run)
    assert "No images are shown" in page.visible
    assert "image" not in page.tags


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_broken_log_lines_are_counted(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('garbage\n[1]\n{"kind": "train", "step": 50, "loss": "NaN"}\n')
    _, page = read(run)
    assert "2 lines of metrics.jsonl could not be read." in page.visible


def test_views_show_the_right_slices_and_sides(data):
    from sss_jax.data.folders import find_cases

    cases = find_cases(data)
    for case in cases.values():
        if case.label is None:
            with pytest.raises(DataError, match="no reference"):
                case_views(case, case.image)
            continue
        (view,) = case_views(case, case.label)
        assert view.edges == ("R", "A")
        assert view.image.shape == view.reference.shape
        np.testing.assert_array_equal(view.reference, view.prediction)
        # Upright radiological slices, whatever the stored orientation: the organ is on the
        # patient's right, which is the left half of the picture.
        organ, wall = (np.argwhere(view.reference == k)[:, 1].mean() for k in (1, 2))
        assert organ < wall


def test_slices_of_most_disagreement_and_largest_object():
    truth, guess = np.zeros((2, 5, 8, 8), np.uint8)
    truth[1, :3, :3] = truth[3, :6, :6] = 1
    guess[3, :6, :6] = 1
    guess[3, 0, 0] = 0
    assert [n for n, _ in _choose(truth, guess)] == [1, 3]
    assert _choose(truth, guess)[0][1] == "most disagreement (9 pixels)"
    assert [n for n, _ in _choose(truth, truth)] == [3]
    same = _choose(truth, np.zeros_like(truth))
    assert [n for n, _ in same] == [3, 1]
    assert same[0][1] == "most disagreement (36 pixels) and largest object"
    assert [n for n, _ in _choose(truth[3:4], guess[3:4])] == [0]


def decode(content):
    """Read a grey PNG whose rows use filter 2, as RFC 2083 describes it."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length :][:4])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    width, height, depth, color = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, color) == (8, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert set(rows[:, 0]) == {2}
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8)


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_png_round_trip(image):
    np.testing.assert_array_equal(decode(grey_png(image)), image)


def test_png_is_read_by_another_library(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    image = np.random.default_rng(0).integers(0, 256, (7, 11)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(grey_png(image))
    read_back = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.png")))
    np.testing.assert_array_equal(read_back, image)
    with pytest.raises(ValueError, match="uint8"):
        grey_png(image.astype(np.float32))


def test_pictures_hold_the_slice(run, data):
    text, _ = read(run)
    content = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text).group(1)
    image = decode(base64.b64decode(content))
    assert image.max() == 255
    assert image.std() > 20


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.bool_, (6, 7)))
def test_contours_enclose_exactly_the_mask(mask):
    loops = [
        np.array([list(map(float, p.split())) for p in loop[1:-1].split("L")])
        for loop in re.findall(r"M[^Z]*Z", contour_path(mask))
    ]
    assert bool(loops) == bool(mask.any())
    inside = np.zeros(mask.shape, int)
    for loop in loops:
        assert loop.min() >= 0
        assert loop[:, 0].max() <= 7
        assert loop[:, 1].max() <= 6
        for row, column in np.ndindex(mask.shape):
            inside[row, column] += winding(loop, column + 0.5, row + 0.5)
    np.testing.assert_array_equal(inside != 0, mask)


def winding(loop, x, y):
    """Signed number of times a closed polygon goes around a point."""
    total = 0
    for (x0, y0), (x1, y1) in zip(loop, np.roll(loop, -1, axis=0), strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x:
            total += 1 if y1 > y0 else -1
    return total


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 1.0, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        (0.0, 10.0, ["0.0", "2.5", "5.0", "7.5", "10.0"]),
        (0.0, 2000.0, ["0", "500", "1,000", "1,500", "2,000"]),
        (0.0, 2e-4, ["0", "5.0e-5", "1.0e-4", "1.5e-4", "2.0e-4"]),
        (-1.0, 1.0, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (3.0, 3.0, ["3", "4", "5", "6"]),
    ],
)
def test_ticks(low, high, texts):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    if low != high:
        assert [tick_text(t, ticks) for t in ticks] == texts
    assert len({tick_text(t, ticks) for t in ticks}) == len(ticks)


def test_line_chart_places_points_and_leaves_gaps():
    nan = float("nan")
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, nan), (3.0, 0.5), (4.0, nan), (5.0, 0.0), (6.0, 1.0)]
    chart = line_chart("t", "u", [Series("a", points, 1)], (0.0, 1.0))
    (path,) = re.findall(r'<path d="([^"]*)"', chart)
    assert path.count("M") == 2  # the lone third point is a dot
    (x0, y0), (x1, y1) = (map(float, p.split()) for p in path[1:].split("M")[0].split("L"))
    assert x1 > x0
    assert y1 < y0  # SVG's vertical axis points down
    assert chart.count("<circle") == 5
    assert line_chart("t", "u", [Series("a", [(0.0, nan)], 1)]) == ""
    assert line_chart("t", "u", []) == ""


def test_thinning_keeps_the_mean_and_the_ends():
    points = [(float(i), float(i % 2)) for i in range(2000)]
    thinned = thin(points)
    assert len(thinned) <= 240
    assert np.mean([y for _, y in thinned]) == pytest.approx(0.5, abs=0.02)
    assert thinned[0][0] < 10
    assert thinned[-1][0] > 1985
    assert thin(points[:100]) == points[:100]
