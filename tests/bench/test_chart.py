"""The chart shows every measurement and prediction at its place, as an SVG document with equal bytes each time."""

import itertools
import xml.etree.ElementTree as ET

import pytest

from distdl.bench.chart import ScalingCurve, scaling_figure
from distdl.inference import figures

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"
STRONG = ScalingCurve(
    "strong",
    {1: [0.9, 1.0, 1.1], 2: [1.8, 1.9, 1.95], 4: [0.4, 1.7, 2.0]},
    [(1, 1.0), (2, 1.9), (4, 3.5), (8, 6.0)],
)
WEAK = ScalingCurve("weak", {1: [1.0], 2: [2.1, 1.9, 2.0]})


def drawn(curves=(STRONG, WEAK), oversubscribed=(4,)):
    figure = scaling_figure(curves, "a <title> & $more$", "machine", ["note one", "note two"], oversubscribed)
    [axes] = figure.axes
    return figure, axes


def lines_of(axes):
    return {line.get_gid(): line for line in axes.get_lines() if line.get_gid()}


def points(line):
    return list(zip(*(values.tolist() for values in line.get_data()), strict=True))


def test_every_measured_median_has_a_dot_on_a_solid_line_and_a_whisker_over_all_repetitions():
    _, axes = drawn()
    lines = lines_of(axes)
    assert points(lines["measured-strong"]) == [(1, 1.0), (2, 1.9), (4, 1.7)]
    assert points(lines["measured-weak"]) == [(1, 1.0), (2, 2.0)]
    for kind in ("strong", "weak"):
        assert (lines[f"measured-{kind}"].get_marker(), lines[f"measured-{kind}"].get_linestyle()) == ("o", "-")
    whiskers = [bar.get_segments() for container in axes.containers for bar in container.lines[2]]
    ends = [(x, low, high) for segments in whiskers for (x, low), (_, high) in segments]
    expected = [(1, 0.9, 1.1), (2, 1.8, 1.95), (4, 0.4, 2.0), (1, 1.0, 1.0), (2, 1.9, 2.1)]
    assert [pytest.approx(end) for end in ends] == expected


def test_doubling_is_one_step_on_both_axes_and_the_ideal_is_straight():
    figure, axes = drawn([ScalingCurve("perfect", {n: [n] for n in (1, 2, 4, 8)})], [])
    figure.draw_without_rendering()
    on_line = axes.transData.transform(points(lines_of(axes)["measured-perfect"])).tolist()
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(on_line)]
    assert all(step == pytest.approx(steps[0]) for step in steps)
    assert min(steps[0]) > 0
    assert points(lines_of(axes)["ideal"]) == [(1, 1), (8, 8)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ranks", "speed-up over 1 rank")


def test_predictions_are_dashed_and_have_no_dots():
    lines = lines_of(drawn()[1])
    assert points(lines["predicted-strong"]) == STRONG.predicted
    assert (lines["predicted-strong"].get_marker(), lines["predicted-strong"].get_linestyle()) == ("None", "--")
    assert "predicted-weak" not in lines


def test_the_region_of_shared_cores_is_shaded_around_its_points_alone():
    _, axes = drawn()
    [shade] = [patch for patch in axes.patches if patch.get_gid() == "oversubscribed"]
    start, end = shade.get_x(), shade.get_x() + shade.get_width()
    assert [start <= ranks <= end for ranks in (1, 2, 4, 8)] == [False, False, True, False]
    assert not drawn(oversubscribed=())[1].patches


def test_everything_lies_inside_of_the_axes_even_for_one_rank_or_a_thousand():
    alone = ScalingCurve("strong", {1: [1.0, 0.2, 1.4]})
    many = ScalingCurve("weak", {1: [1.0]}, [(2**k, 2**k * 0.9) for k in range(11)])
    for curves in ([alone], [many], [alone, many], [STRONG, WEAK]):
        _, axes = drawn(curves, ())
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for line in axes.get_lines():
            for x, y in points(line):
                assert left <= x <= right
                assert bottom <= y <= top


def test_the_document_holds_the_words_and_dots_and_is_the_same_each_time():
    document = figures.content_of(drawn()[0], "svg")
    assert document == figures.content_of(drawn()[0], "svg")
    root = ET.fromstring(document)
    words = [text.text for text in root.iter(SVG + "text")]
    assert "a <title> & $more$" in words
    assert {"machine", "note one", "note two", "ranks", "ideal", "strong, measured", "strong, predicted"} <= set(words)
    [strong] = [group for group in root.iter(SVG + "g") if group.get("id") == "measured-strong"]
    assert len(list(strong.iter(SVG + "use"))) == 3
