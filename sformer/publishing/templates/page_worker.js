// Runs the network beside the page, which so stays responsive.
import * as ort from './ort.wasm.bundle.min.mjs';
import {fromCanvas, preprocess} from './preprocess.js';

ort.env.wasm.wasmPaths = {wasm: new URL('./ort-wasm-simd-threaded.wasm', import.meta.url).href};
// more than one only where the server isolates the page, as browsers ask for
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 4) : 1;
ort.env.logLevel = 'error';

const sessions = new Map();
let queue = Promise.resolve(); // one image after the other

async function sessionOf(file) {
  if (!sessions.has(file)) {
    const url = new URL(file, import.meta.url).href;
    sessions.set(file, ort.InferenceSession.create(url, {executionProviders: ['wasm']}));
  }
  return sessions.get(file);
}

function pixelsOf(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

async function run({model, bitmap}) {
  const session = await sessionOf(model.file);
  const begin = performance.now();
  const {values, cropped} = preprocess(fromCanvas(pixelsOf(bitmap), model.input_size[0]), model);
  bitmap.close();
  const prepared = performance.now();
  const out = await session.run({images: new ort.Tensor('float32', values, [1, ...model.input_size])});
  const end = performance.now();
  return {
    logits: out.logits.data, spikes: out.spikes?.data, activity: out.activity?.data, tokens: out.spikes?.dims[2],
    cropped, seconds: {preprocessing: (prepared - begin) / 1000, network: (end - prepared) / 1000},
    threads: ort.env.wasm.numThreads,
  };
}

self.onmessage = ({data}) => {
  queue = queue.then(async () => {
    try {
      if (data.bitmap) self.postMessage({id: data.id, ...await run(data)});
      else self.postMessage({id: data.id, opened: Boolean(await sessionOf(data.model.file))});
    } catch (error) {
      self.postMessage({id: data.id, error: error.message || String(error)});
    }
  });
};
