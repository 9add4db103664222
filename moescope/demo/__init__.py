"""The embedded demo: a small OLMoE checkpoint of our own, its trace, and how both were made.

Only paths live here, so that finding the demo costs no import of torch. `corpus.py` and
`stories.py` write the text, `train.py` trains and exports, `measure.py` states what the result
does under a right and a wrong router.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
TRACE: Path = Path(__file__).parent / "demo.moetrace"
