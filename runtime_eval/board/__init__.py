"""Measuring on another machine."""
