"""Probes on features of known content."""

import numpy as np
import pytest
import torch

from evaluation.causal.probes import answer_probe, causal_transfer, cluster_agreement, logit_lens, pair_consistency

RNG = np.random.default_rng(0)


def test_an_answer_that_is_in_the_features_is_read_and_one_that_is_not_is_not() -> None:
    labels = [str(number % 4) for number in range(200)]
    there = np.eye(4)[[int(label) for label in labels]] @ RNG.normal(size=(4, 30)) + 0.1 * RNG.normal(size=(200, 30))
    found = answer_probe(there, labels)
    assert found["accuracy"] == 1 and found["majority"] == 0.25
    assert found["mi_nats"] == pytest.approx(np.log(4), abs=0.25) and found["cross_entropy"] < 0.25
    assert found["shuffled"] < 0.4
    absent = answer_probe(RNG.normal(size=(200, 300)), labels)
    assert absent["accuracy"] < 0.4 and absent["mi_nats"] < 0.1
    assert answer_probe(there, labels) == found  # seeded


def test_probes_refuse_what_they_cannot_split() -> None:
    with pytest.raises(ValueError, match="a probe needs a label a row, two labels, each in 5 rows or more"):
        answer_probe(np.zeros((9, 2)), ["a"] * 5 + ["b"] * 4)
    with pytest.raises(ValueError, match="a probe needs"):
        answer_probe(np.zeros((9, 2)), ["a"] * 8)


def test_clusters_that_are_the_labels() -> None:
    labels = ["a"] * 20 + ["b"] * 20
    rows = np.r_[RNG.normal(size=(20, 5)), RNG.normal(size=(20, 5)) + 20]
    assert cluster_agreement(rows, labels) == 1
    assert abs(cluster_agreement(RNG.normal(size=(40, 5)), labels)) < 0.3


def test_logit_lens_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    found = logit_lens(logits, gold=1, end=0, top=2)
    assert found["ids"][0] == [2, 1] and found["gold_rank"] == [2, 1]
    probs = logits[0].softmax(0)
    assert found["probs"][0] == pytest.approx(probs[[2, 1]].tolist()) and found["end_mass"][0] == pytest.approx(
        float(probs[0])
    )
    assert found["entropy"][1] == pytest.approx(np.log(3))
    guarded = logit_lens(logits, prior=torch.tensor([0.0, 0.0, 5.0]), top=1)
    assert guarded["ids"][0] == [1]  # the constant direction is taken off


def test_transfer_and_pairs_by_hand() -> None:
    donors, clean, edited = ["B", "B", "C", "C"], ["A", "B", "A", "A"], ["B", "B", "C", None]
    assert causal_transfer(donors, clean, edited) == {"donor_answer_lift": 50.0, "donor_answer_rate": 75.0}
    assert causal_transfer(donors, clean, edited, sham=["B", "B", "A", "A"])["donor_answer_lift"] == 25.0
    found = pair_consistency(["A", "A", "B", "B"], ["B", "A", "B", "C"], ["A", "A", "B", "B"], ["B", "B", "B", "B"])
    assert found == {"both_right": 50.0, "change_rate": 50.0, "strict_flips": 50.0, "false_flips": 50.0}
