"""Exports of rules to the forms that other libraries take, and to Python."""
