"""Measurements, run by hand. Nothing imports them but the bench command."""
