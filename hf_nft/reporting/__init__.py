"""Reporting: the record of a run, and the card, tables and figures that are views of it."""
