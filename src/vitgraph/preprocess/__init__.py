"""From files, arrays and clips to patch rows: decode, resize, normalise, patchify."""

from vitgraph.preprocess.inputs import Patches, Video

__all__ = ["Patches", "Video"]
