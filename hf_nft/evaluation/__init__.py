"""Evaluation: metrics, their intervals, and the doubts that go with them."""
