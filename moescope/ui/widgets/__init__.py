"""One widget a file: each takes one dataclass of `panels.py` with `.show(data)` and draws it.

Widgets know no engine, no trace, no clock. They compare what they are given with what is on the
screen and refresh only the rows that differ.
"""
