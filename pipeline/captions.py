"""The name under which captioners of your own import their base class; it lives in `pipeline.caption.captioner`."""

from pipeline.caption.captioner import Captioner

__all__ = ["Captioner"]
