"""From files, arrays and clips to patch rows: decode, resize, normalise, patchify."""

from vitgraph.preprocess.inputs import ImageInput, Patches, Video
from vitgraph.preprocess.load import load_image
from vitgraph.preprocess.processor import NavitProcessor, Processor, SmartResizeProcessor
from vitgraph.preprocess.resize import navit_resize, smart_resize, smart_resize_clip
from vitgraph.preprocess.sampling import Sampling
from vitgraph.preprocess.video import Clip, load_frames

__all__ = [
    "Clip",
    "ImageInput",
    "NavitProcessor",
    "Patches",
    "Processor",
    "Sampling",
    "SmartResizeProcessor",
    "Video",
    "load_frames",
    "load_image",
    "navit_resize",
    "smart_resize",
    "smart_resize_clip",
]
