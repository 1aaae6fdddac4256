"""Predicts the speed of training in several processes."""
