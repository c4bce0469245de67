// From an image to what the network reads, as Pillow, torchvision and timm do it elsewhere, with the same bits.
// Resampling is Pillow's: antialiased filters with weights of 22 bits, along rows first, rounded to bytes after each
// pass. (Pillow 13 begins with the columns of some tall images, which differ from these by a level here and there.)

const PRECISION_BITS = 32 - 8 - 2;

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

const FILTERS = {
  box: {support: 0.5, at: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)},
  bilinear: {support: 1, at: (x) => Math.max(1 - Math.abs(x), 0)},
  hamming: {
    support: 1,
    at: (x) => {
      x = Math.abs(x);
      if (x === 0) return 1;
      return x >= 1 ? 0 : Math.sin(x * Math.PI) / (x * Math.PI) * (0.54 + 0.46 * Math.cos(x * Math.PI));
    },
  },
  bicubic: {support: 2, at: bicubic},
  lanczos: {support: 3, at: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)},
};

// Where the pixels that make one of the output begin, and their weights as integers.
function weightsOf(size, wanted, filter) {
  const scale = size / wanted;
  const filterScale = Math.max(scale, 1);
  const support = filter.support * filterScale;
  const out = [];
  for (let i = 0; i < wanted; i++) {
    const center = (i + 0.5) * scale;
    const start = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), size);
    const weights = [];
    let total = 0;
    for (let x = start; x < end; x++) {
      const weight = filter.at((x - center + 0.5) * (1 / filterScale));
      weights.push(weight);
      total += weight;
    }
    out.push({
      start,
      weights: Int32Array.from(weights, (weight) => {
        const share = (total === 0 ? weight : weight / total) * (1 << PRECISION_BITS);
        return Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
      }),
    });
  }
  return out;
}

function byte(sum) {
  return Math.min(Math.max(sum >> PRECISION_BITS, 0), 255);
}

function nearest(image, width, height) {
  const {data, channels} = image;
  const places = (size, wanted) => {
    const found = [];
    let at = size / wanted * 0.5;
    for (let i = 0; i < wanted; i++, at += size / wanted) found.push(Math.min(Math.floor(at), size - 1));
    return found;
  };
  const columns = places(image.width, width);
  const out = new Uint8ClampedArray(width * height * channels);
  let i = 0;
  for (const row of places(image.height, height)) {
    for (const column of columns) {
      for (let c = 0; c < channels; c++) out[i++] = data[(row * image.width + column) * channels + c];
    }
  }
  return {data: out, width, height, channels};
}

// An image {data, width, height, channels}, channels interleaved, in another size.
export function resize(image, width, height, interpolation) {
  if (image.width === width && image.height === height) return image;
  if (interpolation === 'nearest') return nearest(image, width, height);
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`there is no resize method ${interpolation}`);
  const {channels} = image;
  let current = image;
  if (image.width !== width) {
    const out = new Uint8ClampedArray(width * image.height * channels);
    const all = weightsOf(image.width, width, filter);
    for (let y = 0; y < image.height; y++) {
      for (let x = 0; x < width; x++) {
        const {start, weights} = all[x];
        for (let c = 0; c < channels; c++) {
          let sum = 1 << (PRECISION_BITS - 1);
          let at = (y * image.width + start) * channels + c;
          for (let k = 0; k < weights.length; k++, at += channels) sum += image.data[at] * weights[k];
          out[(y * width + x) * channels + c] = byte(sum);
        }
      }
    }
    current = {data: out, width, height: image.height, channels};
  }
  if (current.height !== height) {
    const {data} = current;
    const out = new Uint8ClampedArray(width * height * channels);
    const all = weightsOf(current.height, height, filter);
    const stride = width * channels;
    for (let y = 0; y < height; y++) {
      const {start, weights} = all[y];
      for (let x = 0; x < stride; x++) {
        let sum = 1 << (PRECISION_BITS - 1);
        let at = start * stride + x;
        for (let k = 0; k < weights.length; k++, at += stride) sum += data[at] * weights[k];
        out[y * stride + x] = byte(sum);
      }
    }
    current = {data: out, width, height, channels};
  }
  return current;
}

// As Python rounds: halves to the even number.
function rounded(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

// Width and height that an image is resized to, before it is cropped.
export function sizeBeforeCrop(width, height, how) {
  const [scaleHeight, scaleWidth] = how.scale_size;
  if (how.crop_mode === 'squash') return [scaleWidth, scaleHeight];
  if (how.crop_mode !== 'border' && scaleHeight === scaleWidth) {
    const short = Math.min(width, height);
    const long = Math.trunc(scaleHeight * Math.max(width, height) / short);
    return width <= height ? [scaleHeight, long] : [long, scaleHeight];
  }
  const ratios = [height / scaleHeight, width / scaleWidth];
  const ratio = how.crop_mode === 'border' ? Math.max(...ratios) : Math.min(...ratios);
  return [rounded(width / ratio), rounded(height / ratio)];
}

// The middle of an image; what is beyond its edges is filled.
export function cropMiddle(image, width, height, fill) {
  const {channels} = image;
  // what is missing is added to both sides, and the rest is cropped as if that had always been there
  const left = image.width < width ? -Math.floor((width - image.width) / 2) : rounded((image.width - width) / 2);
  const top = image.height < height ? -Math.floor((height - image.height) / 2) : rounded((image.height - height) / 2);
  const out = new Uint8ClampedArray(width * height * channels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const row = y + top;
      const column = x + left;
      const inside = row >= 0 && row < image.height && column >= 0 && column < image.width;
      for (let c = 0; c < channels; c++) {
        out[(y * width + x) * channels + c] =
          inside ? image.data[(row * image.width + column) * channels + c] : fill[c];
      }
    }
  }
  return {data: out, width, height, channels};
}

// Pixels of a canvas, RGBA, as an image of as many channels as the network reads.
export function fromCanvas(pixels, channels) {
  const {data, width, height} = pixels;
  const out = new Uint8ClampedArray(width * height * channels);
  for (let i = 0, j = 0; i < data.length; i += 4) {
    if (channels === 1) {
      out[j++] = (data[i] * 19595 + data[i + 1] * 38470 + data[i + 2] * 7471 + 0x8000) >> 16;
    } else {
      out[j++] = data[i];
      out[j++] = data[i + 1];
      out[j++] = data[i + 2];
    }
  }
  return {data: out, width, height, channels};
}

// An image as the network reads it: its pixels, cropped, and these normalised, channel after channel.
export function preprocess(image, how) {
  const [channels, height, width] = how.input_size;
  const sized = resize(image, ...sizeBeforeCrop(image.width, image.height, how), how.interpolation);
  const fill = how.crop_mode === 'border' ? how.mean.map((value) => rounded(255 * value)) : Array(channels).fill(0);
  const cropped = cropMiddle(sized, width, height, fill);
  const plane = width * height;
  const values = new Float32Array(channels * plane);
  for (let c = 0; c < channels; c++) {
    const mean = Math.fround(how.mean[c]);
    const std = Math.fround(how.std[c]);
    const table = Float32Array.from({length: 256}, (_, v) => Math.fround(Math.fround(v / 255) - mean) / std);
    for (let i = 0; i < plane; i++) values[c * plane + i] = table[cropped.data[i * channels + c]];
  }
  return {values, cropped};
}
