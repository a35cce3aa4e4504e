"""An HTTP server that classifies pictures with a net from a file that `flaxnets export` wrote.

    flaxnets export weights/flowers --out flowers.stablehlo
    python examples/serve.py flowers.stablehlo
    curl --data-binary @photo.jpg http://127.0.0.1:8000

It needs jax, numpy and Pillow, but not flaxnets. It is an example to read and change: it takes one picture at
a time, from this machine only, and has no accounts and no encryption.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from PIL import Image

MAX_UPLOAD = 20_000_000  # bytes
MAX_PIXELS = 50_000_000


class Net:
    """An exported net, which gives the probabilities of its classes for pictures."""

    def __init__(self, path: Path) -> None:
        try:
            header, _, program = path.read_bytes().partition(b'\n\n')
            self.says: dict[str, Any] = json.loads(header)
        except (OSError, ValueError) as error:
            raise SystemExit(
                f'{path} is no net that `flaxnets export` wrote as .stablehlo: {error}'
            ) from error
        self.images: dict[str, Any] = self.says['preprocess']
        self._run = jax.jit(export.deserialize(bytearray(program)).call)
        self._check()
        self.classify(Image.new('RGB', (64, 64)))  # compiles, so that the first visitor does not wait

    def _check(self) -> None:
        """Refuses nets whose images this example cannot prepare, or that have no classifier."""
        p = self.images
        known = p['crop_mode'] in ('center', 'squash') and p['crop_pct'] <= 1 and len(set(p['size'])) == 1
        channels = self.says['input']['shape'][-1]
        if channels not in (1, 3):
            raise SystemExit(
                f'this example prepares colours or grey, and the net expects {channels} channels'
            )
        if not known or p['channel_order'] != 'rgb' or p['unsupported']:
            raise SystemExit(f'this example prepares other images than the net expects: {p["in_words"]}')
        if self.says['output']['name'] != 'logits':
            raise SystemExit('the net has no classifier, so there are no classes to answer with')

    def classify(self, picture: Image.Image) -> list[dict[str, Any]]:
        """The five likeliest classes of a picture, the likeliest first."""
        logits = np.asarray(self._run(self._prepared(picture)[None]))[0].astype(np.float64)
        odds = np.exp(logits - logits.max())
        shares, names = odds / odds.sum(), self.says['classes']
        best = np.argsort(-shares, kind='stable')[:5]
        return [{'class': names[i], 'probability': round(float(shares[i]), 6)} for i in best]

    def _prepared(self, picture: Image.Image) -> np.ndarray:
        """The net's input [height, width, channels]: resized, cropped and normalised as the file says."""
        p = self.images
        if len(p['mean']) == 1:
            picture = picture.convert('L')
        side = p['size'][0]
        goal = math.floor(side / p['crop_pct'])
        if p['crop_mode'] == 'squash':
            resized = [goal, goal]
        else:
            resized = [goal * length // min(picture.size) for length in picture.size]
        picture = picture.resize(resized, Image.Resampling[p['interpolation'].upper()])
        left, top = (round((have - side) / 2) for have in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
        values = np.asarray(picture, np.float32).reshape(side, side, -1) / 255
        return (values - np.array(p['mean'], np.float32)) / np.array(p['std'], np.float32)


class Handler(BaseHTTPRequestHandler):
    """Answers GET with a description of the net, and POST of a picture with its likeliest classes."""

    server: Server

    def do_GET(self) -> None:
        says = self.server.net.says
        self._answer(200, {key: says[key] for key in ('architecture', 'weights', 'preprocess', 'classes')})

    def do_POST(self) -> None:
        length = self.headers.get('Content-Length', '')
        if not length.isdecimal() or not 0 < int(length) <= MAX_UPLOAD:
            return self._answer(413, {'error': f'send a picture of at most {MAX_UPLOAD:,} bytes'})
        try:
            opened = Image.open(io.BytesIO(self.rfile.read(int(length))))
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f'{opened.width} x {opened.height} pixels are too many')
            picture = opened.convert('RGB')
        except Exception as error:  # Pillow raises many kinds of errors for files that are not pictures
            return self._answer(400, {'error': f'not a picture: {type(error).__name__}: {error}'})
        self._answer(200, {'top': self.server.net.classify(picture)})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value, indent=1, ensure_ascii=False).encode() + b'\n'
        self.send_response(status)
        self.send_header('Content-Type', 'application/json; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    def __init__(self, net: Net, port: int) -> None:
        super().__init__(('127.0.0.1', port), Handler)
        self.net = net


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument('file', type=Path, help='that flaxnets export wrote, ending in .stablehlo')
    parser.add_argument('--port', type=int, default=8000, help='0 takes any that is free (8000)')
    options = parser.parse_args()
    server = Server(Net(options.file), options.port)
    print(f'http://127.0.0.1:{server.server_port} answers; ctrl-C ends it', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == '__main__':
    main()
