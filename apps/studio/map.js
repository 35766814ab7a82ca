// Body of the function that gradio calls with (element, trigger, props, server, upload, watch) for the map.
// Places on the map go from -1 to 1; on the screen they are CSS pixels.

const PALETTE = ['#4269d0', '#e3a008', '#e5484d', '#3ca951', '#a463f2', '#17a2b8', '#ff8ab7', '#9c6b4e', '#7aa2f7', '#9498a0'];
const PLAIN = '#4269d0';
const REACH = 14; // pixels from which a dot can be hit
const PICTURES = 80; // so many rows in view are shown as pictures
const MOST_ZOOM = 600;
const FILES = `${window.gradio_config?.root ?? ''}${window.gradio_config?.api_prefix ?? ''}/file=`;

const find = (selector) => element.querySelector(selector);
const [stage, canvas, here, tip, tools, legend] =
  ['.stage', 'canvas', '.here', '.tip', '.tools', '.legend'].map(find);
const pen = canvas.getContext('2d');

let map = null; // {key, count, x, y, fields}
let field = null; // the one that colours it
let hiddenValues = new Set();
let view = { zoom: 1, x: 0, y: 0 }; // the place in the middle
let hovered = -1;
let waiting = false;
const rows = new Map(); // number -> {text, path, image}
const asked = new Set();

const unpack = (text, Kind) => new Kind(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
const width = () => canvas.clientWidth;
const height = () => canvas.clientHeight;
const scale = () => (Math.min(width(), height()) / 2) * 0.92 * view.zoom;
const toX = (x) => width() / 2 + (x - view.x) * scale();
const toY = (y) => height() / 2 - (y - view.y) * scale();
const color = (number) => (field ? PALETTE[field.codes[number] % PALETTE.length] : PLAIN);
const shown = (number) => !field || !hiddenValues.has(field.codes[number]);
const inView = (number) => {
  const x = toX(map.x[number]), y = toY(map.y[number]);
  return x > 0 && y > 0 && x < width() && y < height();
};

// What the server knows of rows, asked for once, many at a time.
async function learn(numbers) {
  const news = numbers.filter((number) => !asked.has(number)).slice(0, PICTURES);
  if (!news.length) return;
  news.forEach((number) => asked.add(number));
  const key = map.key;
  try {
    const told = await server.rows([key, news]);
    if (map?.key !== key) return;
    for (const [number, row] of Object.entries(told)) {
      const image = new Image();
      image.onload = later;
      image.src = `${FILES}${row.path.split('/').map(encodeURIComponent).join('/')}`;
      rows.set(Number(number), { ...row, image });
    }
    showTip();
    later();
  } catch {
    news.forEach((number) => asked.delete(number)); // the server is away: asked again when it is needed again
  }
}

function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

const rgb = (hex) => {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return (blue << 16) | (green << 8) | red;
};

// The pixels of a dot around its middle, each with how opaque it is.
function dot(radius) {
  const pixels = [], reach = Math.ceil(radius);
  for (let dy = -reach; dy <= reach; dy++) {
    for (let dx = -reach; dx <= reach; dx++) {
      const alpha = Math.round(220 * Math.min(1, Math.max(0, radius + 0.5 - Math.hypot(dx, dy))));
      if (alpha) pixels.push([dx, dy, alpha]);
    }
  }
  return pixels;
}

// Pixel by pixel: a canvas takes a second to draw 100,000 circles, and this a few milliseconds. Gives the first rows in
// view, up to one more than are shown as pictures.
function drawDots(radius, ratio) {
  const { width: wide, height: high } = canvas;
  const frame = new ImageData(wide, high), pixels = new Uint32Array(frame.data.buffer);
  const shape = dot(radius * ratio), reach = Math.ceil(radius * ratio);
  const colors = (field ? PALETTE : [PLAIN]).map(rgb);
  const [left, top, size] = [toX(0) * ratio, toY(0) * ratio, scale() * ratio];
  const visible = [];
  for (let number = 0; number < map.count; number++) {
    const x = Math.round(left + map.x[number] * size), y = Math.round(top - map.y[number] * size);
    if (x < -reach || y < -reach || x >= wide + reach || y >= high + reach || !shown(number)) continue;
    if (visible.length <= PICTURES) visible.push(number);
    const color = colors[field ? field.codes[number] : 0];
    for (const [dx, dy, alpha] of shape) {
      const px = x + dx, py = y + dy;
      if (px < 0 || py < 0 || px >= wide || py >= high) continue;
      const at = py * wide + px;
      if (alpha >= pixels[at] >>> 24) pixels[at] = (alpha << 24) | color;
    }
  }
  pen.putImageData(frame, 0, 0);
  return visible;
}

let settled = 0;
function draw() {
  const ratio = window.devicePixelRatio || 1;
  const w = width(), h = height();
  if (!w || !h) return;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, w, h);
  if (!map) return;
  const style = getComputedStyle(stage);
  const ground = style.backgroundColor;
  const accent = style.getPropertyValue('--primary-500');

  const crowd = Math.min(5, Math.max(1.2, 90 / Math.sqrt(map.count)));
  const radius = Math.min(7, crowd * view.zoom ** 0.35);
  const visible = drawDots(radius, ratio);
  drawNear(accent);
  if (visible.length <= PICTURES && view.zoom > 1) drawPictures(visible, ground);
  for (const [number, line] of [[hovered, 2], [props.picked, 3]]) {
    if (number < 0 || number >= map.count) continue;
    pen.beginPath();
    pen.arc(toX(map.x[number]), toY(map.y[number]), Math.max(radius + 4, rows.get(number)?.side ?? 0), 0, 7);
    pen.strokeStyle = style.color;
    pen.lineWidth = line;
    pen.stroke();
  }
  drawHere();
}

function drawNear(accent) {
  const near = props.near;
  if (near.key !== map.key) return;
  pen.strokeStyle = accent;
  pen.lineWidth = 1.5;
  pen.globalAlpha = 0.7;
  pen.globalCompositeOperation = 'destination-over';
  pen.beginPath();
  for (const number of near.rows) {
    pen.moveTo(toX(near.at[0]), toY(near.at[1]));
    pen.lineTo(toX(map.x[number]), toY(map.y[number]));
  }
  pen.stroke();
  pen.globalCompositeOperation = 'source-over';
  pen.globalAlpha = 1;
}

// Where few dots are in view there is room for what they stand for.
function drawPictures(visible, ground) {
  clearTimeout(settled);
  settled = setTimeout(() => learn(visible), 120);
  const side = Math.min(52, Math.max(22, Math.sqrt((width() * height()) / (visible.length + 1)) / 4));
  for (const number of visible) {
    const row = rows.get(number);
    if (!row?.image.naturalWidth) continue;
    row.side = side / 2 + 4;
    const x = toX(map.x[number]) - side / 2, y = toY(map.y[number]) - side / 2;
    pen.beginPath();
    pen.roundRect(x - 1.5, y - 1.5, side + 3, side + 3, 7);
    pen.fillStyle = ground;
    pen.fill();
    pen.save();
    pen.clip();
    pen.drawImage(row.image, x, y, side, side);
    pen.restore();
    pen.strokeStyle = color(number);
    pen.lineWidth = 2;
    pen.stroke();
  }
}

function drawHere() {
  const at = props.prompt;
  here.hidden = find('[data-do=prompt]').hidden = at.key === undefined || at.key !== map?.key;
  if (here.hidden) return;
  const x = toX(at.at[0]), y = toY(at.at[1]);
  here.hidden = x < 0 || y < 0 || x > width() || y > height();
  here.style.transform = `translate(${x}px, ${y}px)`;
}

function nearest(x, y, reach) {
  let best = -1, least = reach * reach;
  for (let number = 0; number < map.count; number++) {
    const dx = toX(map.x[number]) - x, dy = toY(map.y[number]) - y;
    const squared = dx * dx + dy * dy;
    if (squared < least && shown(number)) { best = number; least = squared; }
  }
  return best;
}

function hover(number) {
  if (number === hovered) return;
  hovered = number;
  canvas.classList.toggle('over', number >= 0);
  if (number >= 0) learn([number]);
  showTip();
  later();
}

function showTip() {
  const row = rows.get(hovered);
  tip.hidden = hovered < 0 || !row || !map;
  if (tip.hidden) return;
  const [image, text, value] = ['img', 'p', 'small'].map((name) => tip.querySelector(name));
  if (image.src !== row.image.src) image.src = row.image.src;
  text.textContent = row.text;
  value.textContent = field ? `${field.name}: ${field.values[field.codes[hovered]]}` : '';
  const x = toX(map.x[hovered]), y = toY(map.y[hovered]);
  const left = x + 16 + tip.offsetWidth > width() ? x - 16 - tip.offsetWidth : x + 16;
  const top = Math.min(height() - tip.offsetHeight - 6, Math.max(6, y - tip.offsetHeight / 2));
  tip.style.transform = `translate(${Math.max(6, left)}px, ${top}px)`;
}

function pick(number) {
  if (number >= 0) trigger('select', { index: number, value: map.key });
}

function zoom(factor, x = width() / 2, y = height() / 2) {
  const before = scale();
  view.zoom = Math.min(MOST_ZOOM, Math.max(0.8, view.zoom * factor));
  const gain = 1 / before - 1 / scale();
  view.x += (x - width() / 2) * gain;
  view.y -= (y - height() / 2) * gain;
  moved();
}

function move(dx, dy) {
  view.x -= dx / scale();
  view.y += dy / scale();
  moved();
}

function moved() {
  view.x = Math.min(1.2, Math.max(-1.2, view.x));
  view.y = Math.min(1.2, Math.max(-1.2, view.y));
  showTip();
  later();
}

// To a place, in a few frames, unless the person wants things to keep still.
let flight = 0;
function fly(x, y, zoomTo) {
  cancelAnimationFrame(flight);
  const from = { ...view }, began = performance.now();
  const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  const frame = (now) => {
    const share = still ? 1 : Math.min(1, Math.max(0, now - began) / 350), eased = share * (2 - share);
    view = {
      zoom: from.zoom * (zoomTo / from.zoom) ** eased,
      x: from.x + (x - from.x) * eased,
      y: from.y + (y - from.y) * eased,
    };
    moved();
    if (share < 1) flight = requestAnimationFrame(frame);
  };
  flight = requestAnimationFrame(frame);
}

const actions = {
  in: () => zoom(1.6),
  out: () => zoom(1 / 1.6),
  all: () => fly(0, 0, 1),
  prompt: () => props.prompt.at && fly(...props.prompt.at, Math.max(view.zoom, 6)),
};
tools.addEventListener('click', (event) => actions[event.target.closest('button')?.dataset.do]?.());

// One finger or the mouse moves, two fingers zoom.
const held = new Map();
let start = null;
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
canvas.addEventListener('pointerdown', (event) => {
  if (event.button > 0) return;
  cancelAnimationFrame(flight);
  canvas.setPointerCapture(event.pointerId);
  held.set(event.pointerId, place(event));
  start = held.size === 1 ? place(event) : null;
  canvas.classList.add('held');
});
canvas.addEventListener('pointermove', (event) => {
  if (!map) return;
  const now = place(event), before = held.get(event.pointerId);
  if (!before) return hover(nearest(...now, REACH));
  const others = [...held].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
  if (others.length === 1) {
    const apart = (at) => Math.hypot(at[0] - others[0][0], at[1] - others[0][1]) || 1;
    zoom(apart(now) / apart(before), ...others[0]);
  } else if (!start || Math.hypot(now[0] - start[0], now[1] - start[1]) > 5) {
    start = null;
    move(now[0] - before[0], now[1] - before[1]);
  } else return;
  held.set(event.pointerId, now);
});
const release = (event) => {
  held.delete(event.pointerId);
  if (!held.size) canvas.classList.remove('held');
};
canvas.addEventListener('pointerup', (event) => {
  if (start && held.size === 1 && map) {
    const number = nearest(...place(event), REACH);
    hover(number);
    pick(number);
  }
  start = null;
  release(event);
});
canvas.addEventListener('pointercancel', release);
canvas.addEventListener('pointerleave', () => hover(-1));
canvas.addEventListener('dblclick', (event) => map && zoom(2, ...place(event)));
canvas.addEventListener('wheel', (event) => {
  if (!map) return;
  event.preventDefault();
  const lines = event.deltaMode === 1 ? 20 : 1;
  zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0018)), ...place(event));
}, { passive: false });

const keys = {
  ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60), ArrowDown: () => move(0, -60),
  '+': actions.in, '=': actions.in, '-': actions.out, 0: actions.all,
  Enter: () => pick(hovered),
};
canvas.addEventListener('keydown', (event) => {
  if (!map || !keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (event.key === 'Enter') hover(nearest(width() / 2, height() / 2, Infinity));
  keys[event.key]();
  if (event.key !== 'Enter') hover(nearest(width() / 2, height() / 2, REACH * 3));
});

function button(parent, pressed, onClick, ...content) {
  const made = document.createElement('button');
  made.type = 'button';
  made.ariaPressed = pressed;
  made.append(...content);
  made.addEventListener('click', onClick);
  parent.append(made);
}

function showLegend() {
  const [by, values] = ['.by', '.values'].map(find);
  by.replaceChildren();
  values.replaceChildren();
  legend.hidden = !map?.fields.length;
  if (legend.hidden) return;
  by.append('Colour');
  for (const one of [...map.fields, null]) {
    button(by, one === field, () => colourBy(one), one ? one.name : 'none');
  }
  field?.values.forEach((value, code) => {
    const mark = document.createElement('i'), count = document.createElement('small');
    mark.style.background = PALETTE[code % PALETTE.length];
    count.textContent = field.counts[code].toLocaleString('en');
    button(values, !hiddenValues.has(code), () => {
      if (!hiddenValues.delete(code)) hiddenValues.add(code);
      showLegend();
      values.children[code].focus();
      later();
    }, mark, value, count);
  });
}

function colourBy(one) {
  field = one;
  hiddenValues.clear();
  showLegend();
  find('.by [aria-pressed=true]')?.focus({ preventScroll: true });
  showTip();
  later();
}

async function load() {
  const key = props.value;
  if (!key || map?.key === key) return;
  try {
    const told = await server.points(key);
    if (props.value !== key || !told) return;
    const points = unpack(told.points, Int16Array);
    const count = points.length / 2;
    const one = (offset) => Float32Array.from({ length: count }, (_, number) => points[2 * number + offset] / 32767);
    const fields = told.fields.map((each) => ({ ...each, codes: unpack(each.codes, Uint8Array) }));
    const was = field?.name;
    map = { key, count, x: one(0), y: one(1), fields };
    rows.clear();
    asked.clear();
    hovered = -1;
    hiddenValues.clear();
    field = fields.find((each) => each.name === was) ?? fields[0] ?? null;
    tools.hidden = false;
    canvas.dataset.count = count;
    showLegend();
    later();
  } catch {
    map = null; // the next time that the tab is opened
    later();
  }
}

watch('value', load);
watch(['prompt', 'near'], later);
watch('picked', () => {
  const number = props.picked;
  if (map && number >= 0 && number < map.count && !inView(number)) fly(map.x[number], map.y[number], view.zoom);
  later();
});
new ResizeObserver(later).observe(stage);
new MutationObserver(later).observe(document.body, { attributeFilter: ['class'] });
load();
