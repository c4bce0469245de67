"""A graph as a web service, without sformer and torch: post an image, get its top classes.

    sformer export out/ model.onnx --uint8-input
    pip install fastapi uvicorn onnxruntime pillow
    MODEL=model.onnx uvicorn --app-dir scripts serve:app
    curl --data-binary @image.jpg localhost:8000
"""
import io
import json
import os

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Request
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(os.environ['MODEL'])
about = json.loads(session.get_modelmeta().custom_metadata_map['sformer'])
channels, height, width = about['input_size']
crop = about['pretrained_cfg'].get('crop_pct') or 1
names = about['pretrained_cfg'].get('label_names') or range(about['num_classes'])
app = FastAPI()


@app.post('/')
async def classify(request: Request, top: int = 5) -> dict[str, float]:
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(await request.body())))
    except OSError:
        raise HTTPException(415, 'this is no image') from None
    image = image.convert('RGB' if channels == 3 else 'L')
    scale = max(int(height / crop) / image.height, int(width / crop) / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, upper = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.array(image.crop((left, upper, left + width, upper + height))).reshape(1, height, width, channels)
    logits = session.run(None, {'images': pixels})[0][0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return {str(names[i]): float(shares[i]) for i in shares.argsort()[::-1][:top]}
