"""Classify one image file with a shipped model, with numpy, Pillow and onnxruntime alone.

python docs/classify_jpeg.py runs/NAME/export/onnxruntime.onnx photo.jpg
"""

import json
import sys
from pathlib import Path

import onnxruntime

from crqat.core.errors import CrqatError
from crqat.core.image_file import load_image
from crqat.core.preprocessing import Preprocessing

model, photo = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
preprocessing = Preprocessing.from_json(json.loads(metadata["crqat.preprocessing"]))
side = session.get_inputs()[0].shape[2]  # networks whose images were no files do not say how to resize one
size, crop = preprocessing.size or side, preprocessing.crop or side
try:
    pixels = load_image(
        Path(photo), size, crop, True, channels=preprocessing.channels, interpolation=preprocessing.interpolation
    )
except CrqatError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
(logits,) = session.run(["logits"], {"input": preprocessing(pixels[None])})
for index in logits[0].argsort()[::-1][:5]:
    print(f"{json.loads(metadata['crqat.class_names'])[index]}: {logits[0, index]:.3f}")
