// The page: an image or the camera in, classes and spikes out. All that it asks for lies beside it.
const TOP = 5;
const LEAST_SPAN = 0.25; // of the largest value: what differs by a few per cent is drawn as such
// inferno, at equal distances
const COLOURS = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39],
  [252, 255, 164]];

const by = (id) => document.getElementById(id);
const worker = new Worker(new URL('./worker.js', import.meta.url), {type: 'module'});
const waiting = new Map();
let models = [];
let current = 0;
let last = null; // the image that is shown, as a blob
let stream = null;
let asked = 0;

worker.onmessage = ({data}) => {
  const {resolve, reject} = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error) reject(new Error(data.error));
  else resolve(data);
};
worker.onerror = (event) => say(event.message || 'the network cannot be started');

function ask(message, transfer = []) {
  const id = ++asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, {resolve, reject});
    worker.postMessage({id, ...message}, transfer);
  });
}

function say(text) {
  by('status').textContent = text;
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / total);
}

function colourOf(share) {
  const place = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[low].map((value, c) => value + (COLOURS[low + 1][c] - value) * (place - low));
}

function rangeOf(values) {
  let low = Infinity;
  let high = 0;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const missing = Math.max(LEAST_SPAN * high - (high - low), 0);
  low = Math.max(low - missing / 2, 0);
  return [low, Math.max(high, low + LEAST_SPAN * high) || 1];
}

function drawImage(canvas, cropped) {
  canvas.width = cropped.width;
  canvas.height = cropped.height;
  const out = new ImageData(cropped.width, cropped.height);
  for (let i = 0; i < cropped.width * cropped.height; i++) {
    for (let c = 0; c < 3; c++) {
      out.data[4 * i + c] = cropped.data[i * cropped.channels + (cropped.channels === 1 ? 0 : c)];
    }
    out.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(out, 0, 0);
}

// The image in pale grey, and each patch in the colour of its value.
function drawSpikes(canvas, cropped, values, [rows, columns], [low, high]) {
  const {width, height, channels, data} = cropped;
  canvas.width = width;
  canvas.height = height;
  const out = new ImageData(width, height);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(y * rows / height);
    for (let x = 0; x < width; x++) {
      const at = y * width + x;
      let grey = 0;
      for (let c = 0; c < channels; c++) grey += data[at * channels + c] / channels;
      const value = values[row * columns + Math.floor(x * columns / width)];
      const colour = colourOf((value - low) / (high - low));
      for (let c = 0; c < 3; c++) out.data[4 * at + c] = 0.7 * colour[c] + 0.3 * grey;
      out.data[4 * at + 3] = 255;
    }
  }
  canvas.getContext('2d').putImageData(out, 0, 0);
}

function showClasses(model, logits) {
  const shares = softmax(logits);
  const best = shares.map((share, index) => ({share, index})).sort((a, b) => b.share - a.share).slice(0, TOP);
  by('classes').replaceChildren(...best.map(({share, index}) => {
    const row = document.createElement('li');
    const bar = document.createElement('span');
    const name = document.createElement('b');
    bar.className = 'bar';
    bar.style.width = `${100 * share}%`;
    name.textContent = model.names[index] ?? String(index);
    row.append(bar, name, ` ${(100 * share).toFixed(1)} %`);
    return row;
  }));
}

function showFigure(id, caption, draw) {
  let figure = by(id);
  if (!figure) {
    figure = document.createElement('figure');
    figure.id = id;
    figure.append(document.createElement('canvas'), document.createElement('figcaption'));
    by('blocks').append(figure);
  }
  draw(figure.firstChild);
  figure.lastChild.textContent = caption;
}

function showSpikes(model, found) {
  by('spiking').hidden = !found.spikes;
  if (!found.spikes) return;
  const {tokens, spikes, activity, cropped} = found;
  const [rows, columns] = model.grid_size;
  const patches = rows * columns;
  let fired = 0;
  let active = 0;
  let neurons = 0;
  const sum = new Float32Array(patches);
  const maps = model.blocks.map((_, block) => {
    const map = spikes.subarray(block * tokens + tokens - patches, (block + 1) * tokens);
    for (let token = 0; token < tokens; token++) {
      fired += spikes[block * tokens + token] * model.neurons_per_token[block];
      active += activity[block * tokens + token] * model.neurons_per_token[block];
    }
    neurons += tokens * model.neurons_per_token[block];
    map.forEach((value, patch) => { sum[patch] += value; });
    return map;
  });
  const range = rangeOf(sum);
  drawSpikes(by('all'), cropped, sum, model.grid_size, range);
  by('low').textContent = range[0].toFixed(1);
  by('high').textContent = range[1].toFixed(1);
  maps.forEach((map, block) => showFigure(
    `block${block}`, `${block}: ${Math.min(...map).toFixed(1)} to ${Math.max(...map).toFixed(1)}`,
    (canvas) => drawSpikes(canvas, cropped, map, model.grid_size, rangeOf(map))));
  by('blocks').querySelectorAll('figure').forEach((figure, i) => { figure.hidden = i >= maps.length; });
  by('counts').textContent = `${(active / 1e6).toFixed(2)} of ${(neurons / 1e6).toFixed(2)} million neurons fire ` +
    `(activity ${(100 * active / neurons).toFixed(1)} %), ${(fired / 1e6).toFixed(1)} million spikes if levels are ` +
    'counted one by one (unary). Counted are the linear layers of the blocks.';
}

async function classify(bitmap) {
  const model = models[current];
  const found = await ask({model, bitmap}, [bitmap]);
  drawImage(by('seen'), found.cropped);
  by('results').hidden = false;
  showClasses(model, found.logits);
  showSpikes(model, found);
  const {network, preprocessing} = found.seconds;
  say(`${(1000 * network).toFixed(0)} ms for the network (${(1 / network).toFixed(1)} images per second) on ` +
    `${found.threads === 1 ? 'one thread' : `${found.threads} threads`}, ${(1000 * preprocessing).toFixed(0)} ms for ` +
    'the pixels');
  return found;
}

async function show(blob) {
  last = blob;
  say('computing …');
  try {
    return await classify(await createImageBitmap(
      blob, {imageOrientation: 'from-image', premultiplyAlpha: 'none', colorSpaceConversion: 'none'}));
  } catch (error) {
    say(error.name === 'InvalidStateError' ? 'this file is no image that the browser can read' : error.message);
    return null;
  }
}

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  by('camera').textContent = 'Camera';
}

async function startCamera() {
  if (stream) {
    stopCamera();
    return;
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment', width: 640, height: 480}});
  } catch (error) {
    say(`the camera cannot be used: ${error.message}`);
    return;
  }
  by('camera').textContent = 'Stop';
  const video = document.createElement('video');
  video.srcObject = stream;
  video.muted = true;
  video.playsInline = true;
  await video.play();
  last = null;
  while (stream && video.srcObject === stream) {
    try {
      await classify(await createImageBitmap(video));
    } catch (error) {
      say(error.message);
      stopCamera();
    }
    await new Promise(requestAnimationFrame);
  }
}

async function choose(index) {
  current = index;
  const model = models[index];
  by('label').textContent = model.title;
  by('which').textContent = `${model.title}: ${model.description}`;
  if (!stream) say('loading …');
  try {
    await ask({model});
  } catch (error) {
    say(error.message);
    return;
  }
  if (current !== index || stream) return;
  if (last) await show(last);
  else say('Drop an image, choose one, or use the camera.');
}

function listen() {
  by('file').addEventListener('change', ({target}) => {
    stopCamera();
    if (target.files[0]) show(target.files[0]);
  });
  by('camera').addEventListener('click', startCamera);
  by('model').addEventListener('input', ({target}) => choose(Number(target.value)));
  document.addEventListener('dragover', (event) => event.preventDefault());
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    stopCamera();
    const [file] = event.dataTransfer.files;
    if (file) show(file);
  });
  document.addEventListener('paste', ({clipboardData}) => {
    if (clipboardData.files[0]) show(clipboardData.files[0]);
  });
}

async function start() {
  const page = await (await fetch(new URL('./models.json', import.meta.url))).json();
  models = page.models;
  document.title = page.title;
  by('title').textContent = page.title;
  by('runtime').textContent = page.runtime;
  by('choice').hidden = models.length < 2;
  by('model').max = models.length - 1;
  listen();
  await choose(0);
}

window.sformer = {models: () => models, choose, show, ready: start()}; // for whoever scripts the page
