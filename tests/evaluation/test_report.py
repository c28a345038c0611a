"""Reports hold every score, interval and protocol, need no other file, and compare only where protocols agree."""

import html.parser
import json

import pytest

from diffussm_jax.evaluation.report import (
    check_report,
    compare,
    html_report,
    make_report,
    protocol_line,
    text_comparison,
    text_report,
)
from diffussm_jax.evaluation.scores import EqualSize, Score

PROTOCOL = {
    "num_samples": 50_000,
    "labels": "balanced",
    "extractor_sha256": "0123456789abcdef" * 4,
    "sampling": {"eta": 0.5},
}


def report_of(fid, deviation=0.1, **protocol):
    score = Score(fid, fid - 2 * deviation, fid + 2 * deviation, deviation, "lower")
    rows = [EqualSize("samples", 100, 3.0, 0.2)]
    return make_report({"FID": score}, PROTOCOL | protocol, equal_sizes=rows, warnings=["<few> samples"])


def test_the_protocol_is_one_line():
    line = protocol_line(PROTOCOL | {"guide": ""})
    assert line == "num_samples=50,000; labels=balanced; extractor_sha256=0123456789ab; sampling=(eta=0.5)"


def test_text_shows_scores_intervals_sets_protocol_and_warnings():
    text = text_report(report_of(9.0712))
    for part in ("FID", "9.07", "8.87 ... 9.27", "lower is better", "samples", "3.00", "num_samples=50,000", "<few>"):
        assert part in text, part


def test_the_page_needs_no_other_file_and_escapes_text():
    page = html_report(report_of(9.07), {"A & B": b"\x89PNG"}, "Scores <1>")
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert [a["src"][:22] for tag, a in tags if tag == "img"] == ["data:image/png;base64,"]
    assert not [tag for tag, _ in tags if tag in ("few", "script", "link")]
    assert "A &amp; B" in page and "&lt;few&gt;" in page and "num_samples=50,000" in page


def test_reports_are_json_and_are_recognised():
    check_report(json.loads(json.dumps(report_of(1.0))), "here")
    with pytest.raises(ValueError, match="here is no report"):
        check_report({"scores": {}}, "here")


def test_a_difference_beyond_the_noise_of_resampling():
    (near,) = compare([report_of(2.0)], [report_of(2.2)])  # the deviation of the difference is 0.14
    (far,) = compare([report_of(2.0)], [report_of(2.4)])
    assert (near.is_larger_than_noise, far.is_larger_than_noise) == (False, True)
    assert far.difference == pytest.approx(0.4) and far.high - far.low == pytest.approx(
        2 * 1.96 * 0.1 * 2**0.5, rel=1e-3
    )
    assert "new training seed" in text_comparison([near, far])


def test_several_reports_are_compared_by_their_own_noise():
    """Welch's t-test: scipy gives p on the other side of 0.05."""
    from scipy import stats

    a, b = [2.0, 2.1, 2.3], [2.35, 2.6, 2.5]
    (found,) = compare([report_of(x, 9.0) for x in a], [report_of(x, 9.0) for x in b])
    expected = stats.ttest_ind(b, a, equal_var=False)
    assert found.noise == "seeds" and found.is_larger_than_noise == (expected.pvalue < 0.05)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert "between the reports" in text_comparison([found])


def test_reports_of_other_protocols_are_not_compared():
    compare([report_of(2.0, step=1, seed=2)], [report_of(2.0, step=5, seed=3)])
    with pytest.raises(ValueError, match="num_samples: 50000 and 10000"):
        compare([report_of(2.0)], [report_of(2.0, num_samples=10_000)])
