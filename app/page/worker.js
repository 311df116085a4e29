// Runs the model file as it is: pixels in, probabilities and heat out. All preprocessing is in the file.

const version = new URL(import.meta.url).searchParams.get("runtime");
const at = (name) => new URL(`ort/${name}?${version}`, import.meta.url).href;
const MOST = 2 ** 24; // pixels of a canvas on the phones that allow the least (iOS)

const runtime = import(at("ort.wasm.bundle.min.mjs"));
let session;

self.onmessage = async ({ data }) => {
  try {
    self.postMessage({ number: data.number, result: data.file ? await load(data.file) : await classify(data.blob) });
  } catch (error) {
    self.postMessage({ number: data.number, error: error.message });
  }
};

async function load(file) {
  const ort = await runtime;
  ort.env.wasm.wasmPaths = { wasm: at("ort-wasm-simd-threaded.wasm") };
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  session = await ort.InferenceSession.create(new Uint8Array(file));
}

async function classify(blob) {
  const ort = await runtime;
  const { width, height, pixels } = await decode(blob);
  const { probabilities, heat } = await session.run({ images: new ort.Tensor("uint8", pixels, [1, height, width, 3]) });
  return { probabilities: probabilities.data, heat: heat ? rows(heat) : null };
}

/** Decode a picture to upright RGB, with white under what is transparent, as the model was trained. */
async function decode(blob) {
  let picture;
  try {
    picture = await createImageBitmap(blob, {
      imageOrientation: "from-image",
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw new Error("This browser finds no picture in it: expected JPEG, PNG, WebP, GIF or another kind that it knows.");
  }
  const scale = Math.min(1, Math.sqrt(MOST / (picture.width * picture.height)));
  const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.floor(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, width, height);
  picture.close();
  const shades = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < shades.length; from += 4) {
    pixels[to++] = shades[from];
    pixels[to++] = shades[from + 1];
    pixels[to++] = shades[from + 2];
  }
  return { width, height, pixels };
}

function rows({ data, dims: [, high, wide] }) {
  return Array.from({ length: high }, (_, row) => Array.from(data.subarray(row * wide, (row + 1) * wide)));
}
