"""The chart is a well-formed picture that shows every point it was given, where it belongs."""

import itertools
import xml.etree.ElementTree as ET

import pytest

from distdl.bench.chart import HEIGHT, WIDTH, ChartPoint, Line, scaling_svg

SVG = "{http://www.w3.org/2000/svg}"
STRONG = Line(
    "strong",
    [ChartPoint(1, 1.0, 0.9, 1.1), ChartPoint(2, 1.9, 1.8, 1.95), ChartPoint(4, 1.7, 0.4, 2.0)],
    [(1, 1.0), (2, 1.9), (4, 3.5), (8, 6.0)],
)
WEAK = Line("weak", [ChartPoint(1, 1.0, 1.0, 1.0), ChartPoint(2, 2.0, 1.9, 2.1)])


def drawn(lines=(STRONG, WEAK), oversubscribed=(4,)):
    text = scaling_svg(lines, "a <title> & more", "machine", ["note one", "note two"], oversubscribed)
    return ET.fromstring(text)


def of_kind(picture, tag, kind):
    return [element for element in picture.iter(SVG + tag) if element.get("class") == kind]


def places(polyline):
    return [tuple(map(float, place.split(","))) for place in polyline.get("points").split()]


def test_every_point_has_a_dot_a_whisker_and_a_place_on_its_line():
    picture = drawn()
    dots = of_kind(picture, "circle", "point")
    assert len(dots) == len(of_kind(picture, "g", "whisker")) == 5
    lines = of_kind(picture, "polyline", "measured")
    assert [len(places(line)) for line in lines] == [3, 2]
    on_lines = [place for line in lines for place in places(line)]
    assert [(float(dot.get("cx")), float(dot.get("cy"))) for dot in dots] == on_lines
    assert dots[2].find(SVG + "title").text == "strong, 4 ranks: 1.70"


def test_doubling_is_one_step_on_both_axes_and_the_ideal_is_straight():
    (ideal,) = of_kind(drawn(), "polyline", "ideal")
    (x1, y1), (x2, y2) = places(ideal)
    picture = drawn([Line("perfect", [ChartPoint(n, n, n, n) for n in (1, 2, 4, 8)])], [])
    on_line = places(of_kind(picture, "polyline", "measured")[0])
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(on_line)]
    assert all(step == pytest.approx(steps[0], abs=0.11) for step in steps)
    assert places(of_kind(picture, "polyline", "ideal")[0]) == [on_line[0], on_line[-1]]
    assert x2 > x1
    assert y2 < y1


def test_predictions_are_dashed_and_have_no_dots():
    (projection,) = of_kind(drawn(), "polyline", "projection")
    assert projection.get("stroke-dasharray")
    assert len(places(projection)) == 4
    assert not any(line.get("stroke-dasharray") for line in of_kind(drawn(), "polyline", "measured"))


def test_the_region_of_shared_cores_is_shaded_around_its_points_alone():
    (shade,) = of_kind(drawn(), "rect", "oversubscribed")
    start, end = float(shade.get("x")), float(shade.get("x")) + float(shade.get("width"))
    inside = [start <= float(dot.get("cx")) <= end for dot in of_kind(drawn(), "circle", "point")]
    assert inside == [False, False, True, False, False]
    assert of_kind(drawn(oversubscribed=()), "rect", "oversubscribed") == []


def test_everything_lies_inside_of_the_picture_even_for_one_rank_or_a_thousand():
    alone = Line("strong", [ChartPoint(1, 1.0, 0.2, 1.4)])
    many = Line("weak", [ChartPoint(1, 1.0, 1.0, 1.0)], [(2**k, 2**k * 0.9) for k in range(11)])
    for lines in ([alone], [many], [alone, many], [STRONG, WEAK]):
        picture = drawn(lines, ())
        for line in picture.iter(SVG + "polyline"):
            for x, y in places(line):
                assert 0 <= x <= WIDTH
                assert 0 <= y <= HEIGHT
        for element in picture.iter(SVG + "line"):
            assert 0 <= float(element.get("y1")) <= HEIGHT
            assert 0 <= float(element.get("y2")) <= HEIGHT


def test_words_are_shown_as_they_are():
    words = [text.text for text in drawn().iter(SVG + "text")]
    assert "a <title> & more" in words
    assert {"machine", "note one", "note two", "ranks"} <= set(words)
