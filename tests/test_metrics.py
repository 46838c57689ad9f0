"""Scores against numbers worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch

from deeplab_fast.errors import UserError
from deeplab_fast.metrics import SegmentationMetrics, format_table, scores

# Four classes; class 2 is predicted but never true, class 3 is in neither.
COUNTS = torch.tensor([[4, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_scores_by_hand():
    result = scores(COUNTS)
    assert result["pixel_accuracy"] == pytest.approx(6 / 10)
    assert result["class_accuracy"] == [pytest.approx(4 / 6), pytest.approx(2 / 4), None, None]
    assert result["mean_accuracy"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert result["class_iou"] == [pytest.approx(4 / 8), pytest.approx(2 / 5), 0.0, None]
    assert result["miou"] == pytest.approx((4 / 8 + 2 / 5 + 0) / 3)
    assert result["fw_iou"] == pytest.approx((6 * 4 / 8 + 4 * 2 / 5) / 10)
    assert result["confusion"] == COUNTS.tolist()
    json.dumps(result, allow_nan=False)


def test_perfect_prediction_scores_one():
    result = scores(torch.diag(torch.tensor([5, 0, 7])))
    assert result["class_iou"] == [1.0, None, 1.0]
    assert [result[k] for k in ("pixel_accuracy", "mean_accuracy", "miou", "fw_iou")] == [1.0] * 4


def test_counts_beyond_float_precision_stay_exact():
    n = 2**53 + 1
    assert scores(torch.tensor([[n, 0], [0, 1]]))["confusion"] == [[n, 0], [0, 1]]


def test_update_adds_up_and_leaves_ignored_pixels_out():
    metrics = SegmentationMetrics(3)
    metrics.update(
        torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8), torch.tensor([[0, 1], [255, 1]], dtype=torch.uint8)
    )
    metrics.update(torch.tensor([[2, 2]], dtype=torch.uint8), torch.tensor([[2, 0]], dtype=torch.uint8))
    assert metrics.counts.dtype == torch.int64
    assert metrics.compute()["confusion"] == [[1, 0, 1], [1, 1, 0], [0, 0, 1]]


def test_update_takes_predictions_made_in_inference_mode():
    metrics = SegmentationMetrics(2)
    with torch.inference_mode():
        prediction = torch.tensor([0, 1, 1], dtype=torch.uint8)
    metrics.update(prediction, torch.tensor([0, 1, 0], dtype=torch.uint8))
    assert metrics.compute()["confusion"] == [[1, 1], [0, 1]]


def test_label_out_of_range_is_an_error_at_compute():
    metrics = SegmentationMetrics(3)
    metrics.update(torch.zeros(4, dtype=torch.uint8), torch.tensor([0, 200, 3, 255], dtype=torch.uint8))
    with pytest.raises(UserError, match=r"2 pixels have a value that is neither a class \(0 to 2\) nor 255"):
        metrics.compute()


def test_nothing_to_score_is_an_error():
    metrics = SegmentationMetrics(3)
    metrics.update(torch.zeros(4, dtype=torch.uint8), torch.full((4,), 255, dtype=torch.uint8))
    with pytest.raises(UserError, match="every pixel of the truth is 255"):
        metrics.compute()


def test_table_names_every_class_and_says_absent():
    lines = format_table(scores(COUNTS), ["road", "sky", "traffic light", "train"]).splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines}
    assert rows["mean IoU"] == ["0.3000"]
    assert rows["road"] == ["0.5000", "0.6667", "6"]
    assert rows["traffic light"] == ["0.0000", "absent", "0"]
    assert rows["train"] == ["absent", "absent", "0"]


def test_counts_of_another_number_of_classes_are_refused():
    metrics = SegmentationMetrics(3)
    with pytest.raises(ValueError, match=r"counts are \(1, 1\); expected \(3, 3\)"):
        metrics.update_from_logits(torch.zeros(1, 1, 4, 4), torch.zeros(1, 8, 8, dtype=torch.uint8))


def test_logits_count_as_their_label_map():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.randint(0, 3, (2, 16, 20), generator=torch.Generator().manual_seed(1)).byte()
    ours, plain = SegmentationMetrics(3), SegmentationMetrics(3)
    ours.update_from_logits(logits, mask)
    full = torch.nn.functional.interpolate(logits, size=(16, 20), mode="bilinear")
    plain.update(full.argmax(1), mask)
    assert torch.equal(ours.counts, plain.counts)
