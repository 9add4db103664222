"""The trace file: `TraceWriter` records one, `TraceReader` reads one, here or somebody else's.

`writer.py` and `reader.py` hold them; `database.py` the SQLite file, `record.py`, `chunk.py` and
`columns.py` the bytes in it, `checks.py` what is asked of a stranger's.
"""

from moescope.trace.reader import TraceReader
from moescope.trace.writer import TraceWriter

__all__ = ["TraceReader", "TraceWriter"]
