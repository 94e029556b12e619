"""Where captioners and judges of your own import their base classes from; they live in `pipeline.caption`."""

from pipeline.caption.captioner import Captioner
from pipeline.caption.judge import Judge, Judged

__all__ = ["Captioner", "Judge", "Judged"]
